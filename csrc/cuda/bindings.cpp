// The Python module influence_fast_cuda: named arguments, all of them checked before a launch; no torch here, so that one build
// serves every version of it. Addresses are of memory on the device: nothing there is read. Work is queued on `stream` of
// `device` and not waited for.
//
// Compiled with INFLUENCE_FAST_SIMT it is influence_fast_simt: the same functions on host memory (simt/simt.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <string_view>
#include <vector>

#include "../bindings.h"
#include "device.h"
#include "params.h"

#ifdef INFLUENCE_FAST_SIMT
#include "simt/simt.h"
#define MODULE influence_fast_simt
#else
#define MODULE influence_fast_cuda
#endif

namespace {

constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;  // blocks along the first axis

int64_t within(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) refuse(name, std::to_string(low) + " to " + std::to_string(high), value);
  return value;
}

void check_kind(const Side& side, bool gaussian, bool rademacher = true) {
  if ((side.kind == Kind::gaussian && !gaussian) || (side.kind == Kind::rademacher && !rademacher))
    refuse("side: kind", rademacher ? "rademacher or sjlt" : "sjlt", side.kind == Kind::gaussian ? "gaussian" : "rademacher");
}

void check_features(const char* name, const Side& side, int64_t features) { same(name, side.features, features); }

// x and dy hold the same samples and tokens, at least one of each.
Batch checked_batch(const Tokens& x, const Tokens& dy, Address spans) {
  at_least("x: samples", x.samples, 1);
  within("x: tokens", x.tokens, 1, kMaxGrid);
  at_least("x: features", x.features, 1);
  at_least("dy: features", dy.features, 1);
  same("dy: samples", dy.samples, x.samples);
  same("dy: tokens", dy.tokens, x.tokens);
  same_dtype("dy: dtype", dy.dtype, x.dtype);
  return {x.samples, x.tokens, checked_spans(spans)};
}

// Parts of a result that is cut, or the result itself.
float* parts_or(float* out, Address parts, int64_t splits) {
  return splits == 1 ? out : pointer<float>("parts", parts);
}

ProjectedLayer make_layer(const Tokens& x, const Tokens& dy, const Side& p_in, const Side& p_out, Address result,
                          Address parts) {
  for (const Side* side : {&p_in, &p_out}) {
    check_kind(*side, false);
    within("k", side->k, 1, kProjectMaxK);
    within("features", side->features, 1, kProjectMaxFeatures);
  }
  check_features("p_in: features", p_in, x.features);
  check_features("p_out: features", p_out, dy.features);
  float* to = pointer<float>("result", result);
  return {x, dy, p_in, p_out, to, parts ? pointer<float>("parts", parts) : to};
}

void project_outer_py(const std::vector<ProjectedLayer>& layers, Address spans, int64_t row_warps, int64_t splits,
                      int device, uint64_t stream) {
  within("layers", static_cast<int64_t>(layers.size()), 1, kLayersPerLaunch);
  if (row_warps != 1 && row_warps != 2 && row_warps != 4) refuse("row_warps", "1, 2 or 4", row_warps);
  ProjectOuterParams p{};
  p.layers = static_cast<int>(layers.size());
  p.batch = checked_batch(layers[0].x, layers[0].dy, spans);
  if (within("splits", splits, 1, kMaxGrid) * row_warps * 32 < p.batch.tokens)
    refuse("splits", "enough for " + std::to_string(p.batch.tokens) + " tokens", splits);
  within("samples x splits", product("samples x splits", p.batch.samples, splits), 1, kMaxGrid);
  for (size_t i = 0; i < layers.size(); ++i) {
    const ProjectedLayer& layer = layers[i];
    checked_batch(layer.x, layer.dy, spans);
    same("layers: samples", layer.x.samples, p.batch.samples);
    same("layers: tokens", layer.x.tokens, p.batch.tokens);
    same_dtype("layers: dtype", layer.x.dtype, layers[0].x.dtype);
    if (splits > 1 && layer.parts == layer.result) refuse("parts", "an address where splits > 1", 0);
    p.layer[i] = layer;
  }
  p.row_warps = static_cast<int>(row_warps);
  p.splits = static_cast<int>(splits);
  const DeviceGuard guard(device);
  project_outer(p, stream);
}

