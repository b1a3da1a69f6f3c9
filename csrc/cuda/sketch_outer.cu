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
// 6,000 cycles and 256 KB of operands at 24-30 bytes per cycle from L2 up to 10,000; adding the tile takes 16,384 / 32
// = 512 steps of four shared-memory accesses if rows fit their owners, 160 row visits of ~5 steps in practice, about
// 3,200 cycles, which the second block of the multiprocessor hides. Below T = 256 the additions are the longer part.
//
// float32 operands are three bfloat16 each, and six of the nine products count (the others are below 2^-24).
#include "params.h"
#include "portable.cuh"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 128, kHalf = 64;
constexpr int kRow = kTile + 8;                 // padded: eight rows of a matrix load lie in different banks
constexpr int kStageRow = kTile + 8;            // likewise for pairs of floats
constexpr int64_t kMaxStrips = 64, kSharedK = 8192;  // more outputs live in global memory

template <typename T>
struct Pipeline {
  using Part = typename Parts<T>::Type;
  static constexpr int parts = Parts<T>::count;
  static constexpr int tokens = parts == 1 ? 32 : 16, stages = parts == 1 ? 3 : 2;
  static constexpr int plane = tokens * kRow;              // one part of one operand
  static constexpr int stage = 2 * parts * plane;          // x planes, then dy planes
  static constexpr size_t operand_bytes = sizeof(Part) * stages * stage;
  static constexpr size_t staging_bytes = sizeof(float) * kHalf * kStageRow;
  static constexpr size_t bytes = operand_bytes > staging_bytes ? operand_bytes : staging_bytes;
};

struct Operand {
  const void* data;  // token 0 of the sample, feature 0 of the tile
  int64_t stride;
  int64_t left;  // features from there on
  bool aligned;
};

// Tokens [token, token + tokens) x 128 features into a stage; zeros beyond the last token and feature.
template <typename T>
DEVICE void fill(const Shared<typename Parts<T>::Type>& shared, int base, const Operand& from, int64_t token,
                 int64_t end) {
  using P = Pipeline<T>;
  const T* data = static_cast<const T*>(from.data);
#pragma unroll
  for (int unit = static_cast<int>(threadIdx.x); unit < P::tokens * kTile / 8; unit += kThreads) {
    const int row = unit / (kTile / 8), column = unit % (kTile / 8) * 8;
    const int64_t left = from.left - column;
    const int valid = token + row >= end || left <= 0 ? 0 : left < 8 ? static_cast<int>(left) : 8;
    const T* source = data + (token + row) * from.stride + column;
    const int at = base + row * kRow + column;
    if constexpr (P::parts == 1) {
      if (from.aligned && (valid == 8 || valid == 0)) {
        copy_async(shared, at, valid ? source : data, valid == 8);
      } else {
        for (int e = 0; e < 8; ++e) shared.store(at + e, e < valid ? source[e] : T{0});
      }
    } else {
      float value[8] = {};
      if (valid == 8 && from.aligned) {
        const float4 a = reinterpret_cast<const float4*>(source)[0], b = reinterpret_cast<const float4*>(source)[1];
        value[0] = a.x, value[1] = a.y, value[2] = a.z, value[3] = a.w;
        value[4] = b.x, value[5] = b.y, value[6] = b.z, value[7] = b.w;
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (e < valid) value[e] = source[e];
      }
      uint16_t part[8][P::parts];
#pragma unroll
      for (int e = 0; e < 8; ++e) split(value[e], part[e]);
#pragma unroll
      for (int q = 0; q < P::parts; ++q) {
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) word[i] = part[2 * i][q] | static_cast<uint32_t>(part[2 * i + 1][q]) << 16;
        shared.template store_vector<uint4>(at + q * P::plane, {word[0], word[1], word[2], word[3]});
      }
    }
  }
}

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

// Where the outputs of a block live.
struct Outputs {
  Shared<float> shared;
  float* global;  // null: in shared memory
  DEVICE_MEMBER void add(uint32_t m, float value) const {
    if (global)
      global[m] += value;
    else
      shared.store(static_cast<int>(m), shared.load(static_cast<int>(m)) + value);
  }
};

