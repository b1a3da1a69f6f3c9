"""DPO as TRL trains it: settings that make it another loss, and each pair's loss and margin from passes that it makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from influence_fast.errors import InputError

# Settings that leave DPO's own loss as it is.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "label_smoothing": (0, 0.0),
    "label_smoothing_factor": (0, 0.0),
    "ld_alpha": (None,),
    "use_weighting": (False,),
    "f_divergence_type": ("reverse_kl",),
}


def is_a(value: Any, name: str) -> bool:
    """Whether a class of this name is among a value's; TRL need not be there to ask."""
    return any(base.__name__ == name for base in type(value).__mro__)


def check_settings(argument: str, args: Any) -> None:
    """Raise InputError where a DPOConfig has another loss than DPO's own (Rafailov et al. 2023, eq. 7)."""
    kinds = getattr(args, "loss_type", ["sigmoid"])
    if (kinds if isinstance(kinds, list) else [kinds]) != ["sigmoid"]:
        raise InputError(f"{argument}: expected DPO's loss_type 'sigmoid', got {kinds!r}")
    for name, usual in _PLAIN.items():
        given = getattr(args, name, usual[0])
        if getattr(given, "value", given) not in usual:
            raise InputError(
                f"{argument}: DPO with {name}={given!r} has another loss than DPO's own; expected {usual[0]!r}"
            )


def of_pairs(policy: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """DPO's loss and margin of each pair ``(N,)``, which is ``-log sigmoid`` of the margin.

    Args:
        policy, reference: log-probabilities of the completions, ``(2 N,)``: the chosen ones, then the rejected ones.
        beta: the loss's strength. The margin is the difference of both completions' rewards, ``beta`` times how much more
            probable the policy makes each than the reference does.
    """
    chosen, rejected = (policy.float() - reference.to(policy.device).float()).chunk(2)
    margins = beta * (chosen - rejected)
    return -logsigmoid(margins), margins
