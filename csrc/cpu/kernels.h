// What the kernels compute, on raw pointers. One table of functions per instruction set, all built from kernels.inc.
//
// Shapes: N samples, T tokens, i inputs, o outputs, k projected numbers. Strides are in elements, the feature stride is 1.
// Sums are in float32. Results are bitwise the same for any number of threads.
#pragma once

#include <cstdint>

#include "scan.h"

namespace influence_fast {

enum class Type : int { f32 = 0, f16 = 1, bf16 = 2 };
enum class Kind : int { none = 0, dense = 1, rademacher = 2, gaussian = 3, sjlt = 4 };

// (N, T, features); token t of sample n starts at element n * stride_n + t * stride_t.
struct Tokens {
  const void* data;
  Type type;
  int64_t features, stride_n, stride_t;
};

// A (k, features) matrix: implicit, or dense float32 with row stride ld. Results are multiplied by scale at the end.
struct Side {
  Kind kind;
  uint32_t key0, key1;
  int64_t k, features;
  float scale;
  const float* dense;
  int64_t ld;
};

// [begin, end) of the tokens that count in each sample, int64 (N, 2); null: all T.
struct Batch {
  int64_t samples, tokens;
  const int64_t* spans;
};

// (m, n) float32, strides in elements.
struct Rows {
  const float* data;
  int64_t m, n, stride_m, stride_n;
};

struct Kernels {
  const char* isa;
  // Entries [r0, r1) x [c0, c1) of an implicit matrix, not scaled: (r1 - r0, c1 - c0).
  void (*random_matrix)(const Side& side, int64_t r0, int64_t r1, int64_t c0, int64_t c1, float* out, int threads);
  // g (N, D), row stride g.stride_n: -> (N, k).
  void (*sketch)(const Tokens& g, int64_t samples, const Side& side, float* out, int threads);
  // -> (N, k_out, k_in); a side of kind none leaves its features as they are.
  void (*project_outer)(const Tokens& x, const Tokens& dy, const Batch& batch, const Side& in, const Side& out_side,
                        float* out, int threads);
  // -> (N, k); weight: null or float32 (o, i), multiplied into the gradient first.
  void (*sketch_outer)(const Tokens& x, const Tokens& dy, const Batch& batch, const Side& side, const float* weight,
                       float* out, int threads);
  // -> (Na, Nb)
  void (*ghost_dot)(const Tokens& xa, const Tokens& dya, const Batch& a, const Tokens& xb, const Tokens& dyb,
                    const Batch& b, float* out, int threads);
  // -> (N,)
  void (*ghost_norm)(const Tokens& x, const Tokens& dy, const Batch& batch, float* out, int threads);
  // Rank of each element within its row, 0 = lowest, ties averaged: (m, n), contiguous. One of the outputs is null: half
  // integers are exact in `narrow` for n up to 2^22. Returns the first row that is not finite, or -1.
  int64_t (*rank)(const Rows& rows, float* narrow, double* wide, int threads);
  // out (n,): -sum over rows of max(k - rank, 0). Returns as rank does.
  int64_t (*vote)(const Rows& rows, int64_t k, double* out, int threads);
  // Both at once with no rank written: ranks (n,) the sum over rows of ranks, votes (n,) as above. Returns as rank does.
  int64_t (*tally)(const Rows& rows, int64_t k, double* ranks, double* votes, int threads);
  ScanKernels scan;
};

const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512bf16();

}  // namespace influence_fast
