// A tile of inner products A B^T in registers, A and B with their features one after another in memory: 128 x 128 by
// eight warps, 64 x 64 by four. A row of the tile is a token of a sample, or several samples' tokens share a tile.
//
// Operands go to shared memory row by row, 32 sixteen-bit features a step and three steps deep (float32: 16, two), rows
// padded so that the eight rows of a matrix load lie in different banks. Nothing is transposed: the matrix instruction
// wants both operands along the features.
//
// float32 operands are three bfloat16 each, and six of the nine products count (operands.cuh).
#pragma once

#include "operands.cuh"

template <typename T, int Tile>
struct GramPipeline {
  using Part = typename Parts<T>::Type;
  static constexpr int parts = Parts<T>::count, threads = 2 * Tile;
  static constexpr int features = parts == 1 ? 32 : 16, stages = parts == 1 ? 3 : 2;
  static constexpr int row = features + 8;
  static constexpr int plane = Tile * row;         // one part of one operand
  static constexpr int stage = 2 * parts * plane;  // planes of A, then of B
  static constexpr size_t bytes = sizeof(Part) * stages * stage;
  // Steps after which accumulators move on: the matrix unit truncates its sums (see kChain).
  static constexpr int chain = kChain * 128 / features;
};

// Which tokens the rows of a tile are: row r is token `token + r % per` of sample `sample + r / per`, per = 2^shift.
struct GramRows {
  int64_t sample, token;
  int shift;
};

// A thread's share of loading one operand: 8 features of one or two rows per step, from step to step onwards.
template <typename T, int Tile>
struct RowLoader {
  using P = GramPipeline<T, Tile>;
  using Part = typename P::Part;
  static constexpr int kLanes = P::features / 8, kRows = P::threads / kLanes, kCount = Tile / kRows;

  const T* at[kCount];
  int row, column;
  bool live[kCount], aligned;
  EightNumbers<T> moved[kCount];

  DEVICE_MEMBER RowLoader(const Tokens& x, const Batch& batch, const GramRows& rows, int64_t first) {
    row = static_cast<int>(threadIdx.x) / kLanes;
    column = static_cast<int>(threadIdx.x) % kLanes * 8;
    aligned = (reinterpret_cast<uintptr_t>(x.data) | static_cast<uintptr_t>(x.token_stride) * sizeof(T) |
               static_cast<uintptr_t>(x.sample_stride) * sizeof(T)) % 16 == 0;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const int r = row + c * kRows;
      const int64_t sample = rows.sample + (r >> rows.shift);
      const int64_t offset = rows.token + (r & ((1 << rows.shift) - 1));
      const Span span = batch.span(sample < batch.samples ? sample : 0);
      live[c] = sample < batch.samples && span.begin + offset < span.end;
      at[c] = static_cast<const T*>(x.data);  // what a copy of nothing names
      if (live[c]) at[c] += sample * x.sample_stride + (span.begin + offset) * x.token_stride + first + column;
    }
  }

  // The next features, of which `left` exist; zeros beyond them and in rows that do not count.
  DEVICE_MEMBER void fetch(const Shared<Part>& shared, int base, int64_t left) {
    left -= column;
    const int valid = left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const int some = live[c] ? valid : 0;
      moved[c].fetch(shared, base + (row + c * kRows) * P::row + column, at[c], some, aligned && some % 8 == 0);
      if (some == 8) at[c] += P::features;
    }
  }

  DEVICE_MEMBER void store(const Shared<Part>& shared, int base) const {
#pragma unroll
    for (int c = 0; c < kCount; ++c) moved[c].store(shared, base + (row + c * kRows) * P::row + column, P::plane);
  }
};

template <int Tile>
using GramAccumulator = float[2][Tile / 16][4];  // a warp's 32 x Tile / 2

// Where acc[m][j][c] of this thread lies in the tile.
template <int Tile>
DEVICE int gram_row(int m, int c) {
  return static_cast<int>(threadIdx.x) / 64 * 32 + 16 * m + static_cast<int>(threadIdx.x) % 32 / 4 + c / 2 * 8;
}
template <int Tile>
DEVICE int gram_column(int j, int c) {
  return static_cast<int>(threadIdx.x) / 32 % 2 * (Tile / 2) + 8 * j + static_cast<int>(threadIdx.x) % 4 * 2 + c % 2;
}

