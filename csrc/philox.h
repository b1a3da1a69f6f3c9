// The one definition of every random entry, compiled for host and device; influence_fast/ops/philox.py is its twin.
//
// Every entry is a pure function of (key, row, column) through Philox4x32-10 (Salmon et al., "Parallel random numbers:
// as easy as 1, 2, 3", SC 2011). key = first 8 bytes of md5(identifier) as two little-endian 32-bit words. With lo and
// hi the low and high word of a 64-bit number:
//
//   entry           counter                      meaning of the output
//   Rademacher      (col / 128, row, 0, 0)       bit col % 128 (word first, then bit); 1 is +1, 0 is -1
//   Gaussian        (col / 4, row, 0, 0)         Box-Muller entry col % 4 of the pairs (x0, x1), (x2, x3)
//   SJLT sign       (lo w, hi w, 1, 0)           w = col / 128; bit col % 128; 1 is +1, 0 is -1
//   SJLT rotation   (lo c', hi c', 2, 0)         c' = c / 4; word c % 4 of chunk c = col / k
//
// SJLT: feature f of chunk c = f / k has its one non-zero in output (f % k + rotation(c)) % k.
#pragma once

#include <math.h>
#include <stdint.h>

// Internal linkage everywhere: translation units built for different instruction sets must not share one copy.
#ifdef __CUDACC__
#define PHILOX_FN static __host__ __device__ __forceinline__
#else
#define PHILOX_FN static inline
#endif

namespace philox {

constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
constexpr uint32_t kSignStream = 1, kRotationStream = 2;

struct Key {
  uint32_t k0, k1;
};

struct Block {
  uint32_t x[4];
};

PHILOX_FN Block philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, Key key) {
#ifdef __CUDACC__
#pragma unroll 5  // of all ten, the compiler would make the keys ahead of a loop over blocks, in twenty registers
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kMul0) * c0, p1 = static_cast<uint64_t>(kMul1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key.k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key.k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    key.k0 += kWeyl0;
    key.k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// Block w of a stream that is numbered by 64 bits (SJLT signs and rotations).
PHILOX_FN Block stream(uint64_t w, uint32_t which, Key key) {
  return philox4x32_10(static_cast<uint32_t>(w), static_cast<uint32_t>(w >> 32), which, 0, key);
}

PHILOX_FN uint32_t bit(const Block& block, int b) { return (block.x[b >> 5] >> (b & 31)) & 1u; }

// 128 Rademacher signs: columns [128 w, 128 w + 128) of a row.
PHILOX_FN Block rademacher(uint32_t row, uint64_t w, Key key) {
  return philox4x32_10(static_cast<uint32_t>(w), row, 0, 0, key);
}

// Two standard normal entries from two words. u1 and the angle are rounded to float32; the functions of them are good to
// two units in the last place: in double on the host, where that costs little, in float on a device.
PHILOX_FN void box_muller(uint32_t a, uint32_t b, float* first, float* second) {
#ifdef __CUDA_ARCH__
  using Real = float;
#else
  using Real = double;
#endif
  const float u1 = (static_cast<float>(a) + 0.5f) * 2.3283064365386963e-10f;
  const float angle = (static_cast<float>(b) * 2.3283064365386963e-10f) * 6.283185307179586f;
  const Real radius = sqrt(Real(-2) * log(static_cast<Real>(u1)));
  *first = static_cast<float>(radius * cos(static_cast<Real>(angle)));
  *second = static_cast<float>(radius * sin(static_cast<Real>(angle)));
}

// Four Gaussian entries: columns [4 w, 4 w + 4) of a row.
PHILOX_FN void gaussian(uint32_t row, uint64_t w, Key key, float out[4]) {
  const Block block = philox4x32_10(static_cast<uint32_t>(w), row, 0, 0, key);
  box_muller(block.x[0], block.x[1], out, out + 1);
  box_muller(block.x[2], block.x[3], out + 2, out + 3);
}

// 128 SJLT signs: features [128 w, 128 w + 128).
PHILOX_FN Block sjlt_signs(uint64_t w, Key key) { return stream(w, kSignStream, key); }

PHILOX_FN uint32_t sjlt_turn(uint32_t word, uint32_t k) {
  return static_cast<uint32_t>((static_cast<uint64_t>(word) * k) >> 32);
}

// Rotation of chunk c = feature / k.
PHILOX_FN uint32_t sjlt_rotation(uint64_t chunk, uint32_t k, Key key) {
  return sjlt_turn(stream(chunk / 4, kRotationStream, key).x[chunk % 4], k);
}

}  // namespace philox
