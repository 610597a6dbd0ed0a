// Parallel loops with a workspace for each thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace spa_fast {

// work(index, workspace) for every index below `count`, in no order; workspaces start on a cache line.
template <class Work>
void run_team(int64_t count, int threads, int64_t workspace_bytes, const Work& work) {
    constexpr std::align_val_t line{64};
    struct Release {
        void operator()(char* memory) const { ::operator delete(memory, line); }
    };
    const int team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
    const int64_t bytes = (workspace_bytes + 63) / 64 * 64;
    // Allocated up front: an exception must not leave a parallel region.
    const std::unique_ptr<char, Release> memory(static_cast<char*>(::operator new(bytes* team, line)));
#ifdef _OPENMP
    if (team > 1) {
#pragma omp parallel for num_threads(team) schedule(dynamic)
        for (int64_t index = 0; index < count; ++index) work(index, memory.get() + bytes * omp_get_thread_num());
        return;
    }
#endif
    for (int64_t index = 0; index < count; ++index) work(index, memory.get());
}

}  // namespace spa_fast
