"""What the forward passes that gradients are taken of show besides: a classifier's predictions and hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from influence_fast.attribution.model_passes import pooled, zeros
from influence_fast.data.batching import Rows, batches, mask_of, token_budget
from influence_fast.data.tasks import config_of, device_of
from influence_fast.gradients import losses
from influence_fast.gradients.model_state import as_evaluated, before_fine_tuning

# Rows that a model is tried on.
_TRIED = 4


class SeenPasses:
    """A pass for gradients of a classifier, watched: called with the rows, the batch and the logits of each step of it.

    Args:
        count: rows in all.
        blocks: of :func:`rerunnable`, for hidden states too.
        folder: where states go that are too many for memory.
    """

    def __init__(self, count: int, blocks: Blocks | None = None, folder: Path | None = None) -> None:
        self._count, self._blocks = count, blocks
        # On the device until they are asked for: a copy of each batch would have the pass wait for it.
        self._logits: list[tuple[list[int], Tensor]] = []
        self._states = None if blocks is None else _States(blocks, count, folder)

    def __call__(self, rows: list[int], batch: dict[str, Tensor], logits: Tensor) -> None:
        self._logits.append((rows, logits.float().log_softmax(1)))
        if self._states is not None:
            self._states.add(rows, batch)

    def watched(self) -> AbstractContextManager[None]:
        """Within, hidden states are seen."""
        return nullcontext() if self._blocks is None else self._blocks.watched()

    def log_probabilities(self) -> Tensor | None:
        """``(n, classes)``; None where a row was not seen, as those are that an earlier build left in the store."""
        if len({row for rows, _ in self._logits for row in rows}) < self._count:
            return None
        out = torch.empty(self._count, self._logits[0][1].shape[1])
        for rows, found in self._logits:
            out[rows] = found.cpu()
        return out

    def base_states(self) -> Tensor | None:
        """Mean hidden states before fine-tuning ``(n, blocks + 1, width)``; None where those of a row were not seen."""
        return None if self._states is None else self._states.all()


class _States:
    """Mean hidden states of all rows."""

    def __init__(self, blocks: Blocks, count: int, folder: Path | None) -> None:
        self._blocks, self._count, self._folder = blocks, count, folder
        self._states = torch.empty(0)
        self._there = torch.zeros(count, dtype=torch.bool)
        self._under_way: tuple[list[int], Tensor] | None = None

    def add(self, rows: list[int], batch: dict[str, Tensor]) -> None:
        """Those of the batch that the model saw last, and that has these rows."""
        found = self._blocks.states(batch)
        self._blocks.forget()
        if found is not None:
            # Copied with the next batch, so that the pass does not wait for it.
            with torch.no_grad():
                mean = torch.stack([pooled(state, mask_of(batch), "mean").float() for state in found], 1)
            self._keep()
            self._under_way = rows, mean

    def all(self) -> Tensor | None:
        self._keep()
        return self._states if self._there.all() else None

    def _keep(self) -> None:
        if self._under_way is None:
            return
        rows, found = self._under_way
        if not len(self._states):
            self._states = zeros((self._count, *found.shape[1:]), self._folder)
        self._states[rows] = found.cpu()
        self._there[rows] = True
        self._under_way = None


@dataclass
class _Call:
    """What a module was given and what it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None

    @property
    def states(self) -> Any:
        return self.args[0] if self.args else self.kwargs.get("hidden_states")

    def again(self, module: nn.Module, states: Tensor) -> Tensor:
        """The module's output for other states, all else as it was."""
        if self.args:
            return _first(module(states, *self.args[1:], **self.kwargs))
        return _first(module(**{**self.kwargs, "hidden_states": states}))


