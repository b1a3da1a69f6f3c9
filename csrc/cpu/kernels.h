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
  ScanKernels scan;
};

// Null where this machine cannot run it.
const Kernels* kernels_baseline();
#ifdef INFLUENCE_FAST_X86
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512bf16();
#endif

}  // namespace influence_fast