void sketch_py(const Matrix& g, const Side& side, Address out, Address parts, int device, uint64_t stream) {
  check_kind(side, false);
  check_features("side: features", side, g.columns);
  within("g: rows", g.rows, 1, kMaxGrid);
  if (g.columns > 1) same("g: column stride", g.column_stride, 1);
  within("k", side.k, 1, 32 * 65535);  // the third axis of a grid
  const int64_t splits = sketch_splits(side.kind, g.columns, side.k);
  float* to = pointer<float>("out", out);
  const SketchParams p{g, side, to, parts_or(to, parts, splits), splits};
  const DeviceGuard guard(device);
  (side.kind == Kind::sjlt ? sketch_sjlt : sketch_dense)(p, stream);
}

void sketch_outer_py(const Tokens& x, const Tokens& dy, Address spans, const Side& side, Address scale, Address out,
                     Address parts, int device, uint64_t stream) {
  check_kind(side, false, false);
  const Batch batch = checked_batch(x, dy, spans);
  check_features("side: features", side, product("x, dy: features", x.features, dy.features));
  const int64_t strips = sketch_outer_strips(x.features, dy.features);
  within("samples x strips", product("samples x strips", x.samples, strips), 1, kMaxGrid);
  float* to = pointer<float>("out", out);
  const SketchOuterParams p{x,  dy, batch, side, optional_pointer<const float>("scale", scale),
                            to, parts_or(to, parts, strips), strips};
  const DeviceGuard guard(device);
  sketch_outer(p, stream);
}

void outer_py(const Tokens& x, const Tokens& dy, Address spans, Address out, int device, uint64_t stream) {
  const Batch batch = checked_batch(x, dy, spans);
  product("samples x o x i", x.samples, product("o x i", dy.features, x.features));
  within("samples x tiles", product("samples x tiles", x.samples, outer_blocks(x.features, dy.features)), 1, kMaxGrid);
  const OuterParams p{x, dy, batch, pointer<float>("out", out), 0};
  const DeviceGuard guard(device);
  outer(p, stream);
}

ScoreScratch checked_scratch(int64_t samples, int64_t features_in, int64_t features_out, int64_t queries) {
  at_least("queries", queries, 1);
  product("queries x o x i", queries, product("o x i", at_least("features_out", features_out, 1), at_least("features_in", features_in, 1)));
  product("samples x queries", at_least("samples", samples, 1), queries);
  const ScoreScratch scratch = score_outer_scratch(samples, features_in, features_out, queries);
  product("splits x samples x queries", scratch.splits, product("samples x queries", scratch.samples, queries));
  within("tiles of samples and queries", scratch.blocks, 1, kMaxGrid);
  within("samples x tiles", product("samples x tiles", scratch.samples, outer_blocks(features_in, scratch.rows)), 1, kMaxGrid);
  return scratch;
}

void score_outer_py(const Tokens& x, const Tokens& dy, Address spans, Address q, int64_t queries, Address out,
                    Address gradients, Address parts, int device, uint64_t stream) {
  const Batch batch = checked_batch(x, dy, spans);
  const ScoreScratch scratch = checked_scratch(x.samples, x.features, dy.features, queries);
  const ScoreOuterParams p{x, dy, batch, pointer<const float>("q", q), queries, pointer<float>("out", out),
                           pointer<float>("gradients", gradients), pointer<float>("parts", parts, scratch.parts == 0)};
  const DeviceGuard guard(device);
  score_outer(p, stream);
}

void ghost_py(const Tokens& xa, const Tokens& dya, Address spans_a, const Tokens& xb, const Tokens& dyb, Address spans_b,
              bool paired, Address out, Address parts, int device, uint64_t stream) {
  GhostParams p{};
  p.xa = xa, p.dya = dya, p.xb = xb, p.dyb = dyb, p.paired = paired;
  p.a = checked_batch(xa, dya, spans_a);
  p.b = checked_batch(xb, dyb, spans_b);
  same("xb: features", xb.features, xa.features);
  same("dyb: features", dyb.features, dya.features);
  same_dtype("xb: dtype", xb.dtype, xa.dtype);
  if (paired) {
    same("xb: samples", xb.samples, xa.samples);
    same("xb: tokens", xb.tokens, xa.tokens);
    if (xb.data != xa.data || dyb.data != dya.data || spans_b != spans_a) refuse("xb, dyb", "xa and dya where paired", "others");
  }
  p.splits = ghost_splits(xa.dtype, xa.tokens, xb.tokens, paired);
  p.pairs = paired ? xa.samples : product("samples", xa.samples, xb.samples);
  product("splits x samples", p.splits, p.pairs);
  within("pairs of tiles", ghost_blocks(p), 1, kMaxGrid);
  p.out = pointer<float>("out", out);
  p.parts = parts_or(p.out, parts, p.splits);
  const DeviceGuard guard(device);
  ghost(p, stream);
}

