#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "gaussian_lanes.h"

namespace spa_fast {
namespace {

const GaussianLanes& sampler_of(Isa isa) {
#ifdef SPA_FAST_X86
    if (isa == Isa::avx512) return gaussian_avx512;
    if (isa == Isa::avx2) return gaussian_avx2;
#endif
    (void)isa;
    return gaussian_portable;
}

constexpr std::align_val_t kCacheLine{64};

struct Release {
    void operator()(char* memory) const { ::operator delete(memory, kCacheLine); }
};

}  // namespace

void check_gaussian(const GaussianArgs& args) {
    if (args.C < 0 || args.D < 0 || args.n < 0 || args.rank < 0)
        throw std::invalid_argument("expected sizes C, D, n, rank >= 0");
    if (args.kind == FactorKind::lowrank && args.rank == 0)
        throw std::invalid_argument("rank: expected >= 1, got 0: that is a diagonal");
    if (args.first < 0 || args.first + args.n > int64_t{1} << 32)
        throw std::invalid_argument("expected 0 <= first and first + n <= 2^32, got " + std::to_string(args.first) +
                                    " and " + std::to_string(args.n));
}

void sample_gaussian_cpu(const GaussianArgs& args, int threads, Isa isa) {
    check_gaussian(args);
    if (!isa_usable(isa)) throw std::invalid_argument(std::string("instruction set not usable here: ") + isa_name(isa));
    if (args.C == 0 || args.n == 0 || args.D == 0) return;

    const GaussianLanes& sampler = sampler_of(isa);
    // Fewer classes than threads: smaller blocks, by whole groups of four samples.
    const int64_t per_class = (std::max(1, threads) + args.C - 1) / args.C;
    const int64_t share = ((args.n + per_class - 1) / per_class + 3) / 4 * 4;
    const int64_t block = std::min(sampler.block(args), share);
    const int64_t blocks = (args.n + block - 1) / block, tasks = args.C * blocks;
    const int team = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
    const int64_t bytes = sampler.workspace_bytes(args);
    // Allocated up front: an exception must not leave a parallel region.
    const std::unique_ptr<char, Release> memory(static_cast<char*>(::operator new(bytes* team, kCacheLine)));
    const auto run = [&](int64_t task, char* workspace) {
        const int64_t start = task % blocks * block;
        sampler.draw(args, task / blocks, start, std::min(args.n, start + block), workspace);
    };
#ifdef _OPENMP
    if (team > 1) {
#pragma omp parallel for num_threads(team) schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) run(task, memory.get() + bytes * omp_get_thread_num());
        return;
    }
#endif
    for (int64_t task = 0; task < tasks; ++task) run(task, memory.get());
}

}  // namespace spa_fast
