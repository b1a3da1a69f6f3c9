"""captum's TracInCP and TracInCPFast on our capture: the same arguments and scores, no gradient formed that need not be."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from influence_fast.compat._parameter_gradients import (
    ParameterGradients,
    Part,
    for_queries,
    inner_products,
    squared_norms,
    summed,
)

DISTRIBUTION, VERSIONS = "captum", ("0.7.0", "0.8.0", "0.9.0")
HOLDERS = ("captum",)
MODULES = ("captum.influence", "captum.influence._core.tracincp", "captum.influence._core.tracincp_fast_rand_proj")
REPLACED = ((MODULES[1], "TracInCP"), (MODULES[2], "TracInCPFast"))
# Bytes of training batches that wait while all checkpoints pass over them, so that each is loaded once for all of these.
_GROUP_BYTES = 1 << 26

LossFunction = Callable[..., Tensor] | None


class KMostInfluentialResults(NamedTuple):
    """Row numbers ``(queries, k)`` int64 of training samples, the most influential first, and their scores."""

    indices: Tensor
    influence_scores: Tensor


def load_state(model: nn.Module, path: str) -> float:
    """Load a state dict that ``torch.save`` wrote, of a model or its ``DataParallel``; gives its ``learning_rate``, or 1."""
    state = dict(torch.load(path, map_location=next(model.parameters()).device, weights_only=True))
    rate = float(state.pop("learning_rate", 1.0))
    own = model.module if isinstance(model, nn.DataParallel) else model
    own.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return rate


class _TracIn:
    """Sums over checkpoints of learning rate times inner product; what a sample's gradient is, is the subclass's."""

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any] | DataLoader[Any],
        checkpoints: str | Sequence[str] | Iterable[str],
        checkpoints_load_func: Callable[..., float],
        loss_fn: LossFunction,
        batch_size: int | None,
        test_loss_fn: LossFunction,
        by_batch: bool,
    ) -> None:
        self.model, self.loss_fn, self.batch_size = model, loss_fn, batch_size
        self.checkpoints = checkpoints
        self.checkpoints_load_func = checkpoints_load_func
        self.test_loss_fn = loss_fn if test_loss_fn is None else test_loss_fn
        if isinstance(train_dataset, DataLoader):
            self.train_dataloader = train_dataset
        else:
            if not isinstance(batch_size, int):
                raise AssertionError("batch_size: expected an int with a `train_dataset` that is a Dataset")
            self.train_dataloader = DataLoader(train_dataset, batch_size, shuffle=False)
        self.train_dataloader_len = _length(self.train_dataloader, "train_dataset")
        self.reduction_type = _reduction(loss_fn, "loss_fn", by_batch)
        self.test_reduction_type = (
            self.reduction_type if test_loss_fn is None else _reduction(test_loss_fn, "test_loss_fn", by_batch)
        )

    @property
    def checkpoints(self) -> list[str]:
        """Paths, or whatever ``checkpoints_load_func`` takes; files of a folder are in the order of their numbers."""
        return self._checkpoints

    @checkpoints.setter
    def checkpoints(self, checkpoints: str | Iterable[str]) -> None:
        if isinstance(checkpoints, str):
            found = sorted(map(str, Path(checkpoints).glob("*")), key=_by_numbers)
        else:
            found = list(checkpoints)
            if isinstance(checkpoints, list) and found and isinstance(found[0], str):
                found.sort(key=_by_numbers)
        if not found:
            raise ValueError(f"Invalid checkpoints provided for TracIn class: {checkpoints}!")
        self._checkpoints = found

    @classmethod
    def get_name(cls) -> str:
        """The class's name, as progress bars show it."""
        return cls.__name__

    def _parts(self, batch: Sequence[Any], of_queries: bool = False) -> list[Part]:
        raise NotImplementedError

    def _queries(self, inputs: Any, aggregate: bool) -> list[list[list[Part]]]:
        """What each checkpoint gives of each batch of queries; of their sum, one batch of one."""
        found = []
        for checkpoint in self.checkpoints:
            self._load(checkpoint)
            batches = []
            total: list[Tensor] = []
            for batch in _loader(inputs):
                parts = self._parts(batch, of_queries=True)
                if aggregate:
                    sums = [summed(part) for part in parts]
                    total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
                else:
                    batches.append([for_queries(part) for part in parts])
            found.append([list(total)] if aggregate else batches)
        return found  # type: ignore[return-value]

    def _load(self, checkpoint: Any) -> float:
        if checkpoint is None:
            raise AssertionError("None returned from `checkpoints`, cannot load.")
        return self.checkpoints_load_func(self.model, checkpoint)

    def _scores(self, inputs: Any, aggregate: bool, show: bool, what: str) -> Iterator[Tensor]:
        """``(queries, samples)`` of each training batch."""
        queries = self._queries(inputs, aggregate)
        loader: Iterable[Any] = self.train_dataloader
        if show:
            loader = tqdm(loader, desc=f"Using {self.get_name()} to {what}", total=self.train_dataloader_len)
        for group in _groups(loader):
            found: list[Tensor | None] = [None] * len(group)
            for checkpoint, batches in zip(self.checkpoints, queries, strict=True):
                rate = self._load(checkpoint)
                for place, batch in enumerate(group):
                    own = self._parts(batch)
                    scores = rate * torch.cat(
                        [
                            torch.stack([inner_products(a, b) for a, b in zip(parts, own, strict=True)]).sum(0)
                            for parts in batches
                        ]
                    )
                    earlier = found[place]
                    found[place] = scores if earlier is None else earlier + scores
            yield from cast(list[Tensor], found)

    def _influence(
        self, inputs: Any, k: int | None, proponents: bool, show: bool, aggregate: bool = False
    ) -> Tensor | KMostInfluentialResults:
        if inputs is None:
            raise AssertionError(
                "`inputs` argument is required. If you wish to calculate self influence scores, please use the "
                "`self_influence` method instead."
            )
        if k is None:
            what = "compute influence for training batches"
            return torch.cat(list(self._scores(inputs, aggregate, show, what)), 1)
        kind = "proponents" if proponents else "opponents"
        what = f"perform computation for getting {kind}. Processing training batches"
        best, numbers, begin = torch.empty(0), torch.empty(0, dtype=torch.int64), 0
        for scores in self._scores(inputs, aggregate, show, what):
            own = torch.arange(begin, begin + scores.shape[1], device=scores.device).expand_as(scores)
            begin += scores.shape[1]
            if best.numel():
                scores, own = torch.cat([best, scores], 1), torch.cat([numbers, own], 1)
            best, order = scores.topk(min(k, scores.shape[1]), dim=1, largest=proponents)
            numbers = own.gather(1, order)
        return KMostInfluentialResults(numbers, best)

    def self_influence(
        self, inputs: Any = None, show_progress: bool = False, outer_loop_by_checkpoints: bool = False
    ) -> Tensor:
        """Each sample's score with itself, ``(samples,)``.

        Args:
            inputs: a batch (a tuple, its labels last) or a ``DataLoader``; the training data where there is none.
            show_progress: show progress bars.
            outer_loop_by_checkpoints: read ``inputs`` once for each checkpoint, not all checkpoints for each few batches.
        """
        loader = self.train_dataloader if inputs is None else _loader(inputs)
        total = _length(loader, "inputs") if show_progress else None
        desc = f"Using {self.get_name()} to compute self influence. Processing "

        def batches() -> Iterable[Any]:
            return tqdm(loader, desc=desc + "batch", total=total) if show_progress else loader

        def of(checkpoint: Any, chosen: Iterable[Any]) -> list[Tensor]:
            rate = self._load(checkpoint)
            return [rate * torch.stack([squared_norms(p) for p in self._parts(batch)]).sum(0) for batch in chosen]

        if outer_loop_by_checkpoints:
            several = tqdm(self.checkpoints, desc=desc + "checkpoint", disable=not show_progress)
            return torch.stack([torch.cat(of(checkpoint, batches())) for checkpoint in several]).sum(0)
        found = []
        for group in _groups(batches()):
            found.append(torch.stack([torch.cat(of(checkpoint, group)) for checkpoint in self.checkpoints]).sum(0))
        return torch.cat(found)


