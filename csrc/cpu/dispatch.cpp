#include "dispatch.h"

#ifdef INFLUENCE_FAST_AVX2
#include <cpuid.h>
#endif

namespace influence_fast {
namespace {

#ifdef INFLUENCE_FAST_AVX2
// For features that not every compiler has a name for: bits of the registers eax, ebx, ecx, edx.
bool cpuid_bit(unsigned leaf, unsigned subleaf, int word, int bit) {
  unsigned words[4];
  return __get_cpuid_count(leaf, subleaf, words, words + 1, words + 2, words + 3) && (words[word] >> bit & 1);
}
#endif

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found{kernels_baseline()};
#ifdef INFLUENCE_FAST_AVX2
  __builtin_cpu_init();
  const bool f16c = cpuid_bit(1, 0, 2, 29);
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c)) return found;
  found.push_back(kernels_avx2());
#endif
#ifdef INFLUENCE_FAST_AVX512
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return found;
  found.push_back(kernels_avx512());
#endif
#ifdef INFLUENCE_FAST_AVX512BF16
  const bool avx512bf16 = cpuid_bit(7, 1, 0, 5);
  // Every CPU with the one has the other.
  if (avx512bf16 && __builtin_cpu_supports("avx512vnni")) found.push_back(kernels_avx512bf16());
#endif
  return found;
}

}  // namespace

const std::vector<const Kernels*>& supported_kernels() {
  static const std::vector<const Kernels*> found = supported();
  return found;
}

}  // namespace influence_fast
