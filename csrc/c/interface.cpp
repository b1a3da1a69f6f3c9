// influence_fast.h over the checked operations (cpu/operations.h).
#include "../influence_fast.h"

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <thread>

#include "../cpu/operations.h"
#include "convert.h"
#include "guard.h"

using namespace influence_fast;

namespace influence_fast::c {
namespace {

thread_local char message[512];

constexpr int kMostThreads = 1024;
std::atomic<int> chosen_threads{0};

int processors() {
#ifdef __linux__
  cpu_set_t mine;
  if (sched_getaffinity(0, sizeof(mine), &mine) == 0) return std::min(kMostThreads, std::max(1, CPU_COUNT(&mine)));
#endif
  return std::min(kMostThreads, std::max(1, static_cast<int>(std::thread::hardware_concurrency())));
}

}  // namespace

int fail(int code, const char* text) noexcept {
  std::snprintf(message, sizeof(message), "%s", text);
  return code;
}

int threads() {
  static const int found = processors();
  const int wanted = chosen_threads.load(std::memory_order_relaxed);
  return wanted > 0 ? wanted : found;
}

namespace {

template <typename T>
Address address(const T* at) {
  return reinterpret_cast<Address>(at);
}

void finite(int64_t bad_row) {
  if (bad_row >= 0) throw NotFinite("values: expected finite numbers, row " + std::to_string(bad_row) + " has others");
}

// Null is refused.
Side given_side(const influence_fast_side* side) {
  if (side == nullptr) refuse("side", "an address", "null");
  return side_of("side", *side);
}

int64_t columns_of(const influence_fast_tokens& x, const influence_fast_tokens& dy) {
  return product("x, dy: features", at_least("x: features", x.features, 0), at_least("dy: features", dy.features, 0));
}

void sketched_outer(const influence_fast_tokens* x, const influence_fast_tokens* dy, const int64_t* spans, const Side& side,
                    const influence_fast_change& change, float* out) {
  const Tokens left = tokens_of("x", x), right = tokens_of("dy", dy);
  checked::sketch_outer(left, right, address(spans), side, address(change.weight), address(change.m), address(change.v),
                        change.beta1, change.beta2, change.eps, address(out), threads());
}

}  // namespace
}  // namespace influence_fast::c

using namespace influence_fast::c;

