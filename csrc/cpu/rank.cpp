// One row at a time, in cache: floats become integers of the same order, pairs (key, column) are sorted by the 22 highest
// bits that differ in the row (two stable radix passes of 11), and what those bits leave equal is put in order on the way
// out. Bytes per element: 4 read, 4 of key, 2 x 8 + 8 of pairs, 4 written; a row of 100,000 stays within 2 MB of cache.
//
// A vote needs the lowest k of a row alone: a histogram of the highest 11 bits tells which elements can be among them, and
// only those are sorted. Votes are summed as integers (twice the rank is one), so any order of rows gives the same bits.

#include "rank.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "parallel.h"

namespace influence_fast {
namespace {

constexpr int kDigit = 11;
constexpr uint32_t kBins = 1u << kDigit;

template <typename Index>
struct Pair {
  uint32_t key;
  Index column;
};

// What one task works in, for all its rows.
template <typename Index>
struct Space {
  explicit Space(int64_t n)
      : keys(new uint32_t[n]), one(new Pair<Index>[n + 1]), two(new Pair<Index>[n + 1]) {}
  std::unique_ptr<uint32_t[]> keys;
  std::unique_ptr<Pair<Index>[]> one, two;
  uint32_t low[kBins], high[kBins];
};

// Order-preserving keys of a row; -0 counts as +0. False where an element is not finite.
bool make_keys(const Rows& rows, int64_t row, uint32_t* keys, uint32_t* least, uint32_t* most) {
  const float* data = rows.data + row * rows.stride_m;
  const int64_t n = rows.n, stride = rows.stride_n;
  uint32_t lo = UINT32_MAX, hi = 0;
  int32_t largest = 0;
  const auto one = [&](int64_t i, float value) {
    value += 0.0f;
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t key = static_cast<uint32_t>(bits ^ ((bits >> 31) | INT32_MIN));
    keys[i] = key;
    lo = std::min(lo, key);
    hi = std::max(hi, key);
    largest = std::max(largest, bits & INT32_MAX);
  };
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) one(i, data[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) one(i, data[i * stride]);
  }
  *least = lo;
  *most = hi;
  return largest < 0x7f800000;
}

// How far to shift (most - least) so that it fits in `bits`.
int shift_to(uint32_t least, uint32_t most, int bits) {
  const uint32_t range = most - least;
  const int width = range == 0 ? 0 : 32 - __builtin_clz(range);
  return std::max(0, width - bits);
}

void starts(uint32_t* counts) {
  uint32_t sum = 0;
  for (uint32_t b = 0; b < kBins; ++b) {
    const uint32_t count = counts[b];
    counts[b] = sum;
    sum += count;
  }
}

// Calls emit(first, last, column) for each of `count` pairs in space.one, sorted by key: first and last are the places of
// the run of equal keys that the pair is in. Keys lie in [least, most].
template <typename Index, typename Emit>
void sorted(Space<Index>& space, int64_t count, uint32_t least, uint32_t most, Emit&& emit) {
  const int shift = shift_to(least, most, 2 * kDigit);
  Pair<Index>*from = space.one.get(), *to = space.two.get();
  std::fill_n(space.low, kBins, 0u);
  std::fill_n(space.high, kBins, 0u);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t digits = (from[i].key - least) >> shift;
    ++space.low[digits & (kBins - 1)];
    ++space.high[digits >> kDigit];
  }
  starts(space.low);
  starts(space.high);
  for (int64_t i = 0; i < count; ++i) to[space.low[((from[i].key - least) >> shift) & (kBins - 1)]++] = from[i];
  for (int64_t i = 0; i < count; ++i) from[space.high[(to[i].key - least) >> shift >> kDigit]++] = to[i];

  for (int64_t begin = 0; begin < count;) {
    const uint32_t digits = (from[begin].key - least) >> shift;
    int64_t end = begin + 1;
    while (end < count && (from[end].key - least) >> shift == digits) ++end;
    if (shift > 0 && end - begin > 1) {
      if (end - begin <= 16) {
        for (int64_t i = begin + 1; i < end; ++i) {
          const Pair<Index> pair = from[i];
          int64_t j = i;
          for (; j > begin && from[j - 1].key > pair.key; --j) from[j] = from[j - 1];
          from[j] = pair;
        }
      } else {
        std::sort(from + begin, from + end, [](const auto& a, const auto& b) { return a.key < b.key; });
      }
    }
    while (begin < end) {
      int64_t last = begin;
      while (last + 1 < end && from[last + 1].key == from[begin].key) ++last;
      for (int64_t i = begin; i <= last; ++i) emit(begin, last, from[i].column);
      begin = last + 1;
    }
  }
}

