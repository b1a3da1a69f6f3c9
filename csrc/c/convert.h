// Structures of influence_fast.h to those of types.h, checked.
#pragma once

#include <string>

#include "../cpu/operations.h"
#include "../influence_fast.h"

namespace influence_fast::c {

// What is wrong with a structure is said by its name.
template <typename Made>
auto within(const char* name, const Made& made) {
  try {
    return made();
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string(name) + ": " + error.what());
  }
}

inline Dtype element_type(int32_t dtype) {
  if (dtype != INFLUENCE_FAST_FLOAT32 && dtype != INFLUENCE_FAST_FLOAT16 && dtype != INFLUENCE_FAST_BFLOAT16)
    refuse("dtype", "INFLUENCE_FAST_FLOAT32, INFLUENCE_FAST_FLOAT16 or INFLUENCE_FAST_BFLOAT16", dtype);
  return static_cast<Dtype>(dtype);
}
static_assert(static_cast<int>(Dtype::float32) == INFLUENCE_FAST_FLOAT32 && static_cast<int>(Dtype::float16) == INFLUENCE_FAST_FLOAT16 &&
              static_cast<int>(Dtype::bfloat16) == INFLUENCE_FAST_BFLOAT16);
static_assert(static_cast<int>(Kind::dense) == INFLUENCE_FAST_DENSE && static_cast<int>(Kind::rademacher) == INFLUENCE_FAST_RADEMACHER &&
              static_cast<int>(Kind::gaussian) == INFLUENCE_FAST_GAUSSIAN && static_cast<int>(Kind::sjlt) == INFLUENCE_FAST_SJLT);

inline Tokens tokens_of(const char* name, const influence_fast_tokens* given) {
  return within(name, [&] {
    if (given == nullptr) refuse("structure", "an address", "null");
    const int64_t shape[3] = {at_least("samples", given->samples, 0), at_least("tokens", given->tokens, 0),
                              at_least("features", given->features, 0)};
    const int64_t strides[3] = {at_least("sample_stride", given->sample_stride, 0), at_least("token_stride", given->token_stride, 0), 1};
    return influence_fast::tokens_of(reinterpret_cast<Address>(given->data), element_type(given->dtype), shape, strides);
  });
}

inline Matrix matrix_of(const char* name, const influence_fast_matrix* given) {
  return within(name, [&] {
    if (given == nullptr) refuse("structure", "an address", "null");
    const int64_t shape[2] = {at_least("rows", given->rows, 0), at_least("columns", given->columns, 0)};
    const int64_t strides[2] = {at_least("row_stride", given->row_stride, 0), at_least("column_stride", given->column_stride, 0)};
    return influence_fast::matrix_of(reinterpret_cast<Address>(given->data), element_type(given->dtype), shape, strides);
  });
}

inline Side side_of(const char* name, const influence_fast_side& given) {
  return within(name, [&] {
    const Address entries = reinterpret_cast<Address>(given.entries);
    switch (given.kind) {
      case INFLUENCE_FAST_DENSE: {
        if (!std::isfinite(given.scale)) refuse("scale", "a finite number", given.scale);
        same("offset", given.offset, 0);
        const int64_t shape[2] = {at_least("k", given.k, 1), at_least("features", given.features, 1)};
        const int64_t strides[2] = {at_least("row_stride", given.row_stride, 0), 1};
        return checked::dense_side(influence_fast::matrix_of(entries, Dtype::float32, shape, strides), given.scale);
      }
      case INFLUENCE_FAST_RADEMACHER:
      case INFLUENCE_FAST_GAUSSIAN:
      case INFLUENCE_FAST_SJLT: {
        // Those that were kept for a gaussian one are sketch's alone.
        if (entries != 0 && given.kind != INFLUENCE_FAST_GAUSSIAN) refuse("entries", "null for this kind", "an address");
        return random_side(static_cast<Kind>(given.kind), static_cast<uint32_t>(given.key), static_cast<uint32_t>(given.key >> 32),
                           given.k, given.features, given.scale, given.offset);
      }
      default:
        refuse("kind", "INFLUENCE_FAST_RADEMACHER, INFLUENCE_FAST_GAUSSIAN, INFLUENCE_FAST_SJLT or INFLUENCE_FAST_DENSE", given.kind);
    }
  });
}

}  // namespace influence_fast::c
