"""What methods need beside gradients: hidden states, predictions, gradients of words, Kronecker factors.

Each is one pass of the model over a set of samples, and :class:`ModelPasses` makes each once however many methods ask.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from influence_fast._memory import GiveBack
from influence_fast.data.batching import Rows as CheckedRows
from influence_fast.data.batching import batches, checked_rows, extent, mask_of, token_budget
from influence_fast.data.tasks import device_of
from influence_fast.errors import InputError
from influence_fast.gradients import losses
from influence_fast.gradients.layers import layer_shape, named_layers, select_layers
from influence_fast.gradients.model_state import as_evaluated, before_fine_tuning, is_adapted, is_trained_inside
from influence_fast.gradients.row_checks import settle_batches

POOLING = ("last", "mean", "first")
_LARGEST_FACTOR = 8192
# Hidden states beyond these are mapped from a file, of which the system keeps in memory what it can.
_IN_MEMORY = 2 << 30
Rows = Sequence[Mapping[str, Any]]


class ModelPasses:
    """Passes of one model over sets of samples, each made once and kept, whichever methods ask for it.

    Args:
        model: the model.
        rows: what turns a set of samples into rows for the model.
        needs: what will be asked for, of ``registry.NEEDS``: hidden states and predictions that are both needed come out of
            one pass.
        batch_tokens, progress: as of :func:`~influence_fast.build_store`.
        folder: where hidden states go that are more than 2 GiB; by default the folder of temporary files.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Callable[[Any], Rows],
        needs: Collection[str] = (),
        batch_tokens: int | str = "auto",
        progress: bool = True,
        folder: Path | None = None,
    ) -> None:
        self._model, self._rows, self._needs = model, rows, frozenset(needs)
        self._settings: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
        self._folder = folder
        # Keyed by the set of samples itself, which is held so that its identity stays its own.
        self._found: dict[tuple[int, str], Any] = {}
        self._held: dict[int, Any] = {}
        self._selections: dict[int, tuple[Any, Tensor]] = {}

    def of_model(self, model: nn.Module) -> ModelPasses:
        """Passes of another model, such as an earlier checkpoint, over the same kind of rows; none is made yet."""
        return ModelPasses(model, self._rows, self._needs, folder=self._folder, **self._settings)

    def share(self, part: Any, whole: Any, rows: Sequence[int]) -> None:
        """``part`` has the inputs of these rows of ``whole``, with other labels: what inputs alone decide is shared."""
        self._held[id(part)] = part
        self._selections[id(part)] = whole, torch.tensor(rows)

    def know_predictions(self, samples: Any, log_probabilities: Tensor) -> None:
        """What :meth:`class_log_probabilities` would find by a pass of its own."""
        self._once(samples, "predictions", lambda: log_probabilities)

    def know_base_states(self, samples: Any, states: Tensor) -> None:
        """What :meth:`all_states` would find by a pass of its own: means, of the model before fine-tuning."""
        self._once(samples, f"{'base ' if is_adapted(self._model) else ''}states mean", lambda: states)

    def hidden_states(self, samples: Any, pooling: str = "mean", base: bool = False) -> dict[str, Tensor]:
        """:func:`~influence_fast.hidden_states`; with ``base`` of the model before fine-tuning. Each call makes a copy."""
        return _by_name(self.all_states(samples, pooling, base))

    def last_states(self, samples: Any, pooling: str = "mean", base: bool = False) -> Tensor:
        """The last block's of :meth:`hidden_states`, ``(n, width)``."""
        return self.all_states(samples, pooling, base)[:, -1].contiguous()

    def all_states(self, samples: Any, pooling: str = "mean", base: bool = False) -> Tensor:
        """Those of all blocks, behind the embedding first: ``(n, blocks + 1, width)``, which is not to be changed.

        Where blocks differ in width the narrower end in zeros.
        """
        if id(samples) in self._selections:
            whole, rows = self._selections[id(samples)]
            return self.all_states(whole, pooling, base)[rows]
        adapted = base and is_adapted(self._model)
        key = f"{'base ' if adapted else ''}states {pooling}"

        def run() -> Tensor:
            if adapted:
                with before_fine_tuning(self._model):
                    return self._pass(samples, pooling, False).states
            both = "predictions" in self._needs and (id(samples), "predictions") not in self._found
            found = self._pass(samples, pooling, both)
            if both:
                self._found[id(samples), "predictions"] = found.log_probabilities
            return found.states

        return self._once(samples, key, run)

    def untouched_states(self, samples: Any) -> Tensor:
        """States that no label was learned from, one vector a sample ``(n, features)``.

        Of an adapter's base, or of a model of which the head alone was trained, behind all blocks; else the first block's
        inputs.
        """
        states = self.all_states(samples, base=True)
        return (states[:, :1] if is_trained_inside(self._model) else states).flatten(1)

    def _pass(self, samples: Any, pooling: str, predictions: bool) -> _Forward:
        return _forward(self._model, self._rows(samples), pooling, predictions, folder=self._folder, **self._settings)

    def class_log_probabilities(self, samples: Any) -> Tensor:
        """Log-probabilities of the classes by a classifier: float32 ``(n, classes)``."""
        if id(samples) in self._selections:
            whole, rows = self._selections[id(samples)]
            return self.class_log_probabilities(whole)[rows]
        states = "hidden states" in self._needs or ("base states" in self._needs and not is_adapted(self._model))
        if states and (id(samples), "predictions") not in self._found:
            self.all_states(samples)
        return self._once(
            samples,
            "predictions",
            lambda: class_log_probabilities(self._model, self._rows(samples), **self._settings),
        )

    def word_gradients(self, samples: Any) -> WordGradients:
        """:func:`~influence_fast.word_gradients`."""
        return self._once(samples, "words", lambda: word_gradients(self._model, self._rows(samples), **self._settings))

    def kronecker_factors(self, samples: Any, layers: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """:func:`~influence_fast.kronecker_factors`."""
        return self._once(
            samples,
            f"factors {' '.join(layers)}",
            lambda: kronecker_factors(self._model, self._rows(samples), layers, **self._settings),
        )

    def _once(self, samples: Any, what: str, run: Callable[[], Any]) -> Any:
        self._held[id(samples)] = samples
        key = id(samples), what
        if key not in self._found:
            self._found[key] = run()
        return self._found[key]


def hidden_states(
    model: nn.Module,
    dataset: Rows,
    pooling: str = "mean",
    *,
    batch_tokens: int | str = "auto",
    progress: bool = True,
) -> dict[str, Tensor]:
    """A vector of each sample behind the embedding and behind every block: float32 ``(n, width)`` by name.

    Names are ``embedding``, ``block 0``, ``block 1``, ...; ``pooling`` takes the last real token, the first, or the mean
    over all. The cosine of two samples' vectors is representation similarity (``repsim``)::

        inf.influence(inf.hidden_states(model, train), inf.hidden_states(model, queries), "cosine")

    Raises:
        InputError: unknown pooling, bad rows, a model that returns no hidden states.
    """
    if pooling not in POOLING:
        raise InputError(f"pooling: expected one of {', '.join(POOLING)}, got {pooling!r}")
    found = _forward(model, dataset, pooling, False, batch_tokens, progress)
    named = _by_name(found.states).items()
    return {name: state[:, :width] for (name, state), width in zip(named, found.widths, strict=True)}


def _by_name(states: Tensor) -> dict[str, Tensor]:
    names = ["embedding", *(f"block {block}" for block in range(states.shape[1] - 1))]
    return {name: states[:, place].contiguous() for place, name in enumerate(names)}


def class_log_probabilities(
    model: nn.Module, dataset: Rows, *, batch_tokens: int | str = "auto", progress: bool = True
) -> Tensor:
    """Log-probabilities of the classes by a classifier: float32 ``(n, classes)``.

    Raises:
        InputError: bad rows.
    """
    return _forward(model, dataset, None, True, batch_tokens, progress).log_probabilities


@dataclass(frozen=True)
class _Forward:
    """What one pass without gradients gave: ``(n, blocks + 1, width)``, of these widths, and ``(n, classes)``."""

    states: Tensor
    widths: list[int]
    log_probabilities: Tensor


def _forward(
    model: nn.Module,
    dataset: Rows,
    pooling: str | None,
    predictions: bool,
    batch_tokens: int | str = "auto",
    progress: bool = True,
    folder: Path | None = None,
) -> _Forward:
    """Pooled hidden states, where ``pooling`` says how, and class log-probabilities, in data-set order."""
    order: list[int] = []
    states, widths = torch.empty(0), list[int]()
    classes: list[Tensor] = []
    what = " and ".join(["hidden states"] * (pooling is not None) + ["predictions"] * predictions)
    rows, kind = checked_rows(model, dataset)
    for chosen, batch in _batches(model, rows, batch_tokens, progress, what):
        order += chosen
        with torch.no_grad():
            options = {"output_hidden_states": True} if pooling else {}
            output = losses.outputs(model, batch, labels=kind == "seq2seq", **options)
        if pooling is not None:
            found = getattr(output, "hidden_states", None)
            if found is None:
                raise InputError(f"model: {type(model).__name__} returns no hidden states")
            if not len(states):
                # Made once: a list of batches put together would be held twice. Narrower states end in zeros.
                widths = [state.shape[-1] for state in found]
                states = zeros((len(rows), len(found), max(widths)), folder)
            for place, (state, width) in enumerate(zip(found, widths, strict=True)):
                states[chosen, place, :width] = pooled(state, mask_of(batch), pooling).float().cpu()
        if predictions:
            logits = losses.logits_of(model, output)
            classes.append(logits.float().log_softmax(1).cpu())
    log_probabilities = torch.cat(classes)[torch.tensor(order).argsort()] if classes else torch.empty(0)
    return _Forward(states, widths, log_probabilities)


def states_on_disk(samples: int, blocks: int, width: int) -> int:
    """Bytes of a file that hidden states behind the embedding and all blocks go to; 0 where they stay in memory."""
    size = 4 * samples * (blocks + 1) * width
    return size if size > _IN_MEMORY else 0


def zeros(shape: tuple[int, int, int], folder: Path | None) -> Tensor:
    """Float32; what is too large for memory in a file without a name, which is gone with the tensor."""
    size = states_on_disk(shape[0], shape[1] - 1, shape[2])
    if not size:
        return torch.zeros(shape)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(size)
        return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))