@dataclass
class Blocks:
    """The blocks of a model: what each was given in the last forward pass, and states of the model before fine-tuning.

    Below the first adapted block both have the same ones. From there on the blocks are run once more with the adapter off,
    on what the first of them was given; a model without an adapter is the one before fine-tuning, and nothing is run again.

    Attributes:
        model: the whole model.
        blocks: in the order in which they run, each on the states that the one before gave.
        behind: modules one of which may see the last block's states, such as a last norm.
        adapted: the number of the first block that an adapter is part of; as many as there are blocks where none is.
    """

    model: nn.Module
    blocks: list[nn.Module]
    behind: list[nn.Module]
    adapted: int
    _calls: dict[nn.Module, list[_Call]] = field(default_factory=dict)
    _watching: bool = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within, forward passes are seen."""
        handles = [module.register_forward_hook(self._see, with_kwargs=True) for module in (*self.blocks, *self.behind)]
        self._watching = True
        try:
            yield
        finally:
            self._watching = False
            self.forget()
            for handle in handles:
                handle.remove()

    def forget(self) -> None:
        """What was seen."""
        self._calls.clear()

    def states(self, batch: dict[str, Tensor]) -> list[Tensor] | None:
        """Those behind the embedding and every block, ``(N, T, width)`` each, of the model before fine-tuning.

        None where a block did not run, or more than once, or states have another shape.
        """
        calls = [self._calls.get(block, []) for block in self.blocks]
        if any(len(of_block) != 1 for of_block in calls):
            return None
        each, shape = [call for [call] in calls], tuple(mask_of(batch).shape)
        first = each[0].states
        if not isinstance(first, Tensor) or first.dim() != 3 or first.shape[:2] != shape:
            return None
        with torch.no_grad():
            found = self._run_again(each) if self.adapted < len(self.blocks) else self._as_seen(each)
        return found if all(isinstance(s, Tensor) and s.shape == first.shape for s in found) else None

    def _as_seen(self, calls: list[_Call]) -> list[Any]:
        last = _first(calls[-1].output)
        behind = self._behind(last)
        return [*(call.states for call in calls), last if behind is None else _first(behind[1].output)]

    def _run_again(self, calls: list[_Call]) -> list[Any]:
        """The blocks from the first adapted one on, with the adapter off."""
        found = [call.states for call in calls[: self.adapted + 1]]
        behind = self._behind(_first(calls[-1].output))
        # Adapters that are switched on again ask for gradients of their weights, which nothing here wants.
        asked = [(weight, weight.requires_grad) for weight in self.model.parameters()]
        self._watching = False
        try:
            with before_fine_tuning(self.model):
                for block, call in list(zip(self.blocks, calls, strict=True))[self.adapted :]:
                    found.append(call.again(block, found[-1]))
                if behind is not None:
                    found[-1] = behind[1].again(behind[0], found[-1])
        finally:
            self._watching = True
            for weight, wanted in asked:
                weight.requires_grad_(wanted)
        return found

    def _behind(self, states: Tensor) -> tuple[nn.Module, _Call] | None:
        """The module that saw the last block's states, and its call."""
        for module in self.behind:
            for call in self._calls.get(module, []):
                if call.states is states:
                    return module, call
        return None

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._watching:
            return
        if module is self.blocks[0]:
            # A forward pass begins. Blocks that a backward ran again, as checkpointing does, are of none.
            self.forget()
        self._calls.setdefault(module, []).append(_Call(args, kwargs, output))


def rerunnable(model: nn.Module, rows: Rows, batch_tokens: int | str = "auto") -> Blocks | None:
    """The blocks of a model that gives the states of itself before fine-tuning in this way, else None.

    A few rows tell, as many as a batch takes: their states in this way are those that the model before fine-tuning returns
    itself.
    """
    found = _blocks_of(model)
    if found is None or rows.kind == "custom":
        return None
    chosen = next(iter(batches(rows, range(min(_TRIED, len(rows))), token_budget(batch_tokens, model))))
    batch = {name: tensor.to(device_of(model)) for name, tensor in rows.batch(chosen, model).items()}
    with as_evaluated(model), torch.no_grad():
        with found.watched():
            losses.outputs(model, batch)
            states = found.states(batch)
        with before_fine_tuning(model):
            wanted = getattr(losses.outputs(model, batch, output_hidden_states=True), "hidden_states", None)
    if states is None or wanted is None or len(states) != len(wanted):
        return None
    pairs = list(zip(states, wanted, strict=True))
    same = all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)
    return found if same else None


def _blocks_of(model: nn.Module) -> Blocks | None:
    """None for a model that has not one list of blocks, as encoder and decoder are two."""
    count = getattr(config_of(model), "num_hidden_layers", None)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        return None
    [(name, blocks)] = lists
    behind = [module for module in model.get_submodule(name.rpartition(".")[0]).children() if module is not blocks]
    with_adapter = (number for number, block in enumerate(blocks) if any(map(_is_adapter, block.modules())))
    return Blocks(model, list(blocks), behind, next(with_adapter, len(blocks)))


def _is_adapter(module: nn.Module) -> bool:
    """Whether PEFT can switch a part of this module off."""
    return callable(getattr(module, "enable_adapters", None))


def _first(output: Any) -> Any:
    """A block's states, which may be the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output
