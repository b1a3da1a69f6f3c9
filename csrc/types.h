// What kernels on host and device are told: element types, tensors, random matrices, which tokens count. The one definition of
// them all. Sizes and strides count elements.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace influence_fast {

enum class Dtype : int { float32 = 0, float16 = 1, bfloat16 = 2, int8 = 3 };

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : dtype == Dtype::int8 ? 1 : 2; }

// What a side of a projection is. identity: features stay as they are; dense: given entries.
enum class Kind : int { identity = 0, dense = 1, rademacher = 2, gaussian = 3, sjlt = 4 };

// (samples, tokens, features); features lie one after another.
struct Tokens {
  const void* data;
  Dtype dtype;
  int64_t samples, tokens, features;
  int64_t sample_stride, token_stride;
};

// (rows, columns)
struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
};

// A (k, features) matrix: a pure function of its key (philox.h), or dense float32. Results are multiplied by scale at the end.
// A random one consists of the columns [offset, offset + features) of its key's; kernels on a GPU know offset 0 alone. Where a
// Gaussian one has `dense`, that holds its entries as panels (cpu/kernels/sketch.inc).
struct Side {
  Kind kind;
  uint32_t key0, key1;
  float scale;
  int64_t k, features;
  const float* dense;
  int64_t row_stride, offset;
};

// [begin, end)
struct Span {
  int64_t begin, end;
};

// Which tokens of each sample count: spans (samples, 2) in memory, or, where it is null, all of them.
struct Batch {
  int64_t samples, tokens;
  const int64_t* spans;

  HOST_DEVICE Span span(int64_t sample) const {
    if (spans == nullptr) return {0, tokens};
    return {spans[2 * sample], spans[2 * sample + 1]};
  }
};

}  // namespace influence_fast