@dataclass(frozen=True)
class WordGradients:
    """Gradients of the word embedding's rows, kept for the tokens that occur.

    Entry e is the gradient ``values[e] (width,)`` of sample ``rows[e]`` with respect to the embedding of ``tokens[e]``,
    summed over the token's places; every (row, token) occurs once. ``count`` samples in all.
    """

    count: int
    rows: Tensor
    tokens: Tensor
    values: Tensor

    def top(self, k: int) -> WordGradients:
        """Only the ``k`` tokens of each sample whose gradient is longest."""
        order = self.values.double().norm(dim=1).argsort(descending=True, stable=True)
        order = order[self.rows[order].argsort(stable=True)]
        rows = self.rows[order]
        first = torch.searchsorted(rows, rows)
        kept = order[torch.arange(len(rows)) - first < k]
        return WordGradients(self.count, self.rows[kept], self.tokens[kept], self.values[kept])


def word_gradients(
    model: nn.Module, dataset: Rows, *, batch_tokens: int | str = "auto", progress: bool = True
) -> WordGradients:
    """Gradients of the word embedding for :func:`~influence_fast.word_influence`.

    A fine-tuning that left the embedding frozen did not follow these gradients: the scores then reflect shared words only.

    Raises:
        InputError: bad rows; a model without an input embedding.
    """
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if callable(find) else None
    if not isinstance(embedding, nn.Embedding):
        raise InputError(f"model: {type(model).__name__} has no input embedding")
    rows: list[Tensor] = []
    tokens: list[Tensor] = []
    values: list[Tensor] = []
    checked, kind = checked_rows(model, dataset)
    loss = losses.named(kind)
    with _watched({"embedding": embedding}) as seen:
        for chosen, batch in _batches(model, checked, batch_tokens, progress, "word gradients"):
            seen.clear()
            loss(model, batch).sum().backward()
            (_, dy), ids = seen.pop("embedding"), batch["input_ids"]
            real = extent(mask_of(batch))
            if embedding.padding_idx is not None:
                real &= ids != embedding.padding_idx
            sample = torch.tensor(chosen, device=ids.device)[:, None].expand_as(ids)[real]
            pairs, place = torch.stack([sample, ids[real]]).unique(dim=1, return_inverse=True)
            summed = dy.new_zeros(pairs.shape[1], dy.shape[-1]).index_add_(0, place, dy[real])
            rows.append(pairs[0].cpu())
            tokens.append(pairs[1].cpu())
            values.append(summed.cpu())
    return WordGradients(len(dataset), torch.cat(rows), torch.cat(tokens), torch.cat(values))


