"""What the listing of GPU kernels reads out of disassemblies, and the arithmetic on top of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import cubins, gpu_static
from benchmarks.cubins import CARDS, Facts

A100, H100, B200 = CARDS
RESOURCES = """
Resource usage:
 Common:
  GLOBAL:0
 Function _Z5firstPf:
  REG:36 STACK:16 SHARED:3072 LOCAL:0 CONSTANT[0]:624 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z6secondPf:
  REG:8 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:624 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
LISTING = """
	code for sm_90a
		Function : _Z5firstPf
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                             /* 0x00000a00ff017b82 */
                                                                                      /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;          /* 0x00000a00ff017b82 */
        /*0020*/              @P1  LDG.E R4, desc[UR4][R2.64] ;                       /* 0x00000a00ff017b82 */
        /*0030*/             @!UP0 LDG.E.U16 R4, desc[UR4][R2.64] ;                   /* 0x00000a00ff017b82 */
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.64 [R3], desc[UR4][R2.64] ; /* 0x0000000000000000 */
        /*0050*/                   HMMA.16816.F32.BF16 R4, R4, R6, R8 ;               /* 0x0000000000000000 */
        /*0060*/                   HMMA.16816.F32.BF16 R4, R4, R6, R8 ;               /* 0x0000000000000000 */
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R4, gdesc[UR8], R8 ;       /* 0x0000000000000000 */
        /*0080*/                   STL.64 [R1], R4 ;                                  /* 0x0000000000000000 */
        /*0090*/                   LDL R4, [R1] ;                                     /* 0x0000000000000000 */
        /*00a0*/                   STG.E.64 desc[UR4][R2.64], R4 ;                    /* 0x0000000000000000 */
		Function : _Z6secondPf
        /*0000*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;        /* 0x0000000000000000 */
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;                       /* 0x0000000000000000 */
"""
ATTRIBUTES = """
.nv.info._Z5firstPf
	<0x1>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x80 0x1 0x1
.nv.info._Z6secondPf
	<0x1>
	Attribute:	EIATTR_REGCOUNT
"""


def test_a_disassembly_is_counted_by_kernel() -> None:
    first, second = cubins.parse(RESOURCES, LISTING, ATTRIBUTES).values()
    # A kilobyte of it is the system's on sm_90.
    assert (first.registers, first.stack, first.shared, first.threads) == (36, 16, 2048, 128)
    assert first.accesses("LDG") == {128: 1, 32: 1, 16: 1}
    assert first.accesses("LDGSTS") == {64: 1}
    assert first.accesses("STG") == {64: 1}
    assert first.tensor == {"HMMA": 2, "HGMMA": 1}
    assert first.local == 2
    assert (second.registers, second.shared, second.threads) == (8, 0, 0)
    assert second.tensor == {"UTCHMMA": 1}
    assert cubins.parse(RESOURCES, LISTING.replace("sm_90a", "sm_80"))["_Z5firstPf"].shared == 3072


def test_remarks_name_what_is_wrong_and_nothing_else() -> None:
    first, second = cubins.parse(RESOURCES, LISTING).values()
    work = gpu_static.Work("", 1, 1)
    assert gpu_static.remarks(first, work) == ["16 bytes of stack, 2 accesses to local memory"]
    assert gpu_static.remarks(second, work) == ["no load wider than 32 bits"]
    plain = Facts(8, 0, 0, Counter({"LDG.E.128": 1}))
    assert gpu_static.remarks(plain, work) == ["no tensor cores"]
    assert gpu_static.remarks(plain, gpu_static.Work("", 1, 1, products=0)) == []


