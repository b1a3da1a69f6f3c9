// The ground every kernel stands on: number types, shared memory, the few instructions that C++ has no name for, and
// the launch. On a device they are PTX and intrinsics; compiled by a host compiler (see simt/simt.h) they are emulated,
// so that the same kernels run, checked, without a card. Kernels use these names only.
#pragma once

#include <stdint.h>

#ifdef INFLUENCE_FAST_SIMT
#include "simt/simt.h"
#endif

#include "../philox.h"

// Sixteen-bit numbers as bits; arithmetic happens in float32 or in the matrix instructions.
struct bf16 {
  static constexpr bool half = false;
  uint16_t bits;
};
struct f16 {
  static constexpr bool half = true;
  uint16_t bits;
};

#ifndef INFLUENCE_FAST_SIMT

#include <cuda_fp16.h>

#include "device.h"

template <typename T>
struct Shared {
  T* data;
  int64_t count;
  __device__ T load(int i) const { return data[i]; }
  __device__ void store(int i, T value) const { data[i] = value; }
  template <typename V>
  __device__ V load_vector(int i) const {
    return *reinterpret_cast<const V*>(data + i);
  }
  template <typename V>
  __device__ void store_vector(int i, const V& value) const {
    *reinterpret_cast<V*>(data + i) = value;
  }
};

struct SharedArena {
  size_t used = 0;
  template <typename T>
  __device__ Shared<T> take(int64_t count) {
    extern __shared__ uint4 storage[];
    T* data = reinterpret_cast<T*>(reinterpret_cast<char*>(storage) + used);
    used += (count * sizeof(T) + 15) / 16 * 16;
    return {data, count};
  }
};

static __device__ __forceinline__ uint16_t half_bits(float value) { return __half_as_ushort(__float2half_rn(value)); }
static __device__ __forceinline__ float half_value(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// Both rounded to the nearest bfloat16, the first in the low half; NaN stays NaN, beyond 3.39e38 is infinity.
static __device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

static __device__ __forceinline__ uint32_t warp_shuffle(uint32_t value, int source) {
  return __shfl_sync(0xFFFFFFFFu, value, source);
}
static __device__ __forceinline__ uint32_t warp_ballot(bool vote) { return __ballot_sync(0xFFFFFFFFu, vote); }

static __device__ __forceinline__ void atomic_min(int64_t* to, int64_t value) {
  atomicMin(reinterpret_cast<long long*>(to), static_cast<long long>(value));
}

// d (16 x 8, float) += a (16 x 16) b (16 x 8).
template <typename T>
static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (T::half) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

template <typename T>
static __device__ __forceinline__ uint32_t shared_address(const Shared<T>& shared, int i) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared.data + i));
}

// Four 8 x 8 matrices of 16-bit numbers; lane 8 m + r points at row r of matrix m; each comes out transposed.
template <typename T>
static __device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const Shared<T>& shared, int i) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(shared, i))
               : "memory");
}

// The same, not transposed: lane 4 r + c holds numbers 2 c and 2 c + 1 of each matrix's row r.
template <typename T>
static __device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const Shared<T>& shared, int i) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(shared, i))
               : "memory");
}

// 16 bytes to shared memory behind the thread's back; zeros where `valid` is false. Through L1 (.ca): neighbouring
// tiles of one block read the same inputs again.
template <typename T>
static __device__ __forceinline__ void copy_async(const Shared<T>& shared, int i, const T* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared, i)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
// A vector of consecutive elements, aligned to its size.
template <typename V, typename T>
static __device__ __forceinline__ V load_vector(const T* from) {
  return *reinterpret_cast<const V*>(from);
}
template <typename V, typename T>
static __device__ __forceinline__ void store_vector(T* to, const V& value) {
  *reinterpret_cast<V*>(to) = value;
}
static __device__ __forceinline__ void prefetch(const void* from) {  // to L2
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(from));
}
static __device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int Pending>
static __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, unsigned block, size_t shared, uint64_t stream,
            const Arguments&... arguments) {
  if (shared > 48 << 10) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
               name);
  }
  kernel<<<grid, block, shared, reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
  check_cuda(cudaGetLastError(), name);
}

#endif  // INFLUENCE_FAST_SIMT

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__

DEVICE float to_float(float value) { return value; }
DEVICE float to_float(bf16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
DEVICE float to_float(f16 value) { return half_value(value.bits); }

// Finite values only, to nearest, ties to even.
template <typename T>
DEVICE T from_float(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (T::half) {
    return {half_bits(value)};
  } else {
    const uint32_t bits = __float_as_uint(value);
    return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
  }
}

// What the matrix instructions multiply for a T. A float32 is the exact sum of three bfloat16 (8 bits of its
// significand each), so that products with +-1 stay exact and sums are float32 sums; 16-bit types are their own part.
template <typename T>
struct Parts {
  using Type = T;
  static constexpr int count = 1;
};
template <>
struct Parts<float> {
  using Type = bf16;
  static constexpr int count = 3;
};

template <int Count>
DEVICE void split(float value, uint16_t (&parts)[Count]) {
  for (int p = 0; p < Count; ++p) {
    const uint32_t head = __float_as_uint(value) & 0xFFFF0000u;
    parts[p] = static_cast<uint16_t>(head >> 16);
    value -= __uint_as_float(head);
  }
}

// Philox words are picked by selects: an array in registers has no run-time index.
DEVICE uint32_t pick(const philox::Block& block, uint32_t i) {
  const uint32_t low = i & 1 ? block.x[1] : block.x[0], high = i & 1 ? block.x[3] : block.x[2];
  return i & 2 ? high : low;
}

DEVICE uint32_t rotation_of(uint64_t chunk, uint32_t k, philox::Key key) {
  return philox::sjlt_turn(pick(philox::stream(chunk / 4, philox::kRotationStream, key), chunk & 3), k);
}

template <typename N>
__host__ __device__ constexpr N ceil_div(N a, N b) {
  return (a + b - 1) / b;
}

// The grid of a kernel that strides over its items.
inline dim3 strided_grid(int64_t items, int64_t per_block) {
#ifdef INFLUENCE_FAST_SIMT
  constexpr int64_t most = 3;  // small shapes stride too
#else
  constexpr int64_t most = 65536;
#endif
  const int64_t blocks = ceil_div(items, per_block);
  return dim3(static_cast<unsigned>(blocks < most ? blocks : most));
}