def kronecker_factors(
    model: nn.Module,
    dataset: Rows,
    layers: str | Iterable[str] = "all",
    *,
    batch_tokens: int | str = "auto",
    progress: bool = True,
) -> dict[str, tuple[Tensor, Tensor]]:
    """``{layer: (A, S)}``: ``A = E[x x^T] (in, in)`` and ``S = E[dy dy^T] (out, out)`` over all real tokens, float64.

    ``x`` are a layer's inputs and ``dy`` the gradients of each sample's loss with the given label (the empirical Fisher)
    with respect to its outputs (Martens & Grosse 2015). For ``influence(..., method="ekfac", factors=...)``.

    Raises:
        InputError: unknown layers, embeddings, layers wider than 8192, bad rows.
    """
    found = kronecker_sums(model, dataset, layers, batch_tokens=batch_tokens, progress=progress)
    return {name: sums.without(None) for name, sums in found.items()}


@dataclass(frozen=True)
class KroneckerSums:
    """Sums over the tokens of one layer, by parts of the rows: float64.

    Attributes:
        inputs: ``sum x x^T``, ``(parts, in, in)``.
        outputs: ``sum dy dy^T``, ``(parts, out, out)``.
        counts: tokens, ``(parts,)``.
    """

    inputs: Tensor
    outputs: Tensor
    counts: Tensor

    def without(self, part: int | None) -> tuple[Tensor, Tensor]:
        """``(A, S)`` of all rows but those of a part."""
        kept = [number for number in range(len(self.counts)) if number != part]
        count = max(int(self.counts[kept].sum()), 1)
        return self.inputs[kept].sum(0) / count, self.outputs[kept].sum(0) / count


