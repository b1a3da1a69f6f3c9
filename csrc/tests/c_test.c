/* The C interface as a C program sees it: every function against plain loops in double, and what each says of arguments that are
 * wrong. Compiled as C99 with -Wall -Wextra -Werror -pedantic; prints "N checks passed"; run.sh builds and runs it. */
#include "influence_fast.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 3, T = 5, I = 19, O = 12, K = 8, M = 2, WEIGHTS = I * O };

static int checks, failures;

static void expect(int passed, const char *what, int line) {
  ++checks;
  if (passed) return;
  ++failures;
  printf("line %d: %s (last error: %s)\n", line, what, influence_fast_last_error());
}
#define CHECK(what) expect((what) != 0, #what, __LINE__)
#define OK(call) expect((call) == INFLUENCE_FAST_OK, #call, __LINE__)
/* The call fails with this code and a message that has these words. */
#define REFUSES(code, words, call) \
  expect((call) == INFLUENCE_FAST_##code && strstr(influence_fast_last_error(), words) != NULL, #call, __LINE__)
#define INVALID(words, call) REFUSES(INVALID_ARGUMENT, words, call)

static uint32_t state = 1;

static float draw(void) { /* in [-1, 1), 16 bits */
  state = state * 1664525u + 1013904223u;
  return (float)(state >> 16) / 32768.0f - 1.0f;
}

static int close_to(const float *got, const double *wanted, int64_t count) {
  int64_t i;
  for (i = 0; i < count; ++i)
    if (!(fabs((double)got[i] - wanted[i]) <= 2e-5 * (1 + fabs(wanted[i])))) {
      printf("%g instead of %g at %d\n", (double)got[i], wanted[i], (int)i);
      return 0;
    }
  return 1;
}

/* The inputs of a layer, the first tokens of which count, and its gradients by plain loops. */
static float x[N][T][I], dy[N][T][O];
static const int64_t spans[N][2] = {{0, T}, {1, 3}, {2, 2}};
static double gradient[N][O][I];

static influence_fast_tokens x_tokens(void) {
  influence_fast_tokens t = {x, INFLUENCE_FAST_FLOAT32, N, T, I, T * I, I};
  return t;
}

static influence_fast_tokens dy_tokens(void) {
  influence_fast_tokens t = {dy, INFLUENCE_FAST_FLOAT32, N, T, O, T * O, O};
  return t;
}

static influence_fast_side side_of(int32_t kind, int64_t k, int64_t features) {
  influence_fast_side side = {kind, 0.5f, 0x100000002u, 0, 0, 0, NULL, 0};
  side.k = k;
  side.features = features;
  return side;
}

static void make_gradients(void) {
  int n, t, o, i;
  memset(gradient, 0, sizeof(gradient));
  for (n = 0; n < N; ++n)
    for (t = 0; t < T; ++t) {
      for (i = 0; i < I; ++i) x[n][t][i] = draw();
      for (o = 0; o < O; ++o) dy[n][t][o] = draw();
      for (o = 0; o < O; ++o)
        for (i = 0; i < I; ++i)
          if (t >= spans[n][0] && t < spans[n][1]) gradient[n][o][i] += (double)dy[n][t][o] * x[n][t][i];
    }
}

static void test_library(void) {
  char isa[32];
  CHECK(strcmp(influence_fast_last_error(), "") == 0);
  CHECK(influence_fast_version() == INFLUENCE_FAST_VERSION_NUMBER);
  CHECK(strlen(influence_fast_isa()) > 0 && strlen(influence_fast_isa()) < sizeof(isa));
  strcpy(isa, influence_fast_isa());
  INVALID("isa: expected one of baseline", influence_fast_set_isa("sse9"));
  INVALID("isa: expected a name", influence_fast_set_isa(NULL));
  OK(influence_fast_set_isa("baseline"));
  CHECK(strcmp(influence_fast_isa(), "baseline") == 0);
  OK(influence_fast_set_isa(isa));
  CHECK(influence_fast_threads() >= 1);
  INVALID("threads", influence_fast_set_threads(-1));
  INVALID("threads", influence_fast_set_threads(1 << 20));
  OK(influence_fast_set_threads(3));
  CHECK(influence_fast_threads() == 3);
  OK(influence_fast_set_threads(0));
}

/* Philox 4x32-10, of which random entries consist. */
static uint32_t philox_word(uint32_t c0, uint32_t c1, uint64_t key, int word) {
  uint32_t c[4] = {0, 0, 0, 0}, k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
  int round;
  c[0] = c0;
  c[1] = c1;
  for (round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = (uint64_t)0xD2511F53u * c[0], p1 = (uint64_t)0xCD9E8D57u * c[2];
    c[0] = (uint32_t)(p1 >> 32) ^ c[1] ^ k0;
    c[1] = (uint32_t)p1;
    c[2] = (uint32_t)(p0 >> 32) ^ c[3] ^ k1;
    c[3] = (uint32_t)p0;
  }
  return c[word];
}

static void test_random_matrix(void) {
  static float whole[K][300], piece[3][40];
  const int32_t kinds[] = {INFLUENCE_FAST_RADEMACHER, INFLUENCE_FAST_GAUSSIAN, INFLUENCE_FAST_SJLT};
  int kind, r, c, good = 1;
  influence_fast_side side = side_of(INFLUENCE_FAST_RADEMACHER, K, 300);
  OK(influence_fast_random_matrix(&side, 0, K, 0, 300, &whole[0][0]));
  for (r = 0; r < K; ++r)
    for (c = 0; c < 300; ++c) {
      const uint32_t bits = philox_word((uint32_t)c / 128, (uint32_t)r, side.key, c % 128 / 32);
      good &= whole[r][c] == ((bits >> c % 32 & 1u) ? 0.5f : -0.5f);
    }
  CHECK(good);
  for (kind = 0; kind < 3; ++kind) {
    double sum = 0, squares = 0;
    side = side_of(kinds[kind], K, 300);
    OK(influence_fast_random_matrix(&side, 0, K, 0, 300, &whole[0][0]));
    for (r = 0; r < K; ++r)
      for (c = 0; c < 300; ++c) {
        sum += whole[r][c];
        squares += (double)whole[r][c] * whole[r][c];
      }
    /* Means near 0, and a variance of scale^2: of sjlt scale^2 / k. */
    CHECK(fabs(sum / (K * 300)) < 0.05);
    CHECK(fabs(squares / (K * 300) * 4 * (kinds[kind] == INFLUENCE_FAST_SJLT ? K : 1) - 1) < 0.1);
    side.offset = 100; /* the same matrix from another column on */
    side.features = 200;
    OK(influence_fast_random_matrix(&side, 2, 3, 30, 40, &piece[0][0]));
    for (good = 1, r = 0; r < 3; ++r) good &= memcmp(piece[r], &whole[r + 2][130], sizeof(piece[r])) == 0;
    CHECK(good);
  }
  INVALID("rows", influence_fast_random_matrix(&side, 6, 3, 0, 1, &piece[0][0]));
  INVALID("rows", influence_fast_random_matrix(&side, 1, INT64_MAX, 0, 1, &piece[0][0]));
  INVALID("row", influence_fast_random_matrix(&side, -1, 3, 0, 1, &piece[0][0]));
  INVALID("columns", influence_fast_random_matrix(&side, 0, 3, 0, 201, &piece[0][0]));
  INVALID("out: expected an address", influence_fast_random_matrix(&side, 0, 3, 0, 1, NULL));
  INVALID("side: expected an address", influence_fast_random_matrix(NULL, 0, 3, 0, 1, &piece[0][0]));
  OK(influence_fast_random_matrix(&side, 0, 3, 0, 0, NULL));
  side.kind = 9;
  INVALID("side: kind", influence_fast_random_matrix(&side, 0, 1, 0, 1, &piece[0][0]));
  side = side_of(INFLUENCE_FAST_GAUSSIAN, K, INT64_MAX);
  INVALID("side: k x features", influence_fast_random_matrix(&side, 0, 1, 0, 1, &piece[0][0]));
  side = side_of(INFLUENCE_FAST_GAUSSIAN, K, 1);
  side.offset = INT64_MAX;
  INVALID("side: offset", influence_fast_random_matrix(&side, 0, 1, 0, 1, &piece[0][0]));
  side = side_of(INFLUENCE_FAST_RADEMACHER, (int64_t)1 << 31, 1);
  INVALID("side: k", influence_fast_random_matrix(&side, 0, 1, 0, 1, &piece[0][0]));
  side = side_of(INFLUENCE_FAST_RADEMACHER, 0, 1);
  INVALID("side: k", influence_fast_random_matrix(&side, 0, 1, 0, 1, &piece[0][0]));
  side = side_of(INFLUENCE_FAST_SJLT, 1, 1);
  side.scale = (float)HUGE_VAL;
  INVALID("side: scale", influence_fast_random_matrix(&side, 0, 1, 0, 1, &piece[0][0]));
  side.scale = 1;
  side.entries = &piece[0][0];
  INVALID("side: entries", influence_fast_random_matrix(&side, 0, 1, 0, 1, &piece[0][0]));
  side.kind = INFLUENCE_FAST_DENSE;
  INVALID("side: expected a random matrix", influence_fast_random_matrix(&side, 0, 1, 0, 1, &piece[0][0]));
}

/* rows (n, features) times the matrix of a side, transposed; random_matrix was checked before. */
static void times(const double *rows, int64_t n, const influence_fast_side *side, double *out) {
  float *matrix = malloc(sizeof(float) * (size_t)(side->k * side->features));
  int64_t r, j, f;
  if (side->kind == INFLUENCE_FAST_DENSE) {
    for (j = 0; j < side->k; ++j)
      for (f = 0; f < side->features; ++f) matrix[j * side->features + f] = side->scale * side->entries[j * side->row_stride + f];
  } else {
    OK(influence_fast_random_matrix(side, 0, side->k, 0, side->features, matrix));
  }
  for (r = 0; r < n; ++r)
    for (j = 0; j < side->k; ++j) {
      double sum = 0;
      for (f = 0; f < side->features; ++f) sum += rows[r * side->features + f] * (double)matrix[j * side->features + f];
      out[r * side->k + j] = sum;
    }
  free(matrix);
}

static void test_sketch(void) {
  enum { D = 700, PADDED = D + 3 };
  static float g[N][PADDED], out[N][K], again[N][K];
  static double wide[N][D], wide_out[N][K], wanted[N][K];
  const int32_t kinds[] = {INFLUENCE_FAST_RADEMACHER, INFLUENCE_FAST_GAUSSIAN, INFLUENCE_FAST_SJLT};
  influence_fast_matrix rows = {g, INFLUENCE_FAST_FLOAT32, N, D, PADDED, 1};
  int n, f, kind, good;
  int64_t numbers;
  float *kept;
  influence_fast_side side;
  for (n = 0; n < N; ++n)
    for (f = 0; f < D; ++f) wide[n][f] = g[n][f] = draw();
  for (kind = 0; kind < 3; ++kind) {
    side = side_of(kinds[kind], K, D);
    times(&wide[0][0], N, &side, &wanted[0][0]);
    OK(influence_fast_sketch(&rows, &side, &out[0][0]));
    CHECK(close_to(&out[0][0], &wanted[0][0], N * K));
    OK(influence_fast_sketch_float64(&wide[0][0], N, D, D, &side, &wide_out[0][0]));
    for (good = 1, n = 0; n < N * K; ++n) good &= fabs((&wide_out[0][0])[n] - (&wanted[0][0])[n]) < 1e-10;
    CHECK(good);
  }
  side = side_of(INFLUENCE_FAST_GAUSSIAN, K, D);
  OK(influence_fast_kept_numbers(&side, &numbers));
  CHECK(numbers >= K * D);
  kept = malloc(sizeof(float) * (size_t)(numbers + 1));
  OK(influence_fast_keep(&side, kept));
  OK(influence_fast_sketch(&rows, &side, &out[0][0]));
  side.entries = kept;
  OK(influence_fast_sketch(&rows, &side, &again[0][0]));
  CHECK(memcmp(out, again, sizeof(out)) == 0);
  side.entries = NULL;
  OK(influence_fast_keep(&side, kept + 1)); /* aligned to an element alone */
  side.entries = kept + 1;
  OK(influence_fast_sketch(&rows, &side, &again[0][0]));
  CHECK(memcmp(out, again, sizeof(out)) == 0);
  free(kept);
  side = side_of(INFLUENCE_FAST_SJLT, K, D);
  INVALID("gaussian", influence_fast_kept_numbers(&side, &numbers));
  INVALID("gaussian", influence_fast_keep(&side, &g[0][0]));
  INVALID("out: expected an address", influence_fast_sketch(&rows, &side, NULL));
  INVALID("out: expected an address aligned to 4", influence_fast_sketch(&rows, &side, (float *)((char *)out + 1)));
  INVALID("g: structure", influence_fast_sketch(NULL, &side, &out[0][0]));
  INVALID("features: expected 8", influence_fast_sketch_float64(&wide[0][0], N, K, D, &side, &wide_out[0][0]));
  INVALID("columns", influence_fast_sketch_float64(&wide[0][0], N, -1, D, &side, &wide_out[0][0]));
  INVALID("strides", influence_fast_sketch_float64(&wide[0][0], N, D, INT64_MAX / 2, &side, &wide_out[0][0]));
  rows.columns = -1;
  INVALID("g: columns", influence_fast_sketch(&rows, &side, &out[0][0]));
  rows.columns = D;
  rows.row_stride = INT64_MAX / 2;
  INVALID("g: strides", influence_fast_sketch(&rows, &side, &out[0][0]));
  rows.row_stride = PADDED;
  rows.column_stride = 2;
  INVALID("g: strides", influence_fast_sketch(&rows, &side, &out[0][0]));
  rows.column_stride = 1;
  rows.data = (const char *)rows.data + 1;
  INVALID("g: data", influence_fast_sketch(&rows, &side, &out[0][0]));
  rows.data = NULL;
  INVALID("g: data", influence_fast_sketch(&rows, &side, &out[0][0]));
  rows.rows = 0;
  OK(influence_fast_sketch(&rows, &side, NULL));
  rows.dtype = 3;
  INVALID("g: dtype", influence_fast_sketch(&rows, &side, &out[0][0]));
}

static void test_gradients(void) {
  static float out[N * WEIGHTS], q[M][O][I], weight[O][I], m[O][I], v[O][I];
  static double wanted[N * WEIGHTS], half[N * WEIGHTS], turned[N * WEIGHTS], changed[N][O][I];
  static float narrow[N][T][I];
  const influence_fast_tokens tx = x_tokens(), tdy = dy_tokens();
  influence_fast_tokens wrong;
  influence_fast_side right = side_of(INFLUENCE_FAST_RADEMACHER, 4, I), left = side_of(INFLUENCE_FAST_SJLT, 5, O), whole, dense;
  influence_fast_change change = {NULL, NULL, NULL, 0.9f, 0.99f, 1e-3f};
  const int64_t *given = &spans[0][0];
  const int32_t kinds[] = {INFLUENCE_FAST_RADEMACHER, INFLUENCE_FAST_GAUSSIAN, INFLUENCE_FAST_SJLT};
  int64_t outside[N][2] = {{0, T}, {3, 2}, {0, 0}};
  int n, other, o, i, j, kind;
  make_gradients();
  for (o = 0; o < O; ++o)
    for (i = 0; i < I; ++i) {
      for (j = 0; j < M; ++j) q[j][o][i] = draw();
      weight[o][i] = draw();
      m[o][i] = draw();
      v[o][i] = draw() + 1.5f;
    }

  OK(influence_fast_outer(&tx, &tdy, given, out));
  CHECK(close_to(out, &gradient[0][0][0], N * WEIGHTS));

  /* (N o, i) to (N o, 4), turned to (N 4, o), to (N 4, 5), turned. */
  for (kind = 0; kind < 3; ++kind) {
    right.kind = kinds[kind];
    times(&gradient[0][0][0], N * O, &right, half);
    for (n = 0; n < N; ++n)
      for (o = 0; o < O; ++o)
        for (j = 0; j < 4; ++j) turned[(n * 4 + j) * O + o] = half[(n * O + o) * 4 + j];
    times(turned, N * 4, &left, half);
    for (n = 0; n < N; ++n)
      for (o = 0; o < 5; ++o)
        for (j = 0; j < 4; ++j) wanted[(n * 5 + o) * 4 + j] = half[(n * 4 + j) * 5 + o];
    OK(influence_fast_project_outer(&tx, &tdy, given, &right, &left, out));
    CHECK(close_to(out, wanted, N * 5 * 4));
  }
  dense = side_of(INFLUENCE_FAST_DENSE, M, I);
  dense.entries = &q[0][0][0];
  dense.row_stride = WEIGHTS;
  times(&gradient[0][0][0], N * O, &dense, wanted);
  OK(influence_fast_project_outer(&tx, &tdy, given, &dense, NULL, out));
  CHECK(close_to(out, wanted, N * O * M));

  for (kind = 0; kind < 3; ++kind) {
    whole = side_of(kinds[kind], K, WEIGHTS);
    times(&gradient[0][0][0], N, &whole, wanted);
    OK(influence_fast_sketch_outer(&tx, &tdy, given, &whole, NULL, out));
    CHECK(close_to(out, wanted, N * K));
    for (n = 0; n < N; ++n)
      for (o = 0; o < O; ++o)
        for (i = 0; i < I; ++i) changed[n][o][i] = gradient[n][o][i] * weight[o][i];
    times(&changed[0][0][0], N, &whole, wanted);
    memset(&change, 0, sizeof(change));
    change.weight = &weight[0][0];
    OK(influence_fast_sketch_outer(&tx, &tdy, given, &whole, &change, out));
    CHECK(close_to(out, wanted, N * K));
    memset(&change, 0, sizeof(change));
    change.m = &m[0][0];
    change.v = &v[0][0];
    change.beta1 = 0.9f;
    change.beta2 = 0.99f;
    change.eps = 1e-3f;
    for (n = 0; n < N; ++n)
      for (o = 0; o < O; ++o)
        for (i = 0; i < I; ++i) {
          const double g = gradient[n][o][i], b1 = change.beta1, b2 = change.beta2;
          changed[n][o][i] = (b1 * m[o][i] + (1 - b1) * g) / sqrt(b2 * v[o][i] + (1 - b2) * g * g + (double)change.eps);
        }
    times(&changed[0][0][0], N, &whole, wanted);
    OK(influence_fast_sketch_outer(&tx, &tdy, given, &whole, &change, out));
    CHECK(close_to(out, wanted, N * K));
  }
  change.v = NULL;
  INVALID("m, v: expected both", influence_fast_sketch_outer(&tx, &tdy, given, &whole, &change, out));
  change.v = &v[0][0];
  change.weight = &weight[0][0];
  INVALID("weight", influence_fast_sketch_outer(&tx, &tdy, given, &whole, &change, out));
  INVALID("side: expected an address", influence_fast_sketch_outer(&tx, &tdy, given, NULL, NULL, out));
  INVALID("side: features", influence_fast_sketch_outer(&tx, &tdy, given, &right, NULL, out));

  for (n = 0; n < N; ++n)
    for (j = 0; j < M; ++j)
      for (wanted[n * M + j] = 0, o = 0; o < O; ++o)
        for (i = 0; i < I; ++i) wanted[n * M + j] += gradient[n][o][i] * q[j][o][i];
  OK(influence_fast_score_outer(&tx, &tdy, given, &q[0][0][0], M, out));
  CHECK(close_to(out, wanted, N * M));
  INVALID("count", influence_fast_score_outer(&tx, &tdy, given, &q[0][0][0], -1, out));
  INVALID("data", influence_fast_score_outer(&tx, &tdy, given, NULL, M, out));
  INVALID("x: expected an address", influence_fast_score_outer(NULL, &tdy, given, &q[0][0][0], M, out));
  OK(influence_fast_score_outer(&tx, &tdy, given, NULL, 0, NULL));

  for (n = 0; n < N; ++n)
    for (other = 0; other < N; ++other)
      for (wanted[n * N + other] = 0, o = 0; o < O; ++o)
        for (i = 0; i < I; ++i) wanted[n * N + other] += gradient[n][o][i] * gradient[other][o][i];
  OK(influence_fast_ghost_dot(&tx, &tdy, given, &tx, &tdy, given, out));
  CHECK(close_to(out, wanted, N * N));
  for (n = 0; n < N; ++n) wanted[n] = sqrt(wanted[n * N + n]);
  OK(influence_fast_ghost_norm(&tx, &tdy, given, out));
  CHECK(close_to(out, wanted, N));
  INVALID("xb: features", influence_fast_ghost_dot(&tx, &tdy, given, &tdy, &tx, given, out));
  INVALID("x: structure", influence_fast_ghost_norm(NULL, &tdy, given, out));

  /* Without spans all tokens count; strides; tokens that repeat. */
  wrong = tx;
  wrong.sample_stride = 0;
  wrong.token_stride = 0;
  memset(wanted, 0, sizeof(wanted));
  for (n = 0; n < N; ++n)
    for (j = 0; j < T; ++j)
      for (o = 0; o < O; ++o)
        for (i = 0; i < I; ++i) wanted[(n * O + o) * I + i] += (double)dy[n][j][o] * x[0][0][i];
  OK(influence_fast_outer(&wrong, &tdy, NULL, out));
  CHECK(close_to(out, wanted, N * WEIGHTS));

  /* bfloat16: the upper halves of numbers that have nothing in the lower ones. */
  {
    static uint16_t upper_x[N][T][I], upper_dy[N][T][O];
    influence_fast_tokens bx = tx, bdy = tdy;
    memset(wanted, 0, sizeof(wanted));
    for (n = 0; n < N; ++n)
      for (j = 0; j < T; ++j) {
        for (i = 0; i < I; ++i) {
          uint32_t bits;
          narrow[n][j][i] = (float)(i % 7 - 3);
          memcpy(&bits, &narrow[n][j][i], 4);
          upper_x[n][j][i] = (uint16_t)(bits >> 16);
        }
        for (o = 0; o < O; ++o) upper_dy[n][j][o] = 0x3F80; /* 1 */
        for (o = 0; o < O; ++o)
          for (i = 0; i < I; ++i) wanted[(n * O + o) * I + i] += (double)narrow[n][j][i];
      }
    bx.data = upper_x;
    bdy.data = upper_dy;
    bx.dtype = bdy.dtype = INFLUENCE_FAST_BFLOAT16;
    OK(influence_fast_outer(&bx, &bdy, NULL, out));
    CHECK(close_to(out, wanted, N * WEIGHTS));
    for (n = 0; n < N * T * O; ++n) (&upper_dy[0][0][0])[n] = 0x3C00; /* 1 in float16 */
    for (n = 0; n < N * T * I; ++n) (&upper_x[0][0][0])[n] = 0x3C00;
    for (n = 0; n < N * WEIGHTS; ++n) wanted[n] = T;
    bx.dtype = bdy.dtype = INFLUENCE_FAST_FLOAT16;
    OK(influence_fast_outer(&bx, &bdy, NULL, out));
    CHECK(close_to(out, wanted, N * WEIGHTS));
    INVALID("dy: dtype", influence_fast_outer(&bx, &tdy, NULL, out));
  }

  INVALID("spans", influence_fast_outer(&tx, &tdy, &outside[0][0], out));
  outside[1][1] = T + 1;
  INVALID("spans", influence_fast_outer(&tx, &tdy, &outside[0][0], out));
  INVALID("spans", influence_fast_outer(&tx, &tdy, (const int64_t *)((const char *)outside + 4), out));
  INVALID("p_in: features", influence_fast_project_outer(&tx, &tdy, given, &left, NULL, out));
  wrong = tx;
  wrong.tokens = T - 1;
  INVALID("dy: tokens", influence_fast_outer(&wrong, &tdy, given, out));
  wrong.tokens = -1;
  INVALID("x: tokens", influence_fast_outer(&wrong, &tdy, given, out));
  wrong.tokens = INT64_MAX;
  INVALID("x: shape", influence_fast_outer(&wrong, &tdy, given, out));
  wrong = tx;
  wrong.sample_stride = INT64_MAX;
  INVALID("x: strides", influence_fast_outer(&wrong, &tdy, given, out));
  wrong.sample_stride = -1;
  INVALID("x: sample_stride", influence_fast_outer(&wrong, &tdy, given, out));
  wrong = tx;
  wrong.dtype = -1;
  INVALID("x: dtype", influence_fast_outer(&wrong, &tdy, given, out));
  dense.entries = NULL;
  INVALID("p_in: data", influence_fast_project_outer(&tx, &tdy, given, &dense, NULL, out));

  /* Nothing to do is nothing wrong: no samples, no tokens, no features. */
  memset(&wrong, 0, sizeof(wrong));
  OK(influence_fast_outer(&wrong, &wrong, NULL, NULL));
  OK(influence_fast_ghost_norm(&wrong, &wrong, NULL, NULL));
  OK(influence_fast_ghost_dot(&wrong, &wrong, NULL, &wrong, &wrong, NULL, NULL));
  wrong.samples = N;
  out[0] = out[N * M - 1] = 7;
  OK(influence_fast_ghost_norm(&wrong, &wrong, NULL, out));
  CHECK(out[0] == 0 && out[N - 1] == 0);
  OK(influence_fast_ghost_dot(&wrong, &wrong, NULL, &wrong, &wrong, NULL, out));
  OK(influence_fast_score_outer(&wrong, &wrong, NULL, NULL, M, out));
  CHECK(out[0] == 0 && out[N * M - 1] == 0);
  wrong.tokens = T;
  OK(influence_fast_outer(&wrong, &wrong, NULL, NULL));
  wrong = tx;
  wrong.tokens = 0;
  {
    influence_fast_tokens none = tdy;
    none.tokens = 0;
    OK(influence_fast_outer(&wrong, &none, NULL, out));
    CHECK(out[0] == 0 && out[N * WEIGHTS - 1] == 0);
  }
}

static void test_ranks(void) {
  enum { R = 4, C = 50 };
  static float values[C][R], ranks[R][C]; /* columns are read across */
  static double wide[R][C], wanted[R][C], sums[C], votes[C], again[C];
  influence_fast_matrix matrix = {values, INFLUENCE_FAST_FLOAT32, R, C, 1, R};
  const int64_t k = 9;
  int r, c, other, good = 1;
  for (r = 0; r < R; ++r)
    for (c = 0; c < C; ++c) values[c][r] = (float)(int)(10 * draw());
  OK(influence_fast_rank(&matrix, &ranks[0][0]));
  OK(influence_fast_rank_float64(&matrix, &wide[0][0]));
  for (r = 0; r < R; ++r)
    for (c = 0; c < C; ++c) {
      int below = 0, equal = 0;
      for (other = 0; other < C; ++other) {
        below += values[other][r] < values[c][r];
        equal += values[other][r] == values[c][r];
      }
      wanted[r][c] = below + 0.5 * (equal - 1);
      good &= (double)ranks[r][c] == wanted[r][c] && wide[r][c] == wanted[r][c];
    }
  CHECK(good);
  OK(influence_fast_vote(&matrix, k, votes));
  OK(influence_fast_rank_and_vote(&matrix, k, sums, again));
  for (good = 1, c = 0; c < C; ++c) {
    double sum = 0, vote = 0;
    for (r = 0; r < R; ++r) {
      sum += wanted[r][c];
      if (wanted[r][c] < (double)k) vote -= (double)k - wanted[r][c];
    }
    good &= sums[c] == sum && votes[c] == vote && again[c] == vote;
  }
  CHECK(good);
  INVALID("k: expected 1 to 50", influence_fast_vote(&matrix, 0, votes));
  INVALID("k: expected 1 to 50", influence_fast_rank_and_vote(&matrix, C + 1, sums, votes));
  INVALID("votes", influence_fast_vote(&matrix, k, NULL));
  INVALID("ranks", influence_fast_rank_and_vote(&matrix, k, NULL, votes));
  INVALID("out", influence_fast_rank(&matrix, NULL));
  INVALID("values", influence_fast_rank_float64(NULL, &wide[0][0]));
  matrix.columns = ((int64_t)1 << 22) + 1;
  INVALID("values: columns", influence_fast_rank(&matrix, &ranks[0][0]));
  matrix.columns = 0;
  INVALID("values: columns", influence_fast_rank(&matrix, &ranks[0][0]));
  matrix.columns = C;
  matrix.dtype = INFLUENCE_FAST_FLOAT16;
  INVALID("values: dtype", influence_fast_rank(&matrix, &ranks[0][0]));
  matrix.dtype = INFLUENCE_FAST_FLOAT32;
  values[7][2] = (float)HUGE_VAL;
  REFUSES(NOT_FINITE, "row 2", influence_fast_rank(&matrix, &ranks[0][0]));
  REFUSES(NOT_FINITE, "row 2", influence_fast_vote(&matrix, k, votes));
}

static void test_index(void) {
  enum { ROWS = 700, A = 30, B = 65, BEST = 12, Q = 3 };
  static float a[ROWS][A], b[ROWS][B], queries[Q][A + B];
  static double scores[Q][ROWS + 1], all[Q][ROWS];
  static int64_t rows[Q][ROWS + 1], some[Q][2];
  static uint8_t allowed[ROWS];
  static const double weight_sets[3][2] = {{1, 1}, {2, 0.25}, {0, 1}};
  influence_fast_matrix layers[2] = {{a, INFLUENCE_FAST_FLOAT32, ROWS, A, A, 1}, {b, INFLUENCE_FAST_FLOAT32, ROWS, B, B, 1}};
  influence_fast_index *index = (influence_fast_index *)layers;
  int q, r, c, i, cosine, filtered, set, good;
  for (r = 0; r < ROWS; ++r) {
    const float length = (float)exp(3 * (double)draw());
    for (c = 0; c < A; ++c) a[r][c] = length * draw();
    for (c = 0; c < B; ++c) b[r][c] = length * draw();
    allowed[r] = r % 3 == 1;
  }
  memcpy(a[500], a[400], sizeof(a[0])); /* a tie */
  memcpy(b[500], b[400], sizeof(b[0]));
  memset(a[9], 0, sizeof(a[0]));
  memset(b[9], 0, sizeof(b[0]));
  for (q = 0; q < Q; ++q)
    for (c = 0; c < A + B; ++c) queries[q][c] = q == 2 ? 0 : draw();
  OK(influence_fast_index_build(layers, 2, &index));
  CHECK(influence_fast_index_rows(index) == ROWS && influence_fast_index_columns(index) == A + B);
  for (cosine = 0; cosine < 2; ++cosine)
    for (filtered = 0; filtered < 2; ++filtered)
      for (set = 0; set < 3; ++set) {
        const double *weight = weight_sets[set];
        OK(influence_fast_index_search(index, &queries[0][0], Q, set == 0 ? NULL : weight, cosine, filtered ? allowed : NULL, BEST,
                                       &scores[0][0], &rows[0][0]));
        for (good = 1, q = 0; q < Q; ++q) {
          static char taken[ROWS];
          memset(taken, 0, sizeof(taken));
          for (r = 0; r < ROWS; ++r) {
            double sum = 0, mine = 0, own = 0;
            for (c = 0; c < A + B; ++c) {
              const double g = c < A ? a[r][c] : b[r][c - A], v = queries[q][c], w = weight[c >= A];
              sum += w * v * g;
              mine += w * g * g;
              own += w * v * v;
            }
            all[q][r] = !cosine ? sum : mine * own > 0 ? sum / sqrt(mine * own) : 0;
          }
          for (i = 0; i < BEST; ++i) {
            int best = -1;
            for (r = 0; r < ROWS; ++r)
              if (!taken[r] && (!filtered || allowed[r]) && (best < 0 || all[q][r] > all[q][best])) best = r;
            taken[best] = 1;
            good &= (&rows[0][0])[q * BEST + i] == best;
            good &= fabs((&scores[0][0])[q * BEST + i] - all[q][best]) <= 1e-6 * (1 + fabs(all[q][best]));
          }
        }
        CHECK(good);
        for (q = 0; q < Q; ++q) {
          some[q][0] = q;
          some[q][1] = -1;
        }
        OK(influence_fast_index_score(index, &queries[0][0], Q, weight, cosine, &some[0][0], 2, &scores[0][0]));
        for (good = 1, q = 0; q < Q; ++q) {
          good &= fabs((&scores[0][0])[2 * q] - all[q][q]) <= 1e-6 * (1 + fabs(all[q][q]));
          good &= (&scores[0][0])[2 * q + 1] != (&scores[0][0])[2 * q + 1];
        }
        CHECK(good);
      }
  /* More than there are. */
  OK(influence_fast_index_search(index, &queries[0][0], 1, NULL, 0, NULL, ROWS + 1, &scores[0][0], &rows[0][0]));
  CHECK(rows[0][ROWS - 1] >= 0 && rows[0][ROWS] == -1 && scores[0][ROWS] != scores[0][ROWS]);
  OK(influence_fast_index_search(index, NULL, 0, NULL, 0, NULL, 5, NULL, NULL));
  INVALID("queries", influence_fast_index_search(index, NULL, 1, NULL, 0, NULL, 5, &scores[0][0], &rows[0][0]));
  INVALID("index", influence_fast_index_search(NULL, &queries[0][0], 1, NULL, 0, NULL, 5, &scores[0][0], &rows[0][0]));
  INVALID("count", influence_fast_index_search(index, &queries[0][0], -1, NULL, 0, NULL, 5, &scores[0][0], &rows[0][0]));
  INVALID("queries", influence_fast_index_search(index, &queries[0][0], INT64_MAX, NULL, 0, NULL, 5, &scores[0][0], &rows[0][0]));
  INVALID("k", influence_fast_index_search(index, &queries[0][0], 1, NULL, 0, NULL, -5, &scores[0][0], &rows[0][0]));
  INVALID("rows", influence_fast_index_search(index, &queries[0][0], 1, NULL, 0, NULL, 5, &scores[0][0], NULL));
  {
    const double negative[2] = {1, -1};
    INVALID("weights", influence_fast_index_search(index, &queries[0][0], 1, negative, 0, NULL, 5, &scores[0][0], &rows[0][0]));
  }
  some[0][0] = ROWS;
  INVALID("rows", influence_fast_index_score(index, &queries[0][0], 1, NULL, 0, &some[0][0], 2, &scores[0][0]));
  a[5][5] += 1e6f; /* too much for what the copy knows, where the row is scored */
  queries[0][5] = a[5][5] > 0 ? 1.0f : -1.0f;
  REFUSES(CHANGED_ROWS, "row",
          influence_fast_index_search(index, &queries[0][0], 1, NULL, 0, NULL, ROWS, &scores[0][0], &rows[0][0]));
  queries[0][0] = (float)HUGE_VAL;
  REFUSES(NOT_FINITE, "queries", influence_fast_index_search(index, &queries[0][0], 1, NULL, 0, NULL, 5, &scores[0][0], &rows[0][0]));
  influence_fast_index_free(index);
  a[6][5] = (float)HUGE_VAL;
  REFUSES(NOT_FINITE, "layers[0]: expected finite numbers, row 6", influence_fast_index_build(layers, 2, &index));
  CHECK(index == NULL);
  influence_fast_index_free(index);
  CHECK(influence_fast_index_rows(index) == 0 && influence_fast_index_columns(index) == 0);
  INVALID("index", influence_fast_index_build(layers, 2, NULL));
  INVALID("layers", influence_fast_index_build(NULL, 2, &index));
  INVALID("count", influence_fast_index_build(layers, 0, &index));
  layers[1].rows = 5;
  INVALID("layers[1]: rows", influence_fast_index_build(layers, 2, &index));
  layers[1].rows = ROWS;
  layers[1].row_stride = B + 1;
  INVALID("layers[1]: row_stride", influence_fast_index_build(layers, 2, &index));
  layers[1].row_stride = B;
  layers[1].dtype = INFLUENCE_FAST_BFLOAT16;
  INVALID("layers[1]: dtype", influence_fast_index_build(layers, 2, &index));
  layers[0].rows = 0;
  INVALID("layers[0]: rows", influence_fast_index_build(layers, 1, &index));

  /* 16-bit rows: what they widen to is what is searched. */
  {
    static uint16_t half[ROWS][A];
    for (r = 0; r < ROWS; ++r)
      for (c = 0; c < A; ++c) half[r][c] = c == 0 ? (uint16_t)(0x3C00 + r) : 0; /* 1 and more in float16, rising */
    layers[0].data = half;
    layers[0].rows = ROWS;
    layers[0].dtype = INFLUENCE_FAST_FLOAT16;
    queries[0][0] = 1;
    for (c = 1; c < A; ++c) queries[0][c] = 0;
    OK(influence_fast_index_build(layers, 1, &index));
    OK(influence_fast_index_search(index, &queries[0][0], 1, NULL, 0, NULL, 2, &scores[0][0], &rows[0][0]));
    CHECK(rows[0][0] == ROWS - 1 && rows[0][1] == ROWS - 2 && scores[0][0] == 1 + (ROWS - 1) / 1024.0);
    influence_fast_index_free(index);
  }
}

int main(void) {
  int threads;
  test_library();
  for (threads = 1; threads <= 3; threads += 2) {
    OK(influence_fast_set_threads(threads));
    test_random_matrix();
    test_sketch();
    test_gradients();
    test_ranks();
    test_index();
  }
  if (failures > 0) {
    printf("%d of %d checks failed on %s\n", failures, checks, influence_fast_isa());
    return 1;
  }
  printf("%d checks of the C interface passed on %s\n", checks, influence_fast_isa());
  return 0;
}
