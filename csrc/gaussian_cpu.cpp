#include <algorithm>
#include <stdexcept>
#include <string>

#include "gaussian_lanes.h"
#include "team.h"

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
    run_team(tasks, threads, sampler.workspace_bytes(args), [&](int64_t task, char* workspace) {
        const int64_t start = task % blocks * block;
        sampler.draw(args, task / blocks, start, std::min(args.n, start + block), workspace);
    });
}

}  // namespace spa_fast