def kronecker_sums(
    model: nn.Module,
    dataset: Rows,
    layers: str | Iterable[str] = "all",
    parts: Tensor | None = None,
    *,
    batch_tokens: int | str = "auto",
    progress: bool = True,
) -> dict[str, KroneckerSums]:
    """What :func:`kronecker_factors` are the mean of, by parts of the rows, in one pass.

    Args:
        parts: the part of each row, int64 ``(n,)`` from 0; by default all are one.

    Raises:
        InputError: as of :func:`kronecker_factors`; several parts and a layer whose inputs are not one block a row.
    """
    names = select_layers(model, layers)
    modules = {name: module for name, module in named_layers(model).items() if name in set(names)}
    for name in names:
        if name not in modules:
            raise InputError(
                f"layers: {name!r} is no weight matrix and has no Kronecker factors; leave it out for ekfac"
            )
    for name, module in modules.items():
        if not _has_factors(module):
            raise InputError(
                f"layers: {name!r} {layer_shape(module)} is an embedding or wider than {_LARGEST_FACTOR}; "
                "leave it out for ekfac"
            )
    shapes = {name: layer_shape(module) for name, module in modules.items()}
    count = 1 if parts is None else int(parts.max()) + 1
    sums = {
        name: KroneckerSums(
            torch.zeros(count, in_, in_, dtype=torch.float64),
            torch.zeros(count, out, out, dtype=torch.float64),
            torch.zeros(count, dtype=torch.int64),
        )
        for name, (out, in_) in shapes.items()
    }
    rows, kind = checked_rows(model, dataset)
    # In chunks the watched head would see a part of the tokens at a time.
    loss = losses.named(kind, chunked=False)
    with _watched(modules) as seen:
        for chosen, batch in _batches(model, rows, batch_tokens, progress, "Kronecker factors"):
            mask = extent(mask_of(batch)).flatten()
            seen.clear()
            loss(model, batch).sum().backward()
            for name, operands in seen.items():
                flat = [operand.flatten(0, -2) for operand in operands]
                owner = None if parts is None else _owners(name, operands[0], parts[chosen]).to(mask.device)
                if len(flat[0]) == len(mask):
                    flat = [operand[mask] for operand in flat]
                    owner = None if owner is None else owner[mask]
                found = sums[name]
                for part in range(count):
                    own = flat if owner is None else [operand[owner == part] for operand in flat]
                    for total, operand in zip((found.inputs, found.outputs), own, strict=True):
                        total[part] += (operand.T @ operand).cpu()
                    found.counts[part] += len(own[0])
            seen.clear()
    return sums


