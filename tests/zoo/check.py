"""One model and some rows against the literal loop: ``autograd.grad`` of one row's loss, alone and without pads.

The loop shares nothing with what it checks but two public definitions: which parameter a layer's name stands for, and the
matrices of a projection (``Side.matrix``), with which the true gradient is multiplied in full.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import influence_fast as inf
from influence_fast.errors import InfluenceError
from influence_fast.ops.projections import Side

# An error beyond is a wrong number, as a share of the layer's true gradient of the row; by the arithmetic of the model.
TOLERANCE = {"float64": 1e-4, "float32": 1e-3, "bfloat16": 0.2, "float16": 0.2}
# A layer's gradient below this share of the row's longest has its error measured against that share: what is zero but for
# rounding. Models in float64 do some of their arithmetic in float32.
SMALL = {"float64": 1e-4, "float32": 1e-3, "bfloat16": 2e-2, "float16": 2e-2}

# Where a disk does not make every case wait.
_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None

Rows = Sequence[dict[str, Any]]
RowLoss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


@dataclass
class Captured:
    """Numbers of every layer, ``(rows, dim)``, and how they were taken."""

    layers: dict[str, Tensor]
    exact: Sequence[str] = ()
    batches: str = "padded"


@dataclass
class Case:
    """A model as a user has it, and what it is to be held against.

    Attributes:
        truth: the loss of one row, a batch of it alone; the model's own (``model(**batch).loss``) where none is given.
        square: rows of one length, as many as tokens, for the last run; ``rows`` where none are given.
        settings: further arguments of ``build_store``.
        collect: ``(case, rows, projection, layers)`` in place of ``build_store``.
        exact_model: what the loop runs where the model itself cannot in float64; a copy in float64 where none is given.
    """

    model: nn.Module
    rows: Rows
    truth: RowLoss | None = None
    square: Rows | None = None
    layers: Sequence[str] = ("trained", "all", "trained")
    loss: Any = "auto"
    settings: dict[str, Any] = field(default_factory=dict)
    collect: Callable[[Case, Rows, str, str], Captured] | None = None
    exact_model: nn.Module | None = None
    dtype: str = ""
    """Of the arithmetic, which sets the tolerance; the model's own where it is empty."""


@dataclass
class Outcome:
    """What came of a case.

    Attributes:
        outcome: ``right``; ``refused`` (a sentence instead of numbers); ``wrong`` (numbers, not the gradients); ``crash``
            (an error that is none of the package's); ``not built`` (no such model could be made).
        fast, exact: numbers of layers that hooks and that autograd give, of all trained ones.
        batches: which rows may share a batch.
        error: the largest relative error of a row and layer over the runs that gave numbers.
        runs: what came of each ``projection layers``: an error, or a sentence.
    """

    outcome: str
    fast: int = 0
    exact: int = 0
    batches: str = ""
    error: float | None = None
    worst: str = ""
    dtype: str = "float64"
    sentence: str = ""
    runs: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in ("", None, {})}


PROJECTIONS = ("identity", "rademacher:3x4", "sjlt:24")


def check(case: Case, projections: Sequence[str] = PROJECTIONS) -> Outcome:
    """Build stores of the case's rows, one for each projection, and compare every number in them."""
    begin = time.monotonic()
    result = Outcome("right", dtype=case.dtype or _dtype(case.model))
    truths: dict[int, list[dict[int, Tensor]]] = {}
    try:
        for rows in (case.rows, case.square):
            if rows is not None:
                truths[id(rows)] = literal(case, rows)
    except Exception as error:
        return Outcome("not built", sentence=f"the loop: {type(error).__name__}: {sentence(error)}")
    for number, projection in enumerate(projections):
        layers = case.layers[number % len(case.layers)]
        rows = case.square if case.square is not None and number == len(projections) - 1 else case.rows
        run = f"{projection} {layers}"
        try:
            found = (case.collect or _build)(case, rows, projection, layers)
        except InfluenceError as error:
            result.runs[run] = sentence(error)
            _worsen(result, "refused", sentence(error), layers)
            continue
        except Exception as error:
            result.runs[run] = f"{type(error).__name__}: {sentence(error)}"
            _worsen(result, "crash", result.runs[run], layers)
            continue
        bias = bool(case.settings.get("bias"))
        error, worst = compare(case.model, found.layers, truths[id(rows)], projection, SMALL[result.dtype], bias)
        result.runs[run] = error
        if result.error is None or not error <= result.error:
            result.error, result.worst = error, worst
        if not error <= TOLERANCE[result.dtype]:
            _worsen(result, "wrong", f"{worst} is off by {error:.2g} of its length", layers)
        if number == 0 or not result.fast + result.exact:
            result.exact, result.batches = len(found.exact), found.batches
            result.fast = len(found.layers) - result.exact
    result.seconds = round(time.monotonic() - begin, 2)
    return result


