// Flat sketches g (N, D) -> (N, k), D beyond 2^31: the matrix is made on the fly, the features are cut into splits that
// leave parts (splits, N, k), added in a fixed order by a second launch.
//
// Dense Rademacher: project.cuh on tensor cores. N = 16, D = 589,824, k = 512 is 9.7 GFLOP on 302 M signs: making them
// takes ~15 us of issue slots on 132 multiprocessors, multiplying as long, reading g (19 MB) 6 us.
//
// SJLT: out[m] sums one signed feature of every chunk of k, a gather: a thread owns one output of 8 rows, neighbours
// read neighbouring features (up to the rotation), nothing is multiplied. ~6 instructions per element against 20 that
// a multiprocessor can issue while sixteen bits arrive: memory-bound.
#include "project.cuh"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Panels of columns side by side in a block; the remaining warps share its features in slices.
__host__ __device__ constexpr int panels_of(int64_t k) {
  int panels = 1;
  while (panels < kWarps && panels * kPanel < k) panels *= 2;
  return panels;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 1 : 2)
    sketch_dense_kernel(const __grid_constant__ SketchParams p) {
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int panels = panels_of(p.side.k), slices = kWarps / panels, slice = warp / panels;
  const int64_t k = p.side.k, column = (static_cast<int64_t>(blockIdx.z) * panels + warp % panels) * kPanel;
  const int columns = static_cast<int>(k - column < 0 ? 0 : k - column > kPanel ? kPanel : k - column);
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRowTile, left = p.g.rows - row0;
  const int live = static_cast<int>(left > kRowTile ? kRowTile : left);
  const T* rows = static_cast<const T*>(p.g.data) + row0 * p.g.row_stride;
  const bool aligned = (reinterpret_cast<uintptr_t>(rows) | static_cast<uintptr_t>(p.g.row_stride) * sizeof(T)) % 16 == 0;
  const int64_t blocks = ceil_div<int64_t>(p.g.columns, kBlock), split = blockIdx.y;
  const int64_t first = blocks * split / p.splits, last = blocks * (split + 1) / p.splits;

  SharedArena arena;
  const Shared<float> sums = arena.take<float>(kWarps * kAccumulators * 32);  // each thread's own until the barrier
  const int own = warp * kAccumulators * 32 + lane;
  for (int i = 0; i < kAccumulators; ++i) sums.store(own + 32 * i, 0);
  const Panel panel{static_cast<uint32_t>(column), ceil_div(columns, 8)};
  if (columns > 0) {
    for (int64_t block = first + slice; block < last; block += static_cast<int64_t>(kChain) * slices) {
      const int64_t stop = block + static_cast<int64_t>(kChain) * slices;
      Accumulator acc;
      clear(acc);
      project<T, false>(acc, rows, p.g.row_stride, live, p.g.columns, aligned, p.side, panel, block, stop < last ? stop : last,
                        static_cast<int64_t>(slices));
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i)
        sums.store(own + 32 * i, sums.load(own + 32 * i) + acc[i / 16][i / 4 % 4][i % 4]);
    }
  }
  __syncthreads();
  const float scale = p.splits == 1 ? p.side.scale : 1.0f;
  for (int i = slice; i < kAccumulators; i += slices) {
    const int row = 16 * (i / 16) + lane / 4 + i % 4 / 2 * 8, at = 8 * (i / 4 % 4) + lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int s = 0; s < slices; ++s) sum += sums.load(((warp % panels + s * panels) * kAccumulators + i) * 32 + lane);
    if (row < live && at < columns) p.parts[(split * p.g.rows + row0 + row) * k + column + at] = sum * scale;
  }
}

constexpr int kRows = 8, kWindow = kThreads, kSignBlocks = 6;

