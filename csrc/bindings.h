// The checked arguments that both Python modules share: Tokens, Matrix and Side of types.h as Python classes. Addresses come in
// as integers; what is wrong is said by the argument's name before a kernel sees it.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <string_view>

#include "types.h"

namespace influence_fast {

namespace py = pybind11;
using Address = uintptr_t;

template <typename Got>
[[noreturn]] void refuse(std::string_view name, std::string_view expected, const Got& got) {
  std::string text(name);
  text.append(": expected ").append(expected).append(", got ");
  if constexpr (std::is_arithmetic_v<Got>) {
    text.append(std::to_string(got));
  } else {
    text.append(got);
  }
  throw std::invalid_argument(text);
}

inline int64_t at_least(const char* name, int64_t value, int64_t least) {
  if (value < least) refuse(name, "at least " + std::to_string(least), value);
  return value;
}

inline int64_t same(const char* name, int64_t value, int64_t wanted) {
  if (value != wanted) refuse(name, std::to_string(wanted), value);
  return value;
}

// Of sizes or strides that were found to be 0 or more.
inline int64_t product(const char* name, int64_t a, int64_t b) {
  int64_t result;
  if (__builtin_mul_overflow(a, b, &result)) refuse(name, "a product below 2^63", std::to_string(a) + " x " + std::to_string(b));
  return result;
}

inline int64_t sum(const char* name, int64_t a, int64_t b) {
  int64_t result;
  if (__builtin_add_overflow(a, b, &result)) refuse(name, "a sum below 2^63", std::to_string(a) + " + " + std::to_string(b));
  return result;
}

template <typename T>
T* optional_pointer(const char* name, Address address) {
  if constexpr (!std::is_void_v<T>) {
    if (address % alignof(T) != 0) refuse(name, "an address aligned to " + std::to_string(alignof(T)) + " bytes", address);
  }
  return reinterpret_cast<T*>(address);
}

// Not null, unless there is nothing to find there.
template <typename T>
T* pointer(const char* name, Address address, bool empty = false) {
  if (address == 0 && !empty) refuse(name, "an address", address);
  return optional_pointer<T>(name, address);
}

inline Dtype dtype_of(std::string_view name) {
  if (name == "float32") return Dtype::float32;
  if (name == "float16") return Dtype::float16;
  if (name != "bfloat16") refuse("dtype", "float32, float16 or bfloat16", name);
  return Dtype::bfloat16;
}

inline const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return "float32";
    case Dtype::float16: return "float16";
    case Dtype::bfloat16: return "bfloat16";
    default: return "int8";
  }
}

inline void same_dtype(const char* name, Dtype dtype, Dtype wanted) {
  if (dtype != wanted) refuse(name, name_of(wanted), name_of(dtype));
}

template <size_t Count>
void unpack(const char* name, const py::tuple& tuple, int64_t (&out)[Count]) {
  if (tuple.size() != Count) refuse(name, std::to_string(Count) + " numbers", tuple.size());
  for (size_t i = 0; i < Count; ++i) out[i] = at_least(name, tuple[i].cast<int64_t>(), 0);
}

// The address of shape's first element, once it is known that all others can be reached by 64-bit sums.
template <size_t Count>
const void* checked(Address data, Dtype dtype, const int64_t (&shape)[Count], const int64_t (&strides)[Count]) {
  int64_t elements = 1, last = 0;
  for (size_t i = 0; i < Count; ++i) elements = product("shape", elements, shape[i]);
  if (elements > 0)
    for (size_t i = 0; i < Count; ++i) last = sum("strides", last, product("strides", shape[i] - 1, strides[i]));
  product("strides", sum("strides", last, 1), bytes_of(dtype));
  if (data % static_cast<Address>(bytes_of(dtype)) != 0) refuse("data", "an address aligned to an element", data);
  return pointer<const void>("data", data, elements == 0);
}

inline Tokens make_tokens(Address data, std::string_view dtype_name, const py::tuple& shape_in, const py::tuple& strides_in) {
  int64_t shape[3], strides[3];
  unpack("shape", shape_in, shape);
  unpack("strides", strides_in, strides);
  if (shape[2] > 1 && strides[2] != 1) refuse("strides", "features one after another", strides[2]);
  const Dtype dtype = dtype_of(dtype_name);
  return {checked(data, dtype, shape, strides), dtype, shape[0], shape[1], shape[2], strides[0], strides[1]};
}

inline Matrix make_matrix(Address data, std::string_view dtype_name, const py::tuple& shape_in, const py::tuple& strides_in) {
  int64_t shape[2], strides[2];
  unpack("shape", shape_in, shape);
  unpack("strides", strides_in, strides);
  const Dtype dtype = dtype_of(dtype_name);
  return {checked(data, dtype, shape, strides), dtype, shape[0], shape[1], strides[0], strides[1]};
}

inline Kind kind_of(std::string_view name) {
  if (name == "rademacher") return Kind::rademacher;
  if (name == "gaussian") return Kind::gaussian;
  if (name != "sjlt") refuse("kind", "rademacher, gaussian or sjlt", name);
  return Kind::sjlt;
}

inline Side make_side(std::string_view kind_name, uint32_t key0, uint32_t key1, int64_t k, int64_t features, float scale,
                      int64_t offset) {
  // Rows are counted by 32 bits where entries are made (philox.h).
  if (at_least("k", k, 1) >= int64_t{1} << 31) refuse("k", "less than 2^31", k);
  product("k x features", k, at_least("features", features, 1));
  if (!std::isfinite(scale)) refuse("scale", "a finite number", scale);
  const Kind kind = kind_of(kind_name);
  // Blocks of 128 signs or 4 normals are counted by 32 bits too.
  const int64_t most = kind == Kind::rademacher ? int64_t{1} << 39 : kind == Kind::gaussian ? int64_t{1} << 34 : INT64_MAX - 128;
  const int64_t end = sum("offset", at_least("offset", offset, 0), features);
  if (end > most) refuse("offset", "columns up to " + std::to_string(most), end);
  return {kind, key0, key1, scale, k, features, nullptr, 0, offset};
}

inline const int64_t* checked_spans(Address address) { return optional_pointer<const int64_t>("spans", address); }

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
