// What similarity.cpp needs of one build of similarity_lanes.cpp (one per instruction set).
#pragma once

#include "similarity.h"

namespace spa_fast {

// Of long rows so many numbers are packed and multiplied at a time, that lanes of many rows fit the L2 cache. Rows that
// are normalised are packed whole.
constexpr int64_t kPanel = 1024;
inline int64_t panel_width(const SimilarityArgs& args) {
    return args.normalize || args.D < kPanel ? args.D : kPanel;
}

// Of one product: lanes first_lane to last_lane - 1 of one operand with rows first_row to last_row - 1 of the other.
struct SimilarityPart {
    int64_t product;
    bool x_in_lanes;
    int64_t first_lane, last_lane, first_row, last_row;
};

struct SimilarityKernel {
    int64_t lanes;                                                  // rows side by side in a vector
    int64_t (*workspace_bytes)(int64_t lane_count, int64_t width);  // multiple of 64
    void (*run)(const SimilarityArgs& args, const SimilarityPart& part, void* workspace);
};

extern const SimilarityKernel similarity_portable;
extern const SimilarityKernel similarity_avx2;
extern const SimilarityKernel similarity_avx512;

}  // namespace spa_fast
