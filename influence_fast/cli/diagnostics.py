"""``doctor`` and ``bench``."""

from __future__ import annotations

from typing import Any

import click

from influence_fast.cli.options import (
    chosen_loss,
    example,
    json_option,
    model_options,
    print_document,
    print_table,
    read_samples,
    say,
)
from influence_fast.errors import InputError


@click.command(epilog=example("influence-fast doctor --model my-model --data train.jsonl --text-column sentence"))
@click.option("--model", help="Also verify capture on this model: a folder of a model or an adapter, or a hub name.")
@click.option("--data", multiple=True, help="With --model, rows to verify on: a file, a glob, a folder, or a hub name.")
@model_options
@json_option
def doctor(model: str | None, data: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Say what hardware and libraries there are, and which backend each operation takes and why.

    With --model and --data it compares captured gradients of a few rows with the literal ones, layer by layer.
    """
    if (model is None) != (not data):
        raise click.UsageError("--model and --data go together.")
    if model is not None:
        _verify(model, data, as_json, options)
        return
    from influence_fast.diagnostics.doctor import examine

    found = examine()

    def show() -> None:
        facts = {**found["machine"], **found["compilers"], **found["packages"]}
        print_table(
            ["what", "found"], [[name, "none" if value in (None, []) else value] for name, value in facts.items()]
        )
        for device, operations in found["backends"].items():
            rows = [
                [op, entry["takes"], "; ".join(f"{b}: {r}" for b, r in entry["not"].items())]
                for op, entry in operations.items()
            ]
            print_table(["operation", "takes", "not"], rows, f"Backends for tensors on {device}")

    print_document(found, as_json, show)


def _verify(model: str, data: tuple[str, ...], as_json: bool, options: dict[str, Any]) -> None:
    """Print how each layer of a model is captured, and how close to the literal gradient."""
    import dataclasses

    from influence_fast.gradients.default_projection import default_projection
    from influence_fast.gradients.layers import default_layers, select_layers
    from influence_fast.gradients.verify import verify_capture

    network, samples, _, _ = read_samples("data", data, model, options)
    layers = select_layers(network, options["layers"] or default_layers(network))
    projection = default_projection(network, layers) if options["projection"] == "auto" else options["projection"]
    report = verify_capture(
        network, samples.rows, chosen_loss(options, samples.task), layers=layers, projection=projection
    )
    ways = [
        [name, "autograd" if name in set(report.exact) else "hooks", f"{e:.1e}"] for name, e in report.errors.items()
    ]
    title = f"{'One sample a batch' if report.one_row else 'In batches'}; tolerance {report.tolerance:g}"

    def show() -> None:
        print_table(["layer", "way", "largest relative error"], ways, title)
        for reason in report.reasons:
            say(f"- {reason}")

    print_document({**dataclasses.asdict(report), "ok": report.ok}, as_json, show)


@click.command(
    epilog=example(
        "influence-fast bench --json > before.json\ninfluence-fast bench --compare before.json --strict --html bench.html"
    )
)
@click.option("--op", "op_names", multiple=True, help="Operation to time; all by default.")
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]), help="Where the tensors are.")
@click.option(
    "--dtype", default="float32", type=click.Choice(["float32", "float16", "bfloat16"]), help="Type of the inputs."
)
@click.option("--threads", type=click.IntRange(1), help="Threads of the kernels and of torch.  [default: torch's own]")
@click.option("--passes", default=7, type=click.IntRange(1), help="Times to go through all cases, in both orders.")
@click.option(
    "--repeats", default=3, type=click.IntRange(1), help="Rounds a pass, in which each candidate takes its turn."
)
@click.option(
    "--shapes",
    type=click.Path(),
    help='Shapes to time instead of the built-in ones, as JSON: {"outer": {"mine": {"n": 8, "t": 16, "i": 64, "o": 64}}}.',
)
@click.option(
    "--peers/--no-peers", default=True, help="Also time each other package that is installed, at its own shapes."
)
@click.option(
    "--result", "earlier", type=click.Path(), help="Show this result, written by --json, and measure nothing."
)
@click.option(
    "--compare", type=click.Path(), help="Say what became slower or faster since this result, written by --json."
)
@click.option("--strict", is_flag=True, help="With --compare, exit with 1 where something became slower.")
@click.option("--svg", type=click.Path(), help="Draw the roofline here: shares of copy bandwidth and matmul rate.")
@click.option("--html", type=click.Path(), help="Write a page with drawing, times and comparison here.")
@json_option
def bench(
    op_names: tuple[str, ...],
    device: str,
    dtype: str,
    threads: int | None,
    passes: int,
    repeats: int,
    shapes: str | None,
    peers: bool,
    earlier: str | None,
    compare: str | None,
    strict: bool,
    svg: str | None,
    html: str | None,
    as_json: bool,
) -> None:
    """Time the kernels on this machine, each verified first, beside plain torch and other packages."""
    from influence_fast._files import atomic_write
    from influence_fast.diagnostics import bench_compare, bench_report

    if strict and compare is None:
        raise click.UsageError("--strict goes with --compare.")
    # A file that cannot be compared with is refused before minutes of measuring.
    old = None if compare is None else bench_compare.read_result(compare)
    if earlier is not None:
        document = bench_compare.read_result(earlier)
    else:
        document = _measured(op_names, device, dtype, threads, passes, repeats, shapes, peers)
    comparison = None if old is None else bench_compare.compare(old, document)
    if svg is not None:
        atomic_write(svg, bench_report.roofline(document).encode())
    if html is not None:
        atomic_write(html, bench_report.page(document, comparison).encode())

    def show() -> None:
        bench_table(document)
        if comparison is not None:
            _comparison_table(comparison)

    print_document(document if comparison is None else {**document, "comparison": comparison}, as_json, show)
    if strict and comparison is not None and any(row["verdict"] == "slower" for row in comparison["results"]):
        raise click.exceptions.Exit(1)


def _measured(
    op_names: tuple[str, ...],
    device: str,
    dtype: str,
    threads: int | None,
    passes: int,
    repeats: int,
    shapes: str | None,
    peers: bool,
) -> dict[str, Any]:
    """A document of measurements of this machine."""
    import torch
    from tqdm import tqdm

    from influence_fast.diagnostics import bench_peers, bench_shapes, kernel_bench

    unknown = [name for name in op_names if name not in kernel_bench.OPS]
    if unknown:
        raise InputError(f"op: expected some of {', '.join(kernel_bench.OPS)}, got {unknown[0]!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: this machine has no CUDA device")
    own = None if shapes is None else bench_shapes.read_shapes(shapes)
    if threads is not None:
        torch.set_num_threads(threads)
    kind, chosen = getattr(torch, dtype), op_names or kernel_bench.OPS
    found = [
        kernel_bench.Measurement(case, device)
        for op in chosen
        for case in kernel_bench.cases(op, device, kind, shapes=own)
    ]
    if not found:
        raise InputError(f"shapes: {shapes} has none of {', '.join(chosen)}")
    document: dict[str, Any] = {
        "machine": kernel_bench.machine(device),
        "dtype": dtype,
        "ceilings": kernel_bench.ceilings(device, kind),
    }
    if peers and "sketch" in chosen and own is None:
        theirs, document["peers"] = bench_peers.peer_cases(device, kind)
        found += [kernel_bench.Measurement(case, device) for case in theirs]
    with tqdm(total=passes * len(found), unit="case", delay=2, disable=None) as bar:
        for number, measurement in kernel_bench.turns(found, passes):
            bar.set_description(f"pass {number + 1} of {passes}, {measurement.case.op} {measurement.case.name}")
            measurement.run_pass(repeats)
            bar.update()
    document["results"] = [measurement.result() for measurement in found]
    return document


def _comparison_table(comparison: dict[str, Any]) -> None:
    """Print what changed between two results."""
    rows = [
        [
            row["op"],
            row["case"],
            f"{row['old_s'] * 1e3:.3f} ms",
            f"{row['new_s'] * 1e3:.3f} ms",
            f"{row['corrected']:.2f}x",
            f"{row['p']:.2g}",
            row["verdict"],
        ]
        for row in comparison["results"]
    ]
    passes = comparison["passes"]
    title = f"Against the older result, {passes['old']} and {passes['new']} passes: {comparison['statistic']}"
    columns = ["operation", "case", "before", "now", ["time, as if the machine", "were as fast"], "p", "verdict"]
    print_table(columns, rows, title)
    if comparison["controls"]:
        factor, calls = comparison["machine_slower_by"], comparison["controls"]
        say(f"Plain torch and numpy took {factor:.2f} times as long ({calls} calls): our times are divided by that.")
    else:
        say("No call of plain torch or numpy is in both results under the same versions: times are as they were.")
    for name, (was, now) in comparison["packages"].items():
        say(f"{name}: {was} then, {now} now.")
    for op, case in comparison["not_compared"]:
        say(f"{op} {case}: not in both results at the same shape.")
    if not comparison["can_tell"]:
        say("So few passes cannot show any change: take more --passes, or fewer operations.")


def bench_table(document: dict[str, Any]) -> None:
    """Print a document of measurements."""
    from influence_fast.diagnostics.bench_report import shares

    rows = []
    for result in document["results"]:
        share = [f"{value:.0%} of {name}" for name, value in shares(result, document["ceilings"]).items()]
        per_element = "" if result["ns_per_element"] is None else f"{result['ns_per_element']:.2f} ns/element"
        best = [f"{ratio:.2f}x {name}" for name, ratio in result["ratios"].items()]
        times = result["times"]["ours"]
        rows.append(
            [
                result["op"],
                result["case"],
                f"{times['p50'] * 1e3:.3f} ms",
                f"{times['p20'] * 1e3:.3f} .. {times['p80'] * 1e3:.3f}",
                [*share, *([per_element] if per_element else [])],
                best,
            ]
        )
    title = f"{document['machine']['device']}, {document['dtype']}, {document['machine']['threads']} threads"
    print_table(["operation", "case", "median", "p20 .. p80", "reached", "speed against"], rows, title)
    for name, what in document.get("peers", {}).items():
        say(f"{name}: {what}")