// Rows of a tile as runs of features, of which the first goes to output `start` and `left` lie in its chunk.
struct Runs {
  Shared<uint32_t> start, left, signs;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 1 : 2)
    sketch_outer_kernel(const __grid_constant__ SketchOuterParams p) {
  using P = Pipeline<T>;
  using Part = typename P::Part;
  const philox::Key key{p.side.key0, p.side.key1};
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int64_t sample = blockIdx.x / p.strips, strip = blockIdx.x % p.strips;
  const uint32_t k = p.side.k;

  SharedArena arena;
  SharedArena alias = arena;  // the finished tile lies where its operands were
  const Shared<Part> operands = arena.take<Part>(P::bytes / sizeof(Part));
  const Shared<float> tile = alias.take<float>(kHalf * kStageRow);
  const Runs runs{arena.take<uint32_t>(kTile), arena.take<uint32_t>(kTile), arena.take<uint32_t>(kTile * 8)};
  float* part = p.parts + (sample * p.strips + strip) * static_cast<int64_t>(k);
  const Outputs outputs{arena.take<float>(k <= kSharedK ? k : 0), k <= kSharedK ? nullptr : part};

  const uint32_t low = static_cast<uint32_t>(static_cast<uint64_t>(k) * warp / kWarps);
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(k) * (warp + 1) / kWarps);
  const uint32_t own = low / 32 * 32 + lane;
  for (uint32_t m = own; m < high; m += 32) {
    if (m < low) continue;
    if (outputs.global)
      outputs.global[m] = 0;
    else
      outputs.shared.store(static_cast<int>(m), 0);
  }

  const int64_t begin = p.spans ? p.spans[2 * sample] : 0, end = p.spans ? p.spans[2 * sample + 1] : p.tokens;
  const int64_t steps = end > begin ? ceil_div<int64_t>(end - begin, P::tokens) : 0;
  const int64_t down = ceil_div<int64_t>(p.features_out, kTile), tiles = down * ceil_div<int64_t>(p.features_in, kTile);
  const int64_t last_tile = steps ? tiles * (strip + 1) / p.strips : 0;

  for (int64_t number = tiles * strip / p.strips; number < last_tile; ++number) {
    const int64_t row0 = number % down * kTile, column0 = number / down * kTile;
    const int rows = static_cast<int>(p.features_out - row0 < kTile ? p.features_out - row0 : kTile);
    const int columns = static_cast<int>(p.features_in - column0 < kTile ? p.features_in - column0 : kTile);
    const auto operand = [&](const void* data, int64_t sample_stride, int64_t token_stride, int64_t feature,
                             int64_t features) -> Operand {
      const T* from = static_cast<const T*>(data) + sample * sample_stride + feature;
      const bool aligned =
          (reinterpret_cast<uintptr_t>(from) | static_cast<uintptr_t>(token_stride) * sizeof(T)) % 16 == 0;
      return {from, token_stride, features - feature, aligned};
    };
    const Operand x = operand(p.x, p.x_sample, p.x_token, column0, p.features_in);
    const Operand dy = operand(p.dy, p.dy_sample, p.dy_token, row0, p.features_out);

    __syncthreads();  // the previous tile has left shared memory
    if (threadIdx.x < kTile * 2) {
      // Two threads per row: one block of signs each; the first also says where the run goes.
      const int row = static_cast<int>(threadIdx.x / 2), which = static_cast<int>(threadIdx.x % 2);
      const uint64_t f = static_cast<uint64_t>((row0 + row) * p.features_in + column0);
      const philox::Block bits = philox::sjlt_signs(f / 128 + which, key);
      runs.signs.store_vector<uint4>(8 * row + 4 * which, {bits.x[0], bits.x[1], bits.x[2], bits.x[3]});
      if (which == 0) {
        const uint64_t chunk = f / k;
        const uint32_t at = static_cast<uint32_t>(f % k), sum = at + rotation_of(chunk, k, key);
        runs.start.store(row, sum >= k ? sum - k : sum);
        runs.left.store(row, k - at);
      }
    }

    TileAccumulator acc;
#pragma unroll
    for (int i = 0; i < 64; ++i) acc[i / 32][i / 4 % 8][i % 4] = 0;
    const auto load = [&](int64_t step) {
      if (step < steps) {
        const int base = static_cast<int>(step % P::stages) * P::stage;
        fill<T>(operands, base, x, begin + step * P::tokens, end);
        fill<T>(operands, base + P::parts * P::plane, dy, begin + step * P::tokens, end);
      }
      copy_async_commit();
    };
    for (int step = 0; step < P::stages - 1; ++step) load(step);
    for (int64_t step = 0; step < steps; ++step) {
      copy_async_wait<P::stages - 2>();
      __syncthreads();  // this step has arrived everywhere, and nobody reads the stage that is filled next
      load(step + P::stages - 1);
      multiply<T>(acc, operands, static_cast<int>(step % P::stages) * P::stage);
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
          const uint64_t start = runs.start.load(mine), stop = start + columns;
          touches = runs.left.load(mine) < static_cast<uint32_t>(columns) || (start < high && stop > low) ||
                    stop > static_cast<uint64_t>(k) + low;
        }
        uint32_t todo = warp_ballot(touches);
        while (todo) {
          const int bit = __ffs(todo) - 1, row = half * kHalf + group + bit;
          todo &= todo - 1;
          const int64_t feature = (row0 + row) * p.features_in + column0;
          const int from = (group + bit) * kStageRow, skew = static_cast<int>(feature % 128);
          const float* scale = p.scale ? p.scale + feature : nullptr;
          uint32_t start = runs.start.load(row), length = runs.left.load(row);
          uint64_t chunk = 0;
          for (int column = 0; column < columns;) {  // one chunk of features after the other
            if (length > static_cast<uint32_t>(columns - column)) length = static_cast<uint32_t>(columns - column);
            for (int piece = 0; piece < 2; ++piece) {  // up to output k, and from output 0 on
              const uint32_t head = length < k - start ? length : k - start;
              const uint32_t a = piece ? 0 : start, b = piece ? length - head : start + head;
              const int shift = column + static_cast<int>(piece ? head : 0);
              const uint32_t stop = b < high ? b : high, go = a > low ? a : low;
              for (uint32_t m = (go > own ? (go - own + 31) / 32 * 32 : 0) + own; m < stop; m += 32) {
                const int at = shift + static_cast<int>(m - a), sign = skew + at;
                float value = tile.load(from + at);
                if (scale) value *= scale[at];
                const uint32_t plus = runs.signs.load(8 * row + sign / 32) >> (sign % 32) & 1u;
                outputs.add(m, __uint_as_float(__float_as_uint(value) ^ (plus ^ 1u) << 31));
              }
            }
            column += static_cast<int>(length);
            if (column < columns) {
              if (chunk == 0) chunk = static_cast<uint64_t>(feature) / k;
              start = rotation_of(++chunk, k, key);
              length = k;
            }
          }
        }
      }
    }
  }
  if (outputs.global) return;
  for (uint32_t m = own; m < high; m += 32)
    if (m >= low) part[m] = outputs.shared.load(static_cast<int>(m));
}

}  // namespace

