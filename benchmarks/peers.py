"""Other libraries against ours on their own shapes, whichever are installed, in one run.

    python -m benchmarks.peers --threads 1 --out benchmarks/results/peers.json

Each case is verified before it is timed: the same numbers where both give the same, else norms that
are kept as well. Then both run in turn, each first every other time, and the medians are compared. Above 1 is faster.
"""

from __future__ import annotations

import importlib.util
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import influence_fast as inf
from benchmarks import protocol

Job = Callable[[], Any]
# A case: its name, theirs, ours, and what raises where the two do not agree.
Case = tuple[str, Job, Job, Callable[[Any, Any], None]]


def _same(theirs: Any, ours: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, check_dtype=False)


def _as_good(vectors: Tensor, scale: float) -> Callable[[Any, Any], None]:
    """Whether both sketches keep norms: within six standard deviations of the sketch, sqrt(2 / k)."""
    expected = vectors.square().sum(1)

    def check(theirs: Tensor, ours: Tensor) -> None:
        for found in (theirs, ours):
            error = (scale * found.float().square().sum(1) / expected - 1).abs().max()
            if float(error) > 6 * (2 / found.shape[1]) ** 0.5:
                raise AssertionError(f"norms are off by {float(error):.2f}")

    return check


def trak() -> Iterator[Case]:
    """``BasicProjector`` on a CPU, as TRAKer calls it."""
    from trak.projectors import BasicProjector, ProjectionType

    from influence_fast.compat import trak as ours

    for rows, features, k in ((16, 200_000, 512), (16, 50_000, 2048)):
        grads = torch.randn(rows, features)
        for kind in ("rademacher", "normal"):
            theirs = BasicProjector(features, k, 0, ProjectionType(kind), torch.device("cpu"), block_size=100)
            mine = ours.BasicProjector(features, k, 0, kind, "cpu")
            name = f"trak BasicProjector {kind}, {rows} x {features} to {k}"
            yield (
                name,
                lambda p=theirs, g=grads: p.project(g, 0),  # type: ignore[misc]
                lambda p=mine, g=grads: p.project(g, 0),  # type: ignore[misc]
                _as_good(grads, 1 / k),
            )


def dattri() -> Iterator[Case]:
    """``random_project`` on a CPU: the projector that it makes, and one call."""
    from dattri.func.projection import random_project

    grads = torch.randn(16, 200_000)
    for kind in ("rademacher", "normal"):

        def made(kind: str = kind) -> Any:
            return random_project(grads, 16, 512, 16, proj_seed=0, proj_type=kind, device="cpu")

        theirs = made()
        with inf.patch("dattri"):
            ours = made()
        name = f"dattri random_project {kind}, 16 x 200000 to 512"
        yield name, lambda f=theirs: f(grads), lambda f=ours: f(grads), _as_good(grads, 1.0)  # type: ignore[misc]


def bergson() -> Iterator[Case]:
    """Its random matrices, and the collection of a small GPT-2's gradients against ``build_store``."""
    from bergson.collector.projection_matrix import random_matrix

    from influence_fast.compat import bergson as ours

    for kind in ("rademacher", "normal"):
        arguments = ("layer/left", 64, 50_000, "cpu", kind)
        name = f"bergson random_matrix {kind}, 64 x 50000"
        yield (
            name,
            lambda a=arguments: random_matrix(*a),  # type: ignore[misc]
            lambda a=arguments: ours.random_matrix(*a),  # type: ignore[misc]
            _same,
        )
    yield _collection()


