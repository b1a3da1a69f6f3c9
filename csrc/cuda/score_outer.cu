// <G_n, q_j> per sample and query: strips of the samples' gradients are written (outer.cu) and multiplied with the same
// strip of all queries, whose entries are the features of inner products (gram.cuh).
//
// Keeping a tile of G in registers instead would read every query once per sample, 4 m bytes an entry of G from the L2
// cache; a strip is written and read once, 8 bytes an entry, and the queries are read once for 64 samples. Its products
// run on the tensor cores, m FLOPs an entry at a rate that additions in float32 registers do not reach.
//
// How a weight is cut into strips, and a strip into the shares of blocks, depends on the weight alone: a sample's scores
// are the same bits in every batch. A block adds its share of a strip to what it kept of the strips before; these parts
// are added up in order.
#include "gram.cuh"

namespace {

constexpr int kScores = 64;  // samples x queries of a block
#ifdef INFLUENCE_FAST_SIMT   // small shapes reach every loop on the host
constexpr int64_t kStrip = 1 << 10, kScratch = 1 << 16, kShare = 1 << 9;
#else
constexpr int64_t kStrip = 1 << 19, kScratch = 1 << 25;  // entries of a strip, of one sample and of those made together
constexpr int64_t kShare = 1 << 10;                      // entries that a block multiplies
#endif

struct ScoresParams {
  Tokens g, q;  // (samples or queries, 1, entries)
  Batch samples, queries;
  float* parts;  // (splits, samples, queries)
  int64_t splits;
  bool add;
};

__global__ void __launch_bounds__(2 * kScores, 2) scores_kernel(const __grid_constant__ ScoresParams p) {
  using P = GramPipeline<float, kScores>;
  const int64_t split = blockIdx.x % p.splits, tile = blockIdx.x / p.splits;
  const int64_t across = ceil_div<int64_t>(p.queries.samples, kScores);
  const int64_t row0 = tile / across * kScores, column0 = tile % across * kScores;
  const int64_t first = split * kShare, last = p.g.features < first + kShare ? p.g.features : first + kShare;

  SharedArena arena;
  const auto operands = arena.take<P::Part>(P::bytes / sizeof(P::Part));
  const uint32_t needed = needed_blocks<kScores>([&](int row, int column) {
    return row0 + row < p.samples.samples && column0 + column < p.queries.samples;
  });
  float sum[32] = {};
  gram_tile<float, kScores>(operands, p.g, p.samples, {row0, 0, 0}, p.q, p.queries, {column0, 0, 0}, false, first, last,
                            needed, [&](int i, float value) { sum[i] += value; });
  float* parts = p.parts + split * p.samples.samples * p.queries.samples;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int m = i / 16, j = i / 4 % 4, c = i % 4;
    const int64_t row = row0 + gram_row<kScores>(m, c), column = column0 + gram_column<kScores>(j, c);
    if (row >= p.samples.samples || column >= p.queries.samples) continue;
    float* to = parts + row * p.queries.samples + column;
    *to = p.add ? *to + sum[i] : sum[i];
  }
}

// Rows of the weight in a strip.
int64_t strip_rows(int64_t features_in, int64_t features_out) {
  const int64_t rows = kStrip / features_in / 128 * 128;
  const int64_t most = rows < 128 ? 128 : rows;
  return features_out < most ? features_out : most;
}

}  // namespace

ScoreScratch score_outer_scratch(int64_t samples, int64_t features_in, int64_t features_out, int64_t queries) {
  ScoreScratch s;
  s.rows = strip_rows(features_in, features_out);
  const int64_t fitting = kScratch / (s.rows * features_in);
  s.samples = samples < fitting ? samples : fitting < 1 ? 1 : fitting;
  s.splits = ceil_div<int64_t>(s.rows * features_in, kShare);
  s.gradients = s.samples * s.rows * features_in;
  s.parts = s.splits > 1 ? s.splits * s.samples * queries : 0;
  s.blocks = s.splits * ceil_div<int64_t>(s.samples, kScores) * ceil_div<int64_t>(queries, kScores);
  return s;
}

void score_outer(const ScoreOuterParams& p, uint64_t stream) {
  const int64_t i = p.x.features, o = p.dy.features, total = p.batch.samples;
  const ScoreScratch scratch = score_outer_scratch(total, i, o, p.queries);
  for (int64_t begin = 0; begin < total; begin += scratch.samples) {
    const int64_t count = total - begin < scratch.samples ? total - begin : scratch.samples;
    float* const out = p.out + begin * p.queries;
    float* const parts = scratch.splits > 1 ? p.parts : out;
    for (int64_t row = 0; row < o; row += scratch.rows) {
      const int64_t rows = o - row < scratch.rows ? o - row : scratch.rows, size = bytes_of(p.x.dtype);
      OuterParams made{p.x, p.dy, p.batch, p.gradients};
      made.x.data = static_cast<const char*>(p.x.data) + begin * p.x.sample_stride * size;
      made.dy.data = static_cast<const char*>(p.dy.data) + (begin * p.dy.sample_stride + row) * size;
      made.dy.features = rows;
      made.x.samples = made.dy.samples = made.batch.samples = count;
      if (p.batch.spans) made.batch.spans = p.batch.spans + 2 * begin;
      outer(made, stream);

      ScoresParams scores{};
      scores.g = {p.gradients, Dtype::float32, count, 1, rows * i, rows * i, 0};
      scores.q = {p.q + row * i, Dtype::float32, p.queries, 1, rows * i, o * i, 0};
      scores.samples = {count, 1, nullptr};
      scores.queries = {p.queries, 1, nullptr};
      scores.parts = parts;
      scores.splits = ceil_div<int64_t>(rows * i, kShare);
      scores.add = row > 0;
      const int64_t tiles = ceil_div<int64_t>(count, kScores) * ceil_div<int64_t>(p.queries, kScores);
      launch("scores", scores_kernel, dim3(static_cast<unsigned>(scores.splits * tiles)), 2 * kScores,
             GramPipeline<float, kScores>::bytes, stream, scores);
    }
    if (scratch.splits > 1) {
      const int64_t inner = count * p.queries;
      sum_parts({parts, out, 1, inner, scratch.splits, 0, inner, nullptr, 1, 1.0f}, stream);
    }
  }
}
