// The Python face of the CPU kernels: pointers come in as integers, sizes and strides in elements. Callers (ops/cpu.py) check
// shapes and dtypes; here nothing is known of tensors.

#ifdef INFLUENCE_FAST_AVX2
#include <cpuid.h>
#endif
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "../philox.h"
#include "kernels.h"
#include "parallel.h"
#include "scan.h"

namespace py = pybind11;
using namespace influence_fast;

namespace {

#ifdef INFLUENCE_FAST_AVX2
// For features that not every compiler has a name for: bits of the registers eax, ebx, ecx, edx.
bool cpuid_bit(unsigned leaf, unsigned subleaf, int word, int bit) {
  unsigned words[4];
  return __get_cpuid_count(leaf, subleaf, words, words + 1, words + 2, words + 3) && (words[word] >> bit & 1);
}
#endif

// Slowest first; the last one that the machine can run is the default. Units whose flags the compiler lacks are not here.
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

const std::vector<const Kernels*>& all() {
  static const std::vector<const Kernels*> found = supported();
  return found;
}

const Kernels* named(const std::string& isa) {
  std::string names;
  for (const Kernels* k : all()) {
    if (isa == k->isa) return k;
    names += (names.empty() ? "" : ", ") + std::string(k->isa);
  }
  throw std::invalid_argument("isa: expected one of " + names + " on this machine, got " + isa);
}

const Kernels* kernels = nullptr;

using Address = uintptr_t;
template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Tokens tokens(Address data, int type, int64_t features, int64_t stride_n, int64_t stride_t) {
  return {at<const void>(data), static_cast<Type>(type), features, stride_n, stride_t};
}

// (kind, key0, key1, k, features, scale, dense, ld)
Side side(const py::tuple& t) {
  return {static_cast<Kind>(t[0].cast<int>()), t[1].cast<uint32_t>(), t[2].cast<uint32_t>(), t[3].cast<int64_t>(),
          t[4].cast<int64_t>(), t[5].cast<float>(), at<const float>(t[6].cast<Address>()), t[7].cast<int64_t>()};
}

// Where exact rows are: addresses of int64 arrays, firsts (shards + 1), data and scales (shards, layers), dims (layers).
struct Stores {
  std::vector<ScanShard> shards;
  ScanSource source;
};

Stores stores(const py::tuple& t) {
  const int64_t count = t[0].cast<int64_t>(), layers = t[1].cast<int64_t>();
  const int64_t* firsts = at<const int64_t>(t[2].cast<Address>());
  const uintptr_t* data = at<const uintptr_t>(t[3].cast<Address>());
  const uintptr_t* scales = at<const uintptr_t>(t[4].cast<Address>());
  Stores found;
  for (int64_t s = 0; s < count; ++s)
    found.shards.push_back({firsts[s], firsts[s + 1] - firsts[s], data + s * layers, scales + s * layers});
  found.source = {nullptr, count, at<const int64_t>(t[5].cast<Address>()), layers, static_cast<Stored>(t[6].cast<int>())};
  return found;
}

}  // namespace