// Chunks whose signs and rotations are made together.
__host__ __device__ constexpr int batch_of(int64_t k) {
  const int groups = static_cast<int>(k < kWindow ? kWindow / k : 1);
  return groups > 32 ? groups : 32;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sketch_sjlt_kernel(const __grid_constant__ SketchParams p) {
  const philox::Key key{p.side.key0, p.side.key1};
  const uint32_t k = static_cast<uint32_t>(p.side.k), window = k < kWindow ? k : kWindow, first_output = blockIdx.z * kWindow;
  const uint32_t width = k - first_output < window ? k - first_output : window;
  const int groups = static_cast<int>(kWindow / window), group = static_cast<int>(threadIdx.x / window);
  const uint32_t m = threadIdx.x % window;
  const bool active = group < groups && m < width;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows, left = p.g.rows - row0;
  const int live = static_cast<int>(left > kRows ? kRows : left);
  const T* rows = static_cast<const T*>(p.g.data) + row0 * p.g.row_stride;
  const int64_t chunks = ceil_div<int64_t>(p.g.columns, k), split = blockIdx.y;
  const int64_t first = chunks * split / p.splits, last = chunks * (split + 1) / p.splits;

  // Of every chunk in a batch: the lane of the chunk that goes to first_output, and the blocks of signs of the two runs
  // of features that the window gathers: [start, ..) and, where the rotation wraps, [0, ..); at most three blocks each.
  const int batch = batch_of(k);
  SharedArena arena;
  const Shared<uint32_t> starts = arena.take<uint32_t>(batch);
  const Shared<uint32_t> signs = arena.take<uint32_t>(static_cast<int64_t>(batch) * kSignBlocks * 4);
  const Shared<float> sums = arena.take<float>(kThreads);

  float acc[kRows] = {};
  for (int64_t base = first; base < last; base += batch) {
    const int count = static_cast<int>(last - base < batch ? last - base : batch);
    __syncthreads();
    for (int slot = static_cast<int>(threadIdx.x); slot < count * kSignBlocks; slot += kThreads) {
      const int which = slot % kSignBlocks;
      const uint64_t chunk = static_cast<uint64_t>(base + slot / kSignBlocks), origin = chunk * k;
      const uint32_t turn = rotation_of(chunk, k, key);
      const uint32_t start = first_output >= turn ? first_output - turn : first_output + (k - turn);
      const uint64_t begin = which < 3 ? origin + start : origin;
      const uint64_t wrapped = static_cast<uint64_t>(start) + width;
      const uint64_t end = which >= 3 ? (wrapped > k ? origin + wrapped - k : origin)
                                      : origin + (wrapped > k ? static_cast<uint64_t>(k) : wrapped);
      const uint64_t block = begin / 128 + which % 3;
      if (which == 0) starts.store(slot / kSignBlocks, start);
      if (begin < end && block * 128 < end) {
        const philox::Block bits = philox::sjlt_signs(block, key);
        signs.store_vector<uint4>(4 * slot, {bits.x[0], bits.x[1], bits.x[2], bits.x[3]});
      }
    }
    __syncthreads();
    if (!active) continue;
#pragma unroll 2
    for (int i = group; i < count; i += groups) {
      const uint32_t start = starts.load(i), sum = start + m, lane = sum >= k ? sum - k : sum;
      const uint64_t origin = static_cast<uint64_t>(base + i) * k, f = origin + lane;
      if (f >= static_cast<uint64_t>(p.g.columns)) continue;
      const int block = sum >= k ? static_cast<int>(f / 128 - origin / 128) + 3
                                 : static_cast<int>(f / 128 - (origin + start) / 128);
      const uint32_t word = signs.load((i * kSignBlocks + block) * 4 + static_cast<int>(f / 32 % 4));
      const uint32_t flip = (~(word >> (f % 32)) & 1u) << 31;
      float value[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) value[r] = r < live ? to_float(rows[r * p.g.row_stride + static_cast<int64_t>(f)]) : 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) acc[r] += __uint_as_float(__float_as_uint(value[r]) ^ flip);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    __syncthreads();
    sums.store(static_cast<int>(threadIdx.x), acc[r]);
    __syncthreads();
    if (group != 0 || !active || r >= live) continue;
    float sum = 0;
    for (int g = 0; g < groups; ++g) sum += sums.load(g * static_cast<int>(window) + static_cast<int>(m));
    p.parts[(split * p.g.rows + row0 + r) * k + first_output + m] = sum;
  }
}

void finish(const SketchParams& p, uint64_t stream) {
  if (p.splits == 1) return;
  const int64_t total = p.g.rows * p.side.k;
  sum_parts({p.parts, p.out, 1, total, p.splits, 0, total, nullptr, 1, p.side.scale}, stream);
}

}  // namespace

int64_t sketch_splits(Kind kind, int64_t features, int64_t k) {
  int64_t splits, most = kMaxSplits;
  if (kind == Kind::sjlt) {
    splits = ceil_div(features, k) / batch_of(k) * 2;
    most = 4 * kMaxSplits / ceil_div<int64_t>(k, kWindow);
  } else {
    splits = ceil_div<int64_t>(features, kBlock) / (8 * (kWarps / panels_of(k)));
  }
  most = most < 1 ? 1 : most;
  return splits < 1 ? 1 : splits > most ? most : splits;
}

void sketch_dense(const SketchParams& p, uint64_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(p.g.rows, kRowTile)), static_cast<unsigned>(p.splits),
                  static_cast<unsigned>(ceil_div<int64_t>(p.side.k, panels_of(p.side.k) * kPanel)));
  const auto kernel = p.g.dtype == Dtype::float32   ? sketch_dense_kernel<float>
                      : p.g.dtype == Dtype::float16 ? sketch_dense_kernel<f16>
                                                : sketch_dense_kernel<bf16>;
  launch("sketch_dense", kernel, grid, kThreads, kWarps * kAccumulators * 32 * sizeof(float), stream, p);
  finish(p, stream);
}

void sketch_sjlt(const SketchParams& p, uint64_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(p.g.rows, kRows)), static_cast<unsigned>(p.splits),
                  static_cast<unsigned>(ceil_div<int64_t>(p.side.k, kWindow)));
  const size_t batch = static_cast<size_t>(batch_of(p.side.k));
  const size_t shared = (batch * 4 + 15) / 16 * 16 + batch * kSignBlocks * 16 + kThreads * sizeof(float);
  const auto kernel = p.g.dtype == Dtype::float32   ? sketch_sjlt_kernel<float>
                      : p.g.dtype == Dtype::float16 ? sketch_sjlt_kernel<f16>
                                                : sketch_sjlt_kernel<bf16>;
  launch("sketch_sjlt", kernel, grid, kThreads, shared, stream, p);
  finish(p, stream);
}
