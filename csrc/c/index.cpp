// The index of influence_fast.h: the 8-bit copy of rows in memory (cpu/exact_search.h), longest row first.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "../cpu/exact_search.h"
#include "../cpu/operations.h"
#include "../cpu/parallel.h"
#include "../influence_fast.h"
#include "convert.h"
#include "guard.h"

using namespace influence_fast;
using namespace influence_fast::c;

namespace {

constexpr int64_t kSegmentBytes = 64 << 20, kRowsAtOnce = 256, kLongestPart = 1 << 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A piece of the copy, and the memory that it consists of.
struct Piece {
  std::vector<uint8_t> codes;
  std::vector<float> scale, error, norm, longest;  // (parts, rows), by block
  std::vector<int32_t> order;
  int64_t first;
};

}  // namespace

struct influence_fast_index {
  std::vector<int64_t> dims;
  std::vector<Address> data, scales;
  StoreShard shard;
  StoredRows rows;
  std::vector<RowPart> parts;
  int64_t stride = 0, columns = 0;
  std::vector<Piece> pieces;

  // A cosine of long rows may be as small as any: their length is no bound.
  Segment segment(const Piece& piece, bool cosine) const {
    return {piece.codes.data(), stride, static_cast<int64_t>(piece.order.size()), static_cast<int64_t>(parts.size()),
            piece.scale.data(), piece.error.data(), piece.norm.data(), piece.order.data(), piece.first,
            cosine ? nullptr : piece.longest.data(), nullptr};
  }
};

namespace {

void describe(influence_fast_index& index, const influence_fast_matrix* layers, int64_t count) {
  if (layers == nullptr) refuse("layers", "an address", "null");
  at_least("count", count, 1);
  const Dtype dtype = element_type(layers[0].dtype);
  for (int64_t l = 0; l < count; ++l) {
    const std::string name = "layers[" + std::to_string(l) + "]";
    const Matrix given = c::matrix_of(name.c_str(), &layers[l]);
    within(name.c_str(), [&] {
      same_dtype("dtype", given.dtype, dtype);
      same("rows", given.rows, layers[0].rows);
      at_least("rows", given.rows, 1);
      at_least("columns", given.columns, 1);
      if (given.columns > 1) same("column_stride", given.column_stride, 1);
      if (given.rows > 1) same("row_stride", given.row_stride, given.columns);
      index.columns = sum("columns", index.columns, given.columns);
    });
    for (int64_t begin = 0; begin < given.columns; begin += kLongestPart) {
      const int64_t dim = std::min(kLongestPart, given.columns - begin);
      index.parts.push_back({index.stride, dim, static_cast<int64_t>(index.parts.size()), l, begin});
      index.stride += (dim + 3) / 4 * 4;
    }
    index.dims.push_back(given.columns);
    index.data.push_back(reinterpret_cast<Address>(given.data));
  }
  index.stride = (index.stride + 63) / 64 * 64;
  index.scales.assign(static_cast<size_t>(count), 0);
  index.shard = {0, layers[0].rows, index.data.data(), index.scales.data()};
  index.rows = {&index.shard, 1, index.dims.data(), count, dtype};
}

// Codes of rows [first, first + rows) in the order they are stored, each kRowsAtOnce by one thread.
struct Quantising {
  const influence_fast_index& index;
  const SearchKernels& kernels;
  int64_t first, rows;
  std::vector<uint8_t> codes;
  std::vector<float> scale, error, norm;

