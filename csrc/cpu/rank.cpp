// One row at a time, in cache: floats become integers of the same order, pairs (key, column) are sorted by three stable
// radix passes of 10, 10 and 12 bits (a pass whose digit is the same everywhere is left out), and runs of equal keys share
// their average rank on the way out. Bytes per element: 4 read, 4 of key, 2 x 8 of pairs, 4 written; a row of 100,000 stays
// within 2 MB of cache.
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

constexpr int kPasses = 3;
constexpr int kShift[kPasses + 1] = {0, 10, 20, 32};
constexpr uint32_t kBins = 1u << 12;
constexpr int kSelectBits = 11;

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
  Index counts[kPasses][kBins];
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

uint32_t digit(uint32_t key, int pass) {
  return (key >> kShift[pass]) & ((1u << (kShift[pass + 1] - kShift[pass])) - 1);
}

// Sorts the pairs source(0) .. source(count - 1) by key and calls emit(first, last, run) for each run of equal keys, which
// has the places from first to last.
template <typename Index, typename Source, typename Emit>
void sorted(Space<Index>& space, int64_t count, Source&& source, Emit&& emit) {
  Pair<Index>*from = nullptr, *to = space.one.get();
  std::memset(space.counts, 0, sizeof(space.counts));
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = source(i).key;
    for (int pass = 0; pass < kPasses; ++pass) ++space.counts[pass][digit(key, pass)];
  }
  const uint32_t some = source(0).key;
  for (int pass = 0; pass < kPasses; ++pass) {
    Index* place = space.counts[pass];
    // Where all share the digit there is nothing to order; the last pass runs in any case if none has.
    if (place[digit(some, pass)] == static_cast<Index>(count) && (from != nullptr || pass + 1 < kPasses)) continue;
    Index sum = 0;
    for (uint32_t bin = 0; bin < kBins; ++bin) {
      const Index size = place[bin];
      place[bin] = sum;
      sum += size;
    }
    if (from == nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        const Pair<Index> pair = source(i);
        to[place[digit(pair.key, pass)]++] = pair;
      }
      from = to;
      to = space.two.get();
    } else {
      for (int64_t i = 0; i < count; ++i) to[place[digit(from[i].key, pass)]++] = from[i];
      std::swap(from, to);
    }
  }
  for (int64_t begin = 0; begin < count;) {
    int64_t last = begin;
    while (last + 1 < count && from[last + 1].key == from[begin].key) ++last;
    emit(begin, last, from + begin);
    begin = last + 1;
  }
}

template <typename Index, typename Out>
bool rank_row(const Rows& rows, int64_t row, Space<Index>& space, Out* out) {
  uint32_t least, most;
  if (!make_keys(rows, row, space.keys.get(), &least, &most)) return false;
  const uint32_t* keys = space.keys.get();
  const auto source = [keys](int64_t i) { return Pair<Index>{keys[i], static_cast<Index>(i)}; };
  sorted(space, rows.n, source, [out](int64_t first, int64_t last, const Pair<Index>* run) {
    const Out value = static_cast<Out>(0.5) * static_cast<Out>(first + last);
    for (int64_t i = 0; i <= last - first; ++i) out[run[i].column] = value;
  });
  return true;
}

template <typename Index>
bool vote_row(const Rows& rows, int64_t row, int64_t k, Space<Index>& space, int64_t* votes) {
  uint32_t least, most;
  if (!make_keys(rows, row, space.keys.get(), &least, &most)) return false;
  const uint32_t* keys = space.keys.get();
  const uint32_t range = most - least;
  const int shift = std::max(0, (range == 0 ? 0 : 32 - __builtin_clz(range)) - kSelectBits);
  // Two histograms, so that runs of equal digits do not wait for one counter.
  Index *even = space.counts[0], *odd = space.counts[1];
  std::fill_n(even, 1 << kSelectBits, Index(0));
  std::fill_n(odd, 1 << kSelectBits, Index(0));
  int64_t i = 0;
  for (; i + 1 < rows.n; i += 2) {
    ++even[(keys[i] - least) >> shift];
    ++odd[(keys[i + 1] - least) >> shift];
  }
  if (i < rows.n) ++even[(keys[i] - least) >> shift];
  uint32_t bin = 0;
  for (int64_t below = 0;; ++bin) {
    below += static_cast<int64_t>(even[bin] + odd[bin]);
    if (below >= k) break;
  }
  // Every element of the bins up to that one: all that tie with the k-th lowest are among them.
  const uint64_t limit = static_cast<uint64_t>(least) + ((static_cast<uint64_t>(bin) + 1) << shift);
  int64_t count = 0;
  // Not where the first pass writes.
  Pair<Index>* kept = space.two.get();
  for (i = 0; i < rows.n; ++i) {
    kept[count] = {keys[i], static_cast<Index>(i)};
    count += keys[i] < limit;
  }
  const auto source = [kept](int64_t i) { return kept[i]; };
  sorted(space, count, source, [votes, k](int64_t first, int64_t last, const Pair<Index>* run) {
    const int64_t value = std::max<int64_t>(2 * k - (first + last), 0);
    for (int64_t i = 0; i <= last - first; ++i) votes[run[i].column] -= value;
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
