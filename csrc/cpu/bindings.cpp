// The Python module influence_fast_cpu: named arguments, all of them checked before a kernel sees them. Nothing is known of torch's
// tensors here: addresses, sizes and strides come in (ops/cpu, search/exact.py), so that one build serves every version of it.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "../bindings.h"
#include "../philox.h"
#include "dispatch.h"
#include "exact_search.h"
#include "kernels.h"
#include "parallel.h"

using namespace influence_fast;

namespace {

const Kernels* named(const std::string& isa) {
  std::string names;
  for (const Kernels* k : supported_kernels()) {
    if (isa == k->isa) return k;
    names += (names.empty() ? "" : ", ") + std::string(k->isa);
  }
  refuse("isa", "one of " + names + " on this machine", isa);
}

const Kernels* kernels = nullptr;
constexpr Side kIdentity = {Kind::identity, 0, 0, 1.0f, 1, 1, nullptr, 0, 0};

Side dense_side(Address data, const py::tuple& shape_in, const py::tuple& strides_in, float scale) {
  const Matrix matrix = make_matrix(data, "float32", shape_in, strides_in);
  if (matrix.columns > 1 && matrix.column_stride != 1) refuse("strides", "columns one after another", matrix.column_stride);
  return {Kind::dense, 0, 0, scale, matrix.rows, matrix.columns, static_cast<const float*>(matrix.data), matrix.row_stride, 0};
}

// The side with the entries that fill_panels left there, which must outlive it.
Side with_panels(Side side, Address panels) {
  if (side.kind != Kind::gaussian) refuse("side", "a gaussian matrix", "another kind");
  side.dense = pointer<const float>("panels", panels);
  return side;
}

void fill_panels(const Side& side, Address panels, int threads) {
  if (side.kind != Kind::gaussian) refuse("side", "a gaussian matrix", "another kind");
  float* to = pointer<float>("panels", panels);
  at_least("threads", threads, 1);
  py::gil_scoped_release free;
  kernels->fill_panels(side, to, threads);
}

// What acts on these features; null is the identity.
const Side& checked_side(const char* name, const Side* side, int64_t features) {
  if (side == nullptr) return kIdentity;
  same(name, side->features, features);
  return *side;
}

// x and dy hold the same samples and tokens; spans lie within them.
Batch checked_batch(const Tokens& x, const Tokens& dy, Address address) {
  same("dy: samples", dy.samples, x.samples);
  same("dy: tokens", dy.tokens, x.tokens);
  same_dtype("dy: dtype", dy.dtype, x.dtype);
  const int64_t* spans = checked_spans(address);
  for (int64_t n = 0; spans != nullptr && n < x.samples; ++n) {
    const int64_t begin = spans[2 * n], end = spans[2 * n + 1];
    if (begin < 0 || begin > end || end > x.tokens)
      refuse("spans", "0 <= begin <= end <= " + std::to_string(x.tokens) + " for sample " + std::to_string(n),
             std::to_string(begin) + " and " + std::to_string(end));
  }
  return {x.samples, x.tokens, spans};
}

float* output(Address out, int64_t rows, int64_t columns) {
  return pointer<float>("out", out, product("out", rows, columns) == 0);
}

void random_matrix(const Side& side, int64_t row, int64_t rows, int64_t column, int64_t columns, Address out, int threads) {
  if (side.kind == Kind::dense) refuse("side", "a random matrix", "a dense one");
  if (sum("rows", at_least("row", row, 0), at_least("rows", rows, 0)) > side.k)
    refuse("rows", "rows within " + std::to_string(side.k), row + rows);
  if (sum("columns", at_least("column", column, 0), at_least("columns", columns, 0)) > side.features)
    refuse("columns", "columns within " + std::to_string(side.features), column + columns);
  float* to = output(out, rows, columns);
  at_least("threads", threads, 1);
  py::gil_scoped_release free;
  kernels->random_matrix(side, row, row + rows, column, column + columns, to, threads);
}

void sketch(const Matrix& g, const Side& side, Address out, int threads) {
  checked_side("side: features", &side, g.columns);
  if (side.kind == Kind::dense) refuse("side", "a random matrix", "a dense one");
  if (g.columns > 1 && g.column_stride != 1) refuse("g: strides", "features one after another", g.column_stride);
  float* to = output(out, g.rows, side.k);
  at_least("threads", threads, 1);
  py::gil_scoped_release free;
  kernels->sketch(g, side, to, threads);
}

void sketch_wide(Address g, const py::tuple& shape_in, const py::tuple& strides_in, const Side& side, Address out, int threads) {
  int64_t shape[2], strides[2];
  unpack("shape", shape_in, shape);
  unpack("strides", strides_in, strides);
  if (shape[1] > 1 && strides[1] != 1) refuse("g: strides", "features one after another", strides[1]);
  checked_side("side: features", &side, shape[1]);
  if (side.kind == Kind::dense) refuse("side", "a random matrix", "a dense one");
  const bool empty = product("shape", shape[0], shape[1]) == 0;
  product("strides", sum("strides", product("strides", shape[0], strides[0]), shape[1]), 8);
  const double* from = pointer<const double>("g", g, empty);
  double* to = pointer<double>("out", out, product("out", shape[0], side.k) == 0);
  at_least("threads", threads, 1);
  py::gil_scoped_release free;
  kernels->sketch_wide(from, shape[0], strides[0], side, to, threads);
}

void project_outer(const Tokens& x, const Tokens& dy, Address spans, const Side* p_in, const Side* p_out, Address out,
                   int threads) {
  const Batch batch = checked_batch(x, dy, spans);
  const Side &right = checked_side("p_in: features", p_in, x.features), &left = checked_side("p_out: features", p_out, dy.features);
  float* to = output(out, x.samples, product("out", p_in ? right.k : x.features, p_out ? left.k : dy.features));
  at_least("threads", threads, 1);
  py::gil_scoped_release free;
  kernels->project_outer(x, dy, batch, right, left, to, threads);
}

void sketch_outer(const Tokens& x, const Tokens& dy, Address spans, const Side& side, Address weight, Address m, Address v,
                  float b1, float b2, float eps, Address out, int threads) {
  const Batch batch = checked_batch(x, dy, spans);
  checked_side("side: features", &side, product("x, dy: features", x.features, dy.features));
  if ((m == 0) != (v == 0)) refuse("m, v", "both or none", m == 0 ? "v alone" : "m alone");
  if (m != 0 && weight != 0) refuse("weight", "none beside m and v", weight);
  const Change change = {optional_pointer<const float>("weight", weight), optional_pointer<const float>("m", m),
                         optional_pointer<const float>("v", v), b1, b2, eps};
  float* to = output(out, x.samples, side.k);
  at_least("threads", threads, 1);
  py::gil_scoped_release free;
  kernels->sketch_outer(x, dy, batch, side, change, to, threads);
}

void ghost_dot(const Tokens& xa, const Tokens& dya, Address spans_a, const Tokens& xb, const Tokens& dyb, Address spans_b,
               Address out, int threads) {
  const Batch a = checked_batch(xa, dya, spans_a), b = checked_batch(xb, dyb, spans_b);
  same("xb: features", xb.features, xa.features);
  same("dyb: features", dyb.features, dya.features);
  same_dtype("xb: dtype", xb.dtype, xa.dtype);
  float* to = output(out, xa.samples, xb.samples);
  at_least("threads", threads, 1);
  py::gil_scoped_release free;
  kernels->ghost_dot(xa, dya, a, xb, dyb, b, to, threads);
}

void ghost_norm(const Tokens& x, const Tokens& dy, Address spans, Address out, int threads) {
  const Batch batch = checked_batch(x, dy, spans);
  float* to = output(out, x.samples, 1);
  at_least("threads", threads, 1);
  py::gil_scoped_release free;
  kernels->ghost_norm(x, dy, batch, to, threads);
}

const Matrix& checked_values(const Matrix& values, int threads) {
  same_dtype("values: dtype", values.dtype, Dtype::float32);
  at_least("values: rows", values.rows, 1);
  at_least("values: columns", values.columns, 1);
  at_least("threads", threads, 1);
  return values;
}

int64_t checked_k(int64_t k, int64_t most) {
  if (k < 1 || k > most) refuse("k", "1 to " + std::to_string(most), k);
  return k;
}

int64_t rank(const Matrix& values, Address out, bool wide, int threads) {
  checked_values(values, threads);
  // Half integers are exact in float32 up to here.
  if (!wide && values.columns > 1 << 22) refuse("wide", "True for more than 2^22 columns", "False");
  float* narrow = wide ? nullptr : pointer<float>("out", out);
  double* large = wide ? pointer<double>("out", out) : nullptr;
  py::gil_scoped_release free;
  return kernels->rank(values, narrow, large, threads);
}

int64_t vote(const Matrix& values, int64_t k, Address votes, int threads) {
  checked_k(k, checked_values(values, threads).columns);
  double* to = pointer<double>("votes", votes);
  py::gil_scoped_release free;
  return kernels->vote(values, k, to, threads);
}

int64_t rank_and_vote(const Matrix& values, int64_t k, Address ranks, Address votes, int threads) {
  checked_k(k, checked_values(values, threads).columns);
  double *rank_sums = pointer<double>("ranks", ranks), *vote_sums = pointer<double>("votes", votes);
  py::gil_scoped_release free;
  return kernels->rank_and_vote(values, k, rank_sums, vote_sums, threads);
}

// ---------------------------------------------------------------------------------------------------- exact search

template <typename T>
using Table = py::array_t<T, py::array::c_style>;

// The exact rows of some layers, shard by shard; owns its tables, not the rows.
class Stored {
 public:
  Stored(const Table<int64_t>& firsts, const Table<int64_t>& data, const Table<int64_t>& scales, const Table<int64_t>& dims,
         std::string_view dtype, int64_t factors, const Table<int64_t>& outs)
      : data_(data.data(), data.data() + data.size()),
        scales_(scales.data(), scales.data() + scales.size()),
        dims_(dims.data(), dims.data() + dims.size()),
        outs_(outs.data(), outs.data() + outs.size()) {
    const int64_t count = at_least("firsts: rows", firsts.size(), 2) - 1, layers = at_least("dims: layers", dims.size(), 1);
    same("data: addresses", data.size(), count * layers);
    same("scales: addresses", scales.size(), count * layers);
    const Dtype type = dtype == "int8" ? Dtype::int8 : dtype_of(dtype);
    for (int64_t dim : dims_) total_ = sum("dims", total_, at_least("dims", dim, 1));
    const int64_t* first = firsts.data();
    for (int64_t s = 0; s < count; ++s) {
      if (first[s] > first[s + 1]) refuse("firsts", "numbers in order", first[s + 1]);
      for (int64_t l = 0; l < layers; ++l) {
        if (data_[s * layers + l] % static_cast<Address>(bytes_of(type)) != 0)
          refuse("data", "addresses aligned to an element", data_[s * layers + l]);
        pointer<const void>("data", data_[s * layers + l], first[s] == first[s + 1]);
        pointer<const float>("scales", scales_[s * layers + l], type != Dtype::int8 || first[s] == first[s + 1]);
      }
      shards_.push_back({first[s], first[s + 1] - first[s], &data_[s * layers], &scales_[s * layers]});
    }
    rows_ = first[count];
    if (at_least("factors", factors, 0) > 0) {
      if (type != Dtype::float32) refuse("factors", "0 unless rows are float32", factors);
      same("outs: layers", outs.size(), layers);
      for (int64_t l = 0; l < layers; ++l) {
        if (at_least("outs", outs_[l], 0) == 0) continue;
        if (dims_[l] % outs_[l] != 0) refuse("outs", "divisors of dims", outs_[l]);
        product("factors", factors, outs_[l] + dims_[l] / outs_[l]);
      }
    }
    view = {shards_.data(), count, dims_.data(), layers, type, factors, outs_.data()};
  }
  Stored(const Stored&) = delete;
  Stored& operator=(const Stored&) = delete;