class TracInCP(_TracIn):
    """Influence as the sum over checkpoints of learning rate times inner product of gradients (Pruthi et al. 2020, eq. 1).

    Args:
        model: its gradients are taken in the mode that it is in; weights need no ``requires_grad`` and are left as found,
            but for what the last checkpoint put there.
        train_dataset: a ``Dataset``, or a ``DataLoader`` whose batches are tuples, labels last.
        checkpoints: a folder, or paths; ``checkpoints_load_func(model, path)`` loads one and gives its learning rate.
        layers: names of modules whose parameters count; all parameters where there are none.
        loss_fn: ``loss_fn(model(*inputs), labels)``; losses of each sample, or with ``sample_wise_grads_per_batch`` their
            sum or mean, as its attribute ``reduction`` says. Without one the sum of a sample's outputs is its loss.
        batch_size: of a ``Dataset``.
        test_loss_fn: the loss of queries, where it is another.

    Raises:
        ValueError: no checkpoint. AssertionError: a reduction that does not fit the flag, layers that are no list of names.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any] | DataLoader[Any],
        checkpoints: str | Sequence[str] | Iterable[str],
        checkpoints_load_func: Callable[..., float] = load_state,
        layers: list[str] | None = None,
        loss_fn: LossFunction = None,
        batch_size: int | None = 1,
        test_loss_fn: LossFunction = None,
        sample_wise_grads_per_batch: bool = False,
    ) -> None:
        super().__init__(
            model,
            train_dataset,
            checkpoints,
            checkpoints_load_func,
            loss_fn,
            batch_size,
            test_loss_fn,
            sample_wise_grads_per_batch,
        )
        self.sample_wise_grads_per_batch = sample_wise_grads_per_batch
        self.layer_modules: list[nn.Module] | None = None
        parameters = list(model.parameters())
        if layers is not None:
            if not isinstance(layers, list) or not layers or not isinstance(layers[0], str):
                raise AssertionError(f"layers: expected a list of names, got {layers!r}")
            self.layer_modules = [model.get_submodule(name) for name in layers]
            parameters = [p for module in self.layer_modules for p in module.parameters()]
            if not parameters:
                raise AssertionError(f"layers: expected modules with parameters, got {layers!r}")
        self._gradients = ParameterGradients(model, parameters)
        self._is_packed = False
        self._packed: ParameterGradients | None = None

    def influence(
        self,
        inputs: Any,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
        *,
        unpack_inputs: bool = True,
    ) -> Tensor | KMostInfluentialResults:
        """Scores ``(queries, training samples)``, or the ``k`` highest (lowest without ``proponents``) of each query.

        Args:
            inputs: a batch of queries (a tuple, labels last) or a ``DataLoader``.
            aggregate: score the sum of the queries: one row.
            unpack_inputs: call ``model(*inputs)``; else the model gets a batch's inputs as one tuple.
        """
        self._is_packed = not unpack_inputs
        try:
            return self._influence(inputs, k, proponents, show_progress, aggregate)
        finally:
            self._is_packed = False

    def compute_intermediate_quantities(self, inputs: Any, aggregate: bool = False) -> Tensor:
        """Each sample's gradients times the learning rate, checkpoint after checkpoint, ``(samples, numbers)``.

        Args:
            inputs: a batch (a tuple, labels last) or a ``DataLoader``.
            aggregate: the sum of all samples: one row.
        """
        of_checkpoints = []
        for checkpoint in self.checkpoints:
            rate = self._load(checkpoint)
            rows: list[Tensor] = []
            for batch in _loader(inputs):
                found = [self._gradients.flat(part, i) for i, part in enumerate(self._parts(batch))]
                own = torch.cat([part.sum(0, keepdim=True) if aggregate else part for part in found], 1)
                rows = [rows[0] + own] if aggregate and rows else [*rows, own]
            of_checkpoints.append(rate * torch.cat(rows))
        return torch.cat(of_checkpoints, 1)

    def _parts(self, batch: Sequence[Any], of_queries: bool = False) -> list[Part]:
        loss = self.test_loss_fn if of_queries else self.loss_fn
        reduction = self.test_reduction_type if of_queries else self.reduction_type
        *inputs, labels = batch
        found = self._gradients
        if of_queries and self._is_packed:
            if self._packed is None:
                self._packed = ParameterGradients(_Packed(self.model), found.parameters)
            found = self._packed
        return found.of_batch(inputs, labels, _losses(loss, reduction))


class _Packed(nn.Module):
    """A model whose inputs come as one tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, model.training

    def forward(self, *inputs: Any) -> Any:
        return self.model(inputs)


