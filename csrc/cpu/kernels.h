// What the kernels compute, on raw pointers: one table of functions for each instruction set, all built from kernels/table.inc.
//
// Shapes: N samples, T tokens, i inputs, o outputs, k projected numbers. Strides are in elements; features lie one after another.
// Sums are in float32. Results are bitwise the same for any number of threads. Nothing is checked here: bindings.cpp does.
#pragma once

#include <cstdint>

#include "../types.h"
#include "exact_search.h"

namespace influence_fast {

// What becomes of an entry g of a gradient before it is sketched; float32 (o, i) each, or null. With weight it is multiplied by
// it; with m and v it becomes Adam's update, (b1 m + (1 - b1) g) / sqrt(b2 v + (1 - b2) g^2 + eps).
struct Change {
  const float *weight, *m, *v;
  float b1, b2, eps;
};

struct Kernels {
  const char* isa;
  // Entries [r0, r1) x [c0, c1) of an implicit matrix, not scaled: (r1 - r0, c1 - c0).
  void (*random_matrix)(const Side& side, int64_t r0, int64_t r1, int64_t c0, int64_t c1, float* out, int threads);
  // g (N, D) -> (N, k).
  void (*sketch)(const Matrix& g, const Side& side, float* out, int threads);
  // The same of float64 (N, D), rows row_stride apart, summed in float64.
  void (*sketch_wide)(const double* g, int64_t rows, int64_t row_stride, const Side& side, double* out, int threads);
  // Entries of a Gaussian side as sketch reads them where side.dense points there; how many numbers that takes.
  void (*fill_panels)(const Side& side, float* panels, int threads);
  int64_t (*panel_numbers)(int64_t k, int64_t features);
  // -> (N, k_out, k_in); an identity leaves its features as they are.
  void (*project_outer)(const Tokens& x, const Tokens& dy, const Batch& batch, const Side& in, const Side& out_side,
                        float* out, int threads);
  // -> (N, k), after `change` of every entry of the gradient.
  void (*sketch_outer)(const Tokens& x, const Tokens& dy, const Batch& batch, const Side& side, const Change& change,
                       float* out, int threads);
  // -> (Na, Nb)
  void (*ghost_dot)(const Tokens& xa, const Tokens& dya, const Batch& a, const Tokens& xb, const Tokens& dyb,
                    const Batch& b, float* out, int threads);
  // -> (N,)
  void (*ghost_norm)(const Tokens& x, const Tokens& dy, const Batch& batch, float* out, int threads);
  // values: float32 (m, n). Rank of each element within its row, 0 = lowest, ties averaged: (m, n), contiguous. One of the
  // outputs is null: half integers are exact in `narrow` for n up to 2^22. Returns the first row that is not finite, or -1.
  int64_t (*rank)(const Matrix& values, float* narrow, double* wide, int threads);
  // out (n,): -sum over rows of max(k - rank, 0). Returns as rank does.
  int64_t (*vote)(const Matrix& values, int64_t k, double* out, int threads);
  // Both at once with no rank written: ranks (n,) the sum over rows of ranks, votes (n,) as above. Returns as rank does.
  int64_t (*rank_and_vote)(const Matrix& values, int64_t k, double* ranks, double* votes, int threads);
  SearchKernels search;
};

const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512bf16();

}  // namespace influence_fast