void random_matrix_py(const Side& side, int64_t row, int64_t rows, int64_t column, int64_t columns,
                      std::string_view dtype, Address out, int device, uint64_t stream) {
  if (sum("rows", at_least("row", row, 0), at_least("rows", rows, 1)) > side.k)
    refuse("rows", "rows within " + std::to_string(side.k), row + rows);
  if (sum("columns", at_least("column", column, 0), at_least("columns", columns, 1)) > side.features)
    refuse("columns", "columns within " + std::to_string(side.features), column + columns);
  const RandomMatrixParams p{side, row, rows, column, columns, dtype_of(dtype), pointer<void>("out", out)};
  const DeviceGuard guard(device);
  random_matrix(p, stream);
}

void rank_py(const Matrix& values, int64_t first_row, Address keys, Address sorted_keys, Address index,
             Address sorted_index, Address workspace, uint64_t workspace_bytes, Address ranks, bool wide, Address bad,
             int device, uint64_t stream) {
  within("values: rows", values.rows, 1, kMaxGrid);
  within("values: columns", values.columns, 1, (int64_t{1} << 32) - 1);
  if (values.columns > 1) same("values: column stride", values.column_stride, 1);
  RankParams p{};
  p.values = values;
  p.first_row = at_least("first_row", first_row, 0);
  p.keys = pointer<uint64_t>("keys", keys);
  p.sorted_keys = pointer<uint64_t>("sorted_keys", sorted_keys);
  p.index = pointer<uint32_t>("index", index);
  p.sorted_index = pointer<uint32_t>("sorted_index", sorted_index);
  p.workspace = pointer<void>("workspace", workspace);
  p.workspace_bytes = workspace_bytes;
  p.ranks = wide ? static_cast<void*>(pointer<double>("ranks", ranks)) : pointer<float>("ranks", ranks);
  p.bad = pointer<int64_t>("bad", bad);
  p.wide = wide;
  const DeviceGuard guard(device);
  rank(p, stream);
}

void vote_py(Address ranks, bool wide, int64_t rows, int64_t columns, double k, Address votes, Address rank_sums,
             int device, uint64_t stream) {
  product("rows x columns", at_least("rows", rows, 1), at_least("columns", columns, 1));
  const VoteParams p{pointer<const void>("ranks", ranks),
                     rows,
                     columns,
                     k,
                     pointer<double>("votes", votes),
                     optional_pointer<double>("rank_sums", rank_sums),
                     wide};
  const DeviceGuard guard(device);
  vote(p, stream);
}

}  // namespace

