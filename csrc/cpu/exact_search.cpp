// The exact search around the inner loops of kernels/exact_search.inc.
//
// Blocks of rows are taken in the order of their longest row, so that the first ones raise the limit (the k-th highest
// score less slack seen so far, at most the k-th best score) and |<u, g>| <= |u| |g| rules out the rest unread. A row whose
// score plus slack reaches the limit is kept; at the end the kept rows are scored from the store, best bound first,
// until no bound reaches the k-th best score. What is found does not depend on threads: every row that could be among
// the best k is scored, and order and ties are those of the exact scores.

#include "exact_search.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace influence_fast {
namespace {

constexpr int64_t kBlocksAtOnce = 4;
// Rows that a thread may keep of a query before the best of them are scored exactly, for a limit without slack; or 4 k.
constexpr size_t kManyRows = 256;
// Blocks of the longest rows, which are sorted and scanned before the others are looked at.
constexpr int64_t kFirstBlocks = 2048;
constexpr float kNone = -std::numeric_limits<float>::infinity();

template <typename Body>
void parallel(int threads, int64_t tasks, const Body& body) {
  parallel_for(
      threads, tasks, [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); },
      const_cast<Body*>(&body));
}

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

struct Candidate {
  float score, slack;
  int64_t row;
  float low() const { return score - slack; }
  float high() const { return score + slack; }
};

// What one thread found for one query.
struct Found {
  std::vector<Candidate> rows;
  size_t full = 0;

  // Drops what the k-th highest lower bound rules out; returns that bound.
  float reduce(size_t k, float limit) {
    if (rows.size() >= k) {
      std::nth_element(rows.begin(), rows.begin() + (k - 1), rows.end(),
                       [](const Candidate& a, const Candidate& b) { return a.low() > b.low(); });
      const float low = rows[k - 1].low();
      if (low > limit) limit = low;
    }
    rows.erase(std::remove_if(rows.begin(), rows.end(), [limit](const Candidate& c) { return c.high() < limit; }),
               rows.end());
    full = std::max(2 * k, rows.size() + std::max<size_t>(k, 32));
    return limit;
  }

  // Whether what `reduce` left is more than a limit with slack should keep.
  bool many(size_t k) const { return rows.size() >= std::max(4 * k, kManyRows); }

  // Scores the k of the highest scores by `exactly`, drops what their lowest rules out, and returns that.
  template <typename Exactly>
  float tighten(size_t k, float limit, const Exactly& exactly) {
    std::nth_element(rows.begin(), rows.begin() + (k - 1), rows.end(),
                     [](const Candidate& a, const Candidate& b) { return a.score > b.score; });
    double lowest = std::numeric_limits<double>::infinity();
    for (size_t i = 0; i < k; ++i) lowest = std::min(lowest, exactly(rows[i]));
    // Lower by more than rounding is off; float32 cannot hold all that float64 can.
    if (std::fabs(lowest) < 1e37) limit = std::max(limit, static_cast<float>(lowest - 1e-6 * std::fabs(lowest) - 1e-37));
    rows.erase(std::remove_if(rows.begin(), rows.end(), [limit](const Candidate& c) { return c.high() < limit; }),
               rows.end());
    full = 2 * rows.size();
    return limit;
  }
};