  int64_t total() const { return total_; }
  int64_t rows() const { return rows_; }
  const std::vector<int64_t>& dims() const { return dims_; }

  StoredRows view;

 private:
  std::vector<Address> data_, scales_;
  std::vector<int64_t> dims_, outs_;
  std::vector<StoreShard> shards_;
  int64_t total_ = 0, rows_ = 0;
};

Queries checked_queries(const Matrix& queries, const Table<double>& weights, bool cosine, const Stored& stored,
                        Address lengths = 0) {
  same_dtype("queries: dtype", queries.dtype, Dtype::float32);
  same("queries: columns", queries.columns, stored.total());
  if (queries.rows > 1) same("queries: row stride", queries.row_stride, queries.columns);
  if (queries.columns > 1) same("queries: column stride", queries.column_stride, 1);
  same("weights: layers", weights.size(), stored.view.layers);
  return {static_cast<const float*>(queries.data), queries.rows, weights.data(), cosine,
          optional_pointer<const double>("lengths", lengths)};
}

Segment make_segment(Address codes, int64_t stride, int64_t first, int64_t rows, int64_t parts, Address scale, Address error,
                     Address norm, Address order, Address longest, Address factor) {
  product("rows", at_least("rows", rows, 1), product("rows", at_least("stride", stride, 4), at_least("parts", parts, 1)));
  return {pointer<const uint8_t>("codes", codes), stride, rows, parts, pointer<const float>("scale", scale),
          pointer<const float>("error", error), pointer<const float>("norm", norm), pointer<const int32_t>("order", order),
          at_least("first", first, 0), optional_pointer<const float>("longest", longest),
          optional_pointer<const float>("factor", factor)};
}

RowPart make_part(int64_t offset, int64_t dim, int64_t index, int64_t layer, int64_t begin) {
  if (at_least("offset", offset, 0) % 4 != 0) refuse("offset", "a multiple of 4", offset);
  // Sums of products of two bytes fit 32 bits.
  if (at_least("dim", dim, 1) > 65536) refuse("dim", "1 to 65536", dim);
  return {offset, dim, at_least("index", index, 0), at_least("layer", layer, 0), at_least("begin", begin, 0)};
}

py::tuple search(const std::vector<Segment>& segments, const std::vector<RowPart>& parts, const Stored& stored,
                 const Matrix& queries, const Table<double>& weights, bool cosine, Address allowed, int64_t k, Address scores,
                 Address rows, int threads, Address lengths) {
  const Queries asked = checked_queries(queries, weights, cosine, stored, lengths);
  at_least("parts", static_cast<int64_t>(parts.size()), 1);
  for (const RowPart& part : parts) {
    if (part.layer >= stored.view.layers) refuse("parts: layer", "one of " + std::to_string(stored.view.layers), part.layer);
    if (part.begin + part.dim > stored.dims()[part.layer])
      refuse("parts: begin", "numbers of the layer", part.begin + part.dim);
    for (const Segment& segment : segments) {
      if (part.offset + part.dim > segment.stride) refuse("parts: offset", "bytes of a row", part.offset + part.dim);
      if (part.index >= segment.parts) refuse("parts: index", "one of " + std::to_string(segment.parts), part.index);
    }
  }
  for (const Segment& segment : segments)
    if (segment.rows > stored.rows() - segment.first) refuse("segments", "stored rows", segment.first + segment.rows);
  const bool empty = product("k", queries.rows, at_least("k", k, 0)) == 0;
  double* best = pointer<double>("scores", scores, empty);
  int64_t* best_rows = pointer<int64_t>("rows", rows, empty);
  at_least("threads", threads, 1);
  SearchStats stats;
  {
    py::gil_scoped_release free;
    stats = exact_search(kernels->search, segments.data(), static_cast<int64_t>(segments.size()), parts.data(),
                         static_cast<int64_t>(parts.size()), stored.view, asked,
                         reinterpret_cast<const uint8_t*>(allowed), k, best, best_rows, threads);
  }
  return py::make_tuple(stats.rows_scanned, stats.bad_row,
                        py::array_t<int64_t>(static_cast<py::ssize_t>(stats.scored.size()), stats.scored.data()));
}

void score_rows(const Stored& stored, const Matrix& queries, const Table<double>& weights, bool cosine, Address rows,
                int64_t width, Address scores, int threads) {
  const Queries asked = checked_queries(queries, weights, cosine, stored);
  const bool empty = product("width", queries.rows, at_least("width", width, 0)) == 0;
  const int64_t* numbers = pointer<const int64_t>("rows", rows, empty);
  double* to = pointer<double>("scores", scores, empty);
  for (int64_t i = 0; i < queries.rows * width; ++i)
    if (numbers[i] >= stored.rows()) refuse("rows", "numbers below " + std::to_string(stored.rows()), numbers[i]);
  at_least("threads", threads, 1);
  py::gil_scoped_release free;
  exact_scores(kernels->search, stored.view, asked, numbers, width, to, threads);
}

void quantise(const Matrix& rows, Address codes, int64_t stride, Address scale, Address error, Address norm, int threads) {
  same_dtype("rows: dtype", rows.dtype, Dtype::float32);
  if (rows.columns > 1) same("rows: column stride", rows.column_stride, 1);
  at_least("stride", stride, rows.columns);
  at_least("threads", threads, 1);
  struct Job {
    const Matrix& rows;
    uint8_t* codes;
    int64_t stride;
    float *scale, *error, *norm;
  } job{rows,
        pointer<uint8_t>("codes", codes),
        stride,
        pointer<float>("scale", scale),
        pointer<float>("error", error),
        pointer<float>("norm", norm)};
  static constexpr int64_t kRows = 256;
  py::gil_scoped_release free;
  parallel_for(
      threads, (rows.rows + kRows - 1) / kRows,
      [](void* context, int64_t i) {
        const Job& j = *static_cast<const Job*>(context);
        const int64_t begin = i * kRows, count = std::min(kRows, j.rows.rows - begin);
        kernels->search.quantise(static_cast<const float*>(j.rows.data) + begin * j.rows.row_stride, j.rows.row_stride, count,
                                 j.rows.columns, j.codes + begin * j.stride, j.stride, j.scale + begin, j.error + begin,
                                 j.norm + begin);
      },
      &job);
}

}  // namespace

