// S vec(G * scale) per sample with an SJLT: tiles of G = dy^T x live on chip, are signed, scaled and added into k
// outputs there, and are never written.
//
// A block owns (sample, strip): it walks its tiles of 128 x 128 entries of G. Each tile is a product over tokens on the
// tensor cores (operands by asynchronous copies, three stages deep; tiles of a strip go down the outputs, so that the
// slice of x is found in L1 again). The finished tile goes through shared memory, 64 rows at a time, and into the
// outputs: a row of the tile is a run of features, and an SJLT maps a run within one chunk of k features onto a
// contiguous run of outputs, rotated. Warp w owns the outputs [w k / 8, (w + 1) k / 8) and lane l of it those with
// m % 32 == l; it goes through the rows that land there in ascending order. So every output belongs to one thread: no
// atomics, no barriers, no bank conflicts, and one order of additions. Strips leave parts, added in order.
//
// Arithmetic, T = 512, 16-bit inputs, per tile and multiprocessor: 16.8 MFLOP at ~2.8 KFLOP per cycle (mma.sync) take
// 6,000 cycles and 256 KB of operands at 24-30 bytes per cycle from L2 up to 10,000. Adding the tile is 16,384 / 32 =
// 512 steps of four shared-memory accesses where runs fit their owners; at k = 4096 it is ~160 visits of a warp to a
// row, ~5 steps and ~100 instructions each: 3,200 cycles of shared memory, 4,000 of issue, which the second block of
// the multiprocessor hides behind its product. Below T = 256 the additions are the longer part.
#include "gradient_tile.cuh"

