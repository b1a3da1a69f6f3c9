// What the bindings hand to the launchers, checked there: pointers on the device, scratch, how work is cut.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../types.h"

using namespace influence_fast;

// One projected layer.
struct ProjectedLayer {
  Tokens x, dy;
  Side in, out;
  float* result;  // (N, k_out, k_in)
  float* parts;   // (N, splits, k_out, k_in); the result itself where there is one split
};

constexpr int kLayersPerLaunch = 16;
constexpr int64_t kProjectMaxK = 128;             // per side: what shared memory holds of a tile's projections
constexpr int64_t kProjectMaxFeatures = 1 << 15;  // per side: keeps chains of float32 additions short

struct ProjectOuterParams {
  ProjectedLayer layer[kLayersPerLaunch];
  int layers;
  Batch batch;    // of every layer, as is the dtype of the first one
  int row_warps;  // warps side by side along tokens; a tile has 32 * row_warps tokens
  int splits;     // tiles along tokens
};

struct SketchParams {
  Matrix g;  // (N, D)
  Side side;
  float* out;    // (N, k)
  float* parts;  // (splits, N, k), or out itself where there is one split
  int64_t splits;
};

struct SketchOuterParams {
  Tokens x, dy;
  Batch batch;
  Side side;
  const float* scale;  // (o, i) contiguous, or null
  float* out;          // (N, k)
  float* parts;        // (N, strips, k), or out itself where there is one strip
  int64_t strips;
};

struct OuterParams {
  Tokens x, dy;
  Batch batch;
  float* out;     // (N, o, i)
  int64_t first;  // of each sample's tokens in a launch: outer() fills it in
};

struct ScoreOuterParams {
  Tokens x, dy;
  Batch batch;
  const float* q;  // (queries, o, i)
  int64_t queries;
  float* out;                // (N, queries)
  float *gradients, *parts;  // ScoreScratch floats of each
};

// How the weight and the batch of score_outer are cut, and the floats of scratch that it takes.
struct ScoreScratch {
  int64_t rows, samples, splits;  // rows of the weight and samples at a time; blocks that share a strip
  int64_t gradients, parts, blocks;
};

struct GhostParams {
  Tokens xa, dya, xb, dyb;
  Batch a, b;
  bool paired;    // sample n with sample n alone: b is a
  float* out;     // (Na, Nb), or (N) of pairs
  float* parts;   // (splits, Na, Nb), or out itself where there is one split
  int64_t splits;
  int64_t pairs;         // Na Nb, or N
  int shift_a, shift_b;  // rows of a sample in a tile of short samples, as powers of two: ghost() fills them in
};

struct RandomMatrixParams {
  Side side;
  int64_t row, rows, column, columns;
  Dtype dtype;
  void* out;  // (rows, columns) contiguous
};

// Rows of a matrix ranked; `first_row` is their place in what the caller ranks.
struct RankParams {
  Matrix values;
  int64_t first_row;
  uint64_t *keys, *sorted_keys;    // (rows, columns) each
  uint32_t *index, *sorted_index;  // likewise
  void* workspace;
  size_t workspace_bytes;
  void* ranks;   // (rows, columns), float64 if wide, else float32
  int64_t* bad;  // lowered to the first row with NaN or infinity
  bool wide;
};

struct VoteParams {
  const void* ranks;  // (rows, columns)
  int64_t rows, columns;
  double k;
  double* votes;      // (columns), added to
  double* rank_sums;  // likewise, or null
  bool wide;
};

#ifdef INFLUENCE_FAST_SIMT  // small shapes reach every loop on the host
constexpr int64_t kMaxSplits = 4;
constexpr int kChain = 2;
#else
constexpr int64_t kMaxSplits = 128;  // of a sketch's features
// Feature blocks after which a warp's accumulators move on to shared memory: the matrix unit truncates its sums, short
// chains keep that far below float32 rounding of the whole.
constexpr int kChain = 64;
#endif

// How work is cut depends on shapes alone, never on the card or the batch: the same sample gives the same bits.
int project_outer_row_warps(int64_t tokens, int64_t k_in, int64_t k_out);
int64_t project_outer_splits(int64_t tokens, int64_t k_in, int64_t k_out);
int64_t sketch_splits(Kind kind, int64_t features, int64_t k);
int64_t sketch_outer_strips(int64_t features_in, int64_t features_out);
int64_t outer_blocks(int64_t features_in, int64_t features_out);
ScoreScratch score_outer_scratch(int64_t samples, int64_t features_in, int64_t features_out, int64_t queries);
int64_t ghost_splits(Dtype dtype, int64_t tokens_a, int64_t tokens_b, bool paired);
int64_t ghost_blocks(const GhostParams& p);

void outer(const OuterParams& p, uint64_t stream);
void project_outer(const ProjectOuterParams& p, uint64_t stream);
void score_outer(const ScoreOuterParams& p, uint64_t stream);
void ghost(GhostParams p, uint64_t stream);
void sketch_dense(const SketchParams& p, uint64_t stream);
void sketch_sjlt(const SketchParams& p, uint64_t stream);
void sketch_outer(const SketchOuterParams& p, uint64_t stream);
size_t rank_workspace(int64_t rows, int64_t columns);
void rank(const RankParams& p, uint64_t stream);
void vote(const VoteParams& p, uint64_t stream);
void random_matrix(const RandomMatrixParams& p, uint64_t stream);

// out[i] = scale * sum over s of parts[i / inner][s][i % inner] (samples outside, parts inside) in the order of s.
// With spans, a sample has parts for its live tiles only: ceil(length / tile), at least one.
struct SumPartsParams {
  const float* parts;
  float* out;
  int64_t samples, inner, splits;
  int64_t sample_stride, split_stride;
  const int64_t* spans;
  int64_t tile;
  float scale;
};
void sum_parts(const SumPartsParams& p, uint64_t stream);
