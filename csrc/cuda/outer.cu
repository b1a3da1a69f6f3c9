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

// Tokens of a launch; the next one adds to what it wrote: the matrix unit truncates its sums (see kChain).
template <typename T>
constexpr int kTokens = sizeof(T) == 4 ? kChain * 8 : kChain * 32;

template <typename T>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 4 ? 1 : 2)
    outer_kernel(const __grid_constant__ OuterParams p) {
  const int64_t down = ceil_div<int64_t>(p.dy.features, kTile), tiles = down * ceil_div<int64_t>(p.x.features, kTile);
  const int64_t sample = blockIdx.x / tiles, number = blockIdx.x % tiles;
  const int64_t row0 = number % down * kTile, column0 = number / down * kTile;

  SharedArena arena;
  const auto operands = arena.take<typename Parts<T>::Type>(Pipeline<T>::bytes / sizeof(typename Parts<T>::Type));
  const Span all = p.batch.span(sample);
  const Span span{all.begin + p.first, all.end - all.begin < p.first + kTokens<T> ? all.end : all.begin + p.first + kTokens<T>};
  if (p.first > 0 && span.end <= span.begin) return;
  TileAccumulator acc;
  gradient_tile<T, true>(acc, operands, p.x, p.dy, sample, span, row0, column0);

  const int64_t width = p.x.features;
  float* out = p.out + sample * p.dy.features * width;
  const bool even = width % 2 == 0 && reinterpret_cast<uintptr_t>(p.out) % 8 == 0;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int m = i / 16, c = i / 8 % 2 * 2, j = i % 8;
    const int64_t row = row0 + tile_row(m, c), column = column0 + tile_column(j, c);
    if (row >= p.dy.features || column >= width) continue;
    float* to = out + row * width + column;
    float2 pair{acc[m][j][c], acc[m][j][c + 1]};
    if (even) {
      if (p.first > 0) {
        const float2 before = load_vector<float2>(to);
        pair.x += before.x, pair.y += before.y;
      }
      store_vector<float2>(to, pair);
    } else {
      to[0] = p.first > 0 ? to[0] + pair.x : pair.x;
      if (column + 1 < width) to[1] = p.first > 0 ? to[1] + pair.y : pair.y;
    }
  }
}

template <typename T>
void run(OuterParams p, uint64_t stream) {
  const dim3 grid(static_cast<unsigned>(p.batch.samples * outer_blocks(p.x.features, p.dy.features)));
  for (p.first = 0; p.first < p.batch.tokens; p.first += kTokens<T>)
    launch("outer", outer_kernel<T>, grid, kTileThreads, Pipeline<T>::bytes, stream, p);
}

}  // namespace

int64_t outer_blocks(int64_t features_in, int64_t features_out) {
  return ceil_div<int64_t>(features_in, kTile) * ceil_div<int64_t>(features_out, kTile);
}

void outer(const OuterParams& p, uint64_t stream) {
  if (p.x.dtype == Dtype::float32)
    run<float>(p, stream);
  else if (p.x.dtype == Dtype::float16)
    run<f16>(p, stream);
  else
    run<bf16>(p, stream);
}
