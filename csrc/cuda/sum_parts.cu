// The second stage of every operation that is cut into parts: adds them in a fixed order.
//
// A block adds 32 outputs; its eight warps take every eighth part, so that hundreds of parts are not one long chain of
// waits for memory, and the warps' sums add up in order.
#include "params.h"
#include "portable.cuh"

namespace {

constexpr int kThreads = 256, kOutputs = 32, kWarps = kThreads / kOutputs;

__global__ void __launch_bounds__(kThreads) sum_parts_kernel(const __grid_constant__ SumPartsParams p) {
  SharedArena arena;
  const Shared<float> sums = arena.take<float>(kThreads);
  const int lane = static_cast<int>(threadIdx.x % kOutputs), warp = static_cast<int>(threadIdx.x / kOutputs);
  const int64_t total = p.samples * p.inner;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kOutputs; base < total;
       base += static_cast<int64_t>(gridDim.x) * kOutputs) {
    const int64_t i = base + lane;
    float sum = 0;
    if (i < total) {
      const int64_t sample = i / p.inner;
      int64_t splits = p.splits;
      if (p.spans) {
        const int64_t live = ceil_div(p.spans[2 * sample + 1] - p.spans[2 * sample], p.tile);
        splits = live < 1 ? 1 : live;
      }
      const float* part = p.parts + sample * p.sample_stride + (i - sample * p.inner);
#pragma unroll 8
      for (int64_t s = warp; s < splits; s += kWarps) sum += part[s * p.split_stride];
    }
    sums.store(static_cast<int>(threadIdx.x), sum);
    __syncthreads();
    if (warp == 0 && i < total) {
      for (int w = 1; w < kWarps; ++w) sum += sums.load(w * kOutputs + lane);
      p.out[i] = sum * p.scale;
    }
    __syncthreads();
  }
}

}  // namespace

void sum_parts(const SumPartsParams& p, uint64_t stream) {
  launch("sum_parts", sum_parts_kernel, strided_grid(p.samples * p.inner, kOutputs), kThreads,
         kThreads * sizeof(float), stream, p);
}
