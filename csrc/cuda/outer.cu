// G = dy^T x per sample: (N, o, i) float32, written once.
//
// A block owns a tile of 128 x 128 entries of one sample's gradient (gradient_tile.cuh) and writes it from registers:
// a warp's store covers whole 32-byte sectors of eight rows. Blocks of one sample follow one another down the outputs,
// so that its inputs come from memory once and from the L2 cache afterwards. Tokens that do not count are not read.
//
// Per entry 2 T FLOPs and 4 bytes written: with 16-bit inputs and T below ~300 writing is the longer part on a card of
// 3 TB/s and ~400 TFLOP/s of mma.sync; float32 inputs cost six times the products.
#include "gradient_tile.cuh"

namespace {

template <typename T>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 4 ? 1 : 2)
    outer_kernel(const __grid_constant__ OuterParams p) {
  const int64_t down = ceil_div<int64_t>(p.dy.features, kTile), tiles = down * ceil_div<int64_t>(p.x.features, kTile);
  const int64_t sample = blockIdx.x / tiles, number = blockIdx.x % tiles;
  const int64_t row0 = number % down * kTile, column0 = number / down * kTile;

  SharedArena arena;
  const auto operands = arena.take<typename Parts<T>::Type>(Pipeline<T>::bytes / sizeof(typename Parts<T>::Type));
  TileAccumulator acc;
  gradient_tile<T, true>(acc, operands, p.x, p.dy, sample, p.batch.span(sample), row0, column0);

  const int64_t width = p.x.features;
  float* out = p.out + sample * p.dy.features * width;
  const bool even = width % 2 == 0 && reinterpret_cast<uintptr_t>(p.out) % 8 == 0;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int m = i / 16, c = i / 8 % 2 * 2, j = i % 8;
    const int64_t row = row0 + tile_row(m, c), column = column0 + tile_column(j, c);
    if (row >= p.dy.features || column >= width) continue;
    float* to = out + row * width + column;
    if (even) {
      store_vector<float2>(to, {acc[m][j][c], acc[m][j][c + 1]});
    } else {
      to[0] = acc[m][j][c];
      if (column + 1 < width) to[1] = acc[m][j][c + 1];
    }
  }
}

}  // namespace

int64_t outer_blocks(int64_t features_in, int64_t features_out) {
  return ceil_div<int64_t>(features_in, kTile) * ceil_div<int64_t>(features_out, kTile);
}

void outer(const OuterParams& p, uint64_t stream) {
  const dim3 grid(static_cast<unsigned>(p.batch.samples * outer_blocks(p.x.features, p.dy.features)));
  const auto run = [&](auto kernel, size_t shared) { launch("outer", kernel, grid, kTileThreads, shared, stream, p); };
  if (p.x.dtype == Dtype::float32)
    run(outer_kernel<float>, Pipeline<float>::bytes);
  else if (p.x.dtype == Dtype::float16)
    run(outer_kernel<f16>, Pipeline<f16>::bytes);
  else
    run(outer_kernel<bf16>, Pipeline<bf16>::bytes);
}
