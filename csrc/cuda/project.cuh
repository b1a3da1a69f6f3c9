// The heart of the dense projections: one warp multiplies 32 rows of data with up to 32 rows of an implicit random
// matrix, whose entries never exist outside registers.
//
// A sum over features has no order that matters to its value, so features are dealt to the fragments of the matrix
// instruction in the order that suits memory: a thread loads 16 bytes (8 sixteen-bit features) of a row, and these are
// its share of two k16 steps. The matching share of the random matrix is one byte of bits of one row, which becomes
// four registers of +-1 pairs with about three instructions each.
//
// Per 128 features a warp issues 64 matrix instructions, one Philox block per lane (~80 instructions), ~14 instructions
// for each of 16 groups of signs and as many for its 16 loads, ~400 in all or 100 cycles of a multiprocessor. Two such
// warps cover k = 64 and 8 KB of sixteen-bit data, which take ~630 cycles to arrive at 3 TB/s over 132 multiprocessors:
// memory-bound with 3x slack. Larger warp tiles would spare sign expansions but cost the second block its registers.
#pragma once

#include "params.h"
#include "portable.cuh"

constexpr int kRowTile = 32, kPanel = 32, kBlock = 128;  // rows, matrix rows, features per step of a warp

// Eight consecutive features of a row as matrix operands: parts x pairs.
template <typename T>
struct Eight {
  uint32_t pair[Parts<T>::count][4];
};

template <typename T>
struct Raw {
  uint4 word[sizeof(T) / 2];
};

template <typename T>
DEVICE Raw<T> load_aligned(const T* from) {
  Raw<T> raw;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) raw.word[i] = load_vector<uint4>(from + i * 16 / sizeof(T));
  return raw;
}

// `valid` of the eight elements may be read; the others are zero whatever memory holds.
template <typename T>
DEVICE Raw<T> load_some(const T* from, int valid) {
  uint32_t bits[2 * sizeof(T)];
#pragma unroll
  for (int i = 0; i < static_cast<int>(2 * sizeof(T)); ++i) {
    if constexpr (sizeof(T) == 4) {
      bits[i] = i < valid ? __float_as_uint(from[i]) : 0;
    } else {
      const uint32_t low = 2 * i < valid ? from[2 * i].bits : 0, high = 2 * i + 1 < valid ? from[2 * i + 1].bits : 0;
      bits[i] = low | high << 16;
    }
  }
  Raw<T> raw;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i)
    raw.word[i] = {bits[4 * i], bits[4 * i + 1], bits[4 * i + 2], bits[4 * i + 3]};
  return raw;
}

template <typename T>
DEVICE Eight<T> operands(const Raw<T>& raw) {
  Eight<T> out;
  if constexpr (sizeof(T) == 4) {
    const uint32_t bits[8] = {raw.word[0].x, raw.word[0].y, raw.word[0].z, raw.word[0].w,
                              raw.word[1].x, raw.word[1].y, raw.word[1].z, raw.word[1].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint16_t low[3], high[3];
      split(__uint_as_float(bits[2 * i]), low);
      split(__uint_as_float(bits[2 * i + 1]), high);
#pragma unroll
      for (int p = 0; p < 3; ++p) out.pair[p][i] = low[p] | static_cast<uint32_t>(high[p]) << 16;
    }
  } else {
    out.pair[0][0] = raw.word[0].x;
    out.pair[0][1] = raw.word[0].y;
    out.pair[0][2] = raw.word[0].z;
    out.pair[0][3] = raw.word[0].w;
  }
  return out;
}

// The pair (+1, +1) of a matrix operand type; flipping bits 15 and 31 negates.
template <typename T>
constexpr uint32_t kOnes = Parts<T>::Type::half ? 0x3C003C00u : 0x3F803F80u;

// The low byte's even bits from 0 up, its odd ones from 16 up.
DEVICE uint32_t spread_of(uint32_t byte) { return (byte & 0x55u) | (byte & 0xAAu) << 15; }

// +-1 pairs from the low byte of `bits`; 1 is +1.
template <typename T>
DEVICE void expand(uint32_t bits, uint32_t (&pairs)[4]) {
  const uint32_t spread = spread_of(bits);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = ((spread << (15 - 2 * i)) & 0x80008000u) ^ (kOnes<T> | 0x80008000u);
}

struct Panel {
  uint32_t column;  // first matrix row
  int tiles;        // groups of eight matrix rows, 1 to 4
};

using Accumulator = float[2][4][4];
constexpr int kAccumulators = 32;

DEVICE void clear(Accumulator& acc) {
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) acc[i / 16][i / 4 % 4][i % 4] = 0;
}

// Where an SJLT sends eight features from f on, and with which signs: lane of the first one in its chunk of k, rotations of
// that chunk and of the next, signs as in expand(). Few numbers, so that they fit a thread's registers: the entries of a
// matrix row are made of them when its turn comes.
struct Targets {
  uint32_t lane, turn, next, spread;  // k < 8: turn holds the hits of matrix row `group`, and no other row counts
};

