// Exact results of the kernels on every instruction set that this machine can run: random entries, sums of small integers, ranks,
// votes and exact searches. Each is compared with a plain loop here, and all of them with one digest, so that every compiler and
// architecture gives the same bits. Prints "N checks passed"; run.sh builds and runs it.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "../philox.h"

using namespace influence_fast;

namespace {

// Of all results of one instruction set, whichever it is.
constexpr uint64_t kDigest = 0x747583B34DB9A841;

uint64_t digest;
int64_t checks, failures;

template <typename T>
void check(const std::string& name, const std::vector<T>& got, const std::vector<T>& expected) {
  ++checks;
  const auto* bytes = reinterpret_cast<const unsigned char*>(got.data());
  for (size_t i = 0; i < got.size() * sizeof(T); ++i) digest = (digest ^ bytes[i]) * 0x100000001B3u;
  if (got.size() == expected.size() && memcmp(got.data(), expected.data(), got.size() * sizeof(T)) == 0) return;
  ++failures;
  for (size_t i = 0; i < std::min(got.size(), expected.size()); ++i) {
    if (got[i] == expected[i]) continue;
    std::printf("%s: %g instead of %g at %zu\n", name.c_str(), double(got[i]), double(expected[i]), i);
    return;
  }
  std::printf("%s: %zu results instead of %zu, or another zero\n", name.c_str(), got.size(), expected.size());
}

// Integers of a few bits, the same on every machine.
std::vector<int64_t> integers(size_t count, uint32_t seed, int64_t low = -4, int64_t high = 4) {
  std::vector<int64_t> values(count);
  for (size_t i = 0; i < count; ++i) {
    const philox::Block block = philox::philox4x32_10(static_cast<uint32_t>(i), seed, 7, 0, {1, 2});
    values[i] = low + block.x[0] % static_cast<uint32_t>(high - low + 1);
  }
  return values;
}

// A tensor's memory, of integers that every type holds.
struct Stored {
  Stored(const std::vector<int64_t>& values, Dtype dtype) : dtype(dtype) {
    for (int64_t value : values) {
      const float real = static_cast<float>(value);
      uint32_t bits;
      memcpy(&bits, &real, 4);
      wide.push_back(real);
      if (dtype == Dtype::bfloat16) {
        narrow.push_back(static_cast<uint16_t>(bits >> 16));
      } else {  // float16: the exponent's bias is 15 instead of 127
        const uint32_t half = (bits >> 13 & 0x3FFu) | ((bits >> 23 & 0xFFu) - 112) << 10;
        narrow.push_back(static_cast<uint16_t>(value == 0 ? 0 : (bits >> 16 & 0x8000u) | half));
      }
    }
  }
  const void* data() const { return dtype == Dtype::float32 ? static_cast<const void*>(wide.data()) : narrow.data(); }
  Dtype dtype;
  std::vector<float> wide;
  std::vector<uint16_t> narrow;
};

int64_t entry(const Side& side, int64_t row, int64_t column) {
  const philox::Key key{side.key0, side.key1};
  if (side.kind == Kind::identity) return row == column;
  if (side.kind == Kind::dense) return static_cast<int64_t>(side.dense[row * side.row_stride + column]);
  if (side.kind == Kind::rademacher)
    return philox::bit(philox::rademacher(static_cast<uint32_t>(row), column / 128, key), column % 128) ? 1 : -1;
  const uint32_t k = static_cast<uint32_t>(side.k);
  if ((column % k + philox::sjlt_rotation(column / k, k, key)) % k != row) return 0;
  return philox::bit(philox::sjlt_signs(column / 128, key), column % 128) ? 1 : -1;
}

std::vector<int64_t> dense(const Side& side) {
  std::vector<int64_t> matrix(side.k * side.features);
  for (int64_t r = 0; r < side.k; ++r)
    for (int64_t c = 0; c < side.features; ++c) matrix[r * side.features + c] = entry(side, r, c);
  return matrix;
}

// matrix (k, features) times rows (n, features), transposed: (n, k).
std::vector<int64_t> times(const std::vector<int64_t>& rows, int64_t n, const Side& side) {
  const std::vector<int64_t> matrix = dense(side);
  std::vector<int64_t> out(n * side.k);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t r = 0; r < side.k; ++r)
      out[i * side.k + r] = std::inner_product(&rows[i * side.features], &rows[i * side.features] + side.features,
                                               &matrix[r * side.features], int64_t{0});
  return out;
}

