// Inner products, or cosines, of all rows of x with all rows of y: the contract.
//
// Accumulated in fp32. An entry depends on its two rows and on nothing else, bit for bit: neither on R and Q nor on
// its place, on strides or threads. With `normalize` rows are divided by their norm first, which is taken in fp64; a
// row of norm 0 or subnormal counts as 0.
#pragma once

#include "sinkhorn.h"

namespace spa_fast {

struct Rows {
    const void* data;
    int64_t count;
    int64_t stride;  // from row to row, in elements
    int64_t step;    // within a row; one of the two is 1
    int64_t apart;   // from the rows of one product to those of the next
};

struct SimilarityArgs {
    Rows x, y;
    CostType type;  // of both
    int64_t P, D;    // products, and the length of a row
    bool normalize;  // with step 1 only
    float* out;      // [P, x.count, y.count] contiguous
};

// Threads and exceptions as sinkhorn_fwd. A thread's workspace: half a megabyte, or W rows to normalise of D > 8192, and 48 rows.
void similarity(const SimilarityArgs& args, int threads, Isa isa);

}  // namespace spa_fast
