"""What a billion rows take in disk, machines and seconds, reckoned from what ``benchmarks.million`` measured: a page.

``python -m benchmarks.billion_page --out docs/billion.md`` makes it from the largest result of ``benchmarks.million`` in
``benchmarks/results`` alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from benchmarks import protocol

_MACHINES = (1, 4, 16, 64)
_BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0}


@click.command()
@click.option(
    "--result",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A result of benchmarks.million; by default the one of most rows in benchmarks/results.",
)
@click.option("--rows", default=1_000_000_000, show_default=True, help="Rows to reckon for.")
@click.option("--memory", default=256.0, show_default=True, help="GiB of memory of a machine.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("docs/billion.md"),
    help="The page; an earlier one is replaced.",
)
def main(result: Path | None, rows: int, memory: float, out: Path) -> None:
    """Write the page of arithmetic."""
    file = result or _largest(protocol.RESULTS)
    protocol.write_text(out, page_of(json.loads(file.read_text()), file.name, rows, memory))
    click.echo(f"wrote {out} from {file.name}")


def _largest(folder: Path) -> Path:
    """The result of most rows, the newest of those."""
    found = []
    for file in folder.glob("million-*.json"):
        document = json.loads(file.read_text())
        if document.get("benchmark") == "million" and {"million", "rank_vote", "mean"} <= document.keys():
            found.append((document["rows"], document["date"], file.name))
    if not found:
        raise click.UsageError(f"--result: no result of benchmarks.million in {folder}; run it first")
    return folder / max(found)[2]


def page_of(document: dict[str, Any], name: str, rows: int, memory: float) -> str:
    """The page of a result of ``benchmarks.million``, for so many rows on machines of so many GiB."""
    measured, dims, every = document["rows"], document["dims"], document["million"]
    times, layers = rows / measured, dims // 128
    index = every["bytes"] / measured * rows
    disk = [(kind, rows * (dims * size + (4 * layers if kind == "int8" else 0))) for kind, size in _BYTES.items()]
    least = max(1, -(-int(index) // int(memory * 2**30)))
    loads = [value for pair in document["load"].values() for value in pair]
    # The store may be of an earlier run.
    loads += document["store"].get("load", [])
    lines = [
        "# A billion rows",
        "",
        f"What {rows:,} rows of {dims} numbers take, reckoned from the rates that `benchmarks.million` measured on "
        f"{measured:,} rows: two cores of an {document['machine']['device'].replace('(R)', '')}, load average "
        f"{min(loads):.1f} to {max(loads):.1f} meanwhile (`benchmarks/results/{name}`). With a load above 2 the times are "
        "upper bounds. `python -m benchmarks.billion_page` writes this page; `--rows` and `--memory` reckon for others.",
        "",
        "Everything that is reckoned grows with the number of rows: the store and its index a row at a time, an exact "
        "search by cosine that reads the whole index, and ranks. A search by inner product reads the rows whose length does "
        "not rule them out; their share was taken as it was measured, though it falls with more rows.",
        "",
        "## Disk",
        "",
        "| what | bytes a row | in all |",
        "|---|---|---|",
        *(f"| store, {kind} | {size / rows:.0f} | {_size(size)} |" for kind, size in disk),
        f"| exact index, {every['share_of_float32']:.1%} of float32 | {index / rows:.0f} | {_size(index)} |",
        "",
        "Factors (`build --factors`) and fewer layers take less; more numbers a row take more, in proportion.",
        "",
        "## Machines",
        "",
        f"An index is mapped, and is fast where the page cache holds it: {_size(index)} take {least} machine"
        f"{'s' * (least > 1)} of {memory:g} GiB. Rows are spread over machines by `index --rows`, and `search` under "
        f"`torchrun` merges what each finds (`examples/slurm`). On machines like the one that was measured:",
        "",
        "| machines | index on each | one query, cosine | one query, dot | 200 queries at once, cosine |",
        "|---|---|---|---|---|",
    ]
    for machines in sorted({*_MACHINES, least}):
        part = times / machines / 1e3
        lines.append(
            f"| {machines} | {_size(index / machines)} | {_time(every['cosine']['p50_ms'] * part)} | "
            f"{_time(every['dot']['p50_ms'] * part)} | {_time(200 * every['cosine']['batch_ms_per_query'] * part)} |"
        )
    floor = every["cosine"]["floor_ms"] * times / 1e3
    lines += [
        "",
        f"The floor of a cosine on one such machine, its bytes at what it reads from memory "
        f"({document['read_bytes_per_s'] / 1e9:.1f} GB/s with what else ran), is {_time(floor)}. Machines of more channels "
        "are faster in proportion. An index that does not fit into memory is read from disk at each search: at 5 GB/s of an "
        f"NVMe drive {_time(index / 5e9)} on one machine.",
        "",
        "## Time to build and to score, on one machine",
        "",
        "| work | measured | reckoned |",
        "|---|---|---|",
        _line("write the store", document["store"]["build_s"], measured, times),
        _line("build the exact index", every["build_s"], measured, times),
        _line(
            f"rank and vote, {document['rank_vote']['rows']} (layer, query) rows", *_of(document, "rank_vote"), times
        ),
        _line("mean of the same", *_of(document, "mean"), times),
        "",
        "Each is divided by the number of machines, which share rows (`build`, `index`, `search`) or layers and queries "
        "(`score`). Computing the gradients comes on top, and is what takes longest: `influence-fast build --dry-run` "
        "measures it for a model on your machine.",
    ]
    return "\n".join(lines) + "\n"


def _of(document: dict[str, Any], key: str) -> tuple[float, int]:
    return document[key]["seconds"], document["rows"]


def _line(what: str, seconds: float, rows: int, times: float) -> str:
    return f"| {what} | {_time(seconds)} for {rows:,} rows | {_time(seconds * times)} |"


def _size(count: float) -> str:
    return (
        f"{count / 1e12:.2f} TB"
        if count >= 1e12
        else f"{count / 1e9:.1f} GB"
        if count >= 1e9
        else f"{count / 1e6:.0f} MB"
    )


def _time(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


if __name__ == "__main__":
    main()
