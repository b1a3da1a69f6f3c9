"""Kernel benchmarks: ours, plain torch (compiled too), and other packages where they are installed, into a JSON file.

    python -m benchmarks.run --op all
    python -m benchmarks.run --op rank --json --threads 2
    python -m benchmarks.run --op sketch --device cuda --dtype bfloat16 --out benchmarks/results

Every kernel is verified against the float64 reference first; a wrong one is not timed. Plots and tables elsewhere are
made from these files alone.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import click
import torch

from benchmarks import protocol
from influence_fast.cli.diagnostics import bench_table
from influence_fast.diagnostics import bench_peers
from influence_fast.diagnostics import kernel_bench as bench
from influence_fast.errors import InfluenceError


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
@click.option("--passes", default=5, show_default=True, help="Times to go through all cases, in both orders.")
@click.option("--repeats", default=3, show_default=True, help="Rounds a pass, in which each candidate takes its turn.")
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
    passes: int,
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
    found: list[bench.Measurement] = []
    failed = False
    with protocol.Results(file, header) as results, protocol.Progress() as progress:
        with progress.step("what the machine does at best"):
            results.document["ceilings"] = bench.ceilings(device, kind)
        chosen = bench.OPS if "all" in op_names else op_names
        cases = itertools.chain.from_iterable(bench.cases(op, device, kind, backend) for op in chosen)
        theirs, results.document["peers"] = bench_peers.peer_cases(device, kind) if "sketch" in chosen else ([], {})
        for case in itertools.chain(cases, theirs):
            if not re.search(case_pattern, case.name):
                continue
            try:
                with progress.step(f"verify {case.op} {case.name}"):
                    found.append(bench.Measurement(with_compiled(case) if compiled else case, device))
            except InfluenceError as error:
                failed = True
                click.echo(f"error: {error}", err=True)
        for number, measurement in bench.turns(found, passes):
            with progress.step(f"pass {number + 1} of {passes}, {measurement.case.op} {measurement.case.name}"):
                measurement.run_pass(repeats)
            results.add(results=[measured.result() for measured in found if measured.passes])
    protocol.show(results.document, as_json, bench_table)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
