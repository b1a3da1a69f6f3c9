// The checked arguments that both Python modules share: Tokens, Matrix and Side of types.h as Python classes. Addresses come in
// as integers; what is wrong is said by the argument's name before a kernel sees it (checks.h).
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <string_view>

#include "checks.h"

namespace influence_fast {

namespace py = pybind11;

inline Dtype dtype_of(std::string_view name) {
  if (name == "float32") return Dtype::float32;
  if (name == "float16") return Dtype::float16;
  if (name != "bfloat16") refuse("dtype", "float32, float16 or bfloat16", name);
  return Dtype::bfloat16;
}

template <size_t Count>
void unpack(const char* name, const py::tuple& tuple, int64_t (&out)[Count]) {
  if (tuple.size() != Count) refuse(name, std::to_string(Count) + " numbers", tuple.size());
  for (size_t i = 0; i < Count; ++i) out[i] = at_least(name, tuple[i].cast<int64_t>(), 0);
}

inline Tokens make_tokens(Address data, std::string_view dtype_name, const py::tuple& shape_in, const py::tuple& strides_in) {
  int64_t shape[3], strides[3];
  unpack("shape", shape_in, shape);
  unpack("strides", strides_in, strides);
  return tokens_of(data, dtype_of(dtype_name), shape, strides);
}

inline Matrix make_matrix(Address data, std::string_view dtype_name, const py::tuple& shape_in, const py::tuple& strides_in) {
  int64_t shape[2], strides[2];
  unpack("shape", shape_in, shape);
  unpack("strides", strides_in, strides);
  return matrix_of(data, dtype_of(dtype_name), shape, strides);
}

inline Kind kind_of(std::string_view name) {
  if (name == "rademacher") return Kind::rademacher;
  if (name == "gaussian") return Kind::gaussian;
  if (name != "sjlt") refuse("kind", "rademacher, gaussian or sjlt", name);
  return Kind::sjlt;
}

inline Side make_side(std::string_view kind_name, uint32_t key0, uint32_t key1, int64_t k, int64_t features, float scale,
                      int64_t offset) {
  return random_side(kind_of(kind_name), key0, key1, k, features, scale, offset);
}

inline void define_arguments(py::module_& m) {
  // Local to the module: the tests' build of the CUDA kernels for the host and the others live in one process.
  py::class_<Tokens>(m, "Tokens", py::module_local(), "(samples, tokens, features) in memory.")
      .def(py::init(&make_tokens), py::arg("data"), py::arg("dtype"), py::arg("shape"), py::arg("strides"));
  py::class_<Matrix>(m, "Matrix", py::module_local(), "(rows, columns) in memory.")
      .def(py::init(&make_matrix), py::arg("data"), py::arg("dtype"), py::arg("shape"), py::arg("strides"));
  py::class_<Side>(m, "Side", py::module_local(), "A random matrix (k, features) of a projection.")
      .def(py::init(&make_side), py::arg("kind"), py::arg("key0"), py::arg("key1"), py::arg("k"), py::arg("features"),
           py::arg("scale"), py::arg("offset") = 0);
}

}  // namespace influence_fast
