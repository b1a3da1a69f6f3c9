"""What the GPU kernels are once compiled, where no GPU is: registers, spills, memory, tensor cores, loads, least times.

The CUDA kernels are compiled by ``nvcc``, the Triton kernels by Triton for the launches that our functions make at the
shapes named, each for sm_80, sm_90 and sm_100::

    python -m benchmarks.gpu_static                   # a table
    python -m benchmarks.gpu_static --arch 90 --only triton --json

Nothing is run. Occupancy follows from the architecture's limits. The least time is what the bytes that must move and the
FLOPs that must be done take at the rates of a card's data sheet, whichever is longer; what a kernel takes is not known here.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import cubins, protocol
from benchmarks.cubins import CARDS, Card, Facts
from influence_fast.ops import Side

SOURCES = Path(__file__).parents[1] / "csrc/cuda"
# The flags of setup.py that code follows from.
_NVCC = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin")
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_TYPES = {"float": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Work:
    """What an operation has to do at a shape: bytes that must move, FLOPs, and where those are done at best.

    ``products`` is how many products of 16-bit parts stand for one of float32 on tensor cores; 0 where they are not used.
    """

    shape: str
    bytes: float
    flops: float
    products: int = 1

    def seconds(self, card: Card) -> float:
        rate = card.tensor_flops / self.products if self.products else card.float32_flops
        return max(self.bytes / card.bytes_per_s, self.flops / rate)


@dataclass(frozen=True)
class Launched:
    """A kernel at a shape: dynamic shared memory of a block, and what the operation has to do."""

    shared: int
    work: Work


def cuda_launches(dtype: str) -> dict[str, Launched]:
    """By kernel, as its function in ``csrc/cuda`` launches it."""
    e, wide = _BYTES[dtype], dtype == "float32"
    n, t, i, o, k = 2, 512, 4096, 14336, 64
    project = Work(
        f"N {n} T {t} i {i} o {o} k {k}, {k}", e * n * t * (i + o), 2 * n * t * k * (i + o), 3 if wide else 1
    )
    n, t, i, o, k = 16, 128, 1024, 1024, 4096
    sketched = Work(
        f"N {n} T {t} i {i} o {o} k {k} sjlt", e * n * t * (i + o) + 4 * n * k, 2 * n * t * i * o, 6 if wide else 1
    )
    operands = 52224  # of a tile of G: three stages of 32 tokens of two operands, or two of 16 tokens in three parts
    gram = 576 if wide else 480  # likewise, of a token of a tile of inner products
    rows, d, small = 16, 589_824, 512
    dense = Work(f"N {rows} D {d} k {small}", e * rows * d, 2 * rows * d * small, 3 if wide else 1)
    sjlt = Work(f"N {rows} D {d} k {small} sjlt", e * rows * d, rows * d, 0)
    t, text, few = 128, f"N {n} T 128 i {i} o {o}", f"N {n}, {n} T 64 i {i} o {o}"
    outer = Work(text, e * n * t * (i + o) + 4 * n * i * o, 2 * n * t * i * o, 6 if wide else 1)
    norms = Work(text, e * n * t * (i + o), n * t * t * (i + o), 6 if wide else 1)
    dots = Work(few, 2 * e * n * 64 * (i + o), 2 * (n * 64) ** 2 * (i + o), 6 if wide else 1)
    scores = Work(
        f"{text} m 8", 4 * (n + 8) * i * o, 2 * n * 8 * i * o, 6
    )  # of float32 gradients that were made before
    m, columns = 200, 100_000
    numbers = m * columns
    text = f"m {m} n {columns}"
    return {
        "project_outer_kernel": Launched(4 * 32 * 4 * (64 + 64), project),
        "sketch_outer_kernel": Launched(operands + 128 * 11 * 4 + 4 * 4096, sketched),
        "outer_kernel": Launched(operands, outer),
        "ghost_long_kernel": Launched(gram * (64 if wide else 128), norms),
        "ghost_short_kernel": Launched(gram * 64, dots),
        "scores_kernel": Launched(576 * 64, scores),
        "sketch_dense_kernel": Launched(8 * 32 * 32 * 4, dense),
        "sketch_sjlt_kernel": Launched(32 * 4 + 32 * 6 * 16 + 256 * 4, sjlt),
        "sum_parts_kernel": Launched(256 * 4, Work("N 16, 64 parts of 512", 4 * 16 * 65 * 512, 16 * 64 * 512, 0)),
        "random_matrix_kernel": Launched(0, Work(f"k {small} D {d}", e * small * d, 0, 0)),
        "rank_keys": Launched(0, Work(text, (e + 12) * numbers, 0, 0)),
        "rank_runs": Launched(0, Work(text, 16 * numbers, 0, 0)),
        "vote_kernel": Launched(0, Work(text, 4 * numbers, 0, 0)),
    }


def triton_calls(dtype: torch.dtype) -> dict[str, tuple[Callable[[], Any], Work]]:
    """By operation: a call of ours at a shape, on tensors without memory, and what it has to do."""
    import influence_fast.ops.triton as ours

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    e, wide = dtype.itemsize, dtype == torch.float32
    n, t, i, o, m = 16, 128, 1024, 1024, 8
    x, dy, few_x, few_dy = empty(n, t, i), empty(n, t, o), empty(n, 64, i), empty(n, 64, o)
    queries = torch.empty(m, o, i, device="meta")
    read, text, units = e * n * t * (i + o), f"N {n} T {t} i {i} o {o}", 0 if wide else 1
    right, left = Side("rademacher", 1, 64, 4096), Side("rademacher", 2, 64, 14336)
    large_x, large_dy = empty(2, 512, 4096), empty(2, 512, 14336)
    rows, d, k = 16, 589_824, 512
    g = empty(rows, d)
    return {
        "outer": (lambda: ours.outer(x, dy, None), Work(text, read + 4 * n * i * o, 2 * n * t * i * o, units)),
        "project_outer": (
            lambda: ours.project_outer(large_x, large_dy, right, left, None),
            Work("N 2 T 512 i 4096 o 14336 k 64, 64", e * 1024 * 18432, 2 * 1024 * 64 * 18432, 3 if wide else 1),
        ),
        "score_outer": (
            lambda: ours.score_outer(x, dy, queries, None),
            Work(f"{text} m {m}", read + 4 * m * i * o, 2 * n * (t + m) * i * o, units),
        ),
        "ghost_dot": (
            lambda: ours.ghost_dot(few_x, few_dy, few_x, few_dy, None, None),
            Work(f"N {n}, {n} T 64 i {i} o {o}", 2 * e * n * 64 * (i + o), 2 * (n * 64) ** 2 * (i + o), units),
        ),
        "ghost_norm": (lambda: ours.ghost_norm(x, dy, None), Work(text, read, n * t * t * (i + o), units)),
        "sketch": (
            lambda: ours.sketch(g, Side("rademacher", 1, k, d)),
            Work(f"N {rows} D {d} k {k}", e * rows * d, 2 * rows * d * k, 3 if wide else 1),
        ),
        "sketch sjlt": (
            lambda: ours.sketch(g, Side("sjlt", 1, k, d)),
            Work(f"N {rows} D {d} k {k} sjlt", e * rows * d, rows * d, 0),
        ),
    }


class _NoDevice:
    """What Triton asks a driver for when it compiles: the target, and nothing that a GPU would have to answer."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def triton_kernels(card: Card, ops: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """A record for each operation's kernel, in float32 and bfloat16."""
    try:
        from triton.runtime import JITFunction, driver
    except ImportError as error:
        raise click.ClickException(f"triton is not installed ({error})") from None
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise click.ClickException("TRITON_INTERPRET=1: nothing is compiled there")
    run, active, compiled = JITFunction.run, driver._active, list[tuple[str, Any]]()

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled.append((self.__name__, made))
        return made

    JITFunction.run = compile_only
    driver.set_active(_NoDevice(card.arch))
    try:
        for dtype in (torch.float32, torch.bfloat16):
            for op, (call, work) in triton_calls(dtype).items():
                if ops and op not in ops:
                    continue
                compiled.clear()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    call()
                for name, made in dict(compiled).items():
                    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                        Path(file.name).write_bytes(made.asm["cubin"])
                        [facts] = cubins.read(Path(file.name)).values()
                    about = {"compiler": "triton", "kernel": name, "op": op, "dtype": str(dtype).removeprefix("torch.")}
                    # What Triton counts of shared memory is what it asks for at the launch.
                    yield record(about, facts, card, 32 * made.metadata.num_warps, made.metadata.shared, work)
    finally:
        JITFunction.run = run
        driver._active = active


