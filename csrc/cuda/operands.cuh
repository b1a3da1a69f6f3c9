// Numbers on their way from memory into shared memory as operands of the matrix instructions, eight at a time.
//
// 16-bit numbers travel by asynchronous copies. float32 ones pass through registers, where each is split into three
// bfloat16: fetched before a step's products and stored after them, so that their wait hides behind these. The three add
// up to it exactly, and as each is the nearest to what is left, they become smaller by 2^-9 twice and of either sign: of
// the nine products of two numbers' parts the three smallest are 2^-26 at most, and left out.
#pragma once

#include "params.h"
#include "portable.cuh"

template <typename T>
struct EightNumbers {
  using Part = typename Parts<T>::Type;
  static constexpr int parts = Parts<T>::count;
  float value[parts == 1 ? 1 : 8];

  // `valid` of the eight from `from` on may be read, the others are zeros. `fast`: aligned, and all of them or none.
  DEVICE_MEMBER void fetch(const Shared<Part>& shared, int to, const T* from, int valid, bool fast) {
    if constexpr (parts == 1) {
      if (fast) {
        copy_async(shared, to, from, valid > 0);
      } else {
        for (int e = 0; e < 8; ++e) shared.store(to + e, e < valid ? from[e] : T{0});
      }
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) value[e] = 0;
      if (fast && valid > 0) {
        const float4 a = load_vector<float4>(from), b = load_vector<float4>(from + 4);
        value[0] = a.x, value[1] = a.y, value[2] = a.z, value[3] = a.w;
        value[4] = b.x, value[5] = b.y, value[6] = b.z, value[7] = b.w;
      } else if (valid > 0) {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (e < valid) value[e] = from[e];
      }
    }
  }

  // Part q goes to `to` + q * plane.
  DEVICE_MEMBER void store(const Shared<Part>& shared, int to, int plane) const {
    if constexpr (parts > 1) {
      float rest[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) rest[e] = value[e];
#pragma unroll
      for (int q = 0; q < parts; ++q) {
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          word[i] = bf16_pair(rest[2 * i], rest[2 * i + 1]);
          rest[2 * i] -= __uint_as_float(word[i] << 16);
          rest[2 * i + 1] -= __uint_as_float(word[i] & 0xFFFF0000u);
        }
        shared.template store_vector<uint4>(to + q * plane, {word[0], word[1], word[2], word[3]});
      }
    }
  }
};

// Runs `multiply(stage)` over all steps, operands of later steps on their way meanwhile: `fetch(step, stage)` begins to
// fill a stage and `store(step, stage)` ends it. Shared memory is free when this begins and still read when it ends.
template <int Stages, typename Fetch, typename Store, typename Multiply>
DEVICE void pipelined(int steps, const Fetch& fetch, const Store& store, const Multiply& multiply) {
#pragma unroll 1
  for (int step = 0; step < Stages - 1; ++step) {
    if (step < steps) fetch(step, step), store(step, step);
    copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<Stages - 2>();
    __syncthreads();  // this step has arrived everywhere, and nobody reads the stage that is filled next
    const int next = step + Stages - 1, stage = next % Stages;
    if (next < steps) fetch(next, stage);
    copy_async_commit();
    multiply(step % Stages, step);
    if (next < steps) store(next, stage);
  }
  copy_async_wait<0>();
}
