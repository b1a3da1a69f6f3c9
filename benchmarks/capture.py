"""Samples per second of gradient capture: ours, its floor, plain hooks, one sample at a time, and bergson if installed.

The *floor* of a run is the forward and the input-gradient backward down to the lowest selected layer: no weight
gradients, no graph below it, the same batches, the same dtype. Everything above it is what capturing costs::

    python -m benchmarks.capture                      # every workload
    python -m benchmarks.capture --work minilm-all --repeats 9 --json
    python -m benchmarks.capture --estimates          # dry runs against builds
    python -m benchmarks.capture --verification       # what checking capture costs of a build of 10^4 rows

Models have random weights in the shapes of the real ones, which cost the same. All methods see the same rows in one
process, in turn, in both orders; figures are medians, and every method's gradients are compared with ours first.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import click
import torch
import transformers as hf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import influence_fast as inf
from benchmarks import protocol
from influence_fast._memory import peak_memory
from influence_fast.data.batching import Loss, Rows, batches, collate
from influence_fast.gradients import job as jobs
from influence_fast.gradients import losses
from influence_fast.gradients.build import build_from, verified_settings
from influence_fast.gradients.layers import named_layers
from influence_fast.gradients.model_state import autocast
from influence_fast.gradients.settings import BuildSettings

_VERIFIED_ROWS = 10_000
Samples = list[dict[str, Any]]
Gradients = dict[str, Tensor]


@dataclass
class Work:
    """One measured job: a model, rows, layers and the precision of forward and backward."""

    model: Callable[[], nn.Module]
    rows: Callable[[], Samples]
    layers: str
    precision: str | None
    tokens: int
    projection: str = "rademacher:16x16"
    single_rows: int = 64


def _minilm() -> nn.Module:
    config = hf.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return hf.BertForSequenceClassification(config)


def _neox() -> nn.Module:
    config = hf.GPTNeoXConfig(
        vocab_size=8192, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048
    )
    return hf.GPTNeoXForCausalLM(config)


def _phrases(count: int = 1024) -> Samples:
    """Lengths like those of SST-2's training phrases with their two special tokens: 3 to 60, half of them under 10."""
    random = torch.Generator().manual_seed(0)
    lengths = (torch.randn(count, generator=random) * 0.65 + 2.2).exp().add(2).clamp(3, 60).long().tolist()
    return [
        {"input_ids": torch.randint(1000, 30000, (n,), generator=random).tolist(), "labels": i % 2}
        for i, n in enumerate(lengths)
    ]


def _documents(count: int = 8, length: int = 512) -> Samples:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(8192, (count, length), generator=random).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


WORKS = {
    "minilm-all": Work(_minilm, _phrases, "attention", None, 2048),
    "minilm-middle": Work(_minilm, _phrases, "attention[2:4]", None, 2048),
    "minilm-middle-bf16": Work(_minilm, _phrases, "attention[2:4]", "bfloat16", 2048),
    "neox-all": Work(_neox, _documents, "attention,mlp", None, 2048, single_rows=4),
    "neox-upper": Work(_neox, _documents, "attention[3:6]", None, 2048, single_rows=4),
    "neox-upper-bf16": Work(_neox, _documents, "attention[3:6]", "bfloat16", 2048, single_rows=4),
}


@dataclass
class Job:
    """A work made concrete, shared by all methods."""

    model: nn.Module
    rows: Rows
    layers: list[str]
    work: Work
    projection: inf.Projection

    def batches(self) -> list[dict[str, Tensor]]:
        return [
            collate([self.rows[i] for i in chosen], self.model)
            for chosen in batches(self.rows, range(len(self.rows)), self.work.tokens)
        ]

    def in_order(self, found: dict[str, list[Tensor]]) -> Gradients:
        """What came batch by batch, in the order of the rows."""
        order = [i for chosen in batches(self.rows, range(len(self.rows)), self.work.tokens) for i in chosen]
        places = torch.tensor(order).argsort()
        return {name: torch.cat(parts)[places] for name, parts in found.items()}

    @cached_property
    def lowered(self) -> nn.Module:
        """The model with bfloat16 weights."""
        return copy.deepcopy(self.model).to(torch.bfloat16)

    def loss(self, **kwargs: Any) -> Loss:
        causal = isinstance(self.rows[0]["labels"], list)
        return losses.TokenLoss(**kwargs) if causal else losses.classification


