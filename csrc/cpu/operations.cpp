#include "operations.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "dispatch.h"
#include "parallel.h"

namespace influence_fast::checked {
namespace {

const Kernels* named(const std::string& isa) {
  std::string names;
  for (const Kernels* k : supported_kernels()) {
    if (isa == k->isa) return k;
    names += (names.empty() ? "" : ", ") + std::string(k->isa);
  }
  refuse("isa", "one of " + names + " on this machine", isa);
}

std::atomic<const Kernels*>& in_use() {
  static std::atomic<const Kernels*> found = [] {
    const char* forced = std::getenv("INFLUENCE_FAST_ISA");
    return forced != nullptr && *forced != '\0' ? named(forced) : supported_kernels().back();
  }();
  return found;
}

constexpr Side kIdentity = {Kind::identity, 0, 0, 1.0f, 1, 1, nullptr, 0, 0};

// What acts on these features; null is the identity.
const Side& checked_side(const char* name, const Side* side, int64_t features) {
  if (side == nullptr) return kIdentity;
  same(name, side->features, features);
  return *side;
}

// x and dy hold the same samples and tokens; spans lie within them.
Batch checked_batch(const Tokens& x, const Tokens& dy, Address address) {
  same("dy: samples", dy.samples, x.samples);
  same("dy: tokens", dy.tokens, x.tokens);
  same_dtype("dy: dtype", dy.dtype, x.dtype);
  const int64_t* spans = checked_spans(address);
  for (int64_t n = 0; spans != nullptr && n < x.samples; ++n) {
    const int64_t begin = spans[2 * n], end = spans[2 * n + 1];
    if (begin < 0 || begin > end || end > x.tokens)
      refuse("spans", "0 <= begin <= end <= " + std::to_string(x.tokens) + " for sample " + std::to_string(n),
             std::to_string(begin) + " and " + std::to_string(end));
  }
  return {x.samples, x.tokens, spans};
}

float* output(Address out, int64_t rows, int64_t columns) {
  return pointer<float>("out", out, product("out", rows, columns) == 0);
}

const Matrix& checked_values(const Matrix& values, int threads) {
  same_dtype("values: dtype", values.dtype, Dtype::float32);
  at_least("values: rows", values.rows, 1);
  at_least("values: columns", values.columns, 1);
  at_least("threads", threads, 1);
  return values;
}

int64_t checked_k(int64_t k, int64_t most) {
  if (k < 1 || k > most) refuse("k", "1 to " + std::to_string(most), k);
  return k;
}

}  // namespace

const Kernels& kernels() { return *in_use().load(std::memory_order_relaxed); }
void use(const std::string& isa) { in_use().store(named(isa)); }

Side dense_side(const Matrix& entries, float scale) {
  same_dtype("entries: dtype", entries.dtype, Dtype::float32);
  if (entries.columns > 1 && entries.column_stride != 1) refuse("strides", "columns one after another", entries.column_stride);
  return {Kind::dense, 0, 0, scale, entries.rows, entries.columns, static_cast<const float*>(entries.data), entries.row_stride, 0};
}

Side with_panels(Side side, Address panels) {
  if (side.kind != Kind::gaussian) refuse("side", "a gaussian matrix", "another kind");
  side.dense = pointer<const float>("panels", panels);
  return side;
}

void fill_panels(const Side& side, Address panels, int threads) {
  if (side.kind != Kind::gaussian) refuse("side", "a gaussian matrix", "another kind");
  float* to = pointer<float>("panels", panels);
  at_least("threads", threads, 1);
  kernels().fill_panels(side, to, threads);
}

void random_matrix(const Side& side, int64_t row, int64_t rows, int64_t column, int64_t columns, Address out, int threads) {
  if (side.kind == Kind::dense) refuse("side", "a random matrix", "a dense one");
  if (sum("rows", at_least("row", row, 0), at_least("rows", rows, 0)) > side.k)
    refuse("rows", "rows within " + std::to_string(side.k), row + rows);
  if (sum("columns", at_least("column", column, 0), at_least("columns", columns, 0)) > side.features)
    refuse("columns", "columns within " + std::to_string(side.features), column + columns);
  float* to = output(out, rows, columns);
  at_least("threads", threads, 1);
  if (rows * columns == 0) return;
  kernels().random_matrix(side, row, row + rows, column, column + columns, to, threads);
}

void sketch(const Matrix& g, const Side& side, Address out, int threads) {
  checked_side("side: features", &side, g.columns);
  if (side.kind == Kind::dense) refuse("side", "a random matrix", "a dense one");
  if (g.columns > 1 && g.column_stride != 1) refuse("g: strides", "features one after another", g.column_stride);
  float* to = output(out, g.rows, side.k);
  at_least("threads", threads, 1);
  if (g.rows == 0) return;
  kernels().sketch(g, side, to, threads);
}

void sketch_wide(Address g, const int64_t (&shape)[2], const int64_t (&strides)[2], const Side& side, Address out, int threads) {
  if (shape[1] > 1 && strides[1] != 1) refuse("g: strides", "features one after another", strides[1]);
  checked_side("side: features", &side, shape[1]);
  if (side.kind == Kind::dense) refuse("side", "a random matrix", "a dense one");
  const bool empty = product("shape", shape[0], shape[1]) == 0;
  product("strides", sum("strides", product("strides", shape[0], strides[0]), shape[1]), 8);
  const double* from = pointer<const double>("g", g, empty);
  double* to = pointer<double>("out", out, product("out", shape[0], side.k) == 0);
  at_least("threads", threads, 1);
  if (shape[0] == 0) return;
  kernels().sketch_wide(from, shape[0], strides[0], side, to, threads);
}

void project_outer(const Tokens& x, const Tokens& dy, Address spans, const Side* p_in, const Side* p_out, Address out,
                   int threads) {
  const Batch batch = checked_batch(x, dy, spans);
  const Side &right = checked_side("p_in: features", p_in, x.features), &left = checked_side("p_out: features", p_out, dy.features);
  float* to = output(out, x.samples, product("out", p_in ? right.k : x.features, p_out ? left.k : dy.features));
  at_least("threads", threads, 1);
  if (x.samples == 0 || (p_in ? right.k : x.features) == 0 || (p_out ? left.k : dy.features) == 0) return;
  kernels().project_outer(x, dy, batch, right, left, to, threads);
}

void sketch_outer(const Tokens& x, const Tokens& dy, Address spans, const Side& side, Address weight, Address m, Address v,
                  float b1, float b2, float eps, Address out, int threads) {
  const Batch batch = checked_batch(x, dy, spans);
  checked_side("side: features", &side, product("x, dy: features", x.features, dy.features));
  if ((m == 0) != (v == 0)) refuse("m, v", "both or none", m == 0 ? "v alone" : "m alone");
  if (m != 0 && weight != 0) refuse("weight", "none beside m and v", weight);
  const Change change = {optional_pointer<const float>("weight", weight), optional_pointer<const float>("m", m),
                         optional_pointer<const float>("v", v), b1, b2, eps};
  float* to = output(out, x.samples, side.k);
  at_least("threads", threads, 1);
  if (x.samples == 0 || side.k == 0) return;
  if (side.features == 0) return static_cast<void>(std::fill_n(to, x.samples * side.k, 0.0f));
  kernels().sketch_outer(x, dy, batch, side, change, to, threads);
}

void ghost_dot(const Tokens& xa, const Tokens& dya, Address spans_a, const Tokens& xb, const Tokens& dyb, Address spans_b,
               Address out, int threads) {
  const Batch a = checked_batch(xa, dya, spans_a), b = checked_batch(xb, dyb, spans_b);
  same("xb: features", xb.features, xa.features);
  same("dyb: features", dyb.features, dya.features);
  same_dtype("xb: dtype", xb.dtype, xa.dtype);
  float* to = output(out, xa.samples, xb.samples);
  at_least("threads", threads, 1);
  if (xa.samples == 0 || xb.samples == 0) return;
  kernels().ghost_dot(xa, dya, a, xb, dyb, b, to, threads);
}

void ghost_norm(const Tokens& x, const Tokens& dy, Address spans, Address out, int threads) {
  const Batch batch = checked_batch(x, dy, spans);
  float* to = output(out, x.samples, 1);
  at_least("threads", threads, 1);
  if (x.samples == 0) return;
  kernels().ghost_norm(x, dy, batch, to, threads);
}

int64_t rank(const Matrix& values, Address out, bool wide, int threads) {
  checked_values(values, threads);
  // Half integers are exact in float32 up to here.
  if (!wide && values.columns > 1 << 22) refuse("wide", "True for more than 2^22 columns", "False");
  float* narrow = wide ? nullptr : pointer<float>("out", out);
  double* large = wide ? pointer<double>("out", out) : nullptr;
  return kernels().rank(values, narrow, large, threads);
}

int64_t vote(const Matrix& values, int64_t k, Address votes, int threads) {
  checked_k(k, checked_values(values, threads).columns);
  double* to = pointer<double>("votes", votes);
  return kernels().vote(values, k, to, threads);
}

int64_t rank_and_vote(const Matrix& values, int64_t k, Address ranks, Address votes, int threads) {
  checked_k(k, checked_values(values, threads).columns);
  double *rank_sums = pointer<double>("ranks", ranks), *vote_sums = pointer<double>("votes", votes);
  return kernels().rank_and_vote(values, k, rank_sums, vote_sums, threads);
}

int64_t panel_numbers(int64_t k, int64_t features) {
  product("k x features", sum("k", at_least("k", k, 1), 64), sum("features", at_least("features", features, 1), 256));
  return kernels().panel_numbers(k, features);
}

void quantise(const Matrix& rows, Address codes, int64_t stride, Address scale, Address error, Address norm, int threads) {
  same_dtype("rows: dtype", rows.dtype, Dtype::float32);
  if (rows.columns > 1) same("rows: column stride", rows.column_stride, 1);
  at_least("stride", stride, rows.columns);
  at_least("threads", threads, 1);
  struct Job {
    const Matrix& rows;
    uint8_t* codes;
    int64_t stride;
    float *scale, *error, *norm;
  } job{rows,
        pointer<uint8_t>("codes", codes),
        stride,
        pointer<float>("scale", scale),
        pointer<float>("error", error),
        pointer<float>("norm", norm)};
  static constexpr int64_t kRows = 256;
  parallel_for(
      threads, (rows.rows + kRows - 1) / kRows,
      [](void* context, int64_t i) {
        const Job& j = *static_cast<const Job*>(context);
        const int64_t begin = i * kRows, count = std::min(kRows, j.rows.rows - begin);
        kernels().search.quantise(static_cast<const float*>(j.rows.data) + begin * j.rows.row_stride, j.rows.row_stride, count,
                                 j.rows.columns, j.codes + begin * j.stride, j.stride, j.scale + begin, j.error + begin,
                                 j.norm + begin);
      },
      &job);
}

}  // namespace influence_fast::checked