def _owners(name: str, inputs: Tensor, parts: Tensor) -> Tensor:
    """The part of each token of a layer's inputs ``(N, ..., in)``, from that of each row of the batch."""
    if len(inputs) != len(parts):
        raise InputError(
            f"layers: {name!r} is given inputs {tuple(inputs.shape)} of {len(parts)} rows, which do not tell the rows "
            "apart; leave it out where rows are held out"
        )
    return parts.repeat_interleave(inputs[..., 0].numel() // len(parts))


def layers_with_factors(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those that :func:`~influence_fast.kronecker_factors` takes: no biases, norms, embeddings, or very wide matrices."""
    modules = named_layers(model)
    return [name for name in names if name in modules and _has_factors(modules[name])]


def _has_factors(module: nn.Module) -> bool:
    return not isinstance(module, nn.Embedding) and max(layer_shape(module)) <= _LARGEST_FACTOR


def _batches(
    model: nn.Module, rows: CheckedRows, batch_tokens: int | str, progress: bool, what: str
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    tokens = token_budget(batch_tokens, model)
    if rows.kind != "custom":
        settle_batches(model, rows, losses.named(rows.kind), tokens)
    give_back = GiveBack()
    with (
        as_evaluated(model),
        tqdm(total=len(rows), desc=what, unit="sample", delay=2, disable=None if progress else True) as bar,
    ):
        for chosen in batches(rows, range(len(rows)), tokens):
            yield chosen, {name: tensor.to(device_of(model)) for name, tensor in rows.batch(chosen, model).items()}
            bar.update(len(chosen))
            give_back()


@contextmanager
def _watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within, a backward leaves ``{name: (input, output gradient)}`` of each module that it reaches."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            # Weights need no gradient here, so the sum with an anchor is what joins the output to the graph.
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            x = args[0].detach()
            output.register_hook(lambda dy: seen.__setitem__(name, (x, dy.detach())))
            return output

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """``(N, T, width) -> (N, width)`` over real tokens: the first of them, the last, or their mean."""
    if pooling == "mean":
        return (states * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    place = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    real = mask != 0
    chosen = (
        place.masked_fill(~real, -1).amax(1) if pooling == "last" else place.masked_fill(~real, len(place[0])).amin(1)
    )
    return states[torch.arange(len(states), device=states.device), chosen]