def ours(job: Job) -> Gradients:
    out = {name: torch.empty(len(job.rows), job.projection.output_dim((1, 1))) for name in job.layers}
    with inf.GradientCapture(job.model, job.layers, job.projection) as capture:
        loss = job.loss(part=capture.part)
        budget = jobs.Budget(job.work.tokens)
        steps = jobs.run(job.model, capture, loss, job.rows, range(len(job.rows)), budget, job.work.precision)
        for chosen, (gradients, _) in steps:
            places = torch.tensor(chosen)
            for name, gradient in gradients.items():
                out[name][places] = gradient
    return out


def floor(job: Job) -> None:
    """Forward and shortened backward, down to the output gradients of the lowest selected layers; nothing captured."""
    modules = named_layers(job.model)

    def join(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_()

    handles = [modules[name].register_forward_hook(join) for name in job.layers]
    loss = job.loss()
    for batch in job.batches():
        with autocast(job.model, job.work.precision):
            each = loss(job.model, batch)
        each.sum().backward()
    for handle in handles:
        handle.remove()


def hooks(job: Job) -> Gradients:
    """What twenty lines of hooks do: keep x, run the whole backward with weight gradients, einsum, project."""
    modules = named_layers(job.model)
    out: dict[str, list[Tensor]] = {name: [] for name in job.layers}
    inputs: dict[str, Tensor] = {}
    sides = _sides(job)
    job.model.requires_grad_(True)

    def see(name: str) -> Callable[..., None]:
        return lambda module, args, output: inputs.__setitem__(name, args[0].detach())

    def take(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, grad_in: Any, grad_out: tuple[Tensor, ...]) -> None:
            left, right = sides[name]
            gradient = torch.einsum("nto,nti->noi", grad_out[0].float(), inputs[name].float())
            out[name].append((left @ gradient @ right.T).flatten(1))

        return hook

    handles = [modules[name].register_forward_hook(see(name)) for name in job.layers]
    handles += [modules[name].register_full_backward_hook(take(name)) for name in job.layers]
    loss = job.loss()
    for batch in job.batches():
        with autocast(job.model, job.work.precision):
            each = loss(job.model, batch)
        each.sum().backward()
        job.model.zero_grad()
    for handle in handles:
        handle.remove()
    job.model.requires_grad_(False)
    return job.in_order(out)


def one_by_one(job: Job) -> Gradients:
    """The paper's loop: one sample at a time, weight gradients of the selected layers, float32."""
    modules = named_layers(job.model)
    out: dict[str, list[Tensor]] = {name: [] for name in job.layers}
    weights = [cast(Tensor, modules[name].weight) for name in job.layers]
    sides, loss = _sides(job), job.loss()
    for weight in weights:
        weight.requires_grad_(True)
    for index in range(min(job.work.single_rows, len(job.rows))):
        each = loss(job.model, collate([job.rows[index]], job.model))
        for name, gradient in zip(job.layers, torch.autograd.grad(each.sum(), weights), strict=True):
            left, right = sides[name]
            out[name].append((left @ gradient @ right.T).flatten())
    job.model.requires_grad_(False)
    return {name: torch.stack(found) for name, found in out.items()}


def bergson(job: Job) -> Gradients:
    """Bergson's collector, its loss and its way of preparing a model, on the same batches, in float32."""
    return _bergson(job, job.model)


def bergson_bf16(job: Job) -> Gradients:
    """The same on a model loaded in bfloat16, which is what its ``--precision bf16`` does."""
    return _bergson(job, job.lowered)


def _bergson(job: Job, model: nn.Module) -> Gradients:
    from bergson.collector.collector import fwd_bwd_factory
    from bergson.collector.gradient_collectors import StreamingGradientCollector
    from bergson.config import IndexConfig
    from bergson.gradients import GradientProcessor

    embeddings = cast(Any, model).get_input_embeddings().requires_grad_(True)
    processor = GradientProcessor(projection_dim=16, projection_type="rademacher")
    collector = StreamingGradientCollector(
        model=model, target_modules=set(job.layers), processor=processor, dtype=next(model.parameters()).dtype
    )
    causal = fwd_bwd_factory(IndexConfig("", loss_reduction="mean"))
    out: dict[str, list[Tensor]] = {name: [] for name in job.layers}
    with collector:
        for batch in job.batches():
            if batch["labels"].dim() == 1:
                losses.classification(model, batch).sum().backward()
                model.zero_grad()
            else:
                causal(model, batch["input_ids"], batch["labels"], batch)
            for name in job.layers:
                out[name].append(collector.mod_grads[name])
    embeddings.requires_grad_(False)
    return job.in_order(out)


def _sides(job: Job) -> dict[str, tuple[Tensor, Tensor]]:
    out = {}
    for name, shape in inf.GradientCapture(job.model, job.layers, job.projection).shapes.items():
        left, right = job.projection.side(name, "left", shape[0]), job.projection.side(name, "right", shape[1])
        if left is not None and right is not None:
            out[name] = left.matrix(), right.matrix()
    return out


def measure(name: str, work: Work, repeats: int, progress: protocol.Progress) -> dict[str, dict[str, float]]:
    """Median samples/s of each method, rounds in alternating order, after a round that warms up and compares."""
    torch.manual_seed(0)
    model = work.model().eval().requires_grad_(False)
    cast(Any, model).config.use_cache = False
    rows = Rows(work.rows(), None)
    list(rows.scan())
    job = Job(model, rows, inf.select_layers(model, work.layers), work, inf.Projection.parse(work.projection))
    methods: dict[str, Callable[[Job], Any]] = {"ours": ours, "floor": floor, "hooks": hooks, "one by one": one_by_one}
    if importlib.util.find_spec("bergson"):
        methods["bergson"] = bergson
        if work.precision:
            methods["bergson bf16"] = bergson_bf16
    with progress.step(f"{name}: gradients of all methods compared"):
        _compare(job, methods)
    times: dict[str, list[float]] = {method: [] for method in methods}
    for round_ in range(repeats + 1):
        with progress.step(f"{name}: round {round_} of {repeats}" if round_ else f"{name}: warming up"):
            for method in list(methods)[:: 1 if round_ % 2 else -1]:
                begin = time.perf_counter()
                methods[method](job)
                if round_:
                    times[method].append(time.perf_counter() - begin)
    counts = {"one by one": min(work.single_rows, len(rows))}
    speeds = {method: [counts.get(method, len(rows)) / t for t in spent] for method, spent in times.items()}
    return {
        method: {
            "samples_per_s": statistics.median(speed),
            "low": min(speed),
            "high": max(speed),
            "ours_over": statistics.median(a / b for a, b in zip(speeds["ours"], speed, strict=True)),
        }
        for method, speed in speeds.items()
    }


def _compare(job: Job, methods: dict[str, Callable[[Job], Any]]) -> None:
    """Refuse to time a method that computes something else."""
    tolerance = 1e-4 if job.work.precision is None else 0.1
    expected = ours(job)
    for method, compute in methods.items():
        for name, gradient in (compute(job) or {}).items():
            error = (expected[name][: len(gradient)] - gradient).norm() / gradient.norm()
            if not error < tolerance:
                raise SystemExit(f"{method} disagrees on {name}: relative error {error:.1e}")


def hold(work: Work) -> dict[str, float]:
    """What ``estimate_build`` says over what ``build_store`` then takes."""
    torch.manual_seed(0)
    model, rows = work.model(), work.rows()
    settings: dict[str, Any] = {
        "layers": work.layers,
        "projection": work.projection,
        "batch_tokens": work.tokens,
        "precision": work.precision,
    }
    found = inf.estimate_build(model, rows, **settings)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        inf.build_store(Path(folder) / "store", model, rows, progress=False, **settings)
        seconds = time.perf_counter() - begin
        size = sum(path.stat().st_size for path in (Path(folder) / "store").iterdir())
    return {
        "time": found.seconds / seconds,
        "disk": found.disk_bytes / size,
        "memory": found.memory_bytes / peak_memory(),
    }


def verification(work: Work) -> dict[str, float]:
    """Seconds of verifying capture before a build, and their share of one of 10^4 rows such as these."""
    torch.manual_seed(0)
    model, rows = work.model(), work.rows()
    settings = BuildSettings(
        work.layers, inf.Projection.parse(work.projection), batch_tokens=work.tokens, precision=work.precision
    )
    begin = time.perf_counter()
    verified_settings(model, rows, settings)
    verifying = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        build_from(Path(folder) / "store", model, rows, replace(settings, verify=False), progress=False)
        building = (time.perf_counter() - begin) * _VERIFIED_ROWS / len(rows)
    return {"verifying_s": verifying, "building_10000_rows_s": building, "share": verifying / building}


@click.command()
@click.option("--work", "names", multiple=True, type=click.Choice(list(WORKS)), help="Workload; all by default.")
@click.option("--repeats", default=5, show_default=True)
@protocol.threads_option
@protocol.out_option("Figures of other workloads that the file has from this machine stay.")
@protocol.json_option
@click.option("--estimates", is_flag=True, help="Hold dry runs against builds instead: estimated / taken.")
@click.option(
    "--verification", "verifies", is_flag=True, help="Time the check of capture instead, as a share of a build."
)
def main(
    names: tuple[str, ...],
    repeats: int,
    threads: int,
    out: Path | None,
    as_json: bool,
    estimates: bool,
    verifies: bool,
) -> None:
    """Measure gradient capture against its floor and its alternatives."""
    torch.set_num_threads(threads)
    names = names or tuple(WORKS)
    header = protocol.header("capture")
    file = protocol.result_file(out, protocol.dated_name(header, "capture"))
    there = protocol.previous(file, "capture")
    if there and there["machine"] != header["machine"]:
        raise click.UsageError(
            f"--out: {file} was measured on another machine or with other versions; name another file"
        )
    kind = "estimates" if estimates else "verification" if verifies else "results"
    part: dict[str, Any] = there.get(kind, {})
    steps = len(names) * (repeats + 2 if kind == "results" else 1)
    with protocol.Results(file, {**there, **header}) as results, protocol.Progress(steps) as progress:
        for name in names:
            if kind == "results":
                part[name] = measure(name, WORKS[name], repeats, progress)
            else:
                with progress.step(name):
                    part[name] = (hold if estimates else verification)(WORKS[name])
            results.add(**{kind: part})
    protocol.show(results.document, as_json, _show)


def _show(document: dict[str, Any]) -> None:
    table = Table("work", "method", "samples/s", "lowest", "highest", "ours / it")
    for name, methods in document.get("results", {}).items():
        for method, row in methods.items():
            figures = [f"{row[key]:.1f}" for key in ("samples_per_s", "low", "high")]
            table.add_row(name, method, *figures, f"{row['ours_over']:.2f}")
        table.add_section()
    held = Table("work", "time", "disk", "memory", title="estimated / taken")
    for name, row in document.get("estimates", {}).items():
        held.add_row(name, *(f"{row[key]:.2f}" for key in ("time", "disk", "memory")))
    checked = Table("work", "verifying, s", "building 10^4 rows, s", "share", title="verification")
    for name, row in document.get("verification", {}).items():
        figures = [f"{row[key]:.1f}" for key in ("verifying_s", "building_10000_rows_s")]
        checked.add_row(name, *figures, f"{100 * row['share']:.1f} %")
    for found in (table, held, checked):
        if found.row_count:
            Console().print(found)


if __name__ == "__main__":
    main()
