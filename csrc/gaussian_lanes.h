// What gaussian_cpu.cpp needs of one build of gaussian_lanes.cpp (one per instruction set).
#pragma once

#include "gaussian.h"

namespace spa_fast {

struct GaussianLanes {
    int64_t (*block)(const GaussianArgs& args);            // samples that a task takes at most
    int64_t (*workspace_bytes)(const GaussianArgs& args);  // multiple of 64
    // Samples start to stop - 1, stop - start <= block, of class c.
    void (*draw)(const GaussianArgs& args, int64_t c, int64_t start, int64_t stop, void* workspace);
};

extern const GaussianLanes gaussian_portable;
extern const GaussianLanes gaussian_avx2;
extern const GaussianLanes gaussian_avx512;

}  // namespace spa_fast