template <typename T = float>
std::vector<T> to(const std::vector<int64_t>& values) {
  return std::vector<T>(values.begin(), values.end());
}

Side side_of(Kind kind, int64_t k, int64_t features) { return {kind, 11, static_cast<uint32_t>(k), 1.0f, k, features, nullptr, 0, 0}; }

const char* name_of(Kind kind) { return kind == Kind::sjlt ? "sjlt" : kind == Kind::rademacher ? "rademacher" : "identity"; }

void test_philox() {
  // Known answers of Random123.
  const uint32_t in[3][6] = {{0, 0, 0, 0, 0, 0},
                             {~0u, ~0u, ~0u, ~0u, ~0u, ~0u},
                             {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0}};
  const std::vector<uint32_t> out[3] = {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
                                        {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
                                        {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}};
  for (int i = 0; i < 3; ++i) {
    const philox::Block block = philox::philox4x32_10(in[i][0], in[i][1], in[i][2], in[i][3], {in[i][4], in[i][5]});
    check("philox", std::vector<uint32_t>(block.x, block.x + 4), out[i]);
  }
}

void test_random_matrix(const Kernels& kernels, int threads) {
  for (Kind kind : {Kind::rademacher, Kind::sjlt}) {
    const Side side = side_of(kind, 37, 1001);
    std::vector<float> got(27 * 823);
    std::vector<int64_t> expected;
    kernels.random_matrix(side, 3, 30, 77, 900, got.data(), threads);
    for (int64_t r = 3; r < 30; ++r)
      for (int64_t c = 77; c < 900; ++c) expected.push_back(entry(side, r, c));
    check("random_matrix", got, to(expected));
  }
}

void test_sketch(const Kernels& kernels, int threads) {
  for (Kind kind : {Kind::rademacher, Kind::sjlt})
    for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16})
      for (int64_t n : {1, 19})
        for (int64_t features : {1, 130, 9001})
          for (int64_t k : {1, 16, 24, 300}) {
            if (kind == Kind::rademacher && features * k > 300000) continue;
            const std::vector<int64_t> values = integers(n * features, 1);
            const Stored g(values, dtype);
            const Side side = side_of(kind, k, features);
            std::vector<float> got(n * k);
            kernels.sketch({g.data(), dtype, n, features, features, 1}, side, got.data(), threads);
            check(std::string("sketch ") + name_of(kind), got, to(times(values, n, side)));
          }
}

// So small that every sum stays below 2^24, where float32 is exact.
struct Gradients {
  int64_t n, t, i, o;
  std::vector<int64_t> x, dy, spans;

  Gradients(int64_t n, int64_t t, int64_t i, int64_t o, uint32_t seed)
      : n(n), t(t), i(i), o(o), x(integers(n * t * i, seed, -2, 2)), dy(integers(n * t * o, seed + 1, -2, 2)) {
    for (int64_t s = 0; s < n; ++s) {
      spans.push_back(s * 5 % (t + 1) / 2);
      spans.push_back(std::max(spans.back(), s % 4 == 3 ? spans.back() : t - s % 2));
    }
  }
  // (n, o, i), flat
  std::vector<int64_t> outer() const {
    std::vector<int64_t> g(n * o * i);
    for (int64_t s = 0; s < n; ++s)
      for (int64_t token = spans[2 * s]; token < spans[2 * s + 1]; ++token)
        for (int64_t r = 0; r < o; ++r)
          for (int64_t c = 0; c < i; ++c)
            g[(s * o + r) * i + c] += dy[(s * t + token) * o + r] * x[(s * t + token) * i + c];
    return g;
  }
  Batch batch() const { return {n, t, spans.data()}; }
};

