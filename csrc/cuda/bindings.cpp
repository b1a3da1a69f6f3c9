// The Python module influence_fast_cuda: pointers, sizes, strides and a stream come in as integers and are checked; no
// torch here, so that one build serves every version of it. Work is queued on `stream` of `device` and not waited for.
//
// Compiled with INFLUENCE_FAST_SIMT it is influence_fast_simt: the same functions on host memory (simt/simt.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "device.h"
#include "params.h"

#ifdef INFLUENCE_FAST_SIMT
#include "simt/simt.h"
#define MODULE influence_fast_simt
#else
#define MODULE influence_fast_cuda
#endif

namespace py = pybind11;

namespace {

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

template <typename T>
T* pointer(uint64_t address, const char* name) {
  require(address != 0, std::string(name) + ": expected an address, got 0");
  return reinterpret_cast<T*>(address);
}

int64_t positive(int64_t value, const char* name) {
  require(value > 0, std::string(name) + ": expected a positive size, got " + std::to_string(value));
  return value;
}

int64_t stride(int64_t value, const char* name) {
  require(value >= 0, std::string(name) + ": expected a stride of 0 or more, got " + std::to_string(value));
  return value;
}

Type type_of(const std::string& name) {
  if (name == "float32") return Type::float32;
  if (name == "float16") return Type::float16;
  require(name == "bfloat16", "dtype: expected float32, float16 or bfloat16, got " + name);
  return Type::bfloat16;
}

Kind kind_of(const std::string& name) {
  if (name == "rademacher") return Kind::rademacher;
  if (name == "sjlt") return Kind::sjlt;
  require(name == "gaussian", "kind: expected rademacher, sjlt or gaussian, got " + name);
  return Kind::gaussian;
}

Side make_side(const std::string& kind, uint32_t key0, uint32_t key1, int64_t k, float scale) {
  require(0 < k && k < int64_t{1} << 31, "k: expected 1 to 2^31 - 1, got " + std::to_string(k));
  return {key0, key1, kind_of(kind), static_cast<uint32_t>(k), scale};
}

// Blocks along the first axis of a grid.
void require_grid(int64_t blocks, const char* what) {
  require(blocks < int64_t{1} << 31, std::string(what) + ": too many for one launch, " + std::to_string(blocks));
}

ProjectedLayer make_layer(uint64_t x, uint64_t dy, int64_t x_sample, int64_t x_token, int64_t dy_sample,
                          int64_t dy_token, int64_t features_in, int64_t features_out, const Side& in, const Side& out,
                          uint64_t result, uint64_t parts) {
  for (const Side* side : {&in, &out}) {
    require(side->kind != Kind::gaussian, "kind: project_outer takes rademacher and sjlt sides");
    require(side->k <= kProjectMaxK, "k: project_outer takes up to " + std::to_string(kProjectMaxK) +
                                         " per side, got " + std::to_string(side->k));
  }
  for (int64_t features : {positive(features_in, "features_in"), positive(features_out, "features_out")})
    require(features <= kProjectMaxFeatures, "features: project_outer takes up to " +
                                                 std::to_string(kProjectMaxFeatures) + " per side, got " +
                                                 std::to_string(features));
  return {pointer<const void>(x, "x"),
          pointer<const void>(dy, "dy"),
          stride(x_sample, "x_sample"),
          stride(x_token, "x_token"),
          stride(dy_sample, "dy_sample"),
          stride(dy_token, "dy_token"),
          features_in,
          features_out,
          in,
          out,
          pointer<float>(result, "result"),
          parts ? reinterpret_cast<float*>(parts) : reinterpret_cast<float*>(result)};
}

void project_outer_py(const std::vector<ProjectedLayer>& layers, const std::string& dtype, int64_t samples,
                      int64_t tokens, uint64_t spans, int64_t row_warps, int64_t splits, int device, uint64_t stream) {
  require(!layers.empty() && layers.size() <= kLayersPerLaunch,
          "layers: expected 1 to " + std::to_string(kLayersPerLaunch) + ", got " + std::to_string(layers.size()));
  require(row_warps == 1 || row_warps == 2 || row_warps == 4, "row_warps: expected 1, 2 or 4");
  require(positive(splits, "splits") * row_warps * 32 >= positive(tokens, "tokens"), "splits: too few for the tokens");
  require_grid(positive(samples, "samples") * splits, "samples x splits");
  ProjectOuterParams p{};
  p.layers = static_cast<int>(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    require(splits == 1 || layers[i].parts != layers[i].result, "parts: expected an address where splits > 1");
    p.layer[i] = layers[i];
  }
  p.type = type_of(dtype);
  p.samples = samples;
  p.tokens = tokens;
  p.spans = reinterpret_cast<const int64_t*>(spans);
  p.row_warps = static_cast<int>(row_warps);
  p.splits = static_cast<int>(splits);
  const DeviceGuard guard(device);
  project_outer(p, stream);
}

void sketch_py(uint64_t g, const std::string& dtype, int64_t samples, int64_t features, int64_t row_stride,
               const Side& side, uint64_t out, uint64_t parts, int device, uint64_t stream) {
  require(side.kind != Kind::gaussian, "kind: sketch takes rademacher and sjlt");
  const int64_t splits = sketch_splits(side.kind, positive(features, "features"), side.k);
  require(splits == 1 || parts, "parts: expected an address where splits > 1");
  require_grid(positive(samples, "samples"), "samples");
  require(side.k <= 32 * 65535, "k: sketch takes up to 2,097,120, got " + std::to_string(side.k));
  SketchParams p{};
  p.g = pointer<const void>(g, "g");
  p.samples = samples;
  p.features = features;
  p.stride = stride(row_stride, "row_stride");
  p.type = type_of(dtype);
  p.side = side;
  p.out = pointer<float>(out, "out");
  p.parts = splits == 1 ? p.out : reinterpret_cast<float*>(parts);
  p.splits = splits;
  const DeviceGuard guard(device);
  (side.kind == Kind::sjlt ? sketch_sjlt : sketch_dense)(p, stream);
}

void sketch_outer_py(uint64_t x, uint64_t dy, const std::string& dtype, int64_t x_sample, int64_t x_token,
                     int64_t dy_sample, int64_t dy_token, int64_t samples, int64_t tokens, int64_t features_in,
                     int64_t features_out, uint64_t spans, const Side& side, uint64_t scale, uint64_t out,
                     uint64_t parts, int device, uint64_t stream) {
  require(side.kind == Kind::sjlt, "kind: sketch_outer takes sjlt");
  SketchOuterParams p{};
  p.x = pointer<const void>(x, "x");
  p.dy = pointer<const void>(dy, "dy");
  p.x_sample = stride(x_sample, "x_sample");
  p.x_token = stride(x_token, "x_token");
  p.dy_sample = stride(dy_sample, "dy_sample");
  p.dy_token = stride(dy_token, "dy_token");
  p.samples = positive(samples, "samples");
  p.tokens = positive(tokens, "tokens");
  require(tokens < int64_t{1} << 31, "tokens: expected less than 2^31");
  p.features_in = positive(features_in, "features_in");
  p.features_out = positive(features_out, "features_out");
  p.spans = reinterpret_cast<const int64_t*>(spans);
  p.type = type_of(dtype);
  p.side = side;
  p.scale = reinterpret_cast<const float*>(scale);
  p.out = pointer<float>(out, "out");
  p.strips = sketch_outer_strips(features_in, features_out);
  require(p.strips == 1 || parts, "parts: expected an address where strips > 1");
  require_grid(samples * p.strips, "samples x strips");
  p.parts = p.strips == 1 ? p.out : reinterpret_cast<float*>(parts);
  const DeviceGuard guard(device);
  sketch_outer(p, stream);
}

void random_matrix_py(const Side& side, int64_t row, int64_t rows, int64_t column, int64_t columns,
                      const std::string& dtype, uint64_t out, int device, uint64_t stream) {
  require(row >= 0 && column >= 0 && row + positive(rows, "rows") <= side.k, "rows: out of the matrix");
  const DeviceGuard guard(device);
  random_matrix({side, row, rows, column, positive(columns, "columns"), type_of(dtype), pointer<void>(out, "out")},
                stream);
}

void rank_py(uint64_t values, const std::string& dtype, int64_t rows, int64_t columns, int64_t row_stride,
             int64_t first_row, uint64_t keys, uint64_t sorted_keys, uint64_t index, uint64_t sorted_index,
             uint64_t workspace, uint64_t workspace_bytes, uint64_t ranks, bool wide, uint64_t bad, int device,
             uint64_t stream) {
  require(positive(rows, "rows") < int64_t{1} << 31, "rows: expected less than 2^31");
  require(positive(columns, "columns") < int64_t{1} << 32, "columns: expected less than 2^32");
  RankParams p{};
  p.values = pointer<const void>(values, "values");
  p.rows = rows;
  p.columns = columns;
  p.stride = stride(row_stride, "row_stride");
  p.first_row = first_row;
  p.type = type_of(dtype);
  p.keys = pointer<uint64_t>(keys, "keys");
  p.sorted_keys = pointer<uint64_t>(sorted_keys, "sorted_keys");
  p.index = pointer<uint32_t>(index, "index");
  p.sorted_index = pointer<uint32_t>(sorted_index, "sorted_index");
  p.workspace = pointer<void>(workspace, "workspace");
  p.workspace_bytes = workspace_bytes;
  p.ranks = pointer<void>(ranks, "ranks");
  p.bad = pointer<int64_t>(bad, "bad");
  p.wide = wide;
  const DeviceGuard guard(device);
  rank(p, stream);
}

void vote_py(uint64_t ranks, bool wide, int64_t rows, int64_t columns, double k, uint64_t votes, int device,
             uint64_t stream) {
  const DeviceGuard guard(device);
  vote({pointer<const void>(ranks, "ranks"), positive(rows, "rows"), positive(columns, "columns"), k,
        pointer<double>(votes, "votes"), wide},
       stream);
}

}  // namespace