PYBIND11_MODULE(influence_fast_cpu, m) {
  m.doc() = "Kernels of influence_fast for the CPU, on addresses (csrc/cpu/kernels.h); every argument is checked.";
  m.attr("__version__") = INFLUENCE_FAST_VERSION;
  define_arguments(m);
  m.def("dense_side", &dense_side, py::arg("data"), py::arg("shape"), py::arg("strides"), py::arg("scale"),
        "A Side of given float32 entries, which must outlive it.");

  const char* forced = std::getenv("INFLUENCE_FAST_ISA");
  kernels = forced != nullptr && *forced != '\0' ? named(forced) : supported_kernels().back();
  m.def("isa", [] { return std::string(kernels->isa); }, "The instruction set in use.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const Kernels* k : supported_kernels()) names.emplace_back(k->isa);
        return names;
      },
      "The instruction sets this machine can run, slowest first.");
  m.def(
      "set_isa", [](const std::string& isa) { kernels = named(isa); }, py::arg("isa"),
      "Use one of isas() from now on; the environment variable INFLUENCE_FAST_ISA sets the first.");
  m.def(
      "philox4x32_10",
      [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
        const philox::Block b = philox::philox4x32_10(c0, c1, c2, c3, {k0, k1});
        return py::make_tuple(b.x[0], b.x[1], b.x[2], b.x[3]);
      },
      py::arg("c0"), py::arg("c1"), py::arg("c2"), py::arg("c3"), py::arg("k0"), py::arg("k1"));

  m.def("random_matrix", &random_matrix, py::arg("side"), py::arg("row"), py::arg("rows"), py::arg("column"), py::arg("columns"),
        py::arg("out"), py::arg("threads"));
  m.def("sketch", &sketch, py::arg("g"), py::arg("side"), py::arg("out"), py::arg("threads"));
  m.def("project_outer", &project_outer, py::arg("x"), py::arg("dy"), py::arg("spans"), py::arg("p_in"), py::arg("p_out"),
        py::arg("out"), py::arg("threads"));
  m.def("sketch_outer", &sketch_outer, py::arg("x"), py::arg("dy"), py::arg("spans"), py::arg("side"), py::arg("weight"),
        py::arg("m"), py::arg("v"), py::arg("b1"), py::arg("b2"), py::arg("eps"), py::arg("out"), py::arg("threads"));
  m.def("sketch_wide", &sketch_wide, py::arg("g"), py::arg("shape"), py::arg("strides"), py::arg("side"), py::arg("out"),
        py::arg("threads"));
  m.def("fill_panels", &fill_panels, py::arg("side"), py::arg("panels"), py::arg("threads"));
  m.def(
      "panel_numbers",
      [](int64_t k, int64_t features) {
        product("k x features", sum("k", at_least("k", k, 1), 64), sum("features", at_least("features", features, 1), 256));
        return kernels->panel_numbers(k, features);
      },
      py::arg("k"), py::arg("features"));
  m.def("with_panels", &with_panels, py::arg("side"), py::arg("panels"));
  m.def("ghost_dot", &ghost_dot, py::arg("xa"), py::arg("dya"), py::arg("spans_a"), py::arg("xb"), py::arg("dyb"),
        py::arg("spans_b"), py::arg("out"), py::arg("threads"));
  m.def("ghost_norm", &ghost_norm, py::arg("x"), py::arg("dy"), py::arg("spans"), py::arg("out"), py::arg("threads"));
  m.def("rank", &rank, py::arg("values"), py::arg("out"), py::arg("wide"), py::arg("threads"));
  m.def("vote", &vote, py::arg("values"), py::arg("k"), py::arg("votes"), py::arg("threads"));
  m.def("rank_and_vote", &rank_and_vote, py::arg("values"), py::arg("k"), py::arg("ranks"), py::arg("votes"), py::arg("threads"));

  m.attr("block_rows") = kBlockRows;
  py::class_<Stored>(m, "StoredRows", py::module_local(), "Where the exact rows of a store's shards and layers are.")
      .def(py::init<const Table<int64_t>&, const Table<int64_t>&, const Table<int64_t>&, const Table<int64_t>&,
                    std::string_view, int64_t, const Table<int64_t>&>(),
           py::arg("firsts"), py::arg("data"), py::arg("scales"), py::arg("dims"), py::arg("dtype"), py::arg("factors") = 0,
           py::arg("outs") = Table<int64_t>());
  py::class_<Segment>(m, "Segment", py::module_local(), "A piece of the 8-bit copy.")
      .def(py::init(&make_segment), py::kw_only(), py::arg("codes"), py::arg("stride"), py::arg("first"), py::arg("rows"),
           py::arg("parts"), py::arg("scale"), py::arg("error"), py::arg("norm"), py::arg("order"), py::arg("longest"),
           py::arg("factor"));
  py::class_<RowPart>(m, "RowPart", py::module_local(), "Some numbers of a layer within a row of the 8-bit copy.")
      .def(py::init(&make_part), py::kw_only(), py::arg("offset"), py::arg("dim"), py::arg("index"), py::arg("layer"),
           py::arg("begin"));
  m.def("quantise", &quantise, py::kw_only(), py::arg("rows"), py::arg("codes"), py::arg("stride"), py::arg("scale"),
        py::arg("error"), py::arg("norm"), py::arg("threads"));
  m.def("exact_search", &search, py::kw_only(), py::arg("segments"), py::arg("parts"), py::arg("stored"), py::arg("queries"),
        py::arg("weights"), py::arg("cosine"), py::arg("allowed"), py::arg("k"), py::arg("scores"), py::arg("rows"),
        py::arg("threads"), py::arg("lengths") = 0);
  m.def("exact_scores", &score_rows, py::kw_only(), py::arg("stored"), py::arg("queries"), py::arg("weights"), py::arg("cosine"),
        py::arg("rows"), py::arg("width"), py::arg("scores"), py::arg("threads"));
}