void test_gradients(const Kernels& kernels, int threads) {
  const int64_t shapes[][6] = {{1, 1, 1, 1, 1, 1}, {5, 7, 9, 17, 3, 2}, {9, 12, 130, 65, 24, 40}, {3, 40, 64, 200, 16, 16}};
  for (const auto& shape : shapes) {
    const Gradients data(shape[0], shape[1], shape[2], shape[3], 3);
    const int64_t n = data.n, t = data.t, i = data.i, o = data.o;
    const std::vector<int64_t> g = data.outer(), weight = integers(o * i, 9, 1, 3), given = integers(5 * o * i, 10);
    std::vector<int64_t> weighted = g;
    for (int64_t e = 0; e < n * o * i; ++e) weighted[e] *= weight[e % (o * i)];
    for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
      const Stored sx(data.x, dtype), sdy(data.dy, dtype);
      const Tokens x{sx.data(), dtype, n, t, i, t * i, i}, dy{sdy.data(), dtype, n, t, o, t * o, o};
      for (Kind in : {Kind::identity, Kind::rademacher, Kind::sjlt})
        for (Kind out : {Kind::identity, Kind::rademacher, Kind::sjlt}) {
          const Side right = side_of(in, in == Kind::identity ? i : shape[4], i);
          const Side left = side_of(out, out == Kind::identity ? o : shape[5], o);
          std::vector<float> got(n * left.k * right.k);
          kernels.project_outer(x, dy, data.batch(), right, left, got.data(), threads);
          const std::vector<int64_t> rows = times(g, n * o, right);  // (n, o, k_in)
          const std::vector<int64_t> matrix = dense(left);
          std::vector<int64_t> expected(got.size());
          for (int64_t s = 0; s < n; ++s)
            for (int64_t a = 0; a < left.k; ++a)
              for (int64_t r = 0; r < o; ++r)
                for (int64_t b = 0; b < right.k; ++b)
                  expected[(s * left.k + a) * right.k + b] += matrix[a * o + r] * rows[(s * o + r) * right.k + b];
          check(std::string("project_outer ") + name_of(in) + " " + name_of(out), got, to(expected));
        }
      for (Kind kind : {Kind::rademacher, Kind::sjlt}) {
        const Side side = side_of(kind, 50, i * o);
        const std::vector<float> factor = to(weight);
        std::vector<float> got(n * side.k);
        kernels.sketch_outer(x, dy, data.batch(), side, Change{}, got.data(), threads);
        check(std::string("sketch_outer ") + name_of(kind), got, to(times(g, n, side)));
        kernels.sketch_outer(x, dy, data.batch(), side, Change{factor.data(), nullptr, nullptr, 0.0f, 0.0f, 0.0f}, got.data(), threads);
        check(std::string("sketch_outer weighted ") + name_of(kind), got, to(times(weighted, n, side)));
      }
      const std::vector<float> matrices = to(given);
      const Side scored{Kind::dense, 0, 0, 1.0f, 5, o * i, matrices.data(), o * i, 0};
      std::vector<float> got(n * 5);
      kernels.sketch_outer(x, dy, data.batch(), scored, Change{}, got.data(), threads);
      check("score_outer", got, to(times(g, n, scored)));
      std::vector<float> dots(n * n), norms(n), roots(n);
      std::vector<int64_t> expected(n * n);
      kernels.ghost_dot(x, dy, data.batch(), x, dy, data.batch(), dots.data(), threads);
      kernels.ghost_norm(x, dy, data.batch(), norms.data(), threads);
      for (int64_t a = 0; a < n; ++a)
        for (int64_t b = 0; b < n; ++b)
          expected[a * n + b] = std::inner_product(&g[a * o * i], &g[a * o * i] + o * i, &g[b * o * i], int64_t{0});
      for (int64_t a = 0; a < n; ++a) roots[a] = std::sqrt(static_cast<float>(expected[a * n + a]));
      check("ghost_dot", dots, to(expected));
      check("ghost_norm", norms, roots);
    }
  }
}

