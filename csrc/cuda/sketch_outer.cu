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
//
// float32 operands are three bfloat16 each, and six of the nine products count (the others are below 2^-24).
#include "params.h"
#include "portable.cuh"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 128, kHalf = 64;
constexpr int kRow = kTile + 8;       // padded: eight rows of a matrix load lie in different banks
constexpr int kStageRow = kTile + 8;  // likewise for pairs of floats
constexpr int64_t kMaxStrips = 64, kSharedK = 8192;  // more outputs live in global memory

template <typename T>
struct Pipeline {
  using Part = typename Parts<T>::Type;
  static constexpr int parts = Parts<T>::count;
  static constexpr int tokens = parts == 1 ? 32 : 16, stages = parts == 1 ? 3 : 2;
  static constexpr int plane = tokens * kRow;      // one part of one operand
  static constexpr int stage = 2 * parts * plane;  // x planes, then dy planes
  static constexpr size_t operand_bytes = sizeof(Part) * stages * stage;
  static constexpr size_t staging_bytes = sizeof(float) * kHalf * kStageRow;
  static constexpr size_t bytes = operand_bytes > staging_bytes ? operand_bytes : staging_bytes;
};

// A thread's share of loading one operand of a tile: 8 features of a few tokens per step, from step to step onwards.
template <typename T>
struct Loader {
  using P = Pipeline<T>;
  using Part = typename P::Part;
  static constexpr int kLanes = kTile / 8, kRows = kThreads / kLanes;

  const T* at;  // this thread's first token of the next step
  int64_t stride;
  int row, column, valid;  // of 8 features
  bool fast;               // all eight or none, and aligned

  DEVICE_MEMBER Loader(const void* data, int64_t sample_offset, int64_t token_stride, int64_t token, int64_t feature,
                       int64_t features) {
    row = static_cast<int>(threadIdx.x) / kLanes;
    column = static_cast<int>(threadIdx.x) % kLanes * 8;
    stride = token_stride;
    const int64_t left = features - feature - column;
    valid = left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
    at = static_cast<const T*>(data) + sample_offset + (token + row) * stride + feature + (valid ? column : 0);
    const uintptr_t address = reinterpret_cast<uintptr_t>(at) | static_cast<uintptr_t>(stride) * sizeof(T);
    fast = valid % 8 == 0 && address % 16 == 0;
  }

  // The next tokens, of which `left` count, into the planes at `base`; zeros beyond the last token and feature.
  DEVICE_MEMBER void load(const Shared<Part>& shared, int base, int64_t left) {
#pragma unroll
    for (int r = 0; r < P::tokens; r += kRows) {
      const bool live = row + r < left && valid > 0;
      const T* from = live ? at + r * stride : at - row * stride;  // the latter is never read
      const int to = base + (row + r) * kRow + column;
      if constexpr (P::parts == 1) {
        if (fast) {
          copy_async(shared, to, from, live);
        } else {
          for (int e = 0; e < 8; ++e) shared.store(to + e, live && e < valid ? from[e] : T{0});
        }
      } else {
        float value[8] = {};
        if (live && fast) {
          const float4 a = load_vector<float4>(from), b = load_vector<float4>(from + 4);
          value[0] = a.x, value[1] = a.y, value[2] = a.z, value[3] = a.w;
          value[4] = b.x, value[5] = b.y, value[6] = b.z, value[7] = b.w;
        } else if (live) {
#pragma unroll
          for (int e = 0; e < 8; ++e)
            if (e < valid) value[e] = from[e];
        }
        uint16_t part[8][P::parts];
#pragma unroll
        for (int e = 0; e < 8; ++e) split(value[e], part[e]);
#pragma unroll
        for (int q = 0; q < P::parts; ++q) {
          uint32_t word[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) word[i] = part[2 * i][q] | static_cast<uint32_t>(part[2 * i + 1][q]) << 16;
          shared.template store_vector<uint4>(to + q * P::plane, {word[0], word[1], word[2], word[3]});
        }
      }
    }
    at += P::tokens * stride;
  }
};