_RANK = ("right", "refused", "crash", "wrong")


def _worsen(result: Outcome, outcome: str, text: str, layers: str) -> None:
    if _RANK.index(outcome) > _RANK.index(result.outcome):
        result.outcome, result.sentence = outcome, text if layers == "trained" else f"{layers}: {text}"


def sentence(error: BaseException) -> str:
    """The first line of an error, without paths of this run and of some length."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    first = re.sub(r"/\S+/", "", first)
    return first if len(first) < 300 else first[:297] + "..."


def _dtype(model: nn.Module) -> str:
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    return next((kind for kind in ("bfloat16", "float16", "float32") if kind in kinds), "float64")


def _build(case: Case, rows: Rows, projection: str, layers: str) -> Captured:
    before = {name: parameter.detach().clone() for name, parameter in case.model.named_parameters()}
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder, _quiet():
        store = inf.build_store(
            Path(folder) / "store",
            case.model,
            rows,
            layers,
            projection,
            loss=case.loss,
            progress=False,
            **case.settings,
        )
        settings = store.meta["settings"]
        found = {name: store.read(name).clone() for name in store.layers}
    for name, parameter in case.model.named_parameters():
        if not torch.equal(parameter.detach(), before[name]):
            raise AssertionError(f"the build changed {name}")
    batches = "one row" if settings.get("one_row") else settings.get("batching", "padded")
    return Captured(found, settings.get("exact", ()), batches)


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("influence_fast")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss that the model itself computes."""
    output = model(**batch)
    return output[0] if isinstance(output, tuple) else output.loss


def row_batch(model: nn.Module, row: dict[str, Any]) -> dict[str, Tensor]:
    """A row as a batch of it alone; a mask of ones where the forward takes one."""
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    batch = {}
    for name, value in row.items():
        tensor = torch.as_tensor(value)[None]
        batch[name] = tensor.to(kind) if tensor.is_floating_point() else tensor
    names = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
    if "attention_mask" in names and "attention_mask" not in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


def literal(case: Case, rows: Rows) -> list[dict[int, Tensor]]:
    """For each row, ``{place of the parameter: gradient}`` of all parameters, in float64 where the model runs in it."""
    model, loss = case.exact_model, case.truth or own_loss
    if model is None:
        model = case.model
        if _dtype(model) != "float64" and case.dtype != "float32":
            model = copy.deepcopy(model).double()
    model.eval()
    weights = [(place, weight) for place, weight in enumerate(model.parameters()) if weight.is_floating_point()]
    flags = [weight.requires_grad for _, weight in weights]
    for _, weight in weights:
        weight.requires_grad_(True)
    out = []
    try:
        for row in rows:
            # What autograd leaves on the parameters; autograd.grad itself refuses reentrant checkpoints.
            loss(model, row_batch(model, row)).backward()
            out.append({place: weight.grad.to_dense().double() for place, weight in weights if weight.grad is not None})
            for _, weight in weights:
                weight.grad = None
    finally:
        for (_, weight), flag in zip(weights, flags, strict=True):
            weight.grad = None
            weight.requires_grad_(flag)
    return out