// A bit for each 16 x 16 of a warp's share, by rows: those for which `test(row, column)` says that they are needed.
template <int Tile, typename Test>
DEVICE uint32_t needed_blocks(const Test& test) {
  constexpr int kPairs = Tile / 32;
  uint32_t needed = 0;
#pragma unroll
  for (int i = 0; i < 2 * kPairs; ++i) {
    const int row = static_cast<int>(threadIdx.x) / 64 * 32 + i / kPairs * 16;
    const int column = static_cast<int>(threadIdx.x) / 32 % 2 * (Tile / 2) + i % kPairs * 16;
    if (test(row, column)) needed |= 1u << i;
  }
  return needed;
}

// A warp of a large tile multiplies all of its share or nothing.
template <typename T, int Tile>
DEVICE void multiply_rows(GramAccumulator<Tile>& acc, const Shared<typename Parts<T>::Type>& shared, int left_base,
                          int right_base, uint32_t needed) {
  using P = GramPipeline<T, Tile>;
  constexpr int kPairs = Tile / 32;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int row0 = warp / 2 * 32, column0 = warp % 2 * (Tile / 2), matrix = lane / 8, line = lane % 8;
#pragma unroll
  for (int f = 0; f < P::features; f += 16) {
    uint32_t left[P::parts][2][4];
#pragma unroll
    for (int q = 0; q < P::parts; ++q) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_matrices(left[q][m], shared,
                      left_base + q * P::plane + (row0 + 16 * m + matrix % 2 * 8 + line) * P::row + f + matrix / 2 * 8);
      }
    }
#pragma unroll
    for (int j = 0; j < 2 * kPairs; j += 2) {
      if (Tile == 64 && !(needed >> j / 2 & (1u << kPairs | 1u))) continue;
#pragma unroll
      for (int q = 0; q < P::parts; ++q) {
        uint32_t right[4];
        load_matrices(right, shared,
                      right_base + q * P::plane + (column0 + 8 * j + matrix / 2 * 8 + line) * P::row + f + matrix % 2 * 8);
#pragma unroll
        for (int l = 0; l < P::parts - q; ++l) {
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            if (Tile == 64 && !(needed >> (m * kPairs + j / 2) & 1)) continue;
            mma<typename P::Part>(acc[m][j], left[l][m], {right[0], right[1]});
            mma<typename P::Part>(acc[m][j + 1], left[l][m], {right[2], right[3]});
          }
        }
      }
    }
  }
}

// Inner products over features [first, last) of rows of a and of b. `flush(i, value)` takes what has been added up of a
// thread's number i, in the order of acc[m][j][c], now and then and at the end. `same`: b's rows are a's, and are loaded once. Shared memory is free when this begins.
template <typename T, int Tile, typename Flush>
DEVICE void gram_tile(const Shared<typename Parts<T>::Type>& operands, const Tokens& a, const Batch& batch_a,
                      const GramRows& rows_a, const Tokens& b, const Batch& batch_b, const GramRows& rows_b, bool same,
                      int64_t first, int64_t last, uint32_t needed, const Flush& flush) {
  using P = GramPipeline<T, Tile>;
  RowLoader<T, Tile> left(a, batch_a, rows_a, first), right(b, batch_b, rows_b, first);
  const int other = same ? 0 : P::parts * P::plane;
  const int steps = static_cast<int>(ceil_div<int64_t>(last - first, P::features));
  GramAccumulator<Tile> acc;
#pragma unroll
  for (int i = 0; i < Tile / 2; ++i) acc[i / (Tile / 4)][i / 4 % (Tile / 16)][i % 4] = 0;
  const auto empty = [&] {
#pragma unroll
    for (int i = 0; i < Tile / 2; ++i) {
      float& number = acc[i / (Tile / 4)][i / 4 % (Tile / 16)][i % 4];
      flush(i, number);
      number = 0;
    }
  };
  pipelined<P::stages>(
      steps,
      [&](int step, int stage) {
        const int64_t rest = last - first - static_cast<int64_t>(step) * P::features;
        left.fetch(operands, stage * P::stage, rest);
        if (!same) right.fetch(operands, stage * P::stage + other, rest);
      },
      [&](int, int stage) {
        left.store(operands, stage * P::stage);
        if (!same) right.store(operands, stage * P::stage + other);
      },
      [&](int stage, int step) {
        if (needed) multiply_rows<T, Tile>(acc, operands, stage * P::stage, stage * P::stage + other, needed);
        if ((step + 1) % P::chain == 0) empty();
      });
  empty();
}