PYBIND11_MODULE(influence_fast_cpu, m) {
  m.doc() = "Native CPU kernels of influence_fast; see csrc/cpu/kernels.h.";
  m.attr("__version__") = INFLUENCE_FAST_VERSION;

  const char* forced = std::getenv("INFLUENCE_FAST_ISA");
  kernels = forced != nullptr && *forced != '\0' ? named(forced) : all().back();

  m.def("isa", [] { return std::string(kernels->isa); }, "The instruction set in use.");
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels* k : all()) names.emplace_back(k->isa);
    return names;
  }, "The instruction sets this machine can run, slowest first.");
  m.def("set_isa", [](const std::string& isa) { kernels = named(isa); }, py::arg("isa"),
        "Use one of isas() from now on; the environment variable INFLUENCE_FAST_ISA sets the first.");

  m.def("philox4x32_10", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    const philox::Block b = philox::philox4x32_10(c0, c1, c2, c3, {k0, k1});
    return py::make_tuple(b.x[0], b.x[1], b.x[2], b.x[3]);
  });

  m.def("random_matrix", [](const py::tuple& s, int64_t r0, int64_t r1, int64_t c0, int64_t c1, Address out, int threads) {
    const Side matrix = side(s);
    py::gil_scoped_release free;
    kernels->random_matrix(matrix, r0, r1, c0, c1, at<float>(out), threads);
  });

  m.def("sketch", [](Address g, int type, int64_t n, int64_t features, int64_t stride, const py::tuple& s, Address out,
                     int threads) {
    const Side matrix = side(s);
    py::gil_scoped_release free;
    kernels->sketch(tokens(g, type, features, stride, 0), n, matrix, at<float>(out), threads);
  });

  m.def("project_outer", [](int type, int64_t n, int64_t t, Address spans, Address x, int64_t in, int64_t xn, int64_t xt,
                            Address dy, int64_t rows, int64_t dn, int64_t dt, const py::tuple& s_in, const py::tuple& s_out,
                            Address out, int threads) {
    const Side right = side(s_in), left = side(s_out);
    py::gil_scoped_release free;
    kernels->project_outer(tokens(x, type, in, xn, xt), tokens(dy, type, rows, dn, dt), {n, t, at<const int64_t>(spans)},
                           right, left, at<float>(out), threads);
  });

  m.def("sketch_outer", [](int type, int64_t n, int64_t t, Address spans, Address x, int64_t in, int64_t xn, int64_t xt,
                           Address dy, int64_t rows, int64_t dn, int64_t dt, const py::tuple& s, Address weight, Address out,
                           int threads) {
    const Side matrix = side(s);
    py::gil_scoped_release free;
    kernels->sketch_outer(tokens(x, type, in, xn, xt), tokens(dy, type, rows, dn, dt), {n, t, at<const int64_t>(spans)},
                          matrix, at<const float>(weight), at<float>(out), threads);
  });

  m.def("ghost_dot", [](int type, int64_t na, int64_t ta, Address spans_a, Address xa, int64_t in, int64_t xan, int64_t xat,
                        Address dya, int64_t rows, int64_t dan, int64_t dat, int64_t nb, int64_t tb, Address spans_b,
                        Address xb, int64_t xbn, int64_t xbt, Address dyb, int64_t dbn, int64_t dbt, Address out,
                        int threads) {
    py::gil_scoped_release free;
    kernels->ghost_dot(tokens(xa, type, in, xan, xat), tokens(dya, type, rows, dan, dat), {na, ta, at<const int64_t>(spans_a)},
                       tokens(xb, type, in, xbn, xbt), tokens(dyb, type, rows, dbn, dbt), {nb, tb, at<const int64_t>(spans_b)},
                       at<float>(out), threads);
  });

  m.def("rank", [](Address data, int64_t rows, int64_t n, int64_t sm, int64_t sn, Address out, bool wide, int threads) {
    py::gil_scoped_release free;
    const Rows matrix{at<const float>(data), rows, n, sm, sn};
    return kernels->rank(matrix, wide ? nullptr : at<float>(out), wide ? at<double>(out) : nullptr, threads);
  });

  m.def("vote", [](Address data, int64_t rows, int64_t n, int64_t sm, int64_t sn, int64_t k, Address out, int threads) {
    py::gil_scoped_release free;
    return kernels->vote({at<const float>(data), rows, n, sm, sn}, k, at<double>(out), threads);
  });

  m.def("tally", [](Address data, int64_t rows, int64_t n, int64_t sm, int64_t sn, int64_t k, Address ranks, Address votes,
                    int threads) {
    py::gil_scoped_release free;
    return kernels->tally({at<const float>(data), rows, n, sm, sn}, k, at<double>(ranks), at<double>(votes), threads);
  });

  m.attr("block_rows") = kScanBlockRows;

  m.def("quantise", [](Address rows, int64_t ld_in, int64_t count, int64_t dim, Address codes, int64_t stride, Address scale,
                       Address error, Address norm, int threads) {
    py::gil_scoped_release free;
    struct Job {
      const float* rows;
      int64_t ld_in, count, dim;
      uint8_t* codes;
      int64_t stride;
      float *scale, *error, *norm;
    } job{at<const float>(rows), ld_in, count, dim, at<uint8_t>(codes), stride, at<float>(scale), at<float>(error),
          at<float>(norm)};
    static constexpr int64_t kRows = 256;
    parallel_for(threads, (count + kRows - 1) / kRows, [](void* context, int64_t i) {
      const Job& j = *static_cast<const Job*>(context);
      const int64_t begin = i * kRows, rows = std::min(kRows, j.count - begin);
      kernels->scan.quantise(j.rows + begin * j.ld_in, j.ld_in, rows, j.dim, j.codes + begin * j.stride, j.stride,
                             j.scale + begin, j.error + begin, j.norm + begin);
    }, &job);
  });

  m.def("scan_search", [](Address segments, int64_t segment_count, Address parts, int64_t part_count, const py::tuple& rows_in,
                          Address queries, int64_t m, Address weights, bool cosine, Address allowed, int64_t k,
                          Address scores, Address rows, int threads) {
    Stores found = stores(rows_in);
    found.source.shards = found.shards.data();
    py::gil_scoped_release free;
    // A segment is ten numbers.
    const int64_t* numbers = at<const int64_t>(segments);
    std::vector<ScanSegment> list;
    for (int64_t s = 0; s < segment_count; ++s, numbers += 10)
      list.push_back({at<const uint8_t>(numbers[0]), numbers[1], numbers[2], at<const float>(numbers[3]),
                      at<const float>(numbers[4]), at<const float>(numbers[5]), at<const int32_t>(numbers[6]), numbers[7],
                      at<const float>(numbers[8]), at<const float>(numbers[9])});
    const ScanStats stats = scan_search(kernels->scan, list.data(), segment_count, at<const ScanPart>(parts), part_count,
                                        found.source, {at<const float>(queries), m, at<const double>(weights), cosine},
                                        at<const uint8_t>(allowed), k, at<double>(scores), at<int64_t>(rows), threads);
    py::gil_scoped_acquire back;
    return py::make_tuple(stats.rows_scanned, stats.rows_rescored, stats.bad_row);
  });

  m.def("scan_rescore", [](const py::tuple& rows_in, Address queries, int64_t m, Address weights, bool cosine, Address rows,
                           int64_t width, Address scores, int threads) {
    Stores found = stores(rows_in);
    found.source.shards = found.shards.data();
    py::gil_scoped_release free;
    scan_rescore(kernels->scan, found.source, {at<const float>(queries), m, at<const double>(weights), cosine},
                 at<const int64_t>(rows), width, at<double>(scores), threads);
  });

  m.def("ghost_norm", [](int type, int64_t n, int64_t t, Address spans, Address x, int64_t in, int64_t xn, int64_t xt,
                         Address dy, int64_t rows, int64_t dn, int64_t dt, Address out, int threads) {
    py::gil_scoped_release free;
    kernels->ghost_norm(tokens(x, type, in, xn, xt), tokens(dy, type, rows, dn, dt), {n, t, at<const int64_t>(spans)},
                        at<float>(out), threads);
  });
}