def compare(
    model: nn.Module,
    layers: dict[str, Tensor],
    truth: list[dict[int, Tensor]],
    projection: str,
    small: float,
    bias: bool = False,
) -> tuple[float, str]:
    """The largest relative error of a row and layer, and where it is; infinite where a number is not finite.

    With ``bias`` the gradient of a layer that has a bias has one more column, of the bias.
    """
    owner = Owners(model)
    longest = [max((float(g.norm()) for g in grads.values()), default=0.0) for grads in truth]
    worst, where = 0.0, ""
    for name, found in layers.items():
        project = None
        for row, grads in enumerate(truth):
            whole = owner.gradient(name, grads, bias)
            if project is None:
                project = projector(name, tuple(whole.shape), projection, owner.is_vector(name))
            expected, got = project(whole), found[row].double()
            if got.shape != expected.shape:
                return float("inf"), f"{name}: {tuple(got.shape)} numbers instead of {tuple(expected.shape)}"
            size = max(float(expected.norm()), small * longest[row])
            error = float((got - expected).norm()) / size if size else float(got.norm())
            error = error if error == error else float("inf")
            if error > worst:
                worst, where = error, name
    return worst, where


class Owners:
    """Which parameter a layer's name stands for: its module's weight, the parameter itself, or one expert's part of it."""

    def __init__(self, model: nn.Module) -> None:
        self.places = {id(parameter): place for place, parameter in enumerate(model.parameters())}
        self.parameters = {_plain(n): p for n, p in model.named_parameters(remove_duplicate=False)}
        self.modules = {_plain(n): m for n, m in model.named_modules(remove_duplicate=False)}

    def gradient(self, name: str, grads: dict[int, Tensor], bias: bool) -> Tensor:
        """The layer's part of a row's gradients as ``(out, in)``; ``(out, 1)`` of a vector."""
        match = re.fullmatch(r"(.*)\[(\d+)\]", name)
        path = match[1] if match else name
        if path in self.parameters:
            holder = self.modules[path.rpartition(".")[0]]
            gradient = self._of(self.parameters[path], grads)
            gradient = gradient[int(match[2])] if match else gradient
            return as_matrix(gradient, bool(match) and bool(getattr(holder, "is_transposed", False)))
        module: Any = self.modules[path]
        turned = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
        matrix = as_matrix(self._of(module.weight, grads), turned)
        if bias and getattr(module, "bias", None) is not None:
            matrix = torch.cat([matrix, self._of(module.bias, grads)[:, None]], 1)
        return matrix

    def is_vector(self, name: str) -> bool:
        parameter = self.parameters.get(name)
        return parameter is not None and parameter.numel() == (parameter.shape[0] if parameter.dim() else 1)

    def _of(self, parameter: Tensor, grads: dict[int, Tensor]) -> Tensor:
        found = grads.get(self.places[id(parameter)])
        return torch.zeros(parameter.shape, dtype=torch.float64) if found is None else found.reshape(parameter.shape)


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")


def as_matrix(gradient: Tensor, turned: bool) -> Tensor:
    if gradient.dim() < 2:
        return gradient.reshape(-1, 1)
    return gradient.T if turned else gradient.flatten(1)


def projector(name: str, shape: tuple[int, int], projection: str, vector: bool) -> Callable[[Tensor], Tensor]:
    """What a projection makes of the whole gradient of a layer of ``shape``, by dense matrices in float64.

    A vector stays whole where it has no more numbers than a matrix is projected to, and is sketched to as many otherwise.
    """
    kind, _, sizes = projection.partition(":")
    if kind == "identity":
        return lambda gradient: gradient.flatten()
    out, in_ = shape

    def dense(role: str, k: int, features: int) -> Tensor:
        return Side(kind, f"{name}/{role}", k, features).matrix(torch.float64, backend="reference")  # type: ignore[arg-type]

    numbers = [int(size) for size in sizes.split("x")]
    dim = numbers[0] * numbers[-1] if len(numbers) == 2 else numbers[0]
    if vector and out <= dim:
        return lambda gradient: gradient.flatten()
    if vector or len(numbers) == 1:
        single = dense("single", dim, out * in_)
        return lambda gradient: single @ gradient.flatten()
    left, right = dense("left", numbers[0], out), dense("right", numbers[1], in_)
    return lambda gradient: (left @ gradient @ right.T).flatten()