  void some(int64_t chunk) {
    const int64_t begin = chunk * kRowsAtOnce, count = std::min(kRowsAtOnce, rows - begin);
    std::vector<float> wide;
    for (size_t p = 0; p < index.parts.size(); ++p) {
      const RowPart& part = index.parts[p];
      const int64_t dim = index.dims[static_cast<size_t>(part.layer)], at = (first + begin) * dim;
      const Address data = index.data[static_cast<size_t>(part.layer)];
      const float* values;
      if (index.rows.dtype == Dtype::float32) {
        values = reinterpret_cast<const float*>(data) + at;
      } else {
        if (part.begin == 0) {
          wide.resize(static_cast<size_t>(count * dim));
          kernels.widen(reinterpret_cast<const uint16_t*>(data) + at, index.rows.dtype, count * dim, wide.data());
        }
        values = wide.data();
      }
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = part.begin; c < part.begin + part.dim; ++c)
          if (!std::isfinite(values[r * dim + c]))
            throw NotFinite("layers[" + std::to_string(part.layer) + "]: expected finite numbers, row " +
                            std::to_string(first + begin + r) + " has others");
      const int64_t row = static_cast<int64_t>(p) * rows + begin;
      kernels.quantise(values + part.begin, dim, count, part.dim, codes.data() + begin * index.stride + part.offset, index.stride,
                       scale.data() + row, error.data() + row, norm.data() + row);
    }
  }
};

Piece copied(const influence_fast_index& index, int64_t first, int64_t rows) {
  const size_t parts = index.parts.size(), count = static_cast<size_t>(rows), stride = static_cast<size_t>(index.stride);
  Quantising made{index, checked::kernels().search, first, rows, std::vector<uint8_t>(count * stride, 128),
                  std::vector<float>(parts * count), std::vector<float>(parts * count), std::vector<float>(parts * count)};
  parallel_for(
      threads(), (rows + kRowsAtOnce - 1) / kRowsAtOnce, [](void* all, int64_t i) { static_cast<Quantising*>(all)->some(i); }, &made);
  std::vector<double> length(count);
  for (size_t p = 0; p < parts; ++p)
    for (size_t r = 0; r < count; ++r) length[r] += static_cast<double>(made.norm[p * count + r]) * made.norm[p * count + r];
  for (double& square : length) square = std::sqrt(square);
  Piece piece;
  piece.first = first;
  piece.order.resize(count);
  std::iota(piece.order.begin(), piece.order.end(), 0);
  std::stable_sort(piece.order.begin(), piece.order.end(),
                   [&](int32_t a, int32_t b) { return length[static_cast<size_t>(a)] > length[static_cast<size_t>(b)]; });
  piece.codes.assign(count * stride + 64, 128);  // read 64 bytes past the end
  for (auto* array : {&piece.scale, &piece.error, &piece.norm}) array->resize(parts * count);
  for (size_t r = 0; r < count; ++r) {
    const size_t from = static_cast<size_t>(piece.order[r]);
    std::copy_n(made.codes.begin() + static_cast<int64_t>(from * stride), stride, piece.codes.begin() + static_cast<int64_t>(r * stride));
    for (size_t p = 0; p < parts; ++p) {
      piece.scale[p * count + r] = made.scale[p * count + from];
      piece.error[p * count + r] = made.error[p * count + from];
      piece.norm[p * count + r] = made.norm[p * count + from];
    }
    if (r % kBlockRows == 0) piece.longest.push_back(std::nextafter(static_cast<float>(length[from]), kInfinity));
  }
  return piece;
}

// Weights of all layers, and queries that are known to be finite.
struct Asked {
  std::vector<double> weights;
  Queries queries;

  Asked(const influence_fast_index& index, const float* values, int64_t count, const double* given, bool cosine)
      : weights(index.dims.size(), 1.0) {
    const int64_t numbers = product("queries", at_least("count", count, 0), index.columns);
    product("queries", numbers, 8);
    pointer<const float>("queries", reinterpret_cast<Address>(values), numbers == 0);
    for (int64_t i = 0; i < numbers; ++i)
      if (!std::isfinite(values[i]))
        throw NotFinite("queries: expected finite numbers, row " + std::to_string(i / index.columns) + " has others");
    const double* weight = optional_pointer<const double>("weights", reinterpret_cast<Address>(given));
    if (weight != nullptr) weights.assign(weight, weight + weights.size());
    for (double w : weights)
      if (!(w >= 0) || !std::isfinite(w)) refuse("weights", "finite numbers of 0 or more", w);
    queries = {values, count, weights.data(), cosine};
  }
};

const influence_fast_index& given(const influence_fast_index* index) {
  if (index == nullptr) refuse("index", "an address", "null");
  return *index;
}

}  // namespace

