// What the bindings hand to the launchers: pointers on the device, sizes, strides in elements, a stream. Checked there.
#pragma once

#include <stddef.h>
#include <stdint.h>

enum class Type : int { float32 = 0, float16 = 1, bfloat16 = 2 };
enum class Kind : int { rademacher = 0, sjlt = 1, gaussian = 2 };

// An implicit (k, features) random matrix.
struct Side {
  uint32_t key0, key1;
  Kind kind;
  uint32_t k;
  float scale;
};

// One projected layer. x (N, T, features_in), dy (N, T, features_out), last stride 1.
struct ProjectedLayer {
  const void *x, *dy;
  int64_t x_sample, x_token, dy_sample, dy_token;
  int64_t features_in, features_out;
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
  Type type;
  int64_t samples, tokens;
  const int64_t* spans;  // (N, 2) or null
  int row_warps;         // warps side by side along tokens; a tile has 32 * row_warps tokens
  int splits;            // tiles along tokens
};

struct SketchParams {
  const void* g;  // (N, D)
  int64_t samples, features, stride;
  Type type;
  Side side;
  float* out;    // (N, k)
  float* parts;  // (splits, N, k), or out itself where there is one split
  int64_t splits;
};

struct SketchOuterParams {
  const void *x, *dy;
  int64_t x_sample, x_token, dy_sample, dy_token;
  int64_t samples, tokens, features_in, features_out;
  const int64_t* spans;
  Type type;
  Side side;
  const float* scale;  // (features_out, features_in) contiguous, or null
  float* out;          // (N, k)
  float* parts;        // (N, strips, k), or out itself where there is one strip
  int64_t strips;
};

struct RandomMatrixParams {
  Side side;
  int64_t row, rows, column, columns;
  Type type;
  void* out;  // (rows, columns) contiguous
};

// Rows of a matrix (rows, columns), last stride 1, ranked; `first_row` is their place in what the caller ranks.
struct RankParams {
  const void* values;
  int64_t rows, columns, stride, first_row;
  Type type;
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
  double* votes;  // (columns), added to
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

void project_outer(const ProjectOuterParams& p, uint64_t stream);
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
