// Checks of what kernels are told, for whichever language asks: what is wrong is thrown as std::invalid_argument by the argument's
// name, before a kernel sees it. Addresses are integers here.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include "types.h"

namespace influence_fast {

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

// The address of shape's first element, once it is known that all others can be reached by 64-bit sums.
template <size_t Count>
const void* first_element(Address data, Dtype dtype, const int64_t (&shape)[Count], const int64_t (&strides)[Count]) {
  int64_t elements = 1, last = 0;
  for (size_t i = 0; i < Count; ++i) elements = product("shape", elements, shape[i]);
  if (elements > 0)
    for (size_t i = 0; i < Count; ++i) last = sum("strides", last, product("strides", shape[i] - 1, strides[i]));
  product("strides", sum("strides", last, 1), bytes_of(dtype));
  if (data % static_cast<Address>(bytes_of(dtype)) != 0) refuse("data", "an address aligned to an element", data);
  return pointer<const void>("data", data, elements == 0);
}

inline Tokens tokens_of(Address data, Dtype dtype, const int64_t (&shape)[3], const int64_t (&strides)[3]) {
  if (shape[2] > 1 && strides[2] != 1) refuse("strides", "features one after another", strides[2]);
  return {first_element(data, dtype, shape, strides), dtype, shape[0], shape[1], shape[2], strides[0], strides[1]};
}

inline Matrix matrix_of(Address data, Dtype dtype, const int64_t (&shape)[2], const int64_t (&strides)[2]) {
  return {first_element(data, dtype, shape, strides), dtype, shape[0], shape[1], strides[0], strides[1]};
}

inline Side random_side(Kind kind, uint32_t key0, uint32_t key1, int64_t k, int64_t features, float scale, int64_t offset) {
  // Rows are counted by 32 bits where entries are made (philox.h).
  if (at_least("k", k, 1) >= int64_t{1} << 31) refuse("k", "less than 2^31", k);
  product("k x features", k, at_least("features", features, 1));
  if (!std::isfinite(scale)) refuse("scale", "a finite number", scale);
  // Blocks of 128 signs or 4 normals are counted by 32 bits too.
  const int64_t most = kind == Kind::rademacher ? int64_t{1} << 39 : kind == Kind::gaussian ? int64_t{1} << 34 : INT64_MAX - 128;
  const int64_t end = sum("offset", at_least("offset", offset, 0), features);
  if (end > most) refuse("offset", "columns up to " + std::to_string(most), end);
  return {kind, key0, key1, scale, k, features, nullptr, 0, offset};
}

inline const int64_t* checked_spans(Address address) { return optional_pointer<const int64_t>("spans", address); }

}  // namespace influence_fast