extern "C" {

int influence_fast_index_build(const influence_fast_matrix* layers, int64_t count, influence_fast_index** out) {
  return guarded([&] {
    influence_fast_index*& to = *pointer<influence_fast_index*>("index", reinterpret_cast<Address>(out));
    to = nullptr;
    auto index = std::make_unique<influence_fast_index>();
    describe(*index, layers, count);
    const int64_t rows = index->shard.rows;
    product("codes", rows, index->stride);
    const int64_t step = std::max(kBlockRows, kSegmentBytes / (4 * std::min(index->columns, kSegmentBytes)));
    for (int64_t first = 0; first < rows; first += step) index->pieces.push_back(copied(*index, first, std::min(step, rows - first)));
    to = index.release();
  });
}

void influence_fast_index_free(influence_fast_index* index) { delete index; }

int64_t influence_fast_index_rows(const influence_fast_index* index) { return index == nullptr ? 0 : index->shard.rows; }

int64_t influence_fast_index_columns(const influence_fast_index* index) { return index == nullptr ? 0 : index->columns; }

int influence_fast_index_search(const influence_fast_index* index, const float* queries, int64_t count, const double* weights,
                                int cosine, const uint8_t* allowed, int64_t k, double* scores, int64_t* rows) {
  return guarded([&] {
    const influence_fast_index& in = given(index);
    const Asked asked(in, queries, count, weights, cosine != 0);
    const bool empty = product("k", count, at_least("k", k, 0)) == 0;
    pointer<double>("scores", reinterpret_cast<Address>(scores), empty);
    pointer<int64_t>("rows", reinterpret_cast<Address>(rows), empty);
    if (empty) return;
    // More than there are rows are -1, without room for them on every thread.
    const int64_t kept = std::min(k, in.shard.rows);
    std::vector<Segment> segments;
    for (const Piece& piece : in.pieces) segments.push_back(in.segment(piece, cosine != 0));
    // Each thread may keep a few times k candidates of every query.
    const int64_t step = std::max<int64_t>(1, std::min<int64_t>(1024, (1 << 22) / kept));
    std::vector<double> found(static_cast<size_t>(kept * std::min(step, count)));
    std::vector<int64_t> numbers(found.size());
    for (int64_t begin = 0; begin < count; begin += step) {
      Queries some = asked.queries;
      some.count = std::min(step, count - begin);
      some.values += begin * in.columns;
      const SearchStats stats =
          exact_search(checked::kernels().search, segments.data(), static_cast<int64_t>(segments.size()), in.parts.data(),
                       static_cast<int64_t>(in.parts.size()), in.rows, some, allowed, kept, found.data(), numbers.data(), threads());
      if (stats.bad_row >= 0)
        throw ChangedRows("index: row " + std::to_string(stats.bad_row) + " is not what the index was built from");
      for (int64_t q = 0; q < some.count; ++q) {
        double* score = std::copy_n(&found[static_cast<size_t>(q * kept)], kept, scores + (begin + q) * k);
        std::fill_n(score, k - kept, std::numeric_limits<double>::quiet_NaN());
        int64_t* row = std::copy_n(&numbers[static_cast<size_t>(q * kept)], kept, rows + (begin + q) * k);
        std::fill_n(row, k - kept, -1);
      }
    }
  });
}

int influence_fast_index_score(const influence_fast_index* index, const float* queries, int64_t count, const double* weights,
                               int cosine, const int64_t* rows, int64_t width, double* scores) {
  return guarded([&] {
    const influence_fast_index& in = given(index);
    const Asked asked(in, queries, count, weights, cosine != 0);
    const bool empty = product("width", count, at_least("width", width, 0)) == 0;
    const int64_t* numbers = pointer<const int64_t>("rows", reinterpret_cast<Address>(rows), empty);
    double* to = pointer<double>("scores", reinterpret_cast<Address>(scores), empty);
    for (int64_t i = 0; i < count * width; ++i)
      if (numbers[i] >= in.shard.rows) refuse("rows", "numbers below " + std::to_string(in.shard.rows), numbers[i]);
    exact_scores(checked::kernels().search, in.rows, asked.queries, numbers, width, to, threads());
  });
}
}