def cuda_kernels(card: Card, ops: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """A record for each kernel of ``csrc/cuda``."""
    sources = sorted(source for source in SOURCES.glob("*.cu") if not ops or source.stem in ops)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        files = [Path(folder, source.with_suffix(".cubin").name) for source in sources]
        list(pool.map(_compiled, sources, files, [card] * len(files)))
        for source, file in zip(sources, files, strict=True):
            ours = kernels_of(source)
            found = cubins.read(file)
            for name, facts in zip(cubins.demangled(list(found)), found.values(), strict=True):
                kernel, _, types = name.rstrip(">").partition("<")
                if kernel not in ours:
                    continue  # of the library that sorts
                dtype = next((_TYPES[word] for word in re.findall(r"\w+", types) if word in _TYPES), "")
                launched = cuda_launches(dtype or "float32").get(kernel)
                about = {"compiler": "nvcc", "kernel": name, "op": source.stem, "dtype": dtype}
                shared, work = (None, None) if launched is None else (launched.shared, launched.work)
                yield record(about, facts, card, facts.threads, shared, work)


def kernels_of(source: Path) -> set[str]:
    """Names of the kernels that a file defines."""
    return set(re.findall(r"__global__[^;{]*?(\w+)\s*\(const __grid_constant__", source.read_text()))


def _compiled(source: Path, file: Path, card: Card) -> None:
    command = [cubins.tool("nvcc"), *_NVCC, f"-arch=sm_{card.arch}", str(source), "-o", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)}:\n{done.stderr.strip()}")