def _collection() -> Case:
    from bergson import GradientProcessor, collect_gradients
    from bergson.config import IndexConfig
    from datasets import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel

    logging.disable(logging.INFO)
    config = GPT2Config(
        vocab_size=2000, n_positions=64, n_embd=256, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(2000, (64, 64)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # It needs one parameter that does.
    model.transformer.wte.weight.requires_grad_(True)
    layers = inf.select_layers(model, "attention,mlp")

    def theirs() -> Any:
        data = Dataset.from_dict({"input_ids": ids, "labels": ids, "length": [64] * 64})
        with tempfile.TemporaryDirectory() as folder:
            settings = IndexConfig(run_path=f"{folder}/run", projection_dim=16, loss_reduction="mean")
            settings.partial_run_path.mkdir(parents=True)
            batches = [list(range(i, i + 16)) for i in range(0, 64, 16)]
            collect_gradients(model, data, GradientProcessor(projection_dim=16), settings, batches=batches)
            found = inf.compat.bergson.open_store(settings.partial_run_path)
            return {f"transformer.{name}": found[name].float().square().sum(1).sqrt().clone() for name in found}

    def ours() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            store = inf.build_store(
                Path(folder) / "s",
                model,
                rows,
                layers,
                "rademacher:16x16",
                batch_tokens=1024,
                progress=False,
                verify=False,
            )
            return {name: store.read(name).norm(dim=1) for name in store.layers}

    def check(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
        # Their names lack a prefix, so matrices differ and norms agree as far as sketches do.
        if set(theirs) != set(ours):
            raise AssertionError("not the same layers")
        a, b = (sum(float(n.square().sum()) for n in found.values()) for found in (theirs, ours))
        if abs(a / b - 1) > 0.1:
            raise AssertionError(f"norms differ: {a} and {b}")

    return "bergson collect_gradients of a GPT-2, 64 rows of 64 tokens, against build_store", theirs, ours, check


def captum() -> Iterator[Case]:
    """TracInCP in its modes, on models of vectors and of tokens."""
    from captum.influence import TracInCP, TracInCPFast

    from influence_fast.compat import captum as ours

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.head = nn.Linear(128, 256), nn.Linear(256, 128), nn.Linear(128, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.down(self.up(x).relu()) + x).mean(1))

    vectors = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def load(model: nn.Module, path: str) -> float:
        return 1.0

    for about, model, shape in (("vectors of 784", vectors, (784,)), ("32 tokens of 128", Tokens(), (32, 128))):
        data = TensorDataset(torch.randn(256, *shape), torch.randint(10, (256,)))
        queries = torch.randn(16, *shape), torch.randint(10, (16,))
        for mode, reduction in (("default", "none"), ("sample-wise", "sum")):
            both = [
                kind(
                    model,
                    data,
                    ["0", "1"],
                    load,
                    loss_fn=nn.CrossEntropyLoss(reduction=reduction),
                    batch_size=32,
                    sample_wise_grads_per_batch=mode != "default",
                )
                for kind in (TracInCP, ours.TracInCP)
            ]
            theirs, mine = ((lambda t=t, q=queries: t.influence(q)) for t in both)
            yield f"captum TracInCP {mode}, {about}, 256 rows, 16 queries", theirs, mine, _same
    data = TensorDataset(torch.randn(256, 784), torch.randint(10, (256,)))
    queries = torch.randn(16, 784), torch.randint(10, (16,))
    loss = nn.CrossEntropyLoss(reduction="sum")
    last = vectors[4]
    both = [kind(vectors, last, data, ["0", "1"], load, loss, 32) for kind in (TracInCPFast, ours.TracInCPFast)]
    theirs, mine = ((lambda t=t, q=queries: t.influence(q)) for t in both)
    yield "captum TracInCPFast, vectors of 784, 256 rows, 16 queries", theirs, mine, _same


PEERS = {"trak": trak, "dattri": dattri, "bergson": bergson, "captum": captum}


def measured(case: Case, runs: int) -> dict[str, float]:
    """Medians of both, which run in turn."""
    _, theirs, ours, check = case
    check(theirs(), ours())
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    for turn in range(runs):
        both = [("theirs", theirs), ("ours", ours)]
        for name, job in both if turn % 2 else reversed(both):
            begin = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - begin)
    a, b = (statistics.median(seconds[name]) for name in ("theirs", "ours"))
    return {"theirs_s": round(a, 6), "ours_s": round(b, 6), "ratio": round(a / b, 3)}


@click.command()
@click.option("--peer", "names", multiple=True, type=click.Choice(list(PEERS)), help="Libraries; all by default.")
@click.option("--threads", default=1, show_default=True, help="Threads of both.")
@click.option("--runs", default=5, show_default=True, help="Runs of each.")
@protocol.out_option("Cases that are measured again are replaced, those of other libraries stay.")
def main(names: tuple[str, ...], threads: int, runs: int, out: Path | None) -> None:
    """Time other libraries and ours in turn."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    header = protocol.header("peers")
    file = protocol.result_file(out, protocol.dated_name(header, "peers"))
    earlier = protocol.previous(file, "peers")
    cases = dict(earlier["cases"]) if names and earlier else {}
    missing = [name for name in names or PEERS if importlib.util.find_spec(name) is None]
    for name in missing:
        click.echo(f"{name}: not installed")
    header |= {"processor": header["machine"]["device"], "threads": threads, "runs": runs, "missing": missing}
    with protocol.Results(file, header) as results:
        for name in names or PEERS:
            for case in () if name in missing else PEERS[name]():
                cases[case[0]] = result = measured(case, runs)
                click.echo(
                    f"{case[0]}: {result['theirs_s']:.4f} s, ours {result['ours_s']:.4f} s: {result['ratio']:.2f}"
                )
                results.add(cases=cases)


if __name__ == "__main__":
    main()
