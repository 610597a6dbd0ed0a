// What sinkhorn_cpu.cpp needs of one build of sinkhorn_lanes.cpp (there is one per instruction set).
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

}  // namespace spa_fast