using TileAccumulator = float[2][8][4];  // a warp's 32 x 64 of the tile

template <typename T>
DEVICE void multiply(TileAccumulator& acc, const Shared<typename Parts<T>::Type>& shared, int base) {
  using P = Pipeline<T>;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int row0 = warp / 2 * 32, column0 = warp % 2 * 64, matrix = lane / 8, line = lane % 8;
#pragma unroll
  for (int t = 0; t < P::tokens; t += 16) {
    uint32_t left[P::parts][2][4];
#pragma unroll
    for (int q = 0; q < P::parts; ++q) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_matrices_transposed(left[q][m], shared,
                                 base + (P::parts + q) * P::plane + (t + matrix / 2 * 8 + line) * kRow + row0 + 16 * m +
                                     matrix % 2 * 8);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
#pragma unroll
      for (int q = 0; q < P::parts; ++q) {
        uint32_t right[4];
        load_matrices_transposed(
            right, shared,
            base + q * P::plane + (t + matrix % 2 * 8 + line) * kRow + column0 + 8 * j + matrix / 2 * 8);
#pragma unroll
        for (int l = 0; l < P::parts - q; ++l) {
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            mma<typename P::Part>(acc[m][j], left[l][m], {right[0], right[1]});
            mma<typename P::Part>(acc[m][j + 1], left[l][m], {right[2], right[3]});
          }
        }
      }
    }
  }
}

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
  using P = Pipeline<T>;
  using Part = typename P::Part;
  const philox::Key key{p.side.key0, p.side.key1};
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int64_t sample = blockIdx.x / p.strips, strip = blockIdx.x % p.strips;
  const uint32_t k = static_cast<uint32_t>(p.side.k);

  SharedArena arena;
  SharedArena alias = arena;  // the finished tile lies where its operands were
  const Shared<Part> operands = arena.take<Part>(P::bytes / sizeof(Part));
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
  const int64_t begin = span.begin, end = span.end;
  const int steps = static_cast<int>(end > begin ? ceil_div<int64_t>(end - begin, P::tokens) : 0);
  const int64_t down = ceil_div<int64_t>(p.dy.features, kTile), tiles = down * ceil_div<int64_t>(p.x.features, kTile);
  const int64_t last_tile = steps ? tiles * (strip + 1) / p.strips : 0;

  for (int64_t number = tiles * strip / p.strips; number < last_tile; ++number) {
    const int64_t row0 = number % down * kTile, column0 = number / down * kTile;
    const int rows = static_cast<int>(p.dy.features - row0 < kTile ? p.dy.features - row0 : kTile);
    const int columns = static_cast<int>(p.x.features - column0 < kTile ? p.x.features - column0 : kTile);
    Loader<T> x(p.x.data, sample * p.x.sample_stride, p.x.token_stride, begin, column0, p.x.features);
    Loader<T> dy(p.dy.data, sample * p.dy.sample_stride, p.dy.token_stride, begin, row0, p.dy.features);

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
#pragma unroll
    for (int i = 0; i < 64; ++i) acc[i / 32][i / 4 % 8][i % 4] = 0;
    const auto load = [&](int step) {
      if (step < steps) {
        const int base = step % P::stages * P::stage;
        const int64_t left = end - begin - static_cast<int64_t>(step) * P::tokens;
        x.load(operands, base, left);
        dy.load(operands, base + P::parts * P::plane, left);
      }
      copy_async_commit();
    };
    for (int step = 0; step < P::stages - 1; ++step) load(step);
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<P::stages - 2>();
      __syncthreads();  // this step has arrived everywhere, and nobody reads the stage that is filled next
      load(step + P::stages - 1);
      multiply<T>(acc, operands, step % P::stages * P::stage);
    }
    copy_async_wait<0>();

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
  const size_t shared = Pipeline<T>::bytes + kTile * 11 * sizeof(uint32_t) + outputs;
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
