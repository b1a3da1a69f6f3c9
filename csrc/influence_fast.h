/* The kernels of influence_fast for C and C++: per-sample gradients of linear layers, projected, scored and compared without being
 * formed; ranks and votes; exact search for the largest inner products. C99 or C++, no Python, no other library.
 *
 * Shapes: N samples, T tokens, i inputs and o outputs of a layer, k projected numbers. G_n = sum over tokens t of
 * dy[n, t] (outer) x[n, t] is the gradient (o, i) of a linear layer for sample n: x are its inputs, dy the gradients of the loss with
 * respect to its outputs. Sizes and strides count elements, not bytes, and are 0 or more. Arrays that have no strides here are
 * contiguous, the last index fastest. Inputs of 16 bits are widened to float32; sums are in float32 unless a function says otherwise.
 *
 * Results do not depend on the number of threads, and are those of the Python package's operations of the same names, bit for bit,
 * on one instruction set. Random entries are the same on every machine and in every release of a major version.
 *
 * Every function that returns int returns INFLUENCE_FAST_OK or one of the codes below, and then influence_fast_last_error() says
 * what was wrong. Arguments are checked first: null where an array is needed, sizes below 0, products of sizes beyond 2^63, addresses
 * that are not aligned to an element, unknown numbers for types. What cannot be seen is how long an array is: outputs must have the
 * size that is given, must not overlap an input, and hold nothing to rely on where a call fails. Where an input or output has no
 * elements its address may be null, and an output without elements is left alone.
 *
 * Functions may be called from several threads at once. Calls that come while another is at work use their own thread alone. Memory
 * is given back by whoever took it: nothing that is passed in is kept, but for the rows and entries that a comment says so of. */
#ifndef INFLUENCE_FAST_H
#define INFLUENCE_FAST_H

#include <stdint.h>

/* Of this header; influence_fast_version() tells that of the library, as major * 10000 + minor * 100 + patch. Within a major version
 * (within a minor one before 1.0) functions, structures and numbers here stay as they are; others may be added. */
#define INFLUENCE_FAST_VERSION_MAJOR 0
#define INFLUENCE_FAST_VERSION_MINOR 1
#define INFLUENCE_FAST_VERSION_PATCH 0
#define INFLUENCE_FAST_VERSION_NUMBER \
  (INFLUENCE_FAST_VERSION_MAJOR * 10000 + INFLUENCE_FAST_VERSION_MINOR * 100 + INFLUENCE_FAST_VERSION_PATCH)

#if defined(__GNUC__)
#define INFLUENCE_FAST_API __attribute__((visibility("default")))
#else
#define INFLUENCE_FAST_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* What functions return. */
enum {
  INFLUENCE_FAST_OK = 0,
  INFLUENCE_FAST_INVALID_ARGUMENT = 1, /* the message names it, with what was expected and what came */
  INFLUENCE_FAST_OUT_OF_MEMORY = 2,    /* working memory; nothing is left behind */
  INFLUENCE_FAST_NOT_FINITE = 3,       /* NaN or infinity among values that have to be compared; the message names the row */
  INFLUENCE_FAST_CHANGED_ROWS = 4,     /* rows of an index are not those that it was built from */
  INFLUENCE_FAST_FAILED = 5            /* anything else, such as threads that the system does not give */
};

/* Types of elements. */
enum { INFLUENCE_FAST_FLOAT32 = 0, INFLUENCE_FAST_FLOAT16 = 1, INFLUENCE_FAST_BFLOAT16 = 2 };

/* What a side of a projection is: entries of +1 and -1; standard normal entries; one +1 or -1 in each column (a sparse
 * Johnson-Lindenstrauss transform); given entries. */
enum {
  INFLUENCE_FAST_RADEMACHER = 2,
  INFLUENCE_FAST_GAUSSIAN = 3,
  INFLUENCE_FAST_SJLT = 4,
  INFLUENCE_FAST_DENSE = 1
};

/* A tensor (samples, tokens, features); features lie one after another. data is aligned to an element. */
typedef struct influence_fast_tokens {
  const void *data;
  int32_t dtype;
  int64_t samples, tokens, features;
  int64_t sample_stride, token_stride;
} influence_fast_tokens;

/* A tensor (rows, columns). data is aligned to an element. */
typedef struct influence_fast_matrix {
  const void *data;
  int32_t dtype;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
} influence_fast_matrix;

