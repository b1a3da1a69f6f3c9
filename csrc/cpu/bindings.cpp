// The Python module influence_fast_cpu: named arguments, all of them checked before a kernel sees them. Nothing is known of torch's
// tensors here: addresses, sizes and strides come in (ops/cpu, search/exact.py), so that one build serves every version of it.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <string_view>
#include <vector>

#include "../bindings.h"
#include "../philox.h"
#include "dispatch.h"
#include "exact_search.h"
#include "operations.h"

using namespace influence_fast;

namespace {

using WithoutGil = py::call_guard<py::gil_scoped_release>;

Side dense_side(Address data, const py::tuple& shape, const py::tuple& strides, float scale) {
  return checked::dense_side(make_matrix(data, "float32", shape, strides), scale);
}

void sketch_wide(Address g, const py::tuple& shape_in, const py::tuple& strides_in, const Side& side, Address out, int threads) {
  int64_t shape[2], strides[2];
  unpack("shape", shape_in, shape);
  unpack("strides", strides_in, strides);
  py::gil_scoped_release free;
  checked::sketch_wide(g, shape, strides, side, out, threads);
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
    const int bits = dtype == "int8_block" ? 8 : dtype == "int4" ? 4 : 0;
    const Dtype type = bits > 0 || dtype == "int8" ? Dtype::int8 : dtype_of(dtype);
    for (int64_t dim : dims_) total_ = sum("dims", total_, at_least("dims", dim, 1));
    const int64_t* first = firsts.data();
    for (int64_t s = 0; s < count; ++s) {
      if (first[s] > first[s + 1]) refuse("firsts", "numbers in order", first[s + 1]);
      for (int64_t l = 0; l < layers; ++l) {
        if (data_[s * layers + l] % static_cast<Address>(bytes_of(type)) != 0)
          refuse("data", "addresses aligned to an element", data_[s * layers + l]);
        pointer<const void>("data", data_[s * layers + l], first[s] == first[s + 1]);
        const bool empty = type != Dtype::int8 || first[s] == first[s + 1];
        if (bits > 0) pointer<const uint16_t>("scales", scales_[s * layers + l], empty);
        else pointer<const float>("scales", scales_[s * layers + l], empty);
      }
      shards_.push_back({first[s], first[s + 1] - first[s], &data_[s * layers], &scales_[s * layers]});
    }
    rows_ = first[count];
    if (at_least("factors", factors, 0) > 0) {
      if (type != Dtype::float32 && bits == 0) refuse("factors", "0 unless rows are float32 or blocks have scales", factors);
      same("outs: layers", outs.size(), layers);
      for (int64_t l = 0; l < layers; ++l) {
        if (at_least("outs", outs_[l], 0) == 0) continue;
        if (dims_[l] % outs_[l] != 0) refuse("outs", "divisors of dims", outs_[l]);
        product("factors", factors, outs_[l] + dims_[l] / outs_[l]);
      }
    }
    view = {shards_.data(), count, dims_.data(), layers, type, bits, factors, outs_.data()};
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

RowPart make_part(int64_t offset, int64_t dim, int64_t index, int64_t layer, int64_t begin, int64_t factors, int64_t out,
                  int64_t in, int64_t scales, int64_t lengths) {
  if (at_least("offset", offset, 0) % 4 != 0) refuse("offset", "a multiple of 4", offset);
  at_least("scales", scales, 0);
  at_least("lengths", lengths, 0);
  if (at_least("factors", factors, 0) > 0) {
    if (at_least("out", out, 1) > 65536 || at_least("in", in, 1) > 65536) refuse("out, in", "1 to 65536", std::max(out, in));
    const int64_t bytes = product("factors", factors, (out + 3) / 4 * 4 + (in + 3) / 4 * 4);
    same("dim", dim, bytes);
    return {offset, dim, at_least("index", index, 0), at_least("layer", layer, 0), same("begin", begin, 0), factors, out, in, scales, lengths};
  }
  // Sums of products of two bytes fit 32 bits.
  if (at_least("dim", dim, 1) > 65536) refuse("dim", "1 to 65536", dim);
  return {offset, dim, at_least("index", index, 0), at_least("layer", layer, 0), at_least("begin", begin, 0), 0, 0, 0, scales, lengths};
}

// Terms of queries for the parts that are factors; owns nothing.
QueryTerms checked_terms(const std::vector<RowPart>& parts, int64_t queries, const Table<int64_t>& first,
                         const Table<int64_t>& begin, const Table<int8_t>& codes, const Table<double>& scale,
                         const Table<int32_t>& shift, const Table<double>& bounds) {
  int64_t at = 0;
  for (const RowPart& part : parts) at += part.factors > 0 ? queries : 0;
  same("term_first: numbers", first.size(), at + 1);
  same("term_begin: numbers", begin.size(), at);
  same("term_bounds: numbers", bounds.size(), 3 * at);
  same("term_shift: numbers", shift.size(), 2 * scale.size());
  at = 0;
  same("term_first", first.data()[0], 0);
  for (const RowPart& part : parts) {
    if (part.factors == 0) continue;
    const int64_t size = (part.out + 63) / 64 * 64 + (part.in + 63) / 64 * 64;
    for (int64_t q = 0; q < queries; ++q, ++at) {
      const int64_t count = first.data()[at + 1] - first.data()[at];
      if (count < 0 || first.data()[at + 1] > scale.size()) refuse("term_first", "numbers of terms in order", first.data()[at + 1]);
      if (begin.data()[at] < 0 || begin.data()[at] > codes.size() - product("terms", count, size))
        refuse("term_begin", "places of whole terms", begin.data()[at]);
    }
  }
  return {first.data(), begin.data(), codes.data(), scale.data(), shift.data(), bounds.data(), bounds.data() + at,
          bounds.data() + 2 * at};
}

py::tuple search(const std::vector<Segment>& segments, const std::vector<RowPart>& parts, const Stored& stored,
                 const Matrix& queries, const Table<double>& weights, bool cosine, Address allowed, int64_t k, Address scores,
                 Address rows, int threads, Address lengths, py::array_t<uint8_t, py::array::c_style> seen,
                 const Table<int64_t>& term_first,
                 const Table<int64_t>& term_begin, const Table<int8_t>& term_codes, const Table<double>& term_scale,
                 const Table<int32_t>& term_shift, const Table<double>& term_bounds) {
  const Queries asked = checked_queries(queries, weights, cosine, stored, lengths);
  at_least("parts", static_cast<int64_t>(parts.size()), 1);
  for (const RowPart& part : parts) {
    if (part.layer >= stored.view.layers) refuse("parts: layer", "one of " + std::to_string(stored.view.layers), part.layer);
    if (part.factors > 0) same("parts: out x in", part.out * part.in, stored.dims()[part.layer]);
    else if (part.begin + part.dim > stored.dims()[part.layer])
      refuse("parts: begin", "numbers of the layer", part.begin + part.dim);
    for (const Segment& segment : segments) {
      if (part.offset + part.dim > segment.stride) refuse("parts: offset", "bytes of a row", part.offset + part.dim);
      if (part.index >= segment.parts) refuse("parts: index", "one of " + std::to_string(segment.parts), part.index);
    }
  }
  int64_t blocks = 0;
  for (const Segment& segment : segments) {
    if (segment.rows > stored.rows() - segment.first) refuse("segments", "stored rows", segment.first + segment.rows);
    blocks += (segment.rows + kBlockRows - 1) / kBlockRows;
  }
  if (seen.size() > 0) same("seen: blocks", seen.size(), blocks);
  uint8_t* marks = seen.size() > 0 ? seen.mutable_data() : nullptr;
  const bool factored = std::any_of(parts.begin(), parts.end(), [](const RowPart& part) { return part.factors > 0; });
  QueryTerms terms{};
  if (factored)
    terms = checked_terms(parts, queries.rows, term_first, term_begin, term_codes, term_scale, term_shift, term_bounds);
  const bool empty = product("k", queries.rows, at_least("k", k, 0)) == 0;
  double* best = pointer<double>("scores", scores, empty);
  int64_t* best_rows = pointer<int64_t>("rows", rows, empty);
  at_least("threads", threads, 1);
  SearchStats stats;
  {
    py::gil_scoped_release free;
    stats = exact_search(checked::kernels().search, segments.data(), static_cast<int64_t>(segments.size()), parts.data(),
                         static_cast<int64_t>(parts.size()), stored.view, asked,
                         reinterpret_cast<const uint8_t*>(allowed), k, best, best_rows, threads, factored ? &terms : nullptr, marks);
  }
  return py::make_tuple(stats.rows_scanned, stats.bad_row, stats.misplaced,
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
  exact_scores(checked::kernels().search, stored.view, asked, numbers, width, to, threads);
}

}  // namespace

PYBIND11_MODULE(influence_fast_cpu, m) {
  m.doc() = "Kernels of influence_fast for the CPU, on addresses (csrc/cpu/kernels.h); every argument is checked.";
  m.attr("__version__") = INFLUENCE_FAST_VERSION;
  define_arguments(m);
  m.def("dense_side", &dense_side, py::arg("data"), py::arg("shape"), py::arg("strides"), py::arg("scale"),
        "A Side of given float32 entries, which must outlive it.");

  checked::kernels();  // an instruction set that is not there is told at once
  m.def("isa", [] { return std::string(checked::kernels().isa); }, "The instruction set in use.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const Kernels* k : supported_kernels()) names.emplace_back(k->isa);
        return names;
      },
      "The instruction sets this machine can run, slowest first.");
  m.def(
      "set_isa", &checked::use, py::arg("isa"),
      "Use one of isas() from now on; the environment variable INFLUENCE_FAST_ISA sets the first.");
  m.def(
      "philox4x32_10",
      [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
        const philox::Block b = philox::philox4x32_10(c0, c1, c2, c3, {k0, k1});
        return py::make_tuple(b.x[0], b.x[1], b.x[2], b.x[3]);
      },
      py::arg("c0"), py::arg("c1"), py::arg("c2"), py::arg("c3"), py::arg("k0"), py::arg("k1"));

  m.def("random_matrix", &checked::random_matrix, WithoutGil(), py::arg("side"), py::arg("row"), py::arg("rows"), py::arg("column"), py::arg("columns"),
        py::arg("out"), py::arg("threads"));
  m.def("sketch", &checked::sketch, WithoutGil(), py::arg("g"), py::arg("side"), py::arg("out"), py::arg("threads"));
  m.def("project_outer", &checked::project_outer, WithoutGil(), py::arg("x"), py::arg("dy"), py::arg("spans"), py::arg("p_in"), py::arg("p_out"),
        py::arg("out"), py::arg("threads"));
  m.def("sketch_outer", &checked::sketch_outer, WithoutGil(), py::arg("x"), py::arg("dy"), py::arg("spans"), py::arg("side"), py::arg("weight"),
        py::arg("m"), py::arg("v"), py::arg("b1"), py::arg("b2"), py::arg("eps"), py::arg("out"), py::arg("threads"));
  m.def("sketch_wide", &sketch_wide, py::arg("g"), py::arg("shape"), py::arg("strides"), py::arg("side"), py::arg("out"),
        py::arg("threads"));
  m.def("fill_panels", &checked::fill_panels, WithoutGil(), py::arg("side"), py::arg("panels"), py::arg("threads"));
  m.def("panel_numbers", &checked::panel_numbers, py::arg("k"), py::arg("features"));
  m.def("with_panels", &checked::with_panels, py::arg("side"), py::arg("panels"));
  m.def("ghost_dot", &checked::ghost_dot, WithoutGil(), py::arg("xa"), py::arg("dya"), py::arg("spans_a"), py::arg("xb"), py::arg("dyb"),
        py::arg("spans_b"), py::arg("out"), py::arg("threads"));
  m.def("ghost_norm", &checked::ghost_norm, WithoutGil(), py::arg("x"), py::arg("dy"), py::arg("spans"), py::arg("out"), py::arg("threads"));
  m.def("rank", &checked::rank, WithoutGil(), py::arg("values"), py::arg("out"), py::arg("wide"), py::arg("threads"));
  m.def("vote", &checked::vote, WithoutGil(), py::arg("values"), py::arg("k"), py::arg("votes"), py::arg("threads"));
  m.def("rank_and_vote", &checked::rank_and_vote, WithoutGil(), py::arg("values"), py::arg("k"), py::arg("ranks"), py::arg("votes"), py::arg("threads"));

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
           py::arg("begin"), py::arg("factors") = 0, py::arg("out") = 0, py::arg("in_") = 0, py::arg("scales") = 0,
           py::arg("lengths") = 0);
  m.def("quantise", &checked::quantise, WithoutGil(), py::kw_only(), py::arg("rows"), py::arg("codes"), py::arg("stride"), py::arg("scale"),
        py::arg("error"), py::arg("norm"), py::arg("threads"));
  m.def("exact_search", &search, py::kw_only(), py::arg("segments"), py::arg("parts"), py::arg("stored"), py::arg("queries"),
        py::arg("weights"), py::arg("cosine"), py::arg("allowed"), py::arg("k"), py::arg("scores"), py::arg("rows"),
        py::arg("threads"), py::arg("lengths") = 0, py::arg("seen") = Table<uint8_t>(), py::arg("term_first") = Table<int64_t>(),
        py::arg("term_begin") = Table<int64_t>(), py::arg("term_codes") = Table<int8_t>(),
        py::arg("term_scale") = Table<double>(), py::arg("term_shift") = Table<int32_t>(),
        py::arg("term_bounds") = Table<double>());
  m.def("exact_scores", &score_rows, py::kw_only(), py::arg("stored"), py::arg("queries"), py::arg("weights"), py::arg("cosine"),
        py::arg("rows"), py::arg("width"), py::arg("scores"), py::arg("threads"));
}
