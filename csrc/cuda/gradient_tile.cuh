// A tile of 128 x 128 entries of one sample's gradient G = dy^T x in registers: a product over tokens on the tensor
// cores, operands as they lie in memory (features one after another), three stages deep.
//
// float32 operands are three bfloat16 each, and six of the nine products count (operands.cuh).
#pragma once

#include "operands.cuh"

constexpr int kTileThreads = 256, kTile = 128;
constexpr int kTileRow = kTile + 8;  // padded: eight rows of a matrix load lie in different banks

template <typename T>
struct Pipeline {
  using Part = typename Parts<T>::Type;
  static constexpr int parts = Parts<T>::count;
  static constexpr int tokens = parts == 1 ? 32 : 16, stages = parts == 1 ? 3 : 2;
  static constexpr int plane = tokens * kTileRow;  // one part of one operand
  static constexpr int stage = 2 * parts * plane;  // x planes, then dy planes
  static constexpr size_t bytes = sizeof(Part) * stages * stage;
};

// A thread's share of loading one operand of a tile: 8 features of a few tokens per step, from step to step onwards.
template <typename T>
struct Loader {
  using P = Pipeline<T>;
  using Part = typename P::Part;
  static constexpr int kLanes = kTile / 8, kRows = kTileThreads / kLanes, kCount = P::tokens / kRows;

  const T* at;  // this thread's first token of the next step
  int64_t stride;
  int row, column, valid;  // of 8 features
  bool fast;               // all eight or none, and aligned
  EightNumbers<T> moved[kCount];

  DEVICE_MEMBER Loader(const Tokens& x, int64_t sample, int64_t token, int64_t feature) {
    row = static_cast<int>(threadIdx.x) / kLanes;
    column = static_cast<int>(threadIdx.x) % kLanes * 8;
    stride = x.token_stride;
    const int64_t left = x.features - feature - column;
    valid = left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
    at = static_cast<const T*>(x.data) + sample * x.sample_stride + (token + row) * stride + feature + (valid ? column : 0);
    const uintptr_t address = reinterpret_cast<uintptr_t>(at) | static_cast<uintptr_t>(stride) * sizeof(T);
    fast = valid % 8 == 0 && address % 16 == 0;
  }

  // The next tokens, of which `left` count, into the planes at `base`; zeros beyond the last token and feature.
  DEVICE_MEMBER void fetch(const Shared<Part>& shared, int base, int64_t left) {
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      const bool live = row + r * kRows < left;
      const T* from = live ? at + r * kRows * stride : at - row * stride;  // the latter is never read
      moved[r].fetch(shared, base + (row + r * kRows) * kTileRow + column, from, live ? valid : 0, fast);
    }
    at += P::tokens * stride;
  }

  DEVICE_MEMBER void store(const Shared<Part>& shared, int base) const {
#pragma unroll
    for (int r = 0; r < kCount; ++r) moved[r].store(shared, base + (row + r * kRows) * kTileRow + column, P::plane);
  }
};

using TileAccumulator = float[2][8][4];  // a warp's 32 x 64 of the tile

// Where acc[m][j][c] of this thread lies in the tile.
DEVICE int tile_row(int m, int c) {
  return static_cast<int>(threadIdx.x) / 64 * 32 + 16 * m + static_cast<int>(threadIdx.x) % 32 / 4 + c / 2 * 8;
}
DEVICE int tile_column(int j, int c) {
  return static_cast<int>(threadIdx.x) / 32 % 2 * 64 + 8 * j + static_cast<int>(threadIdx.x) % 4 * 2 + c % 2;
}

template <typename T>
DEVICE void multiply_tile(TileAccumulator& acc, const Shared<typename Parts<T>::Type>& shared, int base) {
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
                                 base + (P::parts + q) * P::plane + (t + matrix / 2 * 8 + line) * kTileRow + row0 +
                                     16 * m + matrix % 2 * 8);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
#pragma unroll
      for (int q = 0; q < P::parts; ++q) {
        uint32_t right[4];
        load_matrices_transposed(
            right, shared,
            base + q * P::plane + (t + matrix % 2 * 8 + line) * kTileRow + column0 + 8 * j + matrix / 2 * 8);
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

// acc = G[row0 .. + 128, column0 .. + 128) of a sample; zeros beyond the weight's shape. With `Skip` warps do not multiply
// what lies beyond it, which spares narrow weights, such as an adapter's, most of a tile and costs a register.
template <typename T, bool Skip>
DEVICE void gradient_tile(TileAccumulator& acc, const Shared<typename Parts<T>::Type>& operands, const Tokens& x,
                          const Tokens& dy, int64_t sample, Span span, int64_t row0, int64_t column0) {
  using P = Pipeline<T>;
#pragma unroll
  for (int i = 0; i < 64; ++i) acc[i / 32][i / 4 % 8][i % 4] = 0;
  const int64_t length = span.end - span.begin;
  const int steps = static_cast<int>(length > 0 ? ceil_div<int64_t>(length, P::tokens) : 0);
  Loader<T> right(x, sample, span.begin, column0), left(dy, sample, span.begin, row0);
  const bool needed = !Skip || (row0 + tile_row(0, 0) / 32 * 32 < dy.features &&
                                column0 + tile_column(0, 0) / 64 * 64 < x.features);
  pipelined<P::stages>(
      steps,
      [&](int step, int stage) {
        right.fetch(operands, stage * P::stage, length - static_cast<int64_t>(step) * P::tokens);
        left.fetch(operands, stage * P::stage + P::parts * P::plane, length - static_cast<int64_t>(step) * P::tokens);
      },
      [&](int, int stage) {
        right.store(operands, stage * P::stage);
        left.store(operands, stage * P::stage + P::parts * P::plane);
      },
      [&](int stage, int) {
        if (needed) multiply_tile<T>(acc, operands, stage * P::stage);
      });
}
