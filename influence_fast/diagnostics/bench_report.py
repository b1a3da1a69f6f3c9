"""A result of the benchmark as a drawing and as a page: how near each operation comes to what the machine can do.

The roofline (Williams, Waterman and Patterson, 2009) has a roof of two pieces, both measured on the machine: how fast it
copies, for work with few FLOPs a byte, and how fast it multiplies matrices, for the rest. Bytes and FLOPs are those that the
work needs, so a kernel whose inputs lie in cache can stand above the roof.
"""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import jinja2

# Of Okabe and Ito's colours for all kinds of sight; with each a marker.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7f8a99")
_MARKERS = "osD^vP*X"


def shares(result: dict[str, Any], ceilings: dict[str, float]) -> dict[str, float]:
    """Share of copy bandwidth and of the matmul rate that an operation reaches; without the one that it has no work for."""
    found = {
        "copy": result["bytes_per_s"] / ceilings["copy_bytes_per_s"],
        "matmul": result["flops_per_s"] / ceilings["matmul_flops_per_s"],
    }
    return {name: share for name, share in found.items() if share}


def roofline(document: dict[str, Any]) -> str:
    """The drawing, as SVG: the roofline, and below it each case's shares of both ceilings."""
    import matplotlib
    from matplotlib.figure import Figure

    count = len(document["results"])
    # A fixed salt and no date: the same result gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9, 5.2 + 0.26 * count), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=[4.6, 0.6 + 0.26 * count])
        _draw_roof(above, document)
        _draw_shares(below, document)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()


def page(document: dict[str, Any], comparison: dict[str, Any] | None = None) -> str:
    """One HTML file that needs nothing else: machine, drawing, every time, and the comparison where there is one."""
    drawing = roofline(document)
    rows = [{**row, "shares": shares(row, document["ceilings"])} for row in document["results"]]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("bench.html.j2").render(
        document=document, rows=rows, comparison=comparison, drawing=drawing[drawing.index("<svg") :]
    )


def _draw_roof(axes: Any, document: dict[str, Any]) -> None:
    copy, matmul = (document["ceilings"][name] for name in ("copy_bytes_per_s", "matmul_flops_per_s"))
    ridge = matmul / copy
    points = [
        (row["flops_per_s"] / row["bytes_per_s"], row["flops_per_s"], row)
        for row in document["results"]
        if row["flops_per_s"] and row["bytes_per_s"]
    ]
    reached = [intensity for intensity, _, _ in points]
    left, right = min([ridge, *reached]) / 3, max([ridge, *reached]) * 3
    axes.plot([left, ridge, right], [left * copy, matmul, matmul], color="black", linewidth=1.5)
    axes.annotate(f"copies {copy / 1e9:.1f} GB/s", (left, left * copy), (4, 12), textcoords="offset points", rotation=0)
    axes.annotate(
        f"multiplies {matmul / 1e9:.0f} GFLOP/s", (right, matmul), (-4, 5), textcoords="offset points", ha="right"
    )
    looks = itertools.cycle(zip(_COLOURS, _MARKERS, strict=True))
    look = {op: next(looks) for op in dict.fromkeys(row["op"] for _, _, row in points)}
    for op, (colour, marker) in look.items():
        mine = [(intensity, rate) for intensity, rate, row in points if row["op"] == op]
        axes.plot(*zip(*mine, strict=True), linestyle="none", marker=marker, color=colour, markersize=6, label=op)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs that the work needs, a byte that it moves", ylabel="GFLOP/s")
    for axis, unit in ((axes.xaxis, 1), (axes.yaxis, 1e9)):
        for level in (axis.set_major_formatter, axis.set_minor_formatter):
            level(lambda value, _, unit=unit: f"{value / unit:g}")
    axes.tick_params(which="minor", labelsize=7)
    axes.set_title(f"Roofline: {_title(document)}", loc="left", fontsize=10)
    axes.grid(True, which="major", linewidth=0.3)
    if points:
        axes.legend(loc="lower right", frameon=False)


def _draw_shares(axes: Any, document: dict[str, Any]) -> None:
    rows = document["results"]
    found = [shares(row, document["ceilings"]) for row in rows]
    for offset, name, colour, hatch in ((-0.2, "copy", _COLOURS[0], ""), (0.2, "matmul", _COLOURS[1], "///")):
        at = [place + offset for place, share in enumerate(found) if name in share]
        axes.barh(
            at,
            [share[name] for share in found if name in share],
            0.38,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=f"of {name}",
        )
    for place, share in enumerate(found):
        if share:
            axes.annotate(
                f"{max(share.values()):.0%}",
                (max(share.values()), place),
                (3, 0),
                textcoords="offset points",
                va="center",
            )
    axes.set_yticks(range(len(rows)), [f"{row['op']} {row['case']}" for row in rows])
    axes.axvline(1, color="black", linewidth=1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(xlabel="share of what the machine does at best", ylim=(len(rows) - 0.4, -0.6))
    axes.margins(x=0.08)
    if rows:
        axes.legend(loc="best", frameon=False)


def _title(document: dict[str, Any]) -> str:
    machine = document["machine"]
    return f"{machine['device']}, {document['dtype']}, {machine['threads']} threads"