class TracInCPFast(_TracIn):
    """TracInCP of the last layer's weight alone, by its inputs and the loss's gradient by the model's outputs.

    Args:
        final_fc_layer: the layer, or its name, whose outputs are the model's.
        loss_fn: the sum or mean over a batch, as its attribute ``reduction`` says.
        vectorize: taken and not needed: one backward gives the gradients of all samples.

    Others as of :class:`TracInCP`.

    Raises:
        ValueError: no such layer, or no checkpoint. AssertionError: no loss, one that is not reduced, outputs that are no
            matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        final_fc_layer: nn.Module | str,
        train_dataset: Dataset[Any] | DataLoader[Any],
        checkpoints: str | Sequence[str] | Iterable[str],
        checkpoints_load_func: Callable[..., float] = load_state,
        loss_fn: LossFunction = None,
        batch_size: int | None = 1,
        test_loss_fn: LossFunction = None,
        vectorize: bool = False,
    ) -> None:
        if loss_fn is None:
            raise AssertionError("loss function must not be none")
        super().__init__(
            model, train_dataset, checkpoints, checkpoints_load_func, loss_fn, batch_size, test_loss_fn, True
        )
        self.vectorize = vectorize
        self.final_fc_layer = final_fc_layer

    @property
    def final_fc_layer(self) -> nn.Module:
        """The layer whose inputs are used."""
        return self._final

    @final_fc_layer.setter
    def final_fc_layer(self, layer: nn.Module | str) -> None:
        if isinstance(layer, str):
            try:
                layer = self.model.get_submodule(layer)
            except AttributeError as error:
                raise ValueError(f'Invalid final_fc_layer str: "{layer}" provided!') from error
        self._final = layer

    def influence(
        self, inputs: Any, k: int | None = None, proponents: bool = True, show_progress: bool = False
    ) -> Tensor | KMostInfluentialResults:
        """Scores ``(queries, training samples)``, or the ``k`` highest (lowest without ``proponents``) of each query.

        Args:
            inputs: a batch of queries: a tuple, labels last.
        """
        return self._influence(inputs, k, proponents, show_progress)

    def _parts(self, batch: Sequence[Any], of_queries: bool = False) -> list[Part]:
        loss = self.test_loss_fn if of_queries else self.loss_fn
        reduction = self.test_reduction_type if of_queries else self.reduction_type
        *inputs, labels = batch
        seen: list[Tensor] = []
        handle = self._final.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        try:
            with torch.no_grad():
                out = self.model(*inputs)
        finally:
            handle.remove()
        if out.dim() != 2:
            raise AssertionError(f"model: expected outputs of shape (samples, classes), got {tuple(out.shape)}")
        with torch.enable_grad():
            leaf = out.detach().requires_grad_()
            [grad] = torch.autograd.grad(_losses(loss, reduction)(leaf, labels), leaf)
        return [(seen[-1].flatten(1)[:, None], grad[:, None])]


def _losses(loss: LossFunction, reduction: str) -> Callable[[Any, Any], Tensor]:
    """What turns outputs and labels into losses of which the sum is meant: ``(N,)``, or one number."""

    def losses(out: Tensor, labels: Any) -> Tensor:
        if out.dim() == 0:
            raise AssertionError("Please ensure model output has at least one dimension.")
        if loss is None or labels is None:
            return out if out.dim() == 1 else out.flatten(1).sum(1)
        found = loss(out, labels)
        if reduction != "none":
            if found.dim() > 0 and found.shape == out.shape:
                raise AssertionError("Please ensure custom loss function is applying either a sum or mean reduction.")
            return found.sum() * len(out) if reduction == "mean" else found.sum()
        if found.dim() == 0 or len(found) != len(out):
            raise AssertionError(
                f"Loss function is applying a reduction. Please ensure Output shape: {tuple(out.shape)} and Loss shape: "
                f"{tuple(found.shape)} are matching."
            )
        return found if found.dim() == 1 else found.flatten(1).sum(1)

    return losses


def _reduction(loss: LossFunction, name: str, by_batch: bool) -> str:
    """``none``, ``sum`` or ``mean``: how a loss function joins samples."""
    if loss is None:
        return "sum"
    if not callable(loss):
        raise AssertionError(f"{name}: expected a function, got {loss!r}")
    allowed = ("sum", "mean") if by_batch else ("none",)
    reduction = getattr(loss, "reduction", None)
    if reduction is None:
        meant = "the sum over a batch" if by_batch else "one loss a sample"
        warnings.warn(
            f"`{name}` has no attribute `reduction`: its result is taken for {meant}", UserWarning, stacklevel=4
        )
        return allowed[0]
    if reduction not in allowed:
        raise AssertionError(
            f"reduction for `{name}` must be {' or '.join(allowed)} when `sample_wise_grads_per_batch` is {by_batch}"
        )
    return str(reduction)


def _loader(inputs: Any) -> Iterable[Any]:
    return inputs if isinstance(inputs, DataLoader) else [inputs]


def _length(loader: Any, name: str) -> int | None:
    try:
        return len(loader)
    except TypeError:
        warnings.warn(
            f"Unable to determine the number of batches in `{name}`: progress is shown without a total", stacklevel=3
        )
        return None


def _groups(loader: Iterable[Any]) -> Iterator[list[Any]]:
    """Batches as they come, a few at a time."""
    group: list[Any] = []
    size = 0
    for batch in loader:
        group.append(batch)
        size += sum(x.numel() * x.element_size() if isinstance(x, Tensor) else 1 << 12 for x in batch)
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _by_numbers(path: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", path)]