@pytest.mark.parametrize(
    ("card", "threads", "registers", "shared", "blocks"),
    [
        # As the CUDA occupancy calculator has them.
        (A100, 256, 32, 0, 8),  # all 64 warps
        (A100, 256, 33, 0, 6),  # registers are given out 256 a warp: 40 a thread
        (A100, 256, 128, 0, 2),
        (A100, 256, 255, 0, 1),
        (A100, 128, 255, 0, 2),
        (A100, 32, 16, 0, 32),  # blocks run out before warps do
        (A100, 256, 32, 64 << 10, 2),  # 65 KB each of 164
        (H100, 256, 32, 64 << 10, 3),  # of 228
        (H100, 1024, 64, 0, 1),
        (B200, 256, 32, 227 << 10, 1),
        (B200, 256, 32, 228 << 10, 0),  # with the system's kilobyte it does not fit
    ],
)
def test_occupancy(card: Any, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert cubins.blocks_per_multiprocessor(card, threads, registers, shared) == blocks
    assert cubins.occupancy(card, threads, registers, shared) == blocks * threads / 2048


def test_least_times_are_the_longer_of_two() -> None:
    assert gpu_static.Work("", 3350e9, 1).seconds(H100) == 1
    assert gpu_static.Work("", 1, 989e12).seconds(H100) == 1
    assert gpu_static.Work("", 1, 989e12, products=6).seconds(H100) == pytest.approx(6)
    assert gpu_static.Work("", 1, 67e12, products=0).seconds(H100) == 1


def test_names() -> None:
    assert cubins.short("void (anonymous namespace)::rank_keys<bf16>(RankParams)") == "rank_keys<bf16>"
    assert cubins.short("_outer") == "_outer"


def test_the_work_of_every_cuda_kernel_is_known() -> None:
    if not gpu_static.SOURCES.exists():
        pytest.skip("csrc is not beside the tests")
    kernels = {name for source in gpu_static.SOURCES.glob("*.cu") for name in gpu_static.kernels_of(source)}
    assert kernels
    assert kernels <= gpu_static.cuda_launches("float32").keys()


def test_the_page_has_every_kernel_of_the_result(tmp_path: Path) -> None:
    about = {"compiler": "nvcc", "kernel": "rank_keys<bf16>", "op": "rank", "dtype": "bfloat16"}
    facts, work = Facts(40, 0, 0, Counter({"LDG.E.U16": 3}), 256), gpu_static.Work("m 2 n 3", 3350e3, 0, 0)
    kernel = gpu_static.record(about, facts, H100, facts.threads, 4096, work)
    file, page = tmp_path / "found.json", tmp_path / "gpu.md"
    header = {"benchmark": "gpu_static", "compilers": {"nvcc": "13.0"}, "cards": [asdict(H100)]}
    file.write_text(json.dumps(header | {"kernels": [kernel]}))
    page.write_text("before\n<!-- gpu_static -->\n<!-- end of gpu_static -->\nafter\n")
    result = CliRunner().invoke(gpu_static.main, ["--out", str(file), "--page", str(page)], catch_exceptions=False)
    assert "wrote" in result.output
    cells = "`rank_keys<bf16>` | 40 | 0 | 4.0 KB | 75% | - | 3 x 16 | - | 1.0 us | no load wider than 32 bits"
    assert f"| {cells} |" in page.read_text()
    assert "- m 2 n 3: rank_keys" in page.read_text()


def run(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.gpu_static", "--arch", "90", *arguments, "--out", str(file)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(cubins.__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert "least time" in done.stdout
    found = json.loads(file.read_text())
    assert "partial" not in found
    kernels: list[dict[str, Any]] = found["kernels"]
    return kernels


def test_triton_kernels_of_16_bits_use_tensor_cores_and_wide_loads(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    wide, narrow = run(tmp_path, "--only", "triton", "--op", "outer")
    assert [wide["dtype"], narrow["dtype"]] == ["float32", "bfloat16"]
    assert not wide["tensor"]
    assert narrow["tensor"]
    assert not narrow["remarks"]
    assert 0 < narrow["occupancy"] <= 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cuda_kernels_are_compiled_and_read(tmp_path: Path) -> None:
    found = {kernel["kernel"]: kernel for kernel in run(tmp_path, "--only", "nvcc", "--op", "sketch_outer")}
    assert found.keys() == {"sketch_outer_kernel<float>", "sketch_outer_kernel<bf16>", "sketch_outer_kernel<f16>"}
    for kernel in found.values():
        assert kernel["tensor"]["HMMA"] > 0
        assert kernel["threads"] == 256
        assert not kernel["remarks"]
        assert kernel["shared_bytes"] == 74240