void raise(std::atomic<float>& limit, float value) {
  float seen = limit.load(std::memory_order_relaxed);
  while (value > seen && !limit.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

// Reads exact rows.
class Reader {
 public:
  Reader(const SearchKernels& kernels, const StoredRows& source) : kernels_(kernels), source_(source) {
    int64_t widest = 0, stored = 0;
    for (int64_t l = 0; l < source.layers; ++l) {
      widest = std::max(widest, source.dims[l]);
      stored = std::max(stored, numbers(l));
    }
    if (source.dtype != Dtype::float32) room_.resize(stored);
    if (source.factors > 0) whole_.resize(widest);
  }

  const float* read(int64_t row, int64_t layer) {
    const StoreShard* shard = std::upper_bound(source_.shards, source_.shards + source_.shard_count, row,
                                              [](int64_t r, const StoreShard& s) { return r < s.first; }) - 1;
    const float* found = stored(*shard, row - shard->first, layer, numbers(layer));
    return factored(layer) ? product(found, layer) : found;
  }

 private:
  bool factored(int64_t layer) const { return source_.factors > 0 && source_.outs[layer] > 0; }

  // That are kept of a row.
  int64_t numbers(int64_t layer) const {
    const int64_t dim = source_.dims[layer];
    return factored(layer) ? source_.factors * (source_.outs[layer] + dim / source_.outs[layer]) : dim;
  }

  // The numbers that are kept of a row, as float32.
  const float* stored(const StoreShard& shard, int64_t row, int64_t layer, int64_t dim) {
    const int64_t at = row * dim;
    if (source_.bits > 0) {
      const int64_t blocks = (dim + kScaled - 1) / kScaled, bytes = (dim * source_.bits + 7) / 8;
      const uint16_t* scales = reinterpret_cast<const uint16_t*>(shard.scale[layer]) + row * blocks;
      const uint8_t* codes = reinterpret_cast<const uint8_t*>(shard.data[layer]) + row * bytes;
      for (int64_t block = 0; block < blocks; ++block) {
        float scale;
        kernels_.widen(scales + block, Dtype::bfloat16, 1, &scale);
        for (int64_t i = block * kScaled; i < std::min(dim, (block + 1) * kScaled); ++i) {
          const int code = source_.bits == 8 ? static_cast<int8_t>(codes[i]) : ((codes[i / 2] >> (i % 2 * 4)) & 15) - 8;
          room_[i] = static_cast<float>(code) * scale;
        }
      }
      return room_.data();
    }
    const float* scales = reinterpret_cast<const float*>(shard.scale[layer]);
    const float scale = scales == nullptr ? 1.0f : scales[row];
    switch (source_.dtype) {
      case Dtype::float32: return reinterpret_cast<const float*>(shard.data[layer]) + at;
      case Dtype::int8: {
        const int8_t* codes = reinterpret_cast<const int8_t*>(shard.data[layer]) + at;
        for (int64_t i = 0; i < dim; ++i) room_[i] = static_cast<float>(codes[i]) * scale;
        return room_.data();
      }
      default:
        kernels_.widen(reinterpret_cast<const uint16_t*>(shard.data[layer]) + at, source_.dtype, dim, room_.data());
        if (scales != nullptr)
          for (int64_t i = 0; i < dim; ++i) room_[i] *= scale;
        return room_.data();
    }
  }

  const float* product(const float* left, int64_t layer) {
    const int64_t dim = source_.dims[layer], out = source_.outs[layer], in = dim / out;
    const float* right = left + source_.factors * out;
    std::fill_n(whole_.begin(), dim, 0.0f);
    for (int64_t c = 0; c < source_.factors; ++c, left += out, right += in) {
      for (int64_t o = 0; o < out; ++o) {
        for (int64_t i = 0; i < in; ++i) whole_[o * in + i] += left[o] * right[i];
      }
    }
    return whole_.data();
  }

  const SearchKernels& kernels_;
  const StoredRows& source_;
  std::vector<float> room_, whole_;
};

// One query's exact scores.
class Scorer {
 public:
  Scorer(const SearchKernels& kernels, const StoredRows& source, const Queries& queries, const float* query)
      : kernels_(kernels), source_(source), queries_(queries), query_(query), reader_(kernels, source) {
    double sum = 0;
    const float* v = query;
    for (int64_t l = 0; l < source.layers; v += source.dims[l++])
      sum += queries.weights[l] * kernels.dot(v, v, source.dims[l]);
    norm_ = std::sqrt(sum);
  }

  double score(int64_t row) {
    double sum = 0, square = 0;
    const float* v = query_;
    for (int64_t l = 0; l < source_.layers; v += source_.dims[l++]) {
      const float* g = reader_.read(row, l);
      sum += queries_.weights[l] * kernels_.dot(v, g, source_.dims[l]);
      if (queries_.cosine) square += queries_.weights[l] * kernels_.dot(g, g, source_.dims[l]);
    }
    if (!queries_.cosine && queries_.lengths == nullptr) return sum;
    const double length = queries_.cosine ? norm_ * std::sqrt(square) : queries_.lengths[row];
    return length == 0 ? 0 : sum / length;
  }

  double norm() const { return norm_; }

 private:
  const SearchKernels& kernels_;
  const StoredRows& source_;
  const Queries& queries_;
  const float* query_;
  Reader reader_;
  double norm_ = 0;
};

// Queries scaled to unit length (as far as scores go) and rounded to 8 bits.
class Tile {
 public:
  Tile(const RowPart* parts, int64_t count, const Queries& queries, int64_t first, int width, double* unit,
       const int64_t* layer_begin, int64_t total, const QueryTerms* terms)
      : first(first), used(static_cast<int>(std::min<int64_t>(width, queries.count - first))) {
    view.width = width;
    int64_t size = 0;
    for (int64_t p = 0; p < count; ++p)
      if (parts[p].factors == 0) size += width > kFewQueries ? round_up(parts[p].dim, 4) : round_up(parts[p].dim, 64);
    view.stride = size;
    codes_.assign(size * width + 64, 0);
    shift_.assign(count * width, 0);
    scale_.assign(count * width, 0);
    along_.assign(count * width, 0);
    across_.assign(count * width, 0);
    whole.assign(width, 0);
    terms_.assign(count * width, {});
    size_t longest = 0;
    for (int64_t p = 0; p < count && terms != nullptr; ++p) longest += parts[p].factors > 0;
    // Scales of terms stay where they are while pointers are taken.
    if (longest > 0) term_scales_.reserve(terms->first[longest * queries.count] + 1);
    // What rounding in float32 can add, and in the norm of a cosine.
    const double room = 1e-5 + 4e-7 * static_cast<double>(count);
    std::vector<double> u(65536);
    for (int q = 0; q < used; ++q) {
      const float* values = queries.values + (first + q) * total;
      double sum = 0;
      for (int64_t p = 0; p < count; ++p) {
        const double weight = queries.weights[parts[p].layer];
        const float* v = values + layer_begin[parts[p].layer] + parts[p].begin;
        const int64_t dim = parts[p].factors > 0 ? parts[p].out * parts[p].in : parts[p].dim;
        for (int64_t i = 0; i < dim; ++i) sum += weight * weight * v[i] * static_cast<double>(v[i]);
      }
      const double length = std::sqrt(sum);
      unit[first + q] = length;
      whole[q] = 1 + room;
      int64_t base = 0, factored = 0;
      for (int64_t p = 0; p < count; ++p) {
        const int64_t dim = parts[p].dim, at = p * width + q;
        const double by = length > 0 ? queries.weights[parts[p].layer] / length : 0;
        if (parts[p].factors > 0) {
          const int64_t given = factored++ * queries.count + first + q, begin = terms->first[given];
          const size_t scales = term_scales_.size();
          for (int64_t t = begin; t < terms->first[given + 1]; ++t)
            term_scales_.push_back(static_cast<float>(terms->scale[t] * by));
          terms_[at] = {terms->codes + terms->begin[given], term_scales_.data() + scales, terms->shift + 2 * begin,
                        terms->first[given + 1] - begin};
          along_[at] = static_cast<float>(by * terms->along[given] * (1 + room)) + 1e-30f;
          across_[at] = static_cast<float>(by * (terms->across[given] + room * terms->summed[given]) * (1 + 1e-6)) + 1e-30f;
          continue;
        }
        const float* v = values + layer_begin[parts[p].layer] + parts[p].begin;
        double top = 0, square = 0, rounded = 0, rest = 0;
        for (int64_t i = 0; i < dim; ++i) {
          u[i] = by * v[i];
          top = std::max(top, std::fabs(u[i]));
          square += u[i] * u[i];
        }
        const float step = top < 1e-30 ? 0 : static_cast<float>(top / 127);
        int32_t total_codes = 0;
        for (int64_t i = 0; i < dim; ++i) {
          const double near = step > 0 ? std::nearbyint(u[i] / step) : 0;
          const int8_t code = static_cast<int8_t>(std::max(-127.0, std::min(127.0, near)));
          const double value = static_cast<double>(step) * code;
          rounded += value * value;
          rest += (u[i] - value) * (u[i] - value);
          total_codes += code;
          codes_[width > kFewQueries ? base * width + (i / 4) * width * 4 + q * 4 + i % 4 : q * size + base + i] = code;
        }
        base += width > kFewQueries ? round_up(dim, 4) : round_up(dim, 64);
        scale_[at] = step;
        shift_[at] = 128 * total_codes;
        along_[at] = static_cast<float>(std::sqrt(rounded) * (1 + room)) + 1e-30f;
        across_[at] = static_cast<float>((std::sqrt(rest) + room * std::sqrt(square)) * (1 + 1e-6)) + 1e-30f;
      }
    }
    view.codes = codes_.data();
    view.shift = shift_.data();
    view.scale = scale_.data();
    view.along = along_.data();
    view.across = across_.data();
    view.terms = terms_.data();
  }

  QueryTile view;
  int64_t first;
  int used;
  std::vector<float> whole;  // bound on |u|

 private:
  std::vector<int8_t> codes_;
  std::vector<int32_t> shift_;
  std::vector<float> scale_, along_, across_, term_scales_;
  std::vector<PartTerms> terms_;
};

struct Block {
  int32_t segment, number;  // which one of the segment
  float longest;            // bound on |g| of a row
};

bool better(double a, int64_t row_a, double b, int64_t row_b) { return a > b || (a == b && row_a < row_b); }

void first_rows(const Segment* segments, int64_t count, const uint8_t* allowed, int64_t k, double* scores,
                int64_t* rows) {
  int64_t found = 0;
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t row = segments[s].first; row < segments[s].first + segments[s].rows && found < k; ++row) {
      if (allowed != nullptr && allowed[row] == 0) continue;
      scores[found] = 0;
      rows[found++] = row;
    }
  }
}

}  // namespace