extern "C" {

int influence_fast_version(void) { return INFLUENCE_FAST_VERSION_NUMBER; }

const char* influence_fast_last_error(void) { return message; }

const char* influence_fast_isa(void) {
  const char* isa = "";
  guarded([&] { isa = checked::kernels().isa; });
  return isa;
}

int influence_fast_set_isa(const char* isa) {
  return guarded([&] {
    if (isa == nullptr) refuse("isa", "a name", "null");
    checked::use(isa);
  });
}

int influence_fast_threads(void) { return threads(); }

int influence_fast_set_threads(int count) {
  return guarded([&] {
    if (count < 0 || count > kMostThreads) refuse("threads", "0 to " + std::to_string(kMostThreads), count);
    chosen_threads.store(count, std::memory_order_relaxed);
  });
}

int influence_fast_random_matrix(const influence_fast_side* side, int64_t row, int64_t rows, int64_t column, int64_t columns,
                                 float* out) {
  return guarded([&] {
    const Side matrix = given_side(side);
    checked::random_matrix(matrix, row, rows, column, columns, address(out), threads());
    if (matrix.scale == 1.0f) return;
    for (int64_t i = 0; i < rows * columns; ++i) out[i] *= matrix.scale;
  });
}

int influence_fast_sketch(const influence_fast_matrix* g, const influence_fast_side* side, float* out) {
  return guarded([&] {
    Side matrix = given_side(side);
    if (matrix.kind == Kind::gaussian && side->entries != nullptr)
      matrix = checked::with_panels(matrix, address(side->entries));
    checked::sketch(matrix_of("g", g), matrix, address(out), threads());
  });
}

int influence_fast_sketch_float64(const double* g, int64_t rows, int64_t columns, int64_t row_stride,
                                  const influence_fast_side* side, double* out) {
  return guarded([&] {
    const int64_t shape[2] = {at_least("rows", rows, 0), at_least("columns", columns, 0)};
    const int64_t strides[2] = {at_least("row_stride", row_stride, 0), 1};
    checked::sketch_wide(address(g), shape, strides, given_side(side), address(out), threads());
  });
}

int influence_fast_kept_numbers(const influence_fast_side* side, int64_t* numbers) {
  return guarded([&] {
    const Side matrix = given_side(side);
    if (matrix.kind != Kind::gaussian) refuse("side", "a gaussian matrix", "another kind");
    *pointer<int64_t>("numbers", address(numbers)) = checked::panel_numbers(matrix.k, matrix.features);
  });
}

int influence_fast_keep(const influence_fast_side* side, float* entries) {
  return guarded([&] { checked::fill_panels(given_side(side), address(entries), threads()); });
}

int influence_fast_outer(const influence_fast_tokens* x, const influence_fast_tokens* dy, const int64_t* spans, float* out) {
  return influence_fast_project_outer(x, dy, spans, nullptr, nullptr, out);
}

int influence_fast_project_outer(const influence_fast_tokens* x, const influence_fast_tokens* dy, const int64_t* spans,
                                 const influence_fast_side* p_in, const influence_fast_side* p_out, float* out) {
  return guarded([&] {
    const Tokens inputs = tokens_of("x", x), gradients = tokens_of("dy", dy);
    Side right, left;
    if (p_in != nullptr) right = side_of("p_in", *p_in);
    if (p_out != nullptr) left = side_of("p_out", *p_out);
    checked::project_outer(inputs, gradients, address(spans), p_in == nullptr ? nullptr : &right,
                           p_out == nullptr ? nullptr : &left, address(out), threads());
  });
}

int influence_fast_sketch_outer(const influence_fast_tokens* x, const influence_fast_tokens* dy, const int64_t* spans,
                                const influence_fast_side* side, const influence_fast_change* change, float* out) {
  return guarded([&] {
    const influence_fast_change none = {nullptr, nullptr, nullptr, 0.0f, 0.0f, 0.0f};
    sketched_outer(x, dy, spans, given_side(side), change == nullptr ? none : *change, out);
  });
}

int influence_fast_score_outer(const influence_fast_tokens* x, const influence_fast_tokens* dy, const int64_t* spans, const float* q,
                               int64_t count, float* out) {
  return guarded([&] {
    if (x == nullptr || dy == nullptr) refuse(x == nullptr ? "x" : "dy", "an address", "null");
    const int64_t features = columns_of(*x, *dy), shape[2] = {at_least("count", count, 0), features}, strides[2] = {features, 1};
    const Side side = checked::dense_side(matrix_of(address(q), Dtype::float32, shape, strides), 1.0f);
    sketched_outer(x, dy, spans, side, {nullptr, nullptr, nullptr, 0.0f, 0.0f, 0.0f}, out);
  });
}

int influence_fast_ghost_dot(const influence_fast_tokens* xa, const influence_fast_tokens* dya, const int64_t* spans_a,
                             const influence_fast_tokens* xb, const influence_fast_tokens* dyb, const int64_t* spans_b, float* out) {
  return guarded([&] {
    checked::ghost_dot(tokens_of("xa", xa), tokens_of("dya", dya), address(spans_a), tokens_of("xb", xb), tokens_of("dyb", dyb),
                       address(spans_b), address(out), threads());
  });
}

int influence_fast_ghost_norm(const influence_fast_tokens* x, const influence_fast_tokens* dy, const int64_t* spans, float* out) {
  return guarded([&] { checked::ghost_norm(tokens_of("x", x), tokens_of("dy", dy), address(spans), address(out), threads()); });
}

int influence_fast_rank(const influence_fast_matrix* values, float* out) {
  return guarded([&] {
    const Matrix given = matrix_of("values", values);
    if (given.columns > 1 << 22) refuse("values: columns", "at most 2^22 for ranks in float32", given.columns);
    finite(checked::rank(given, address(out), false, threads()));
  });
}

int influence_fast_rank_float64(const influence_fast_matrix* values, double* out) {
  return guarded([&] { finite(checked::rank(matrix_of("values", values), address(out), true, threads())); });
}

int influence_fast_vote(const influence_fast_matrix* values, int64_t k, double* votes) {
  return guarded([&] { finite(checked::vote(matrix_of("values", values), k, address(votes), threads())); });
}

int influence_fast_rank_and_vote(const influence_fast_matrix* values, int64_t k, double* ranks, double* votes) {
  return guarded(
      [&] { finite(checked::rank_and_vote(matrix_of("values", values), k, address(ranks), address(votes), threads())); });
}
}