// f < 2^32.
DEVICE Targets targets(uint32_t f, uint32_t byte, const Side& side, uint32_t group) {
  const philox::Key key{side.key0, side.key1};
  const uint32_t k = static_cast<uint32_t>(side.k);
  uint32_t chunk = f / k, lane = f - chunk * k, turn = rotation_of(chunk, k, key);
  if (k >= 8)  // at most one chunk begins among the eight
    return {lane, turn, lane + 8 > k ? rotation_of(chunk + 1, k, key) : 0, spread_of(byte)};
  uint32_t hits = 0;
#pragma unroll 1
  for (uint32_t e = 0; e < 8; ++e) {
    const uint32_t sum = lane + turn;
    hits |= static_cast<uint32_t>((sum >= k ? sum - k : sum) == group) << e;
    if (++lane == k) {
      lane = 0;
      turn = rotation_of(++chunk, k, key);
    }
  }
  return {0, hits, 0, spread_of(byte)};
}

// Entries of matrix row `column`: +-1 pairs where it is hit, 0 or -0 elsewhere. Rows beyond k get some that nobody reads.
template <typename T>
DEVICE void expand(const Targets& target, uint32_t column, uint32_t k, uint32_t (&pairs)[4]) {
  uint32_t hits = target.turn;
  if (k >= 8) {
    const uint32_t here = column - target.turn + (column < target.turn ? k : 0) - target.lane;
    const uint32_t after = column - target.next + (column < target.next ? k : 0) - target.lane + k;
    hits = (here < 8 ? 1u << here : 0) | (after < 8 ? 1u << after : 0);
  }
  const uint32_t hit = spread_of(hits);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pairs[i] = (hit >> 2 * i & 0x00010001u) * (kOnes<T> & 0xFFFFu) ^ (~target.spread << (15 - 2 * i) & 0x80008000u);
}

// acc += rows[0 .. live) of data times panel of the matrix, over feature blocks first, first + step, ... below last.
// Fragment layout of acc[m][j][c]: row 16 m + lane / 4 + c / 2 * 8, column 8 j + lane % 4 * 2 + c % 2.
// Numbers of features are int where they fit: for two blocks a multiprocessor a thread has 128 registers, and with 32 sums, 16 of
// data and ~10 of Philox each one counts.
template <typename T, bool Sjlt, typename Index>
DEVICE void project(Accumulator& acc, const T* rows, int64_t stride, int live, Index features, bool aligned,
                    const Side& side, Panel panel, Index first, Index last, Index step) {
  using Part = typename Parts<T>::Type;
  const int lane = static_cast<int>(threadIdx.x % 32), group = lane / 4, quarter = lane % 4;
  const philox::Key key{side.key0, side.key1};

  const T* from = rows + group * stride + 8 * quarter;  // and three rows that are eight apart

  for (Index block = first; block < last; block += step) {
    // A lane per row asks for the next block: by the time it is needed it has come from memory to L2, whatever few
    // loads registers have room for.
#pragma unroll
    for (int e = 0; e < kBlock; e += 128 / static_cast<int>(sizeof(T))) {
      const Index f = (block + step) * kBlock + e;
      if (group + 8 * quarter < live && block + step < last && f < features)
        prefetch(from + 8 * quarter * (stride - 1) + f);
    }
    philox::Block bits;
    if constexpr (Sjlt) {
      bits = philox::sjlt_signs(static_cast<uint64_t>(block), key);
    } else {
      // The four lanes of a group need bits of the same four matrix rows: each makes one of them.
      bits = philox::rademacher(panel.column + 8 * quarter + group, static_cast<uint64_t>(block), key);
    }
#pragma unroll 1
    for (int s = 0; s < 4; ++s) {
      const uint32_t word = pick(bits, s);
      const Index f = block * kBlock + 32 * s, left = features - f - 8 * quarter;
      Raw<T> raw[4] = {};  // four loads in flight per thread; other warps fill the wait. Set, or it lives from round to round
      if (aligned && left >= 8) {
#pragma unroll
        for (int r = 0; r < 4; ++r) raw[r] = group + 8 * r < live ? load_aligned(from + 8 * r * stride + f) : Raw<T>{};
      } else {
        const int width = left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
#pragma unroll 1
        for (int r = 0; r < 4; ++r) {
          const Raw<T> some = load_some(from + 8 * r * stride + f, group + 8 * r < live ? width : 0);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (i == r) raw[i] = some;
        }
      }
      Eight<T> data[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) data[r] = operands<T>(raw[r]);

      Targets target;
      if constexpr (Sjlt) target = targets(static_cast<uint32_t>(f) + 8 * quarter, word >> (8 * quarter), side, group);
      __syncwarp();  // matrix instructions want all lanes together
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j >= panel.tiles) break;
        uint32_t pairs[4];
        if constexpr (Sjlt) {
          expand<T>(target, panel.column + static_cast<uint32_t>(8 * j + group), static_cast<uint32_t>(side.k), pairs);
        } else {
          expand<T>(warp_shuffle(word, 4 * group + j) >> (8 * quarter), pairs);
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int p = 0; p < Parts<T>::count; ++p) {
            const auto &top = data[2 * m].pair[p], &bottom = data[2 * m + 1].pair[p];
            mma<Part>(acc[m][j], {top[0], bottom[0], top[1], bottom[1]}, {pairs[0], pairs[1]});
            mma<Part>(acc[m][j], {top[2], bottom[2], top[3], bottom[3]}, {pairs[2], pairs[3]});
          }
        }
      }
    }
  }
}