def record(
    about: dict[str, str], facts: Facts, card: Card, threads: int, shared: int | None, work: Work | None
) -> dict[str, Any]:
    """All that is said of a kernel; ``shared`` is what is asked for at the launch, None where that is not known."""
    both = facts.shared + (shared or 0)
    return {
        **about,
        "arch": card.arch,
        "threads": threads,
        "registers": facts.registers,
        "stack_bytes": facts.stack,
        "local_instructions": facts.local,
        "shared_bytes": None if shared is None else both,
        "occupancy": None if shared is None else cubins.occupancy(card, threads, facts.registers, both),
        "tensor": facts.tensor,
        "loads": facts.accesses("LDG"),
        "copies": facts.accesses("LDGSTS", "UTMALDG", "UBLKCP"),
        "stores": facts.accesses("STG"),
        "work": None if work is None else asdict(work),
        "least_seconds": None if work is None else work.seconds(card),
        "remarks": remarks(facts, work),
    }


def remarks(facts: Facts, work: Work | None) -> list[str]:
    """What a reader should ask about."""
    found = []
    if facts.stack or facts.local:
        found.append(f"{facts.stack} bytes of stack, {facts.local} accesses to local memory")
    wide = [bits for bits in (*facts.accesses("LDG"), *facts.accesses("LDGSTS", "UTMALDG", "UBLKCP")) if bits > 32]
    if not wide and facts.accesses("LDG"):
        found.append("no load wider than 32 bits")
    if work is not None and work.products and work.flops and not facts.tensor:
        found.append("no tensor cores")
    return found


def _counts(counts: dict[Any, int]) -> str:
    return ", ".join(f"{count} x {bits}" for bits, count in counts.items()) or "-"


COLUMNS = (
    "kernel",
    "registers",
    "stack",
    "shared",
    "occupancy",
    "tensor cores",
    "loads",
    "copies",
    "least time",
    "remarks",
)


def cells(kernel: dict[str, Any]) -> list[str]:
    """A kernel as a row of the table and of the page."""
    title = (
        kernel["kernel"] if kernel["compiler"] == "nvcc" else f"{kernel['kernel']} ({kernel['op']}, {kernel['dtype']})"
    )
    seconds, shared, share = kernel["least_seconds"], kernel["shared_bytes"], kernel["occupancy"]
    return [
        title,
        str(kernel["registers"]),
        str(kernel["stack_bytes"]),
        "not known" if shared is None else f"{shared / 1024:.1f} KB",
        "not known" if share is None else f"{share:.0%}",
        ", ".join(f"{count} {name}" for name, count in kernel["tensor"].items()) or "-",
        _counts(kernel["loads"]),
        _counts(kernel["copies"]),
        "-" if seconds is None else f"{1e6 * seconds:.1f} us",
        "; ".join(kernel["remarks"]) or "-",
    ]


