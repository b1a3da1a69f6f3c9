// The operations of kernels.h behind checks of every argument, for whichever language asks (bindings.cpp, c/interface.cpp), on the
// instruction set in use. What is wrong is thrown as std::invalid_argument. An `Address` of an output may be 0 where it is empty.
#pragma once

#include <string>

#include "../checks.h"
#include "kernels.h"

namespace influence_fast::checked {

// The fastest that this machine can run, or that the environment variable INFLUENCE_FAST_ISA names, until another is named.
const Kernels& kernels();
void use(const std::string& isa);

Side dense_side(const Matrix& entries, float scale);
// The side with the entries that fill_panels left there, which must outlive it.
Side with_panels(Side side, Address panels);
int64_t panel_numbers(int64_t k, int64_t features);
void fill_panels(const Side& side, Address panels, int threads);

void random_matrix(const Side& side, int64_t row, int64_t rows, int64_t column, int64_t columns, Address out, int threads);
void sketch(const Matrix& g, const Side& side, Address out, int threads);
void sketch_wide(Address g, const int64_t (&shape)[2], const int64_t (&strides)[2], const Side& side, Address out, int threads);
// A side that is null is the identity.
void project_outer(const Tokens& x, const Tokens& dy, Address spans, const Side* p_in, const Side* p_out, Address out, int threads);
void sketch_outer(const Tokens& x, const Tokens& dy, Address spans, const Side& side, Address weight, Address m, Address v,
                  float b1, float b2, float eps, Address out, int threads);
void ghost_dot(const Tokens& xa, const Tokens& dya, Address spans_a, const Tokens& xb, const Tokens& dyb, Address spans_b,
               Address out, int threads);
void ghost_norm(const Tokens& x, const Tokens& dy, Address spans, Address out, int threads);
// These return the first row that is not finite, or -1.
int64_t rank(const Matrix& values, Address out, bool wide, int threads);
int64_t vote(const Matrix& values, int64_t k, Address votes, int threads);
int64_t rank_and_vote(const Matrix& values, int64_t k, Address ranks, Address votes, int threads);
// codes, stride apart, and scale, error and norm of each row (exact_search.h).
void quantise(const Matrix& rows, Address codes, int64_t stride, Address scale, Address error, Address norm, int threads);

}  // namespace influence_fast::checked