namespace {

constexpr int kThreads = kTileThreads, kWarps = kThreads / 32;
constexpr int kHalf = 64, kStageRow = kTile + 8;  // the finished tile, 64 rows at a time; rows padded for pairs of floats
constexpr int64_t kMaxStrips = 64, kSharedK = 8192;  // more outputs live in global memory

// The finished tile lies where its operands were.
template <typename T>
constexpr size_t kOperandBytes =
    Pipeline<T>::bytes > sizeof(float) * kHalf * kStageRow ? Pipeline<T>::bytes : sizeof(float) * kHalf * kStageRow;

// What a warp needs to add rows of the finished tile into the outputs [low, high) that are its own.
struct Scatter {
  Shared<float> tile, shared;  // 64 rows of the tile; the outputs, unless
  float* global;               // they are here
  Shared<uint32_t> signs;      // eight words per row of the tile
  uint32_t low, high;
};

// Tile entries first + (m - a), with the sign of bit `bit + (m - a)`, go to outputs m of [a, b). A lane owns the m with
// m % 32 == lane, so that its bit stays in place from one word to the next.
template <bool Global>
DEVICE void add_run(const Scatter& s, uint32_t a, uint32_t b, int first, int bit, const float* scale) {
  const uint32_t stop = b < s.high ? b : s.high, go = a > s.low ? a : s.low;
  uint32_t m = (go & ~31u) + threadIdx.x % 32;
  if (m < go) m += 32;
  const int skip = static_cast<int>(m - a);
  int from = first + skip, word = (bit + skip) / 32;
  const int shift = 31 - (bit + skip) % 32;
  if (scale) scale += skip;
  for (; m < stop; m += 32, from += 32, ++word) {
    float value = s.tile.load(from);
    if (scale) {
      value *= *scale;
      scale += 32;
    }
    value = __uint_as_float(__float_as_uint(value) ^ (~(s.signs.load(word) << shift) & 0x80000000u));
    if constexpr (Global)
      s.global[m] += value;
    else
      s.shared.store(static_cast<int>(m), s.shared.load(static_cast<int>(m)) + value);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 1 : 2)
    sketch_outer_kernel(const __grid_constant__ SketchOuterParams p) {
  using Part = typename Parts<T>::Type;
  const philox::Key key{p.side.key0, p.side.key1};
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int64_t sample = blockIdx.x / p.strips, strip = blockIdx.x % p.strips;
  const uint32_t k = static_cast<uint32_t>(p.side.k);

  SharedArena arena;
  SharedArena alias = arena;
  const Shared<Part> operands = arena.take<Part>(kOperandBytes<T> / sizeof(Part));
  const Shared<float> tile = alias.take<float>(kHalf * kStageRow);
  // Rows of the tile as runs of features: the output of the first, how many lie in its chunk, where its sign is.
  const Shared<uint32_t> starts = arena.take<uint32_t>(kTile), lefts = arena.take<uint32_t>(kTile);
  const Shared<uint32_t> skews = arena.take<uint32_t>(kTile), signs = arena.take<uint32_t>(kTile * 8);
  float* part = p.parts + (sample * p.strips + strip) * static_cast<int64_t>(k);
  const Shared<float> kept = arena.take<float>(k <= kSharedK ? k : 0);
  const bool global = k > kSharedK;

  const uint32_t low = static_cast<uint32_t>(static_cast<uint64_t>(k) * warp / kWarps);
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(k) * (warp + 1) / kWarps);
  const uint32_t own = low / 32 * 32 + lane;
  for (uint32_t m = own; m < high; m += 32) {
    if (m < low) continue;
    if (global)
      part[m] = 0;
    else
      kept.store(static_cast<int>(m), 0);
  }
  const Scatter scatter{tile, kept, part, signs, low, high};

  const Span span = p.batch.span(sample);
  const int64_t down = ceil_div<int64_t>(p.dy.features, kTile), tiles = down * ceil_div<int64_t>(p.x.features, kTile);
  const int64_t last_tile = span.end > span.begin ? tiles * (strip + 1) / p.strips : 0;

  for (int64_t number = tiles * strip / p.strips; number < last_tile; ++number) {
    const int64_t row0 = number % down * kTile, column0 = number / down * kTile;
    const int rows = static_cast<int>(p.dy.features - row0 < kTile ? p.dy.features - row0 : kTile);
    const int columns = static_cast<int>(p.x.features - column0 < kTile ? p.x.features - column0 : kTile);

    __syncthreads();  // the previous tile has left shared memory
    if (threadIdx.x < kTile * 2) {
      // Two threads per row: one block of signs each; the first also says where the run goes.
      const int row = static_cast<int>(threadIdx.x / 2), which = static_cast<int>(threadIdx.x % 2);
      const uint64_t f = static_cast<uint64_t>((row0 + row) * p.x.features + column0);
      const philox::Block bits = philox::sjlt_signs(f / 128 + which, key);
      signs.store_vector<uint4>(8 * row + 4 * which, {bits.x[0], bits.x[1], bits.x[2], bits.x[3]});
      if (which == 0) {
        const uint64_t chunk = f / k;
        const uint32_t at = static_cast<uint32_t>(f % k), sum = at + rotation_of(chunk, k, key);
        starts.store(row, sum >= k ? sum - k : sum);
        lefts.store(row, k - at);
        skews.store(row, static_cast<uint32_t>(f % 128));
      }
    }

    TileAccumulator acc;
    gradient_tile<T, false>(acc, operands, p.x, p.dy, sample, span, row0, column0);

#pragma unroll 1
    for (int half = 0; half < kTile / kHalf; ++half) {
      __syncthreads();
      if (warp / 4 == half) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          const int m = i / 16, j = i / 2 % 8, c = i % 2;
          const int row = warp / 2 % 2 * 32 + 16 * m + lane / 4 + 8 * c, column = warp % 2 * 64 + 8 * j + lane % 4 * 2;
          tile.store_vector<float2>(row * kStageRow + column, {acc[m][j][2 * c], acc[m][j][2 * c + 1]});
        }
      }
      __syncthreads();
#pragma unroll 1
      for (int group = 0; group < kHalf; group += 32) {
        // Which of these 32 rows touch outputs of this warp? Runs that leave their chunk are looked at closely.
        const int mine = half * kHalf + group + lane;
        bool touches = false;
        if (mine < rows) {
          const uint64_t start = starts.load(mine), stop = start + columns;
          touches = lefts.load(mine) < static_cast<uint32_t>(columns) || (start < high && stop > low) ||
                    stop > static_cast<uint64_t>(k) + low;
        }
        uint32_t todo = warp_ballot(touches);
        while (todo) {
          const int bit = __ffs(todo) - 1, row = half * kHalf + group + bit;
          todo &= todo - 1;
          const int from = (group + bit) * kStageRow, skew = 256 * row + static_cast<int>(skews.load(row));
          const float* scale = p.scale ? p.scale + (row0 + row) * p.x.features + column0 : nullptr;
          uint32_t start = starts.load(row), length = lefts.load(row);
          uint64_t chunk = 0;
          for (int column = 0; column < columns;) {  // one chunk of features after the other
            if (length > static_cast<uint32_t>(columns - column)) length = static_cast<uint32_t>(columns - column);
            const uint32_t head = length < k - start ? length : k - start;  // up to output k; the rest from 0 on
#pragma unroll 1
            for (int piece = 0; piece < 2; ++piece) {
              const int shift = column + static_cast<int>(piece ? head : 0);
              const uint32_t a = piece ? 0 : start, b = piece ? length - head : start + head;
              if (a >= high || b <= low) continue;
              if (global)
                add_run<true>(scatter, a, b, from + shift, skew + shift, scale ? scale + shift : nullptr);
              else
                add_run<false>(scatter, a, b, from + shift, skew + shift, scale ? scale + shift : nullptr);
            }
            column += static_cast<int>(length);
            if (column < columns) {
              if (chunk == 0) chunk = static_cast<uint64_t>((row0 + row) * p.x.features + column0) / k;
              start = rotation_of(++chunk, k, key);
              length = k;
            }
          }
        }
      }
    }
  }
  if (global) return;
  for (uint32_t m = own; m < high; m += 32)
    if (m >= low) part[m] = kept.load(static_cast<int>(m));
}

}  // namespace

int64_t sketch_outer_strips(int64_t features_in, int64_t features_out) {
  const int64_t strips = ceil_div<int64_t>(features_in, kTile) * ceil_div<int64_t>(features_out, kTile) / 4;
  return strips < 1 ? 1 : strips > kMaxStrips ? kMaxStrips : strips;
}

template <typename T>
static void run(const SketchOuterParams& p, uint64_t stream) {
  const size_t outputs = p.side.k <= kSharedK ? (static_cast<size_t>(p.side.k) * sizeof(float) + 15) / 16 * 16 : 0;
  const size_t shared = kOperandBytes<T> + kTile * 11 * sizeof(uint32_t) + outputs;
  launch("sketch_outer", sketch_outer_kernel<T>, dim3(static_cast<unsigned>(p.batch.samples * p.strips)), kThreads, shared,
         stream, p);
}

void sketch_outer(const SketchOuterParams& p, uint64_t stream) {
  if (p.x.dtype == Dtype::float32)
    run<float>(p, stream);
  else if (p.x.dtype == Dtype::float16)
    run<f16>(p, stream);
  else
    run<bf16>(p, stream);
  if (p.strips == 1) return;
  const int64_t k = p.side.k;
  sum_parts({p.parts, p.out, p.batch.samples, k, p.strips, p.strips * k, k, nullptr, 1, 1.0f}, stream);
}
