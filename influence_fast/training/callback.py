"""A callback of a transformers Trainer that keeps each row's loss and margin as training passes by."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from influence_fast.data.tasks import IGNORED, head_of
from influence_fast.errors import InputError
from influence_fast.gradients.layers import uncompiled
from influence_fast.gradients.losses import logits_of, widened
from influence_fast.gradients.model_state import is_adapted
from influence_fast.training.carried_rows import LABELS, REFERENCE, ROWS, carry_rows
from influence_fast.training.preferences import check_settings, is_a, of_pairs
from influence_fast.training.recorded import (
    Checkpoint,
    Epoch,
    epoch_file,
    read_checkpoints,
    read_epoch,
    recorded_epochs,
    write_checkpoints,
    write_epoch,
)

# Logits that are looked at together: as many as stay in a CPU's cache, or keep a GPU busy.
_CPU_ENTRIES, _GPU_ENTRIES = 1 << 19, 1 << 25
# Batches whose numbers wait on the device: a copy of each at once would have a GPU wait.
_WAITING = 256
_SHIFTED, _IN_PLACE = "causal-lm", ("masked-lm", "token-classification", "seq2seq")


class InfluenceCallback(TrainerCallback):
    """Records each training row's loss and margin in every epoch, from the forward passes that training makes anyway.

    Example::

        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[inf.InfluenceCallback("recorded")])
        trainer.train()
        inf.read_training("recorded").aum()  # (n,), lowest = most harmful

    Row i is ``train_dataset[i]``. Its loss is the cross entropy of its label, or the mean over its target tokens; its margin
    the logit of the label minus the largest other logit (Pleiss et al. 2020, eq. 1), or the mean of that over its target
    tokens. Both are of the weights before the step that the row is part of, in train mode (dropout is on), and without label
    smoothing, whatever loss is trained. A row that an epoch sees several times keeps the last. Evaluation is not recorded.
    TRL's SFTTrainer has no logits, so no margins: they are NaN. Of TRL's DPOTrainer a row is a pair: its loss is DPO's
    (Rafailov et al. 2023, eq. 7), its margin the difference of the rewards of both completions.

    Written are one file for each epoch, at its end and with each checkpoint, and the checkpoints' folders with the mean
    learning rate since the one before. A training that resumes goes on with the epoch that was cut short; rows that it has
    not seen by then are NaN.

    Args:
        folder: where to write; made if missing.
        reference: the ``ref_model`` of a DPOTrainer that has one, so that its passes are seen too; not needed where an
            adapter is switched off, or the reference's log-probabilities were computed beforehand.

    Raises:
        InputError: when training begins, a folder that holds another training; a stream of rows; packed rows; several
            processes or GPUs; a compiled model; preference losses other than DPO's own, or a reference that is not seen; at
            the first batch, a task without one label or target tokens a row, or a loss that does not hand the whole batch to
            the model.
    """

    def __init__(self, folder: str | Path, reference: nn.Module | None = None) -> None:
        self.folder = Path(folder)
        self.reference = reference
        self._handles: list[Any] = []
        self._rates: dict[int, float] = {}
        self._checkpoints: list[Checkpoint] = []
        self._state: Any = None
        self._number = 0
        self._epoch = Epoch.empty(0)
        self._begin_step = 0
        self._waiting: list[tuple[int, Tensor, Tensor, Tensor, Tensor | None]] = []
        self._carried: tuple[Tensor, Tensor] | None = None
        # Of preferences: their strength, the pass over the reference that is under way, and pairs that wait for it.
        self._beta: float | None = None
        self._of_reference = False
        self._precomputed: Tensor | None = None
        self._pairs: tuple[Tensor, Tensor] | None = None
        self._recorded = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Number the rows and watch the model."""
        self._remove_hooks()
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        _check(args)
        self._beta = float(args.beta) if is_a(args, "DPOConfig") else None
        if self._beta is not None:
            self._check_preferences(args, model)
        there = recorded_epochs(self.folder)
        step = self._begin_step = int(state.global_step)
        if there and step == 0:
            raise InputError(
                f"folder: {self.folder} holds a recorded training, and this one begins anew; choose another folder, or "
                "remove it"
            )
        self._count = carry_rows(loader)
        self._kind = head_of(model)
        self._state, self._rates, self._waiting, self._recorded = state, {}, [], False
        self._checkpoints = [one for one in read_checkpoints(self.folder) if one.step <= step] if step else []
        # What was recorded after the step that training goes on from comes again.
        self._earlier = {number: read_epoch(file).before(step) for number, file in there.items()}
        for number, epoch in self._earlier.items():
            if len(epoch.losses) != self._count:
                raise InputError(
                    f"folder: {self.folder} recorded {len(epoch.losses)} rows, and the training set has {self._count}"
                )
            if not bool((epoch.steps >= 0).any()):
                epoch_file(self.folder, number).unlink()
        self._handles = [
            model.register_forward_pre_hook(self._strip, with_kwargs=True),
            model.register_forward_hook(self._see, with_kwargs=True),
        ]
        if self._beta is not None and self.reference is not None:
            self._handles += [
                self.reference.register_forward_pre_hook(self._strip, with_kwargs=True),
                self.reference.register_forward_hook(self._see, with_kwargs=True),
            ]

    def _check_preferences(self, args: Any, model: nn.Module) -> None:
        check_settings("args", args)
        if self.reference is None and not is_adapted(model) and not getattr(args, "precompute_ref_log_probs", False):
            raise InputError(
                "reference: a pair's loss needs the reference's pass, which is not seen; add the callback as "
                "trainer.add_callback(inf.InfluenceCallback(folder, reference=trainer.ref_model)), or train with "
                "precompute_ref_log_probs=True"
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin an epoch, or go on with one that was cut short."""
        self._number = math.floor(state.epoch or 0)
        self._epoch = self._earlier.pop(self._number, Epoch.empty(self._count))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the learning rate of a step."""
        step, rate = int(state.global_step), float(kwargs["optimizer"].param_groups[0]["lr"])
        if self._pairs is not None:
            raise InputError(
                "reference: a batch of pairs was trained on and no pass of the reference was seen; give the callback the "
                "Trainer's (reference=trainer.ref_model)"
            )
        if not self._recorded:
            raise InputError(
                "compute_loss: no training batch came to the model with the numbers of its rows; a loss of one's own has to "
                "call model(**inputs) with the batch that it is given"
            )
        self._rates[step] = rate
        self._epoch.rates = torch.cat([self._epoch.rates, torch.tensor([rate], dtype=torch.float64)])
        self._epoch.rate_steps = torch.cat([self._epoch.rate_steps, torch.tensor([step])])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note a checkpoint, and write what its epoch has so far."""
        self._write()
        step = int(state.global_step)
        path = Path(args.output_dir) / f"checkpoint-{step}"
        if not path.is_dir():
            return
        before = max((one.step for one in self._checkpoints if one.step < step), default=self._begin_step)
        # A checkpoint that training resumed from has no step of this training before it.
        rates = [rate for at, rate in self._rates.items() if before <= at < step]
        if not rates:
            return
        optimizer = path / "optimizer.pt"
        found = Checkpoint(
            path.absolute(),
            step,
            sum(rates) / len(rates),
            optimizer.absolute() if optimizer.exists() else None,
            trained_names(kwargs["model"], kwargs["optimizer"]),
        )
        self._checkpoints = [one for one in self._checkpoints if one.step != step] + [found]
        write_checkpoints(self.folder, self._checkpoints)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the epoch."""
        self._write()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _write(self) -> None:
        self._collect()
        if bool((self._epoch.steps >= 0).any()):
            write_epoch(self.folder, self._number, self._epoch)

    def _strip(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take from a batch what the model does not know."""
        rows, labels, reference = (kwargs.pop(name, None) for name in (ROWS, LABELS, REFERENCE))
        self._carried, self._of_reference = None, False
        if self._beta is not None:
            if rows is not None and torch.is_grad_enabled():
                self._carried, self._precomputed = (rows, rows), reference
            else:
                self._of_reference = rows is not None
        elif rows is not None and model.training and torch.is_grad_enabled():
            if labels is None:
                raise InputError("train_dataset: the batch has no labels, so its rows have no loss to record")
            self._carried = rows, labels
        return args, kwargs

    @torch.no_grad()
    def _see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._beta is not None:
            self._see_pairs(output, self._beta)
            return
        if self._carried is None:
            return
        (rows, labels), self._carried = self._carried, None
        # TRL's losses never have all logits at once.
        fused = getattr(output, "log_probs", None) if getattr(output, "logits", None) is None else None
        if fused is None and getattr(output, "logits", output) is None:
            raise InputError("args: the model returns no logits, as with a fused loss; train without use_liger_kernel")
        logits = logits_of(model, output, "labels" in kwargs) if fused is None else fused
        if len(logits) != len(rows) or len(labels) != len(rows):
            raise InputError(
                f"data_collator: {len(rows)} rows became a batch of {len(logits)}; rows that are packed together cannot be "
                "recorded one by one"
            )
        if fused is None:
            losses, margins, classes = by_row(self._kind, logits, labels.to(logits.device))
        else:
            losses = -fused.float().sum(1) / output.label_mask.sum(1)
            margins, classes = torch.full_like(losses, torch.nan), None
        self._keep(rows, losses, margins, classes)

    def _see_pairs(self, output: Any, beta: float) -> None:
        """Keep what the policy says of a batch of pairs until the reference has said it too."""
        if self._carried is None and not self._of_reference:
            return
        each = getattr(output, "log_probs", None)
        if each is None:
            raise InputError(
                "args: this version of TRL gives no log-probabilities (log_probs) by which pairs are recorded"
            )
        said = each.detach().float().sum(1)
        if self._carried is not None:
            rows, self._carried = self._carried[0], None
            if len(said) != 2 * len(rows):
                raise InputError(
                    f"data_collator: {len(rows)} pairs became a batch of {len(said)} texts; expected two each"
                )
            self._pairs, reference = (rows, said), self._precomputed
        else:
            reference = said
        if self._pairs is not None and reference is not None:
            (rows, policy), self._pairs = self._pairs, None
            self._keep(rows, *of_pairs(policy, reference, beta), None)

    def _keep(self, rows: Tensor, losses: Tensor, margins: Tensor, classes: Tensor | None) -> None:
        self._waiting.append((int(self._state.global_step), rows, losses, margins, classes))
        self._recorded = True
        if len(self._waiting) >= _WAITING:
            self._collect()

    def _collect(self) -> None:
        """Fetch what waits on the device."""
        for step, rows, losses, margins, classes in self._waiting:
            rows = rows.cpu()
            self._epoch.losses[rows] = losses.float().cpu()
            self._epoch.margins[rows] = margins.float().cpu()
            self._epoch.steps[rows] = step
            if classes is not None:
                self._epoch.labels[rows] = classes.long().cpu()
        self._waiting = []


def trained_names(model: nn.Module, optimizer: Any) -> tuple[str, ...] | None:
    """Names of the parameters that an optimizer has, in its order; None where it has one that is not the model's."""
    names = {id(parameter): uncompiled(name) for name, parameter in model.named_parameters()}
    given = [names.get(id(parameter)) for group in optimizer.param_groups for parameter in group["params"]]
    return None if None in given else tuple(map(str, given))


def by_row(kind: str | None, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss and margin of each row ``(N,)``, and its class where it has one label.

    Args:
        kind: the loss that the model's head is for, as of ``data.tasks.head_of``.
        logits: ``(N, classes)``, or ``(N, T, classes)``.
        labels: ``(N,)``, or ``(N, T)`` with -100 where there is no target.

    Raises:
        InputError: another task.
    """
    if logits.dim() == 2 and labels.dim() == 1 and not labels.is_floating_point() and logits.shape[1] > 1:
        losses, margins = _by_target(logits, labels)
        return losses, margins, labels
    if logits.dim() != 3 or labels.dim() != 2 or (kind != _SHIFTED and kind not in _IN_PLACE):
        raise InputError(
            "model: losses and margins are recorded of classifiers with one label a row, and of models with target tokens; "
            f"this one gives logits {tuple(logits.shape)} for labels {tuple(labels.shape)}"
        )
    # Prompts that an adapter puts before a row have no labels.
    logits = logits[:, -labels.shape[1] :]
    if kind == _SHIFTED:
        logits, labels = logits[:, :-1], labels[:, 1:]
    wanted = labels != IGNORED
    row = wanted.nonzero()[:, 0]
    found = _by_target(logits, labels, wanted)
    # A row without a target is NaN, as one that was not seen.
    count = wanted.sum(1)
    losses, margins = (each.new_zeros(len(labels)).index_add_(0, row, each) / count for each in found)
    return losses, margins, None


def _by_target(logits: Tensor, labels: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross entropy and margin of each target, a part of the logits in float32 at a time."""
    labels = labels if wanted is None else labels[wanted]
    places = None if wanted is None else wanted.nonzero().unbind(1)
    step = max(1, (_GPU_ENTRIES if logits.is_cuda else _CPU_ENTRIES) // logits.shape[-1])
    losses, margins = [], []
    # Once even where there is no target, for an empty tensor of the right type.
    for begin in range(0, max(1, len(labels)), step):
        chosen = slice(begin, begin + step)
        part = widened(logits[chosen] if places is None else logits[places[0][chosen], places[1][chosen]])
        own = part.gather(1, labels[chosen, None])[:, 0]
        losses.append(part.logsumexp(1) - own)
        largest, best = part.max(1)
        right = (best == labels[chosen]).nonzero()[:, 0]
        # Only of targets that are the largest themselves another has to be found, in a copy of their logits.
        largest[right] = part[right].scatter(1, best[right, None], -torch.inf).amax(1)
        margins.append(own - largest)
    return torch.cat(losses), torch.cat(margins)


def _check(args: Any) -> None:
    """Raise InputError for what makes rows unknown."""
    if args.world_size > 1 or args.n_gpu > 1:
        raise InputError(
            f"args: training runs in {max(args.world_size, args.n_gpu)} processes or on as many GPUs, and rows are recorded "
            "in one"
        )
    if getattr(args, "packing", False) or getattr(args, "padding_free", False):
        raise InputError("args: packed rows share a forward, so no row has a loss of its own; train without packing")
    if args.torch_compile:
        raise InputError("args: a compiled model does not hand over its outputs; train without torch_compile")