/* A matrix (k, features) that projects vectors of `features` numbers to k. Everything is multiplied by scale, which is finite; write
 * 1 for the entries as they are.
 *
 * Random kinds are a pure function of kind, key, row and column (of k too for sjlt): of Philox 4x32-10. Keys are those of the Python
 * package where they are integers (a negative one as uint64_t); there, a name stands for the first 8 bytes of its MD5 digest, the
 * lowest first. The matrix has the columns [offset, offset + features) of its key's, so that a long vector can be sketched in
 * pieces. Limits: 1 <= k < 2^31, 1 <= features, offset + features up to 2^39 for rademacher, 2^34 for gaussian, 2^63 - 128 for sjlt.
 *
 * entries: for INFLUENCE_FAST_DENSE, float32 (k, features) with rows row_stride apart. For INFLUENCE_FAST_GAUSSIAN null, or what
 * influence_fast_keep() wrote for this very side, which influence_fast_sketch() then reads instead of making it anew; row_stride
 * is not read. Null for the other kinds. Entries must live as long as the side is used. */
typedef struct influence_fast_side {
  int32_t kind;
  float scale;
  uint64_t key;
  int64_t k, features, offset;
  const float *entries;
  int64_t row_stride;
} influence_fast_side;

/* What becomes of each entry g of a gradient before it is sketched: float32 (o, i) arrays, null where not wanted.
 * weight: g is multiplied by it. m and v, both or none and not beside weight: Adam's moments; g becomes Adam's update
 * (beta1 m + (1 - beta1) g) / sqrt(beta2 v + (1 - beta2) g^2 + eps), as LESS (Xia et al. 2024) has it. */
typedef struct influence_fast_change {
  const float *weight;
  const float *m, *v;
  float beta1, beta2, eps;
} influence_fast_change;

/* ---- The library */

/* As INFLUENCE_FAST_VERSION_NUMBER, of the library that was loaded. */
INFLUENCE_FAST_API int influence_fast_version(void);

/* What was wrong with the last call of this thread that did not return INFLUENCE_FAST_OK; "" before there was one. It stays valid
 * until the next such call of the thread. */
INFLUENCE_FAST_API const char *influence_fast_last_error(void);

/* The instruction set in use, such as "avx512" (never null), and another from now on, for all threads: one of the names that the
 * message lists where it is not known. The environment variable INFLUENCE_FAST_ISA sets the first; a name there that this
 * machine does not have makes every call fail and this one return "". Entries of influence_fast_keep() belong to one. */
INFLUENCE_FAST_API const char *influence_fast_isa(void);
INFLUENCE_FAST_API int influence_fast_set_isa(const char *isa);

/* How many threads a call may use, for all threads of the process: the processors that it may run on until another number, 1 to 1024,
 * is set; 0 goes back to that. */
INFLUENCE_FAST_API int influence_fast_threads(void);
INFLUENCE_FAST_API int influence_fast_set_threads(int threads);

/* ---- Random matrices, and rows projected by them */

/* Entries [row, row + rows) x [column, column + columns) of a random side, times its scale: out (rows, columns). Columns are
 * counted from the side's offset on. */
INFLUENCE_FAST_API int influence_fast_random_matrix(const influence_fast_side *side, int64_t row, int64_t rows, int64_t column,
                                                    int64_t columns, float *out);

/* g (N, features) times the transposed matrix of a random side: out (N, k). g has column_stride 1. Sums over pieces of
 * features (offset) that begin at multiples of 32768, or of 8 k beyond a k of 4096, have the bits of one sum when they are added. */
INFLUENCE_FAST_API int influence_fast_sketch(const influence_fast_matrix *g, const influence_fast_side *side, float *out);

/* The same of float64 g (rows, columns), rows row_stride apart, summed in float64: out (rows, k). */
INFLUENCE_FAST_API int influence_fast_sketch_float64(const double *g, int64_t rows, int64_t columns, int64_t row_stride,
                                                     const influence_fast_side *side, double *out);

/* The entries of a gaussian side, each of which costs a logarithm and a cosine, to be kept between calls of
 * influence_fast_sketch(): how many floats they take on the instruction set in use, and the entries themselves. */
INFLUENCE_FAST_API int influence_fast_kept_numbers(const influence_fast_side *side, int64_t *numbers);
INFLUENCE_FAST_API int influence_fast_keep(const influence_fast_side *side, float *entries);

/* ---- Gradients of linear layers. x (N, T, i) and dy (N, T, o) have the same N, T and type. spans, int64 (N, 2) or null: the tokens
 * [spans[n][0], spans[n][1]) of sample n count, others are never read into a result; null: all. */

/* The gradients themselves: out (N, o, i). */
INFLUENCE_FAST_API int influence_fast_outer(const influence_fast_tokens *x, const influence_fast_tokens *dy, const int64_t *spans,
                                            float *out);

/* P_out G P_in^T without forming G: out (N, k_out, k_in). p_in has i features, p_out has o; null is the identity, whose k is
 * its features. */
INFLUENCE_FAST_API int influence_fast_project_outer(const influence_fast_tokens *x, const influence_fast_tokens *dy,
                                                    const int64_t *spans, const influence_fast_side *p_in,
                                                    const influence_fast_side *p_out, float *out);

