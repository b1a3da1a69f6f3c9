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


@click.command(epilog=example("influence-fast bench --op rank --op vote"))
@click.option("--op", "op_names", multiple=True, help="Operation to time; all by default.")
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]), help="Where the tensors are.")
@click.option(
    "--dtype", default="float32", type=click.Choice(["float32", "float16", "bfloat16"]), help="Type of the inputs."
)
@click.option("--repeats", default=9, help="Rounds, in which each candidate takes its turn.")
@json_option
def bench(op_names: tuple[str, ...], device: str, dtype: str, repeats: int, as_json: bool) -> None:
    """Time the kernels on this machine, each verified first, beside plain torch."""
    import torch

    from influence_fast.diagnostics import kernel_bench

    unknown = [name for name in op_names if name not in kernel_bench.OPS]
    if unknown:
        raise InputError(f"op: expected some of {', '.join(kernel_bench.OPS)}, got {unknown[0]!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: this machine has no CUDA device")
    kind = getattr(torch, dtype)
    found = [
        kernel_bench.measure(case, device, repeats)
        for op in op_names or kernel_bench.OPS
        for case in kernel_bench.cases(op, device, kind)
    ]
    document = {
        "machine": kernel_bench.machine(device),
        "dtype": dtype,
        "ceilings": kernel_bench.ceilings(device, kind),
        "results": found,
    }
    print_document(document, as_json, lambda: bench_table(document))


def bench_table(document: dict[str, Any]) -> None:
    """Print a document of measurements."""
    ceilings = document["ceilings"]
    rows = []
    for result in document["results"]:
        share = [
            f"{result[key] / ceilings[ceiling]:.0%} of {name}"
            for key, ceiling, name in (
                ("bytes_per_s", "copy_bytes_per_s", "copy"),
                ("flops_per_s", "matmul_flops_per_s", "matmul"),
            )
            if result[key]
        ]
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
