// Exact nearest rows by inner product: a scan over an 8-bit copy with a bound on its error, then float64 sums over the
// rows that the bound cannot rule out.
//
// A row is a few parts (a layer each, or a piece of one) side by side. A part of a row is g = scale * (code - 128) + rest
// with |rest| <= error and |g| <= norm; a query u likewise with integers q. Then
//   |<u, g> - scale_u scale_g <q, code - 128>| <= |rest_u| norm_g + |scale_u q| error_g,
// which, with room for the rounding of float32, is the slack of a score. Integers are exact on every instruction set.
//
// A part may be a layer's factors, g = sum_c u_c v_c^T, and its codes those of all u_c and v_c. The query's matrix is a sum of
// terms a b^T, whose codes stand for P, and a rest E. With P and E in the norm that bounds a matrix between two vectors,
//   |<u, g> - sum <a, u_c> <b, v_c> of the codes| <= |E| sum_c |u_c| |v_c| + |P| sum_c (|rest u_c| |v_c| + |u_c~| |rest v_c|):
// the same two products of a number of the row with one of the query, now norm = sum_c |u_c| |v_c|, error = sum_c (..).
#pragma once

#include <cstdint>
#include <vector>

#include "../types.h"

namespace influence_fast {

// Rows of a block are tiles of this many queries; a few queries are scanned without tiles.
constexpr int kWideTile = 64, kNarrowTile = 16, kFewQueries = 8;

// Rows of a block: a multiple of the rows of every tile; of 512 bytes they are 96 KB, in second-level cache.
constexpr int64_t kBlockRows = 192;

// A part takes `dim` bytes of a row from `offset` (a multiple of four) on, and holds the numbers of its layer (counted among
// the chosen ones) from `begin` on. dim is at most 65536, so that sums fit 32 bits.
struct RowPart {
  int64_t offset, dim, index, layer, begin;
  // Of factors, else 0: how many, and numbers of both sides; u_1, v_1, u_2, ... each begin at a multiple of four bytes, dim is
  // all of them. A pair has one scale, so that those of a part begin `scales` after index; |g| stands among the norms, `lengths`
  // after index, which is 0 where norm is |g| itself.
  int64_t factors = 0, out = 0, in = 0, scales = 0, lengths = 0;
};

// What stands for the queries' matrices of the parts that are factors, by part and query: terms first[at] .. first[at + 1],
// whose codes, each side padded with zeros to 64 numbers, begin at codes + begin[at].
struct QueryTerms {
  const int64_t *first, *begin;
  const int8_t* codes;
  const double* scale;                    // by term
  const int32_t* shift;                   // by term and side: 128 * sum of the codes
  const double *along, *across, *summed;  // at part * queries + query: |P|, |E|, and what rounding of the terms is relative to
};

// Consecutive rows; scale, error and norm of a part and row r are at index * ld + r. Codes may be read 64 bytes past the end.
struct CodeBlock {
  const uint8_t* codes;
  int64_t stride, rows;
  const float *scale, *error, *norm;
  int64_t ld;  // scales of a part and row are at (index + scales) * ld + r
  const float* factor;  // multiplies scores and slacks of a row, or null
};

// A tile of `width` queries; all else is at p * width + query. Codes of a tile of kWideTile or kNarrowTile, part by part: four
// numbers of query 0, of query 1, ..., then the next four numbers; of fewer queries, query by query, each part padded
// with zeros to 64 numbers.
struct PartTerms {
  const int8_t* codes;
  const float* scale;
  const int32_t* shift;
  int64_t count;
};

struct QueryTile {
  int width;
  const int8_t* codes;
  int64_t stride;  // of fewer queries
  const float *scale, *along, *across;
  const int32_t* shift;     // 128 * sum of the codes
  const PartTerms* terms;   // of parts that are factors
};

struct SearchKernels {
  // score and slack (rows, width), of up to kFewQueries (width, kBlockRows); bit q of hits[r] tells that score + slack of
  // query q is not below limit[q].
  void (*block)(const RowPart* parts, int64_t count, const CodeBlock& block, const QueryTile& queries,
                const float* limit, float* score, float* slack, uint64_t* hits);
  // codes of float32 rows (row stride ld_in); scale, error, norm at [r].
  void (*quantise)(const float* rows, int64_t ld_in, int64_t count, int64_t dim, uint8_t* codes, int64_t stride,
                   float* scale, float* error, float* norm);
  // inverse[r] = 1 / sqrt(sum_p weight_p |g_p[r]|^2), 0 where that is 0: what a cosine multiplies scores by.
  void (*inverse_lengths)(const RowPart* parts, int64_t count, const CodeBlock& block, const double* weights,
                          float* inverse);
  // The sum in float64 of 16 interleaved sums, added in pairs: the same bits on every instruction set, since a product of two
  // float32 is exact in float64.
  double (*dot)(const float* a, const float* b, int64_t count);
  void (*widen)(const void* in, Dtype dtype, int64_t count, float* out);
};

// A piece of the 8-bit copy: rows in an order of their own, order[position] + first is the number of a row. Pieces come in
// the order of their rows.
struct Segment {
  const uint8_t* codes;
  int64_t stride, rows, parts;
  const float *scale, *error, *norm;  // (parts, rows), and more of factors: RowPart
  const int32_t* order;
  int64_t first;
  const float* longest;  // by block: bound on |g| over the chosen parts; null: no bound
  const float* factor;   // by row: what Queries::lengths divides scores by, inverted, to 1e-6; null without
};

// Numbers of a row that share a scale, where blocks have one.
constexpr int64_t kScaled = 32;

// Where the exact rows are: a shard holds rows from first on, layer l of row r at data[l] + (r - first) * the bytes of a row.
struct StoreShard {
  int64_t first, rows;
  const uintptr_t* data;   // by layer
  const uintptr_t* scale;  // by layer: float32 that each row is multiplied with, null for 1, never for int8; with bits bfloat16
                           // of each row's blocks
};

struct StoredRows {
  const StoreShard* shards;
  int64_t shard_count;
  const int64_t* dims;  // of the chosen layers
  int64_t layers;
  Dtype dtype;
  // Of int8: blocks of kScaled numbers have scales, and codes 8 bits or 4, the first of two in the lower half of a byte, plus 8.
  int bits = 0;
  // A row of layer l is factors vectors of outs[l] numbers, then as many of dims[l] / outs[l], and stands
  // for the sum of their outer products. Rows are there as they are where factors or outs[l] is 0.
  int64_t factors = 0;
  const int64_t* outs = nullptr;
};

// queries (m, sum of dims) float32; weight of each layer. Score: sum_l weight_l <v_l, g_l>; for cosine divided by
// sqrt(sum_l weight_l |v_l|^2) sqrt(sum_l weight_l |g_l|^2), 0 where that is 0; else, where lengths are given, divided by
// that of the row, 0 where it is 0.
struct Queries {
  const float* values;
  int64_t count;
  const double* weights;
  bool cosine;
  const double* lengths = nullptr;  // by row, or null; a segment's factor is then the inverse, and cosine is false
};

// What was read of a block of a segment.
constexpr uint8_t kUnseen = 0, kOrderSeen = 1, kAllSeen = 2;

struct SearchStats {
  int64_t rows_scanned, bad_row;  // bad_row: a stored row whose score the bound does not allow, or -1
  int64_t misplaced;              // a segment whose order names a row outside it, or -1
  std::vector<int64_t> scored;    // stored rows that were read, those of one query after those of another
};

// The k best rows of each query among those with allowed[row] (or all): scores float64 (m, k), rows (m, k), best first, ties
// in row order; where fewer than k are allowed the rest is -1. `seen`, by block of all segments, is set to what was read; longest
// of every block is read.
SearchStats exact_search(const SearchKernels& kernels, const Segment* segments, int64_t segment_count, const RowPart* parts,
                      int64_t part_count, const StoredRows& source, const Queries& queries, const uint8_t* allowed,
                      int64_t k, double* scores, int64_t* rows, int threads, const QueryTerms* terms = nullptr,
                      uint8_t* seen = nullptr);

// Scores of given rows (m, width); a row below 0 has score NaN.
void exact_scores(const SearchKernels& kernels, const StoredRows& source, const Queries& queries, const int64_t* rows,
                  int64_t width, double* scores, int threads);

}  // namespace influence_fast
