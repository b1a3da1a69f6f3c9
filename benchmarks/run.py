"""Kernel benchmarks: ours, plain torch, and peers' packages where they are installed, into a JSON file.

    python -m benchmarks.run --op all
    python -m benchmarks.run --op rank --json --threads 2
    python -m benchmarks.run --op sketch --device cuda --dtype bfloat16 --out benchmarks/results

Every kernel is verified against the float64 reference first; a wrong one is not timed. Plots and tables elsewhere are
made from these files alone.
"""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import protocol
from influence_fast.cli.diagnostics import bench_table
from influence_fast.diagnostics import kernel_bench as bench
from influence_fast.errors import InfluenceError


def with_peers(case: bench.Case) -> bench.Case:
    """Add the peers that are installed to a sketch: each projects vectors of the same size to as many numbers."""
    if case.op != "sketch":
        return case
    n, d, k, kind = bench.SKETCH_SHAPES[case.name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.randn(n, d, device=device)
    with contextlib.suppress(ImportError):
        from trak.projectors import BasicProjector, ProjectionType

        if kind == "rademacher":
            trak = BasicProjector(d, k, 0, ProjectionType.rademacher, device, dtype=torch.float32)
            case.baselines["TRAK BasicProjector"] = lambda: trak.project(g, model_id=0)
    with contextlib.suppress(ImportError):
        import fast_jl

        if kind == "rademacher" and device == "cuda" and k % 512 == 0:
            case.baselines["fast_jl"] = lambda: fast_jl.project_rademacher_8(g, k, 0, 132)
    with contextlib.suppress(ImportError):
        from sjlt import SJLTProjection

        if kind == "sjlt" and device == "cuda":
            projection = SJLTProjection(d, k, c=1, device=device)
            case.baselines["sjlt"] = lambda: projection(g)
    return case


def with_compiled(case: bench.Case) -> bench.Case:
    """Add what torch.compile makes of each baseline in plain torch; it compiles during the rounds that warm up."""
    for name, call in list(case.baselines.items()):
        if name.startswith(("torch", "bmm")) and "our" not in name:
            case.baselines[f"{name}, compiled"] = torch.compile(call, dynamic=False)
    return case


@click.command()
@click.option("--op", "op_names", multiple=True, default=["all"], type=click.Choice(["all", *bench.OPS]))
@click.option("--case", "case_pattern", default="", help="Only cases whose name matches this pattern.")
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option("--dtype", default="float32", type=click.Choice(["float32", "float16", "bfloat16"]))
@click.option("--backend", default="auto")
@protocol.threads_option
@click.option("--repeats", default=15, show_default=True)
@click.option(
    "--compile/--no-compile", "compiled", default=True, help="Baselines under torch.compile too (slow start)."
)
@protocol.out_option("An earlier result there is replaced.")
@protocol.json_option
def main(
    op_names: tuple[str, ...],
    case_pattern: str,
    device: str,
    dtype: str,
    backend: str,
    threads: int,
    repeats: int,
    compiled: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure the kernels and their baselines in one run."""
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    header = {**protocol.header("kernels", device), "dtype": dtype}
    file = protocol.result_file(out, protocol.dated_name(header, "-".join(op_names), dtype))
    protocol.previous(file, "kernels")
    found: list[dict[str, Any]] = []
    failed = False
    with protocol.Results(file, header) as results, protocol.Progress() as progress:
        with progress.step("what the machine does at best"):
            results.document["ceilings"] = bench.ceilings(device, kind)
        for op in bench.OPS if "all" in op_names else op_names:
            for case in bench.cases(op, device, kind, backend):
                if not re.search(case_pattern, case.name):
                    continue
                case = with_peers(case)
                try:
                    with progress.step(f"{op} {case.name}"):
                        found.append(bench.measure(with_compiled(case) if compiled else case, device, repeats))
                    results.add(results=found)
                except InfluenceError as error:
                    failed = True
                    click.echo(f"error: {error}", err=True)
    protocol.show(results.document, as_json, bench_table)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
