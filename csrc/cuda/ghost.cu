// <G_a, G_b> = sum over pairs of tokens (xa . xb)(dya . dyb), for all pairs of samples, or for each sample with itself:
// no gradient is formed, and no matrix of tokens x tokens leaves the chip.
//
// A block multiplies tiles of inner products of inputs with those of output gradients (gram.cuh), entry by entry, in
// registers. The product is linear in its second factor, so its chains of additions end there and need no place of
// their own.
//
// Long samples: tiles of 128 x 128 tokens (float32: 64 x 64). Blocks of a pair of samples take its tiles in turn and leave parts, added in
// order; of a sample with itself the tiles below the diagonal count twice in place of those above.
// Short samples (up to 64 tokens): a tile of 64 x 64 holds several samples a side, each in 2^s >= T rows. The finished
// product goes through shared memory, where one thread adds up each pair's share. Of samples with themselves only the
// 16 x 16 along the diagonal are multiplied.
//
// Per tile and step of 32 sixteen-bit features: 1.05 MFLOP and 16 KB from the L2 cache, 64 FLOP a byte: ~5.5 TB/s of L2
// feed ~350 TFLOP/s, near what mma.sync does.
#include "gram.cuh"

namespace {

// Of tokens a side. float32 is bound by products, not by operands: smaller tiles leave room for a second block.
template <typename T>
constexpr int kLong = sizeof(T) == 4 ? 64 : 128;
constexpr int kShort = 64;
constexpr int kProductRow = kShort + 1;
#ifdef INFLUENCE_FAST_SIMT  // small shapes reach every loop on the host
constexpr int64_t kMaxTileSplits = 2;
#else
constexpr int64_t kMaxTileSplits = 64;
#endif

// Rows of a sample in a short tile, as a power of two.
int shift_of(int64_t tokens) {
  int shift = 0;
  while ((int64_t{1} << shift) < tokens) ++shift;
  return shift;
}

template <typename T>
__global__ void __launch_bounds__(2 * kLong<T>, 128 / kLong<T>) ghost_long_kernel(const __grid_constant__ GhostParams p) {
  constexpr int kTokens = kLong<T>, kShift = kTokens == 64 ? 6 : 7, kWarps = kTokens / 16, kEach = kTokens / 2;
  using P = GramPipeline<T, kTokens>;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int64_t pair = blockIdx.x / p.splits, split = blockIdx.x % p.splits;
  const int64_t sample_a = p.paired ? pair : pair / p.b.samples, sample_b = p.paired ? pair : pair % p.b.samples;
  const Span a = p.a.span(sample_a), b = p.b.span(sample_b);
  const int down = static_cast<int>(ceil_div<int64_t>(a.end - a.begin, kTokens));
  const int across = static_cast<int>(ceil_div<int64_t>(b.end - b.begin, kTokens));

  SharedArena arena, sums_arena;
  const auto operands = arena.take<typename P::Part>(P::bytes / sizeof(typename P::Part));
  const Shared<float> sums = sums_arena.take<float>(kWarps);  // where the operands were

  float sum = 0;
  const int splits = static_cast<int>(p.splits);
  int until = static_cast<int>(split);  // tiles until the next one that is this block's
#pragma unroll 1
  for (int row = 0; row < down; ++row) {
#pragma unroll 1
    for (int column = 0; column < (p.paired ? row + 1 : across); ++column) {
      if (until-- > 0) continue;
      until = splits - 1;
      const GramRows rows_a{sample_a, int64_t{row} * kTokens, kShift}, rows_b{sample_b, int64_t{column} * kTokens, kShift};
      const bool same = p.paired && row == column;
      const uint32_t needed = needed_blocks<kTokens>([&](int r, int c) {
        return rows_a.token + r < a.end - a.begin && rows_b.token + c < b.end - b.begin;
      });
      float inputs[kEach] = {}, products = 0;
      __syncthreads();  // the previous tile has left shared memory
      gram_tile<T, kTokens>(operands, p.xa, p.a, rows_a, p.xb, p.b, rows_b, same, 0, p.xa.features, needed,
                            [&](int i, float value) { inputs[i] += value; });
      __syncthreads();
      gram_tile<T, kTokens>(operands, p.dya, p.a, rows_a, p.dyb, p.b, rows_b, same, 0, p.dya.features, needed,
                            [&](int i, float value) { products += inputs[i] * value; });
      sum += p.paired && !same ? 2 * products : products;
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __uint_as_float(warp_shuffle(__float_as_uint(sum), lane ^ step));
  __syncthreads();
  if (lane == 0) sums.store(warp, sum);
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) sum += sums.load(w);
    p.parts[split * p.pairs + pair] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(2 * kShort, 2) ghost_short_kernel(const __grid_constant__ GhostParams p) {
  using P = GramPipeline<T, kShort>;
  const int thread = static_cast<int>(threadIdx.x);
  const int per_a = kShort >> p.shift_a, per_b = kShort >> p.shift_b;  // samples in a tile
  const int64_t across = p.paired ? 1 : ceil_div<int64_t>(p.b.samples, per_b);
  const GramRows rows_a{blockIdx.x / across * per_a, 0, p.shift_a};
  const GramRows rows_b = p.paired ? rows_a : GramRows{blockIdx.x % across * per_b, 0, p.shift_b};

  SharedArena arena, alias;
  const auto operands = arena.take<typename P::Part>(P::bytes / sizeof(typename P::Part));
  const Shared<float> product = alias.take<float>(kShort * kProductRow);

  const auto exists = [](int first, const GramRows& rows, const Batch& batch) {
    return rows.sample + (first >> rows.shift) < batch.samples && (first & ((1 << rows.shift) - 1)) < batch.tokens;
  };
  const uint32_t needed = needed_blocks<kShort>([&](int row, int column) {
    const bool meet = !p.paired || (row >> p.shift_a <= (column + 15) >> p.shift_a &&
                                    column >> p.shift_a <= (row + 15) >> p.shift_a);
    return meet && exists(row, rows_a, p.a) && exists(column, rows_b, p.b);
  });

  float inputs[32] = {}, products[32] = {};
  gram_tile<T, kShort>(operands, p.xa, p.a, rows_a, p.xb, p.b, rows_b, p.paired, 0, p.xa.features, needed,
                       [&](int i, float value) { inputs[i] += value; });
  __syncthreads();
  gram_tile<T, kShort>(operands, p.dya, p.a, rows_a, p.dyb, p.b, rows_b, p.paired, 0, p.dya.features, needed,
                       [&](int i, float value) { products[i] += inputs[i] * value; });
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int m = i / 16, j = i / 4 % 4, c = i % 4;
    product.store(gram_row<kShort>(m, c) * kProductRow + gram_column<kShort>(j, c), products[i]);
  }
  __syncthreads();
  // Along each row the columns of one sample, into the first of them; then down the rows of one sample.
  for (int i = thread; i < kShort * per_b; i += 2 * kShort) {
    const int begin = i % kShort * kProductRow + ((i / kShort) << p.shift_b);
    float sum = product.load(begin);
    for (int column = 1; column < 1 << p.shift_b; ++column) sum += product.load(begin + column);
    product.store(begin, sum);
  }
  __syncthreads();
  for (int i = thread; i < per_a * per_b; i += 2 * kShort) {
    const int which_a = i / per_b, which_b = i % per_b;
    const int64_t sample_a = rows_a.sample + which_a, sample_b = rows_b.sample + which_b;
    if (sample_a >= p.a.samples || sample_b >= p.b.samples || (p.paired && which_a != which_b)) continue;
    const int begin = (which_a << p.shift_a) * kProductRow + (which_b << p.shift_b);
    float sum = product.load(begin);
    for (int row = 1; row < 1 << p.shift_a; ++row) sum += product.load(begin + row * kProductRow);
    p.out[p.paired ? sample_a : sample_a * p.b.samples + sample_b] = sum;
  }
}

bool fits_short(int64_t tokens_a, int64_t tokens_b) { return tokens_a <= kShort && tokens_b <= kShort; }

int64_t tokens_of(Dtype dtype) { return dtype == Dtype::float32 ? kLong<float> : kLong<f16>; }

template <typename T>
void run(const GhostParams& p, uint64_t stream) {
  const dim3 grid(static_cast<unsigned>(ghost_blocks(p)));
  if (fits_short(p.a.tokens, p.b.tokens))
    launch("ghost_short", ghost_short_kernel<T>, grid, 2 * kShort, GramPipeline<T, kShort>::bytes, stream, p);
  else
    launch("ghost_long", ghost_long_kernel<T>, grid, 2 * kLong<T>, GramPipeline<T, kLong<T>>::bytes, stream, p);
}

}  // namespace

int64_t ghost_splits(Dtype dtype, int64_t tokens_a, int64_t tokens_b, bool paired) {
  if (fits_short(tokens_a, tokens_b)) return 1;
  const int64_t down = ceil_div(tokens_a, tokens_of(dtype)), across = ceil_div(tokens_b, tokens_of(dtype));
  const int64_t tiles = paired ? down * (down + 1) / 2 : down * across;
  return tiles < kMaxTileSplits ? tiles : kMaxTileSplits;
}

int64_t ghost_blocks(const GhostParams& p) {
  if (!fits_short(p.a.tokens, p.b.tokens)) return p.splits * p.pairs;
  const int64_t down = ceil_div<int64_t>(p.a.samples, kShort >> shift_of(p.a.tokens));
  return p.paired ? down : down * ceil_div<int64_t>(p.b.samples, kShort >> shift_of(p.b.tokens));
}

void ghost(GhostParams p, uint64_t stream) {
  if (fits_short(p.a.tokens, p.b.tokens)) p.shift_a = shift_of(p.a.tokens), p.shift_b = shift_of(p.b.tokens);
  if (p.xa.dtype == Dtype::float32)
    run<float>(p, stream);
  else if (p.xa.dtype == Dtype::float16)
    run<f16>(p, stream);
  else
    run<bf16>(p, stream);
  if (p.splits > 1) sum_parts({p.parts, p.out, p.pairs, 1, p.splits, 1, p.pairs, nullptr, 1, 1.0f}, stream);
}