int64_t sketch_outer_strips(int64_t features_in, int64_t features_out) {
  const int64_t strips = ceil_div<int64_t>(features_in, kTile) * ceil_div<int64_t>(features_out, kTile) / 4;
  return strips < 1 ? 1 : strips > kMaxStrips ? kMaxStrips : strips;
}

template <typename T>
static void run(const SketchOuterParams& p, uint64_t stream) {
  const size_t outputs = p.side.k <= kSharedK ? (p.side.k * sizeof(float) + 15) / 16 * 16 : 0;
  const size_t shared = Pipeline<T>::bytes + kTile * 10 * sizeof(uint32_t) + outputs;
  launch("sketch_outer", sketch_outer_kernel<T>, dim3(static_cast<unsigned>(p.samples * p.strips)), kThreads, shared,
         stream, p);
}

void sketch_outer(const SketchOuterParams& p, uint64_t stream) {
  if (p.type == Type::float32)
    run<float>(p, stream);
  else if (p.type == Type::float16)
    run<f16>(p, stream);
  else
    run<bf16>(p, stream);
  if (p.strips == 1) return;
  const int64_t k = p.side.k;
  sum_parts({p.parts, p.out, p.samples, k, p.strips, p.strips * k, k, nullptr, 1, 1.0f}, stream);
}
