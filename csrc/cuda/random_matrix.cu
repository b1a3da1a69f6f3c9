// Entries of an implicit random matrix, scaled, one thread each: for tests, and for callers that want it dense.
#include "params.h"
#include "portable.cuh"

namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) random_matrix_kernel(const __grid_constant__ RandomMatrixParams p) {
  const philox::Key key{p.side.key0, p.side.key1};
  const int64_t total = p.rows * p.columns, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const uint32_t row = static_cast<uint32_t>(p.row + i / p.columns);
    const uint64_t column = static_cast<uint64_t>(p.column + i % p.columns);
    const uint32_t word = static_cast<uint32_t>(column / 32 % 4), shift = static_cast<uint32_t>(column % 32);
    float entry;
    if (p.side.kind == Kind::rademacher) {
      entry = pick(philox::rademacher(row, column / 128, key), word) >> shift & 1u ? 1.0f : -1.0f;
    } else if (p.side.kind == Kind::sjlt) {
      const uint32_t k = static_cast<uint32_t>(p.side.k);
      const uint64_t chunk = column / k, lane = column % k;
      const bool hit = (lane + rotation_of(chunk, k, key)) % k == row;
      entry = !hit ? 0.0f : pick(philox::sjlt_signs(column / 128, key), word) >> shift & 1u ? 1.0f : -1.0f;
    } else {
      float four[4];
      philox::gaussian(row, column / 4, key, four);
      entry = column & 2 ? (column & 1 ? four[3] : four[2]) : (column & 1 ? four[1] : four[0]);
    }
    // Rounded before scaling and after, as torch does in T.
    static_cast<T*>(p.out)[i] = from_float<T>(to_float(from_float<T>(entry)) * p.side.scale);
  }
}

}  // namespace

void random_matrix(const RandomMatrixParams& p, uint64_t stream) {
  const auto kernel = p.dtype == Dtype::float32   ? random_matrix_kernel<float>
                      : p.dtype == Dtype::float16 ? random_matrix_kernel<f16>
                                                : random_matrix_kernel<bf16>;
  launch("random_matrix", kernel, strided_grid(p.rows * p.columns, kThreads), kThreads, 0, stream, p);
}
