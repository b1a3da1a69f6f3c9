// Average ranks within rows, and what a column's ranks add up to: votes against it, and their sum.
//
// All rows of a call are sorted at once by 64-bit keys, the row above the value's bits in ascending order: CUB's radix
// sort makes one pass per eight bits that are in use, five for up to 256 rows, and neither few long rows nor many short
// ones leave the card idle. Each entry then finds the ends of its run of ties by bisection, and only if it has a tie.
// Bytes per entry: ~12 written and read per pass and ~30 around them, 150 in all, 0.05 ns at 3 TB/s.
#include "params.h"
#include "portable.cuh"

#ifndef INFLUENCE_FAST_SIMT
#include <cub/device/device_radix_sort.cuh>
#endif

namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) rank_keys(const __grid_constant__ RankParams p) {
  const int64_t columns = p.values.columns, total = p.values.rows * columns;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t row = i / columns, column = i - row * columns;
    const float value = to_float(static_cast<const T*>(p.values.data)[row * p.values.row_stride + column]) + 0.0f;  // -0 is 0
    uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7F800000u) == 0x7F800000u) atomic_min(p.bad, p.first_row + row);
    bits ^= bits >> 31 ? 0xFFFFFFFFu : 0x80000000u;
    p.keys[i] = static_cast<uint64_t>(row) << 32 | bits;
    p.index[i] = static_cast<uint32_t>(column);
  }
}

// The first position in [low, high) whose key is not below (not above, for After) `key`.
template <bool After>
DEVICE int64_t bound(const uint64_t* keys, int64_t low, int64_t high, uint64_t key) {
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (After ? keys[middle] <= key : keys[middle] < key)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

__global__ void __launch_bounds__(kThreads) rank_runs(const __grid_constant__ RankParams p) {
  const int64_t columns = p.values.columns, total = p.values.rows * columns;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const uint64_t key = p.sorted_keys[i];
    const int64_t begin = static_cast<int64_t>(key >> 32) * columns, end = begin + columns;
    int64_t first = i, last = i + 1;
    if (i > begin && p.sorted_keys[i - 1] == key) first = bound<false>(p.sorted_keys, begin, i, key);
    if (last < end && p.sorted_keys[last] == key) last = bound<true>(p.sorted_keys, last, end, key);
    const double rank = 0.5 * static_cast<double>(first + last - 1 - 2 * begin);
    const int64_t to = begin + p.sorted_index[i];
    if (p.wide)
      static_cast<double*>(p.ranks)[to] = rank;
    else
      static_cast<float*>(p.ranks)[to] = static_cast<float>(rank);
  }
}

__global__ void __launch_bounds__(kThreads) vote_kernel(const __grid_constant__ VoteParams p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; c < p.columns; c += step) {
    double ranks = 0, votes = 0;  // halves of integers: exact in any order
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t at = row * p.columns + c;
      const double rank = p.wide ? static_cast<const double*>(p.ranks)[at] : static_cast<const float*>(p.ranks)[at];
      ranks += rank;
      if (rank < p.k) votes += rank - p.k;
    }
    p.votes[c] += votes;
    if (p.rank_sums) p.rank_sums[c] += ranks;
  }
}

#ifdef INFLUENCE_FAST_SIMT

size_t sort(void* workspace, size_t, const RankParams& p, uint64_t) {
  if (!workspace) return 1;
  std::vector<int64_t> order(static_cast<size_t>(p.values.rows * p.values.columns));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return p.keys[a] < p.keys[b]; });
  for (size_t i = 0; i < order.size(); ++i)
    p.sorted_keys[i] = p.keys[order[i]], p.sorted_index[i] = p.index[order[i]];
  return 0;
}

#else

// Bits of a key in use.
int bits_of(int64_t rows) {
  int bits = 32;
  while (bits < 64 && (rows - 1) >> (bits - 32)) ++bits;
  return bits;
}

// With no workspace: the bytes that one must have.
size_t sort(void* workspace, size_t bytes, const RankParams& p, uint64_t stream) {
  check_cuda(cub::DeviceRadixSort::SortPairs(workspace, bytes, const_cast<const uint64_t*>(p.keys), p.sorted_keys,
                                             const_cast<const uint32_t*>(p.index), p.sorted_index,
                                             p.values.rows * p.values.columns, 0, bits_of(p.values.rows), reinterpret_cast<cudaStream_t>(stream)),
             "rank sort");
  return bytes;
}

#endif

}  // namespace

size_t rank_workspace(int64_t rows, int64_t columns) {
  RankParams p{};
  p.values.rows = rows;
  p.values.columns = columns;
  return sort(nullptr, 0, p, 0);
}

void rank(const RankParams& p, uint64_t stream) {
  const dim3 grid = strided_grid(p.values.rows * p.values.columns, kThreads);
  const auto keys = p.values.dtype == Dtype::float32   ? rank_keys<float>
                    : p.values.dtype == Dtype::float16 ? rank_keys<f16>
                                              : rank_keys<bf16>;
  launch("rank_keys", keys, grid, kThreads, 0, stream, p);
  sort(p.workspace, p.workspace_bytes, p, stream);
  launch("rank_runs", rank_runs, grid, kThreads, 0, stream, p);
}

void vote(const VoteParams& p, uint64_t stream) {
  launch("vote", vote_kernel, strided_grid(p.columns, kThreads), kThreads, 0, stream, p);
}
