// The second stage of every operation that is cut into parts: adds them in a fixed order.
#include "params.h"
#include "portable.cuh"

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) sum_parts_kernel(const __grid_constant__ SumPartsParams p) {
  const int64_t total = p.samples * p.inner, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t sample = i / p.inner;
    int64_t splits = p.splits;
    if (p.spans) {
      const int64_t live = ceil_div(p.spans[2 * sample + 1] - p.spans[2 * sample], p.tile);
      splits = live < 1 ? 1 : live;
    }
    const float* part = p.parts + sample * p.sample_stride + i % p.inner;
    float sum = 0;
    for (int64_t s = 0; s < splits; ++s) sum += part[s * p.split_stride];
    p.out[i] = sum * p.scale;
  }
}

}  // namespace

void sum_parts(const SumPartsParams& p, uint64_t stream) {
  const int64_t blocks = ceil_div<int64_t>(p.samples * p.inner, kThreads);
  launch("sum_parts", sum_parts_kernel, dim3(static_cast<unsigned>(blocks < 65536 ? blocks : 65536)), kThreads, 0,
         stream, p);
}