def rates(card: dict[str, Any]) -> str:
    """What least times follow from."""
    tensor, other = card["tensor_flops"] / 1e12, card["float32_flops"] / 1e12
    return (
        f"sm_{card['arch']}, {card['name']}: {card['bytes_per_s'] / 1e9:.0f} GB/s, {tensor:.0f} TFLOP/s in 16 bits on "
        f"tensor cores, {other:.1f} in float32 ({card['source']})"
    )


def print_table(document: dict[str, Any]) -> None:
    for card in document["cards"]:
        table = Table(title=rates(card), title_justify="left")
        for name in COLUMNS:
            table.add_column(name, overflow="fold")
        for kernel in document["kernels"]:
            if kernel["arch"] == card["arch"]:
                table.add_row(*cells(kernel))
        Console(width=max(150, Console().width)).print(table)


def table_of(document: dict[str, Any]) -> list[str]:
    """The lines of the page."""
    compilers = ", ".join(f"{name} {version}" for name, version in document["compilers"].items())
    lines = [f"By {compilers}.", ""]
    for card in document["cards"]:
        lines += [rates(card) + ".", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        # float16 differs from bfloat16 in the names of instructions alone.
        mine = [k for k in document["kernels"] if k["arch"] == card["arch"] and k["dtype"] != "float16"]
        for kernel in mine:
            title, *rest = cells(kernel)
            lines.append(f"| `{title}` | {' | '.join(rest)} |")
        lines.append("")
    shapes = dict[str, list[str]]()
    for kernel in document["kernels"]:
        if kernel["work"] is not None:
            names = shapes.setdefault(kernel["work"]["shape"], [])
            name = kernel["kernel"].partition("<")[0]
            if name not in names:
                names.append(name)
    lines += ["Shapes of the least times:", ""]
    return lines + [f"- {shape}: {', '.join(names)}" for shape, names in shapes.items()]


def _version(*command: str) -> str:
    text = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found[1] if found else ""


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option(
    "--arch", "archs", type=click.Choice([str(card.arch) for card in CARDS]), multiple=True, help="Default: all."
)
@click.option("--only", type=click.Choice(["nvcc", "triton"]), help="Kernels of one compiler.")
@click.option("--op", "ops", multiple=True, help="Operations, or files of csrc/cuda; default: all.")
@protocol.out_option("An earlier result there is replaced.")
@click.option(
    "--page", type=click.Path(path_type=Path, exists=True), help="Put the tables of the result into this page."
)
@protocol.json_option
def main(
    archs: Sequence[str], only: str | None, ops: Sequence[str], out: Path | None, page: Path | None, as_json: bool
) -> None:
    cards = [card for card in CARDS if not archs or str(card.arch) in archs]
    makers = {"nvcc": cuda_kernels, "triton": triton_kernels}
    file = protocol.result_file(out or (page and protocol.RESULTS / "gpu_static.json"), "gpu_static")
    there = protocol.previous(file, "gpu_static")
    if page is not None:
        if not there:
            raise click.UsageError(f"--page: {file} has no result")
        protocol.write_section(page, "gpu_static", table_of(there))
        click.echo(f"wrote {page}")
        return
    versions = {}
    if only != "triton":
        versions["nvcc"] = _version(cubins.tool("nvcc"), "--version")
    if only != "nvcc":
        import importlib.metadata

        versions["triton"] = importlib.metadata.version("triton")
    document = protocol.header("gpu_static") | {
        "compilers": versions,
        "cards": [asdict(card) for card in cards],
        "kernels": [],
    }
    steps = [(compiler, card) for compiler in versions for card in cards]
    with protocol.Results(file, document) as results, protocol.Progress(len(steps)) as progress:
        for compiler, card in steps:
            with progress.step(f"{compiler} sm_{card.arch}"):
                results.add(kernels=[*document["kernels"], *makers[compiler](card, ops)])
    protocol.show(document, as_json, print_table)


if __name__ == "__main__":
    main()
