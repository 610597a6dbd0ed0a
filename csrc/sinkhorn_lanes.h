// What sinkhorn_cpu.cpp needs of one build of sinkhorn_lanes.cpp and sinkhorn_grad.cpp (one per instruction set).
#pragma once

#include "sinkhorn.h"

namespace spa_fast {

struct LaneSolver {
    int64_t lanes;                                                            // problems solved side by side
    int64_t (*workspace_bytes)(int64_t K, int64_t M);                         // multiple of 64
    void (*solve)(const SinkhornArgs& args, int64_t group, void* workspace);  // problems group * lanes and on
};

extern const LaneSolver lanes_portable;
extern const LaneSolver lanes_avx2;
extern const LaneSolver lanes_avx512;

// Problems first to last - 1.
typedef void GradSolver(const SinkhornGradArgs& args, int64_t first, int64_t last);
GradSolver grad_portable, grad_avx2, grad_avx512;

}  // namespace spa_fast