SearchStats exact_search(const SearchKernels& kernels, const Segment* segments, int64_t segment_count, const RowPart* parts,
                      int64_t part_count, const StoredRows& source, const Queries& queries, const uint8_t* allowed,
                      int64_t k, double* scores, int64_t* rows, int threads, const QueryTerms* terms, uint8_t* seen) {
  std::vector<int64_t> layer_begin(source.layers);
  int64_t total = 0;
  for (int64_t l = 0; l < source.layers; total += source.dims[l++]) layer_begin[l] = total;
  std::fill_n(scores, queries.count * k, std::numeric_limits<double>::quiet_NaN());
  std::fill_n(rows, queries.count * k, -1);

  std::vector<double> unit(queries.count);
  std::vector<std::unique_ptr<Tile>> tiles;
  for (int64_t first = 0; first < queries.count;) {
    const int64_t left = queries.count - first;
    // Terms of queries are as many as their rank, and are not tiled.
    const int width = left <= kFewQueries   ? static_cast<int>(left)
                      : terms != nullptr    ? kFewQueries
                      : left <= kNarrowTile ? kNarrowTile
                                            : kWideTile;
    tiles.push_back(
        std::make_unique<Tile>(parts, part_count, queries, first, width, unit.data(), layer_begin.data(), total, terms));
    first += width;
  }

  std::vector<int64_t> first_block(segment_count + 1);
  for (int64_t s = 0; s < segment_count; ++s)
    first_block[s + 1] = first_block[s] + (segments[s].rows + kBlockRows - 1) / kBlockRows;
  std::vector<Block> blocks;
  blocks.reserve(first_block[segment_count]);
  for (int64_t s = 0; s < segment_count; ++s) {
    const float* longest = segments[s].longest;
    for (int64_t b = 0; b < first_block[s + 1] - first_block[s]; ++b)
      blocks.push_back({static_cast<int32_t>(s), static_cast<int32_t>(b), longest == nullptr ? -kNone : longest[b]});
  }
  const auto longer = [](const Block& a, const Block& b) { return a.longest > b.longest; };
  const int64_t block_count = static_cast<int64_t>(blocks.size());
  const bool bounded = std::any_of(segments, segments + segment_count, [](const Segment& s) { return s.longest != nullptr; });

  std::vector<std::atomic<float>> limits(queries.count);
  // A query of zeros scores 0 everywhere: its best rows are the first ones, and nothing needs to be scanned.
  for (int64_t q = 0; q < queries.count; ++q) limits[q].store(unit[q] > 0 ? kNone : -kNone);
  const int workers = std::max(1, threads);
  std::vector<std::vector<Found>> found(workers);
  for (auto& mine : found) {
    mine.resize(queries.count);
    for (Found& f : mine) f.full = 2 * static_cast<size_t>(k);
  }
  // Whether some query may still find a row of a block that has this longest one.
  const auto is_open = [&](const Tile& tile, float longest) {
    for (int q = 0; q < tile.used; ++q) {
      const float limit = limits[tile.first + q].load(std::memory_order_relaxed);
      // Nothing is below an infinite limit, that of a query of zeros.
      if (limit < -kNone && !(tile.whole[q] * longest < limit)) return true;
    }
    return false;
  };
  const auto any_open = [&](const Block& block) {
    return std::any_of(tiles.begin(), tiles.end(), [&](const auto& tile) { return is_open(*tile, block.longest); });
  };
  std::atomic<int64_t> next{0}, scanned{0}, misplaced{-1}, bad{-1};
  // The exact score of a candidate, and whether the copy allows it; `by` makes scores of those of the scan, whose queries have
  // unit length.
  const auto exact_score = [&](Scorer& scorer, const Candidate& candidate, double by, std::vector<int64_t>& read) {
    const double exact = scorer.score(candidate.row);
    read.push_back(candidate.row);
    const double off = std::fabs(exact - static_cast<double>(candidate.score) * by);
    const bool fine = off <= static_cast<double>(candidate.slack) * by * (1 + 1e-6) + 1e-300;
    if (!fine) {
      int64_t seen_before = bad.load();
      while ((seen_before < 0 || candidate.row < seen_before) && !bad.compare_exchange_weak(seen_before, candidate.row)) {
      }
    }
    return std::make_pair(exact, fine);
  };
  const auto scale_of = [&](const Scorer& scorer, int64_t query) {
    return !queries.cosine ? unit[query] : scorer.norm() > 0 ? unit[query] / scorer.norm() : 0;
  };
  std::vector<int64_t> scored;
  std::mutex adding;
  const auto scan = [&](int64_t end) {
    parallel(threads, workers, [&](int64_t worker) {
      std::vector<Found>& mine = found[worker];
      std::vector<float> room(2 * kBlockRows * kWideTile), limit(kWideTile);
      float *score = room.data(), *slack = score + kBlockRows * kWideTile;
      std::vector<uint64_t> hits(kBlockRows);
      std::vector<float> inverse(kBlockRows);
      std::vector<int64_t> read_exactly;
      int64_t read = 0;
      for (int64_t at; (at = next.fetch_add(kBlocksAtOnce)) < end;) {
        for (int64_t b = at; b < std::min(at + kBlocksAtOnce, end); ++b) {
          const Block& block = blocks[b];
          if (!any_open(block)) continue;
          const Segment& segment = segments[block.segment];
          const int64_t begin = block.number * kBlockRows, count = std::min(kBlockRows, segment.rows - begin);
          const int32_t* order = segment.order + begin;
          // Of a file: believed as far as it stays within the segment.
          const auto inside = [&](int32_t position) { return position >= 0 && position < segment.rows; };
          uint8_t* mark = seen == nullptr ? nullptr : seen + first_block[block.segment] + block.number;
          if (allowed != nullptr) {
            if (mark != nullptr && *mark == kUnseen) *mark = kOrderSeen;
            if (std::none_of(order, order + count, [&](int32_t position) {
                  return !inside(position) || allowed[segment.first + position] != 0;
                }))
              continue;
          }
          if (mark != nullptr) *mark = kAllSeen;
          CodeBlock view{segment.codes + begin * segment.stride,
                         segment.stride,
                         count,
                         segment.scale + begin,
                         segment.error + begin,
                         segment.norm + begin,
                         segment.rows,
                         segment.factor == nullptr ? nullptr : segment.factor + begin};
          if (queries.cosine) {
            kernels.inverse_lengths(parts, part_count, view, queries.weights, inverse.data());
            view.factor = inverse.data();
          }
          for (const auto& tile : tiles) {
            if (!is_open(*tile, block.longest)) continue;
            for (int q = 0; q < tile->view.width; ++q)
              limit[q] = q < tile->used ? limits[tile->first + q].load(std::memory_order_relaxed)
                                        : std::numeric_limits<float>::infinity();
            kernels.block(parts, part_count, view, tile->view, limit.data(), score, slack, hits.data());
            read += count;
            const bool few = tile->view.width <= kFewQueries;
            for (int64_t r = 0; r < count; ++r) {
              if (hits[r] != 0 && !inside(order[r])) {
                misplaced.store(block.segment, std::memory_order_relaxed);
                continue;
              }
              for (uint64_t bits = hits[r]; bits != 0; bits &= bits - 1) {
                const int q = __builtin_ctzll(bits);
                if (q >= tile->used) break;
                const int64_t row = segment.first + order[r];
                if (allowed != nullptr && allowed[row] == 0) continue;
                const int64_t place = few ? q * kBlockRows + r : r * tile->view.width + q;
                Candidate candidate{score[place], slack[place], row};
                // What float32 cannot hold is decided by the exact score.
                if (!std::isfinite(candidate.score) || !std::isfinite(candidate.slack))
                  candidate = {0.0f, std::numeric_limits<float>::infinity(), row};
                if (candidate.high() < limit[q]) continue;
                Found& f = mine[tile->first + q];
                f.rows.push_back(candidate);
                if (f.rows.size() >= f.full) {
                  const int64_t query = tile->first + q;
                  limit[q] = f.reduce(k, limits[query].load(std::memory_order_relaxed));
                  if (f.many(k)) {
                    Scorer scorer(kernels, source, queries, queries.values + query * total);
                    const double by = scale_of(scorer, query);
                    limit[q] = f.tighten(k, limit[q], [&](const Candidate& one) {
                      return exact_score(scorer, one, by, read_exactly).first / by;
                    });
                  }
                  raise(limits[query], limit[q]);
                }
              }
            }
          }
        }
      }
      scanned.fetch_add(read);
      const std::lock_guard<std::mutex> lock(adding);
      scored.insert(scored.end(), read_exactly.begin(), read_exactly.end());
    });
  };
  if (!bounded || block_count <= kFirstBlocks) {
    if (bounded) std::stable_sort(blocks.begin(), blocks.end(), longer);
    scan(block_count);
  } else {
    const auto first = blocks.begin() + kFirstBlocks;
    std::nth_element(blocks.begin(), first, blocks.end(), longer);
    std::sort(blocks.begin(), first, longer);
    scan(kFirstBlocks);
    const auto last = std::remove_if(first, blocks.end(), [&](const Block& block) { return !any_open(block); });
    std::sort(first, last, longer);
    next = kFirstBlocks;
    scan(last - blocks.begin());
  }

  parallel(threads, queries.count, [&](int64_t query) {
    if (unit[query] == 0) return first_rows(segments, segment_count, allowed, k, scores + query * k, rows + query * k);
    std::vector<Candidate> kept;
    for (auto& own : found) {
      if (own.empty()) continue;
      kept.insert(kept.end(), own[query].rows.begin(), own[query].rows.end());
      std::vector<Candidate>().swap(own[query].rows);
    }
    Found all;
    all.rows.swap(kept);
    all.reduce(k, limits[query].load());
    kept.swap(all.rows);
    std::sort(kept.begin(), kept.end(), [](const Candidate& a, const Candidate& b) { return a.high() > b.high(); });
    Scorer scorer(kernels, source, queries, queries.values + query * total);
    const double by = scale_of(scorer, query);
    double* best = scores + query * k;
    int64_t* best_row = rows + query * k;
    // Worst on top.
    std::vector<std::pair<double, int64_t>> heap;
    const auto above = [](const std::pair<double, int64_t>& a, const std::pair<double, int64_t>& b) {
      return better(a.first, a.second, b.first, b.second);
    };
    std::vector<int64_t> mine;
    for (const Candidate& candidate : kept) {
      const bool whole = static_cast<int64_t>(heap.size()) == k;
      if (whole && static_cast<double>(candidate.high()) * by < heap.front().first) break;
      const auto [exact, fine] = exact_score(scorer, candidate, by, mine);
      if (!fine) break;
      if (whole && !better(exact, candidate.row, heap.front().first, heap.front().second)) continue;
      if (whole) {
        std::pop_heap(heap.begin(), heap.end(), above);
        heap.pop_back();
      }
      heap.emplace_back(exact, candidate.row);
      std::push_heap(heap.begin(), heap.end(), above);
    }
    std::sort(heap.begin(), heap.end(), above);
    for (size_t i = 0; i < heap.size(); ++i) {
      best[i] = heap[i].first;
      best_row[i] = heap[i].second;
    }
    const std::lock_guard<std::mutex> lock(adding);
    scored.insert(scored.end(), mine.begin(), mine.end());
  });
  return {scanned.load(), bad.load(), misplaced.load(), std::move(scored)};
}

void exact_scores(const SearchKernels& kernels, const StoredRows& source, const Queries& queries, const int64_t* rows,
                  int64_t width, double* scores, int threads) {
  int64_t total = 0;
  for (int64_t l = 0; l < source.layers; ++l) total += source.dims[l];
  parallel(threads, queries.count, [&](int64_t query) {
    Scorer scorer(kernels, source, queries, queries.values + query * total);
    for (int64_t i = query * width; i < (query + 1) * width; ++i)
      scores[i] = rows[i] < 0 ? std::numeric_limits<double>::quiet_NaN() : scorer.score(rows[i]);
  });
}

}  // namespace influence_fast