PYBIND11_MODULE(MODULE, m) {
  m.doc() = "CUDA kernels of influence_fast on raw device pointers.";
  // Local, so that the tests' build for the host and this one live in one process.
  py::class_<Side>(m, "Side", py::module_local())
      .def(py::init(&make_side), py::arg("kind"), py::arg("key0"), py::arg("key1"), py::arg("k"), py::arg("scale"));
  py::class_<ProjectedLayer>(m, "Layer", py::module_local())
      .def(py::init(&make_layer), py::kw_only(), py::arg("x"), py::arg("dy"), py::arg("x_sample"), py::arg("x_token"),
           py::arg("dy_sample"), py::arg("dy_token"), py::arg("features_in"), py::arg("features_out"), py::arg("p_in"),
           py::arg("p_out"), py::arg("result"), py::arg("parts"));
#ifdef INFLUENCE_FAST_VERSION
  m.attr("__version__") = INFLUENCE_FAST_VERSION;
#endif
  m.attr("LAYERS_PER_LAUNCH") = kLayersPerLaunch;
  m.attr("PROJECT_MAX_K") = kProjectMaxK;
  m.attr("PROJECT_MAX_FEATURES") = kProjectMaxFeatures;
  m.def("project_outer_row_warps", &project_outer_row_warps, py::arg("tokens"), py::arg("k_in"), py::arg("k_out"));
  m.def("project_outer_splits", &project_outer_splits, py::arg("tokens"), py::arg("k_in"), py::arg("k_out"));
  m.def(
      "sketch_splits",
      [](const std::string& kind, int64_t features, int64_t k) { return sketch_splits(kind_of(kind), features, k); },
      py::arg("kind"), py::arg("features"), py::arg("k"));
  m.def("sketch_outer_strips", &sketch_outer_strips, py::arg("features_in"), py::arg("features_out"));
  m.def("project_outer", &project_outer_py, py::kw_only(), py::arg("layers"), py::arg("dtype"), py::arg("samples"),
        py::arg("tokens"), py::arg("spans"), py::arg("row_warps"), py::arg("splits"), py::arg("device"),
        py::arg("stream"));
  m.def("sketch", &sketch_py, py::kw_only(), py::arg("g"), py::arg("dtype"), py::arg("samples"), py::arg("features"),
        py::arg("row_stride"), py::arg("side"), py::arg("out"), py::arg("parts"), py::arg("device"),
        py::arg("stream"));
  m.def("sketch_outer", &sketch_outer_py, py::kw_only(), py::arg("x"), py::arg("dy"), py::arg("dtype"),
        py::arg("x_sample"), py::arg("x_token"), py::arg("dy_sample"), py::arg("dy_token"), py::arg("samples"),
        py::arg("tokens"), py::arg("features_in"), py::arg("features_out"), py::arg("spans"), py::arg("side"),
        py::arg("scale"), py::arg("out"), py::arg("parts"), py::arg("device"), py::arg("stream"));
  m.def("random_matrix", &random_matrix_py, py::kw_only(), py::arg("side"), py::arg("row"), py::arg("rows"),
        py::arg("column"), py::arg("columns"), py::arg("dtype"), py::arg("out"), py::arg("device"), py::arg("stream"));
  m.def(
      "rank_workspace",
      [](int64_t rows, int64_t columns, int device) {
        const DeviceGuard guard(device);
        return rank_workspace(positive(rows, "rows"), positive(columns, "columns"));
      },
      py::arg("rows"), py::arg("columns"), py::arg("device"));
  m.def("rank", &rank_py, py::kw_only(), py::arg("values"), py::arg("dtype"), py::arg("rows"), py::arg("columns"),
        py::arg("row_stride"), py::arg("first_row"), py::arg("keys"), py::arg("sorted_keys"), py::arg("index"),
        py::arg("sorted_index"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("ranks"), py::arg("wide"),
        py::arg("bad"), py::arg("device"), py::arg("stream"));
  m.def("vote", &vote_py, py::kw_only(), py::arg("ranks"), py::arg("wide"), py::arg("rows"), py::arg("columns"),
        py::arg("k"), py::arg("votes"), py::arg("device"), py::arg("stream"));
#ifdef INFLUENCE_FAST_SIMT
  m.def("seed", &simt::seed, py::arg("value"), "Draw another order of threads and blocks from here on.");
#endif
}
