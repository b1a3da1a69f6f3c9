"""What a compiled GPU kernel says of itself without a GPU: registers, memory, instructions, and how many warps fit.

``cuobjdump`` reads it out of a cubin; nothing is run. Occupancy follows from the limits of the architecture (CUDA C++
Programming Guide, technical specifications per compute capability) and the units in which registers and shared memory are
given out (the CUDA occupancy calculator).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click

_WARP, _WARPS, _BLOCKS = 32, 64, 32
_REGISTERS, _REGISTER_UNIT, _WARP_UNIT = 65536, 256, 4
_SHARED_UNIT, _RESERVED = 128, 1024


@dataclass(frozen=True)
class Card:
    """An architecture's limits that differ, and what NVIDIA's data sheet says of the card named (dense, not sparse)."""

    arch: int
    name: str
    shared_kb: int  # of a multiprocessor
    bytes_per_s: float
    tensor_flops: float  # bfloat16 and float16 on tensor cores
    float32_flops: float
    source: str


CARDS = (
    Card(80, "A100 SXM 80 GB", 164, 2039e9, 312e12, 19.5e12, "A100 data sheet, nvidia-us-2188504"),
    Card(90, "H100 SXM", 228, 3350e9, 989e12, 67e12, "H100 data sheet: half of the rates with sparsity"),
    Card(
        100, "B200", 228, 8000e9, 2250e12, 75e12, "HGX B200 data sheet: an eighth of eight cards, half of sparse rates"
    ),
)


@dataclass(frozen=True)
class Facts:
    """Of one kernel: registers of a thread, bytes of its stack, bytes of static shared memory, instructions by name.

    ``threads`` is the most that a block may have, by the kernel's launch bounds; 0 where it has none.
    """

    registers: int
    stack: int
    shared: int
    instructions: Counter[str]
    threads: int = 0

    @property
    def tensor(self) -> dict[str, int]:
        """Instructions of tensor cores, by what they are called: mma.sync, Hopper's and Blackwell's asynchronous ones."""
        return self._counted(r"(?:H|I|D|Q|O)MMA|(?:H|I|Q|B)GMMA|UTC\w*MMA")

    @property
    def local(self) -> int:
        """Loads and stores of memory that registers were spilled to, or that arrays with changing indices live in."""
        return sum(count for name, count in self.instructions.items() if name.split(".")[0] in ("LDL", "STL"))

    def accesses(self, *names: str) -> dict[int, int]:
        """Instructions of these names by the bits that a thread moves with one."""
        found: Counter[int] = Counter()
        for name, count in self.instructions.items():
            first, *rest = name.split(".")
            if first in names:
                found[_bits(rest)] += count
        return dict(sorted(found.items(), reverse=True))

    def _counted(self, pattern: str) -> dict[str, int]:
        found: Counter[str] = Counter()
        for name, count in self.instructions.items():
            if re.fullmatch(pattern, name.split(".")[0]):
                found[name.split(".")[0]] += count
        return dict(found)


def _bits(suffixes: list[str]) -> int:
    for suffix in suffixes:
        if suffix in ("256", "128", "64"):
            return int(suffix)
        if re.fullmatch(r"[US](?:8|16)", suffix):
            return int(suffix[1:])
    return 32


def blocks_per_multiprocessor(card: Card, threads: int, registers: int, shared: int) -> int:
    """Blocks that fit by warps, blocks, registers and shared memory; 0 where one alone does not."""
    warps = -(-threads // _WARP)
    of_warp = -(-max(registers, 1) * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // of_warp // _WARP_UNIT * _WARP_UNIT // warps
    of_block = -(-(shared + _RESERVED) // _SHARED_UNIT) * _SHARED_UNIT
    return min(_WARPS // warps, _BLOCKS, by_registers, card.shared_kb * 1024 // of_block)


def occupancy(card: Card, threads: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's 64 warps that are there at once."""
    return blocks_per_multiprocessor(card, threads, registers, shared) * -(-threads // _WARP) / _WARPS


def parse(resources: str, listing: str, attributes: str = "") -> dict[str, Facts]:
    """Facts by mangled name, from what ``cuobjdump`` prints for ``-res-usage``, ``-sass`` and ``-elf``."""
    counted: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in listing.splitlines():
        if named := re.search(r"Function : (\S+)", line):
            current = counted.setdefault(named[1], Counter())
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            current[found[1]] += 1
    target = re.search(r"code for sm_(\d+)", listing)
    facts = {}
    pattern = r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    for name, registers, stack, shared in re.findall(pattern, resources):
        # From sm_90 on the count has the kilobyte that the system takes of each block.
        own = int(shared) - (_RESERVED if target and int(target[1]) >= 90 else 0)
        bound = re.search(rf"^\.nv\.info\.{re.escape(name)}$(.*?)(?:^\.|\Z)", attributes, re.M | re.S)
        most = bound and re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+0x(\w+)", bound[1])
        threads = int(most[1], 16) if most else 0
        facts[name] = Facts(int(registers), int(stack), max(own, 0), counted.get(name, Counter()), threads)
    return facts


def read(cubin: Path) -> dict[str, Facts]:
    """Facts of the kernels of a cubin by mangled name.

    Raises:
        click.ClickException: no cuobjdump, or it cannot read the file.
    """
    said = [_run(tool("cuobjdump"), option, str(cubin)) for option in ("-res-usage", "-sass", "-elf")]
    return parse(*said)


def demangled(names: list[str]) -> list[str]:
    """Names as C++ has them, without what surrounds them: ``sum_parts_kernel``, ``rank_keys<bf16>``."""
    text = _run(tool("c++filt"), input="\n".join(names)) if names else ""
    return [short(name) for name in text.splitlines()]


def short(name: str) -> str:
    """``rank_keys<bf16>`` of ``void (anonymous namespace)::rank_keys<bf16>(RankParams)``."""
    bare = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    return bare[: bare.rindex("(")] if "(" in bare else bare


def tool(name: str) -> str:
    """A program of the CUDA toolkit, of Triton's package, or of the system.

    Raises:
        click.ClickException: it is in none of these.
    """
    spec = find_spec("triton")
    homes = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    homes += [Path(place) / "backends/nvidia/bin" for place in ((spec and spec.submodule_search_locations) or ())]
    for home in [None, *homes]:
        if found := shutil.which(name, path=None if home is None else str(home)):
            return found
    raise click.ClickException(f"no {name}: it comes with the CUDA toolkit and with triton")


def _run(*command: str, input: str | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, input=input)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