void test_ranks(const Kernels& kernels, int threads) {
  const int64_t m = 5;
  for (int64_t n : {1, 17, 3000, 600000})
    for (int64_t high : {3, 1 << 20}) {
      const std::vector<float> values = to(integers(m * n, 20, -high, high));
      const int64_t k = (n + 4) / 5;
      std::vector<float> ranks(m * n), got(m * n);
      std::vector<double> votes(n), sums(n), some(n), more(n);
      for (int64_t row = 0; row < m; ++row) {
        std::vector<float> sorted(&values[row * n], &values[row * n] + n);
        std::sort(sorted.begin(), sorted.end());
        for (int64_t c = 0; c < n; ++c) {
          const auto [first, last] = std::equal_range(sorted.begin(), sorted.end(), values[row * n + c]);
          const double rank = 0.5 * static_cast<double>((first - sorted.begin()) + (last - sorted.begin()) - 1);
          ranks[row * n + c] = static_cast<float>(rank);
          sums[c] += rank;
          votes[c] -= std::max(static_cast<double>(k) - rank, 0.0);
        }
      }
      const Matrix matrix{values.data(), Dtype::float32, m, n, n, 1};
      std::vector<double> wide(m * n);
      int64_t bad = kernels.rank(matrix, got.data(), nullptr, threads);
      check("rank", got, ranks);
      bad = std::max(bad, kernels.rank(matrix, nullptr, wide.data(), threads));
      check("rank in float64", wide, std::vector<double>(ranks.begin(), ranks.end()));
      bad = std::max(bad, kernels.vote(matrix, k, some.data(), threads));
      for (double& vote : votes) vote += 0.0;  // no negative zero
      for (double& vote : some) vote += 0.0;
      check("vote", some, votes);
      bad = std::max(bad, kernels.rank_and_vote(matrix, k, more.data(), some.data(), threads));
      for (double& vote : some) vote += 0.0;
      check("ranks of rank_and_vote", more, sums);
      check("votes of rank_and_vote", some, votes);
      std::vector<float> infinite = values;
      infinite[(m - 2) * n] = INFINITY;
      const int64_t row = kernels.rank({infinite.data(), Dtype::float32, m, n, n, 1}, got.data(), nullptr, threads);
      check("rows of rank that are not finite", std::vector<int64_t>{bad, row}, {-1, m - 2});
    }
}

