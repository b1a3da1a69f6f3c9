// (P_out dy)^T (P_in x) per sample: both projections and the outer product in one launch, for up to 16 layers at once.
//
// A block owns a tile of up to 128 tokens of one sample and layer, reads them once, straight from memory into matrix
// operands (project.cuh), keeps the projected tile in shared memory and multiplies it out there in float32: T k_in
// k_out multiply-adds are 1-2 % of the work. Blocks of one sample leave parts, summed in the order of tokens by a
// second small launch: parts are k_in k_out floats against 128 (d_in + d_out) inputs, 1.5 % at 2048 and k = 64.
#include "project.cuh"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Tile {
  int64_t sample, begin;
  int live;
};

// The projection of one side of a tile into `out`, (tokens, width), columns [offset, offset + k4). The warps share it
// out by rows, then by panels of columns, then by slices of the features.
template <typename T>
DEVICE void project_side(const Shared<float>& out, int width, int offset, const Tokens& x, const Side& side,
                         const Tile& tile, int row_warps) {
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int k4 = static_cast<int>(side.k + 3) / 4 * 4;
  int panels = 1;
  while (panels * row_warps < kWarps && panels * kPanel < k4) panels *= 2;
  const int slices = kWarps / (row_warps * panels), slice = warp / row_warps / panels;
  const int row0 = warp % row_warps * kRowTile;
  const int live = tile.live - row0 < 0 ? 0 : tile.live - row0 > kRowTile ? kRowTile : tile.live - row0;
  const int64_t stride = x.token_stride;
  const T* rows = static_cast<const T*>(x.data) + tile.sample * x.sample_stride + (tile.begin + row0) * stride;
  const bool aligned = (reinterpret_cast<uintptr_t>(rows) | static_cast<uintptr_t>(stride) * sizeof(T)) % 16 == 0;
  const int features = static_cast<int>(x.features), blocks = ceil_div(features, kBlock);
  for (int base = 0; base < k4; base += panels * kPanel) {
    const int column = base + warp / row_warps % panels * kPanel;
    const int columns = k4 - column < 0 ? 0 : k4 - column > kPanel ? kPanel : k4 - column;
    const Panel panel{static_cast<uint32_t>(column), ceil_div(columns, 8)};
    Accumulator acc;
    clear(acc);
    if (live > 0 && columns > 0) {
      if (side.kind == Kind::sjlt)
        project<T, true>(acc, rows, stride, live, features, aligned, side, panel, slice, blocks, slices);
      else
        project<T, false>(acc, rows, stride, live, features, aligned, side, panel, slice, blocks, slices);
    }
    for (int turn = 0; turn < slices; ++turn) {  // slices add up in a fixed order
      if (turn == slice && live > 0) {
#pragma unroll
        for (int i = 0; i < kAccumulators; ++i) {
          const int m = i / 16, j = i / 4 % 4, c = i % 4;
          const int row = row0 + 16 * m + lane / 4 + c / 2 * 8, at = 8 * j + lane % 4 * 2 + c % 2;
          if (at >= columns) continue;
          const int index = row * width + offset + column + at;
          out.store(index, turn ? out.load(index) + acc[m][j][c] : acc[m][j][c]);
        }
      }
      __syncthreads();
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 1 : 2)
    project_outer_kernel(const __grid_constant__ ProjectOuterParams p) {
  const ProjectedLayer& layer = p.layer[blockIdx.y];
  const int tokens = kRowTile * p.row_warps, split = static_cast<int>(blockIdx.x % p.splits);
  Tile tile;
  tile.sample = blockIdx.x / p.splits;
  const Span span = p.batch.span(tile.sample);
  tile.begin = span.begin + static_cast<int64_t>(split) * tokens;
  const int64_t end = span.end;
  tile.live = static_cast<int>(end - tile.begin < 0 ? 0 : end - tile.begin > tokens ? tokens : end - tile.begin);
  if (tile.live == 0 && split > 0) return;

  const int k_in = static_cast<int>(layer.in.k), k_out = static_cast<int>(layer.out.k);
  const int in4 = (k_in + 3) & ~3, width = in4 + ((k_out + 3) & ~3);
  SharedArena arena;
  const Shared<float> projected = arena.take<float>(static_cast<int64_t>(tokens) * width);
#pragma unroll 1
  for (int left = 0; left < 2; ++left) {
    project_side<T>(projected, width, left ? in4 : 0, left ? layer.dy : layer.x, left ? layer.out : layer.in, tile,
                    p.row_warps);
  }

  const float scale = p.splits == 1 ? layer.in.scale * layer.out.scale : 1.0f;
  float* result = layer.parts + (tile.sample * p.splits + split) * static_cast<int64_t>(k_in) * k_out;
  for (int quad = static_cast<int>(threadIdx.x); quad < in4 / 4 * ((width - in4) / 4); quad += kThreads) {
    const int in = quad % (in4 / 4) * 4, out = quad / (in4 / 4) * 4;
    float sum[4][4] = {};
    for (int t = 0; t < tile.live; ++t) {
      const float4 a = projected.load_vector<float4>(t * width + in4 + out);
      const float4 b = projected.load_vector<float4>(t * width + in);
      const float left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] += left[i / 4] * right[i % 4];
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (out + i / 4 < k_out && in + i % 4 < k_in)
        result[static_cast<int64_t>(out + i / 4) * k_in + in + i % 4] = sum[i / 4][i % 4] * scale;
    }
  }
}

}  // namespace

int project_outer_row_warps(int64_t tokens, int64_t k_in, int64_t k_out) {
  const int fitting = k_in + k_out > 184 ? 2 : 4;  // 96 KB of shared memory at most
  return tokens <= 32 ? 1 : tokens <= 64 || fitting == 2 ? 2 : 4;
}

int64_t project_outer_splits(int64_t tokens, int64_t k_in, int64_t k_out) {
  const int64_t splits = ceil_div<int64_t>(tokens, kRowTile * project_outer_row_warps(tokens, k_in, k_out));
  return splits > 1 ? splits : 1;
}

void project_outer(const ProjectOuterParams& p, uint64_t stream) {
  const dim3 grid(static_cast<unsigned>(p.batch.samples * p.splits), static_cast<unsigned>(p.layers));
  size_t shared = 0;
  for (int i = 0; i < p.layers; ++i) {
    const size_t width = static_cast<size_t>((p.layer[i].in.k + 3) / 4 * 4 + (p.layer[i].out.k + 3) / 4 * 4);
    const size_t bytes = sizeof(float) * kRowTile * static_cast<size_t>(p.row_warps) * width;
    shared = bytes > shared ? bytes : shared;
  }
  const auto kernel = p.layer[0].x.dtype == Dtype::float32   ? project_outer_kernel<float>
                      : p.layer[0].x.dtype == Dtype::float16 ? project_outer_kernel<f16>
                                                : project_outer_kernel<bf16>;
  launch("project_outer", kernel, grid, kThreads, shared, stream, p);
  if (p.splits == 1) return;
  for (int i = 0; i < p.layers; ++i) {
    const ProjectedLayer& layer = p.layer[i];
    const int64_t inner = layer.in.k * layer.out.k;
    sum_parts({layer.parts, layer.result, p.batch.samples, inner, p.splits, p.splits * inner, inner, p.batch.spans,
               static_cast<int64_t>(kRowTile) * p.row_warps, layer.in.scale * layer.out.scale},
              stream);
  }
}
