// Ranks within rows, and votes against the lowest of them. Ties get their average rank.
#pragma once

#include <cstdint>

namespace influence_fast {

// (m, n) float32, strides in elements.
struct Rows {
  const float* data;
  int64_t m, n, stride_m, stride_n;
};

// out (m, n), contiguous: rank of each element within its row, 0 = lowest. Out is float (n up to 2^22, where half-integers
// are exact) or double. Returns the first row that is not finite, or -1.
template <typename Out>
int64_t rank(const Rows& rows, Out* out, int threads);

// out (n,): -sum over rows of max(k - rank, 0). Returns the first row that is not finite, or -1.
int64_t vote(const Rows& rows, int64_t k, double* out, int threads);

}  // namespace influence_fast