PYBIND11_MODULE(MODULE, m) {
  m.doc() = "CUDA kernels of influence_fast, on addresses; every argument is checked.";
#ifdef INFLUENCE_FAST_VERSION
  m.attr("__version__") = INFLUENCE_FAST_VERSION;
#endif
  define_arguments(m);
  py::class_<ProjectedLayer>(m, "Layer", py::module_local())
      .def(py::init(&make_layer), py::kw_only(), py::arg("x"), py::arg("dy"), py::arg("p_in"), py::arg("p_out"),
           py::arg("result"), py::arg("parts"));
  m.attr("LAYERS_PER_LAUNCH") = kLayersPerLaunch;
  m.attr("PROJECT_MAX_K") = kProjectMaxK;
  m.attr("PROJECT_MAX_FEATURES") = kProjectMaxFeatures;
  m.def("project_outer_row_warps", &project_outer_row_warps, py::arg("tokens"), py::arg("k_in"), py::arg("k_out"));
  m.def("project_outer_splits", &project_outer_splits, py::arg("tokens"), py::arg("k_in"), py::arg("k_out"));
  m.def(
      "sketch_splits",
      [](std::string_view kind, int64_t features, int64_t k) {
        return sketch_splits(kind_of(kind), at_least("features", features, 1), at_least("k", k, 1));
      },
      py::arg("kind"), py::arg("features"), py::arg("k"));
  m.def("sketch_outer_strips", &sketch_outer_strips, py::arg("features_in"), py::arg("features_out"));
  m.def(
      "ghost_splits",
      [](std::string_view dtype, int64_t tokens_a, int64_t tokens_b, bool paired) {
        return ghost_splits(dtype_of(dtype), at_least("tokens_a", tokens_a, 1), at_least("tokens_b", tokens_b, 1), paired);
      },
      py::arg("dtype"), py::arg("tokens_a"), py::arg("tokens_b"), py::arg("paired"));
  m.def(
      "score_outer_scratch",
      [](int64_t samples, int64_t features_in, int64_t features_out, int64_t queries) {
        const ScoreScratch scratch = checked_scratch(samples, features_in, features_out, queries);
        return py::make_tuple(scratch.gradients, scratch.parts);
      },
      py::arg("samples"), py::arg("features_in"), py::arg("features_out"), py::arg("queries"),
      "Floats of scratch: gradients, parts.");
  m.def("outer", &outer_py, py::kw_only(), py::arg("x"), py::arg("dy"), py::arg("spans"), py::arg("out"),
        py::arg("device"), py::arg("stream"));
  m.def("score_outer", &score_outer_py, py::kw_only(), py::arg("x"), py::arg("dy"), py::arg("spans"), py::arg("q"),
        py::arg("queries"), py::arg("out"), py::arg("gradients"), py::arg("parts"), py::arg("device"), py::arg("stream"));
  m.def("ghost", &ghost_py, py::kw_only(), py::arg("xa"), py::arg("dya"), py::arg("spans_a"), py::arg("xb"),
        py::arg("dyb"), py::arg("spans_b"), py::arg("paired"), py::arg("out"), py::arg("parts"), py::arg("device"),
        py::arg("stream"));
  m.def("project_outer", &project_outer_py, py::kw_only(), py::arg("layers"), py::arg("spans"), py::arg("row_warps"),
        py::arg("splits"), py::arg("device"), py::arg("stream"));
  m.def("sketch", &sketch_py, py::kw_only(), py::arg("g"), py::arg("side"), py::arg("out"), py::arg("parts"),
        py::arg("device"), py::arg("stream"));
  m.def("sketch_outer", &sketch_outer_py, py::kw_only(), py::arg("x"), py::arg("dy"), py::arg("spans"),
        py::arg("side"), py::arg("scale"), py::arg("out"), py::arg("parts"), py::arg("device"), py::arg("stream"));
  m.def("random_matrix", &random_matrix_py, py::kw_only(), py::arg("side"), py::arg("row"), py::arg("rows"),
        py::arg("column"), py::arg("columns"), py::arg("dtype"), py::arg("out"), py::arg("device"), py::arg("stream"));
  m.def(
      "rank_workspace",
      [](int64_t rows, int64_t columns, int device) {
        const DeviceGuard guard(device);
        return rank_workspace(at_least("rows", rows, 1), at_least("columns", columns, 1));
      },
      py::arg("rows"), py::arg("columns"), py::arg("device"));
  m.def("rank", &rank_py, py::kw_only(), py::arg("values"), py::arg("first_row"), py::arg("keys"),
        py::arg("sorted_keys"), py::arg("index"), py::arg("sorted_index"), py::arg("workspace"),
        py::arg("workspace_bytes"), py::arg("ranks"), py::arg("wide"), py::arg("bad"), py::arg("device"),
        py::arg("stream"));
  m.def("vote", &vote_py, py::kw_only(), py::arg("ranks"), py::arg("wide"), py::arg("rows"), py::arg("columns"),
        py::arg("k"), py::arg("votes"), py::arg("rank_sums"), py::arg("device"), py::arg("stream"));
#ifdef INFLUENCE_FAST_SIMT
  m.def("seed", &simt::seed, py::arg("value"), "Draw another order of threads and blocks from here on.");
  m.def(
      "barriers",
      [] { return std::vector<std::string>(simt::machine.barriers.begin(), simt::machine.barriers.end()); },
      "The barriers that were waited at, \"kernel file:line\".");
  m.def("leave_out", [](std::string barrier) { simt::machine.left_out = std::move(barrier); }, py::arg("barrier"));
#endif
}