template <typename Index, typename Out>
bool rank_row(const Rows& rows, int64_t row, Space<Index>& space, Out* out) {
  uint32_t least, most;
  if (!make_keys(rows, row, space.keys.get(), &least, &most)) return false;
  for (int64_t i = 0; i < rows.n; ++i) space.one[i] = {space.keys[i], static_cast<Index>(i)};
  sorted(space, rows.n, least, most, [out](int64_t first, int64_t last, Index column) {
    out[column] = static_cast<Out>(0.5 * static_cast<double>(first + last));
  });
  return true;
}

template <typename Index>
bool vote_row(const Rows& rows, int64_t row, int64_t k, Space<Index>& space, int64_t* votes) {
  uint32_t least, most;
  if (!make_keys(rows, row, space.keys.get(), &least, &most)) return false;
  const uint32_t* keys = space.keys.get();
  const int shift = shift_to(least, most, kDigit);
  // Two histograms, so that runs of equal digits do not wait for one counter.
  std::fill_n(space.low, kBins, 0u);
  std::fill_n(space.high, kBins, 0u);
  int64_t i = 0;
  for (; i + 1 < rows.n; i += 2) {
    ++space.low[(keys[i] - least) >> shift];
    ++space.high[(keys[i + 1] - least) >> shift];
  }
  if (i < rows.n) ++space.low[(keys[i] - least) >> shift];
  uint32_t bin = 0;
  for (int64_t below = 0; bin < kBins; ++bin) {
    below += static_cast<int64_t>(space.low[bin]) + space.high[bin];
    if (below >= k) break;
  }
  // Every element of the bins up to that one: all that tie with the k-th lowest are among them.
  const uint64_t limit = static_cast<uint64_t>(least) + ((static_cast<uint64_t>(bin) + 1) << shift);
  int64_t count = 0;
  uint32_t highest = least;
  Pair<Index>* kept = space.one.get();
  for (i = 0; i < rows.n; ++i) {
    kept[count] = {keys[i], static_cast<Index>(i)};
    const bool keep = keys[i] < limit;
    count += keep;
    highest = std::max(highest, keep ? keys[i] : least);
  }
  sorted(space, count, least, highest, [votes, k](int64_t first, int64_t last, Index column) {
    votes[column] -= std::max<int64_t>(2 * k - (first + last), 0);
  });
  return true;
}

// Cuts the rows into `parts` and calls work(part, first row, last row) for each.
template <typename Work>
void by_parts(int64_t m, int64_t parts, int threads, Work&& work) {
  struct Context {
    int64_t m, parts;
    Work* work;
  } context{m, parts, &work};
  parallel_for(
      threads, parts,
      [](void* raw, int64_t part) {
        const Context& c = *static_cast<Context*>(raw);
        (*c.work)(part, c.m * part / c.parts, c.m * (part + 1) / c.parts);
      },
      &context);
}

void lower(std::atomic<int64_t>& bad, int64_t row) {
  int64_t seen = bad.load();
  while ((seen < 0 || row < seen) && !bad.compare_exchange_weak(seen, row)) {
  }
}

template <typename Index, typename Out>
int64_t rank_rows(const Rows& rows, Out* out, int threads) {
  std::atomic<int64_t> bad{-1};
  by_parts(rows.m, std::min<int64_t>(rows.m, 4 * threads), threads, [&](int64_t, int64_t begin, int64_t end) {
    Space<Index> space(rows.n);
    for (int64_t row = begin; row < end; ++row) {
      if (!rank_row(rows, row, space, out + row * rows.n)) return lower(bad, row);
    }
  });
  return bad.load();
}

template <typename Index>
int64_t vote_rows(const Rows& rows, int64_t k, double* out, int threads) {
  std::atomic<int64_t> bad{-1};
  const int64_t parts = std::min<int64_t>(rows.m, threads);
  std::vector<std::vector<int64_t>> votes(parts);
  by_parts(rows.m, parts, threads, [&](int64_t part, int64_t begin, int64_t end) {
    Space<Index> space(rows.n);
    votes[part].assign(rows.n, 0);
    for (int64_t row = begin; row < end; ++row) {
      if (!vote_row(rows, row, k, space, votes[part].data())) return lower(bad, row);
    }
  });
  for (int64_t i = 0; i < rows.n; ++i) {
    int64_t sum = 0;
    for (const auto& own : votes) sum += own[i];
    out[i] = 0.5 * static_cast<double>(sum);
  }
  return bad.load();
}

}  // namespace

template <typename Out>
int64_t rank(const Rows& rows, Out* out, int threads) {
  return rows.n <= UINT32_MAX ? rank_rows<uint32_t>(rows, out, threads) : rank_rows<uint64_t>(rows, out, threads);
}

template int64_t rank<float>(const Rows&, float*, int);
template int64_t rank<double>(const Rows&, double*, int);

int64_t vote(const Rows& rows, int64_t k, double* out, int threads) {
  return rows.n <= UINT32_MAX ? vote_rows<uint32_t>(rows, k, out, threads) : vote_rows<uint64_t>(rows, k, out, threads);
}

}  // namespace influence_fast