// As the index lays the 8-bit copy out: parts side by side, longest row first.
void test_search(const Kernels& kernels, int threads) {
  const int64_t rows = 500, dims[] = {7, 70}, dim = 77, stride = 128, k = 9, parts_of_row = 2;
  std::vector<int64_t> values = integers(rows * dim, 30);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < dim; ++c) values[r * dim + c] *= int64_t{1} << (r * 7 % 5);  // lengths differ
  for (Dtype dtype : {Dtype::float32, Dtype::float16, Dtype::bfloat16}) {
    std::vector<int64_t> layer[2];
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < dim; ++c) layer[c >= dims[0]].push_back(values[r * dim + c]);
    const Stored stored[2] = {{layer[0], dtype}, {layer[1], dtype}};
    const RowPart parts[2] = {{0, dims[0], 0, 0, 0}, {8, dims[1], 1, 1, 0}};
    std::vector<uint8_t> codes(rows * stride + 64, 128), sorted(rows * stride + 64, 128);
    std::vector<float> scale(2 * rows), error(2 * rows), norm(2 * rows);
    for (int p = 0; p < 2; ++p)
      kernels.search.quantise(stored[p].wide.data(), dims[p], rows, dims[p], codes.data() + parts[p].offset, stride,
                              &scale[p * rows], &error[p * rows], &norm[p * rows]);
    std::vector<double> length(rows);
    std::vector<int32_t> order(rows);
    std::iota(order.begin(), order.end(), 0);
    for (int64_t r = 0; r < rows; ++r) length[r] = std::sqrt(norm[r] * double(norm[r]) + norm[rows + r] * double(norm[rows + r]));
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return length[a] > length[b]; });
    std::vector<float> by_order[3], longest;
    for (int64_t r = 0; r < rows; ++r) {
      memcpy(&sorted[r * stride], &codes[order[r] * stride], stride);
      if (r % kBlockRows == 0) longest.push_back(std::nextafter(static_cast<float>(length[order[r]]), INFINITY));
    }
    const std::vector<float>* plain[] = {&scale, &error, &norm};
    for (int a = 0; a < 3; ++a)
      for (int64_t p = 0; p < 2; ++p)
        for (int64_t r = 0; r < rows; ++r) by_order[a].push_back((*plain[a])[p * rows + order[r]]);
    const uintptr_t data[2] = {reinterpret_cast<uintptr_t>(stored[0].data()), reinterpret_cast<uintptr_t>(stored[1].data())};
    const uintptr_t none[2] = {0, 0};
    const StoreShard shard{0, rows, data, none};
    const StoredRows source{&shard, 1, dims, 2, dtype};
    const double weights[2] = {1.0, 0.5};
    for (bool cosine : {false, true})
      for (int64_t m : {1, 5, 13, 70}) {
        const std::vector<int64_t> asked = integers(m * dim, 31);
        const std::vector<float> queries = to(asked);
        std::vector<std::pair<double, int64_t>> all(rows);
        std::vector<double> expected, got(m * k);
        std::vector<int64_t> expected_rows, got_rows(m * k);
        const auto square = [&](int64_t r) {
          double sum = 0;
          for (int64_t c = 0; c < dim; ++c)
            sum += weights[c >= dims[0]] * double(values[r * dim + c]) * double(values[r * dim + c]);
          return sum;
        };
        for (int64_t q = 0; q < m; ++q) {
          double own = 0;
          for (int64_t c = 0; c < dim; ++c) own += weights[c >= dims[0]] * double(asked[q * dim + c] * asked[q * dim + c]);
          for (int64_t r = 0; r < rows; ++r) {
            double sum = 0;
            for (int64_t c = 0; c < dim; ++c)
              sum += weights[c >= dims[0]] * double(asked[q * dim + c] * values[r * dim + c]);
            const double both = std::sqrt(own) * std::sqrt(square(r));
            all[r] = {!cosine ? sum : both == 0 ? 0 : sum / both, -r};
          }
          std::sort(all.rbegin(), all.rend());
          for (int64_t i = 0; i < k; ++i) {
            expected.push_back(all[i].first);
            expected_rows.push_back(-all[i].second);
          }
        }
        const Segment segment{sorted.data(),      stride,
                              rows,               parts_of_row,
                              by_order[0].data(), by_order[1].data(),
                              by_order[2].data(), order.data(),
                              0,                  cosine ? nullptr : longest.data(),
                              nullptr};
        const SearchStats stats = exact_search(kernels.search, &segment, 1, parts, 2, source,
                                               {queries.data(), m, weights, cosine}, nullptr, k, got.data(), got_rows.data(), threads);
        check(cosine ? "scores of a cosine search" : "scores of a search", got, expected);
        check("rows of a search", got_rows, expected_rows);
        check("rows that the bound does not allow", std::vector<int64_t>{stats.bad_row}, {-1});
      }
  }
}

}  // namespace

int main() {
  std::string isas;
  bool same = true;
  for (const Kernels* kernels : supported_kernels()) {
    isas += std::string(" ") + kernels->isa;
    for (int threads : {1, 3}) {
      digest = 0xCBF29CE484222325u;
      test_philox();
      test_random_matrix(*kernels, threads);
      test_sketch(*kernels, threads);
      test_gradients(*kernels, threads);
      test_ranks(*kernels, threads);
      test_search(*kernels, threads);
      ++checks;
      if (digest == kDigest) continue;
      same = false;
      std::printf("%s, %d threads: digest 0x%016" PRIx64 " instead of 0x%016" PRIx64 "\n", kernels->isa, threads, digest, kDigest);
    }
  }
  if (failures > 0 || !same) {
    std::printf("%" PRId64 " of %" PRId64 " checks failed on%s\n", failures + !same, checks, isas.c_str());
    return 1;
  }
  std::printf("%" PRId64 " checks passed on%s\n", checks, isas.c_str());
  return 0;
}