/* G, flattened to o * i numbers, times the transposed matrix of a side of o * i features: out (N, k). G is never stored.
 * change may be null. */
INFLUENCE_FAST_API int influence_fast_sketch_outer(const influence_fast_tokens *x, const influence_fast_tokens *dy,
                                                   const int64_t *spans, const influence_fast_side *side,
                                                   const influence_fast_change *change, float *out);

/* Inner products with given matrices q, float32 (count, o, i): out (N, count). */
INFLUENCE_FAST_API int influence_fast_score_outer(const influence_fast_tokens *x, const influence_fast_tokens *dy,
                                                  const int64_t *spans, const float *q, int64_t count, float *out);

/* Inner products of two sets of gradients of one layer, without forming them: out (Na, Nb). Both have one type. */
INFLUENCE_FAST_API int influence_fast_ghost_dot(const influence_fast_tokens *xa, const influence_fast_tokens *dya,
                                                const int64_t *spans_a, const influence_fast_tokens *xb,
                                                const influence_fast_tokens *dyb, const int64_t *spans_b, float *out);

/* Frobenius norms of the gradients, without forming them: out (N). */
INFLUENCE_FAST_API int influence_fast_ghost_norm(const influence_fast_tokens *x, const influence_fast_tokens *dy,
                                                 const int64_t *spans, float *out);

/* ---- Ranks and votes of the columns of an influence matrix: values float32 (m, n), any strides, with 1 row and 1 column or more.
 * INFLUENCE_FAST_NOT_FINITE where a row has NaN or infinity. */

/* Ranks within each row, 0 = lowest, ties get their average rank: out (m, n). float32 holds half integers for n up to 2^22 alone;
 * more columns are an invalid argument there. */
INFLUENCE_FAST_API int influence_fast_rank(const influence_fast_matrix *values, float *out);
INFLUENCE_FAST_API int influence_fast_rank_float64(const influence_fast_matrix *values, double *out);

/* votes (n): minus the sum over rows of max(k - rank, 0), for 1 <= k <= n. */
INFLUENCE_FAST_API int influence_fast_vote(const influence_fast_matrix *values, int64_t k, double *votes);

/* The same, and ranks (n): the sum over rows of ranks, in one pass. */
INFLUENCE_FAST_API int influence_fast_rank_and_vote(const influence_fast_matrix *values, int64_t k, double *ranks, double *votes);

/* ---- Exact search over rows in memory: an 8-bit copy of the rows is scanned, and what its error cannot rule out is scored exactly */

typedef struct influence_fast_index influence_fast_index;

/* Index of rows that consist of `count` layers, each a matrix of the same rows and one type: columns and rows without gaps
 * (column_stride 1, row_stride columns), 1 or more of each, all finite. The matrices' memory is kept, not copied: it must live and
 * stay as it is until the index is freed. The copy takes about a byte a number. *index is null after a failure. */
INFLUENCE_FAST_API int influence_fast_index_build(const influence_fast_matrix *layers, int64_t count, influence_fast_index **index);

/* Nothing happens for null. No other call may be at work on the index. */
INFLUENCE_FAST_API void influence_fast_index_free(influence_fast_index *index);

/* Rows of an index, and columns of all its layers together: 0 for null. */
INFLUENCE_FAST_API int64_t influence_fast_index_rows(const influence_fast_index *index);
INFLUENCE_FAST_API int64_t influence_fast_index_columns(const influence_fast_index *index);

/* The k best rows of each query: scores float64 (count, k), best first, ties in the order of rows, and their numbers, int64 (count, k).
 * queries: float32 (count, columns of all layers), finite. A score is the sum over layers of weight times the inner product, in float64;
 * weights: float64 by layer, finite and not negative, null for 1 each. cosine not 0: it is divided by both lengths,
 * sqrt(sum of weight |layer|^2), and 0 where one of them is. allowed: a byte for each row of the index, 0 for rows that are left out;
 * null for none. Where fewer than k rows are allowed the last numbers are -1 and their scores NaN. For the rows that harm most,
 * negate the queries. */
INFLUENCE_FAST_API int influence_fast_index_search(const influence_fast_index *index, const float *queries, int64_t count,
                                                   const double *weights, int cosine, const uint8_t *allowed, int64_t k,
                                                   double *scores, int64_t *rows);

/* The same scores of given rows, int64 (count, width): scores float64 (count, width), NaN where a number is below 0. */
INFLUENCE_FAST_API int influence_fast_index_score(const influence_fast_index *index, const float *queries, int64_t count,
                                                  const double *weights, int cosine, const int64_t *rows, int64_t width,
                                                  double *scores);

#ifdef __cplusplus
}
#endif

#endif
