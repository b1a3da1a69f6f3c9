"""The host machine that runs the CUDA kernels where no card is: what it reports, and that no kernel gives it reason to."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from simt import CUDA, FLAGS, compiler
from torch import Tensor

from influence_fast.ops import cuda
from influence_fast.ops.projections import Side


def runs() -> dict[str, Callable[[], Tensor]]:
    """Every kernel with shared memory, through its loops: by kernel, a call that waits at each of its barriers."""
    random = torch.Generator().manual_seed(3)

    def inputs(n: int, t: int, *features: int) -> list[Tensor]:
        return [torch.randn(n, t, f, generator=random) for f in features]

    x, dy = inputs(1, 150, 40, 40)
    wide_x, wide_dy = inputs(1, 40, 150, 140)
    sides = Side("rademacher", "r", 40, 40), Side("sjlt", "l", 24, 40)
    q, g = torch.randn(3, 40, 40, generator=random), torch.randn(2, 9000, generator=random)
    short = inputs(3, 20, 40, 40)
    return {
        "outer": lambda: cuda.outer(x, dy, None),
        "project_outer, sum_parts": lambda: cuda.project_outer(x, dy, *sides, None),
        "sketch_outer": lambda: cuda.sketch_outer(wide_x, wide_dy, Side("sjlt", "s", 50, 150 * 140), None, None),
        "scores": lambda: cuda.score_outer(x, dy, q, None),
        "ghost_long": lambda: cuda.ghost_dot(x, dy, x, dy, None, None),
        "ghost_long of a sample with itself": lambda: cuda.ghost_norm(x, dy, None),
        "ghost_short": lambda: cuda.ghost_dot(*short, *short, None, None),
        "sketch_dense": lambda: cuda.sketch(g, Side("rademacher", "f", 40, 9000)),
        "sketch_sjlt": lambda: cuda.sketch(g, Side("sjlt", "f", 1, 9000)),
    }


@pytest.mark.parametrize("name", runs())
def test_every_barrier_is_needed(device: str, simt: ModuleType, name: str) -> None:
    """A kernel is right as it is, in several orders; with any one of its barriers left out it races, and that is said.

    Or it is led out of bounds by what it reads too early.
    """
    if device != "cpu":
        pytest.skip("a card does not say")
    call = runs()[name]
    first = call()
    for seed in (1, 2):
        simt.seed(seed)
        assert torch.equal(call(), first)
    kernels = name.split(" of ")[0].split(", ")
    barriers = [barrier for barrier in simt.barriers() if barrier.split()[0] in kernels]
    assert barriers
    try:
        for barrier in barriers:
            simt.leave_out(barrier)
            with pytest.raises(
                RuntimeError, match=rf"{barrier.split()[0]}, block \(.*\), thread \d+: (race: |shared array of)"
            ):
                call()
    finally:
        simt.leave_out("")


def test_every_kernel_and_barrier_is_among_the_runs(device: str, simt: ModuleType) -> None:
    if device != "cpu":
        pytest.skip("a card does not say")
    for call in runs().values():
        call()
    seen = {barrier.split()[1] for barrier in simt.barriers()}
    for source in sorted(CUDA.glob("*.cu*")):
        lines = [line.split("//")[0] for line in source.read_text().splitlines()]
        assert {f"{source.name}:{n}" for n, line in enumerate(lines, 1) if "__syncthreads()" in line} <= seen


FAULTS = r"""
#include "portable.cuh"
#include <cstdio>
#include <cstring>

void stray() { SharedArena a; a.take<float>(8).store(static_cast<int>(threadIdx.x), 1); }
void greedy() { SharedArena a; a.take<float>(1000); }
void misaligned() { SharedArena a; a.take<float>(64).load_vector<float4>(1); }
void race() { SharedArena a; a.take<float>(64).store(5, static_cast<float>(threadIdx.x % 2)); }
void late() {  // a write after reads of another warp
  SharedArena a;
  const auto s = a.take<float>(64);
  const int id = static_cast<int>(threadIdx.x);
  s.store(id, 1);
  __syncthreads();
  s.load(id / 32 * 32);
  s.load(id ^ 32);
  __syncwarp();
  s.store(id, 2);
}
void copied() {  // asynchronous copies are writes of the thread that asked for them
  static const float from[4] = {};
  SharedArena a;
  const auto s = a.take<float>(4);
  if (threadIdx.x == 0) copy_async(s, 0, &from[0], true);
  copy_async_commit();
  copy_async_wait<0>();
  s.load(static_cast<int>(threadIdx.x) % 4);
}
void unsynced() {
  SharedArena a;
  const auto s = a.take<float>(64);
  s.store(static_cast<int>(threadIdx.x), 1);
  s.load(static_cast<int>(threadIdx.x ^ 32));
}
void divergent() { if (threadIdx.x < 40) __syncthreads(); }
void two_places() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
void half_a_warp() { if (threadIdx.x % 32 < 16) warp_ballot(true); }
void fine() {
  SharedArena a;
  const auto s = a.take<float>(64);
  const int id = static_cast<int>(threadIdx.x);
  if (!std::isnan(s.load(id))) throw std::runtime_error("shared memory starts clean");
  s.store(id, 1);
  __syncwarp();
  s.load(id / 32 * 32);
  __syncwarp();
  if (id % 32 == 0) s.store(id, 2);
  __syncwarp();
  s.load(id ^ 1);
  __syncthreads();
  s.load(id ^ 32);
}

int main() {
  struct Case { const char* name; void (*kernel)(); const char* message; };
  const Case cases[] = {
      {"stray", stray, "shared array of 8 used at"}, {"greedy", greedy, "more shared memory"},
      {"misaligned", misaligned, "misaligned"},
      {"race", race, "race: writes byte 20 of shared memory, which thread "}, {"unsynced", unsynced, "race"},
      {"late", late, "race: writes"}, {"copied", copied, "with no barrier in between"},
      {"divergent", divergent, "__syncthreads was not reached by all"},
      {"two_places", two_places, "different __syncthreads"}, {"half_a_warp", half_a_warp, "not reached by all lanes"},
      {"fine", fine, nullptr}};
  int bad = 0;
  for (const Case& c : cases) {
    std::string seen;
    try {
      launch(c.name, c.kernel, dim3(2), 64, 512, 0);
    } catch (const std::exception& e) {
      seen = e.what();
    }
    const bool right = c.message ? seen.find(c.message) != std::string::npos &&
                                       seen.find(std::string(c.name) + ", block (") == 0
                                 : seen.empty();
    if (!right) ++bad, std::printf("%s: %s\n", c.name, seen.c_str());
  }
  return bad;
}
"""


def test_host_machine_reports_faults(tmp_path: Path) -> None:
    source, program = tmp_path / "faults.cpp", tmp_path / "faults"
    source.write_text(FAULTS)
    subprocess.run([compiler(), *FLAGS, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
