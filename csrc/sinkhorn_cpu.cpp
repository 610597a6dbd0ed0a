#include <algorithm>
#include <stdexcept>
#include <string>

#include "sinkhorn.h"
#include "sinkhorn_lanes.h"
#include "team.h"

namespace spa_fast {
namespace {

const LaneSolver* solver_of(Isa isa) {
    switch (isa) {
        case Isa::portable: return &lanes_portable;
#ifdef SPA_FAST_X86
        case Isa::avx2: return &lanes_avx2;
        case Isa::avx512: return &lanes_avx512;
#endif
        default: return nullptr;
    }
}

void check(const TransportBatch& args, Isa isa) {
    if (args.P < 0 || args.K < 1 || args.K > kMaxSide || args.M < 1 || args.M > kMaxSide)
        throw std::invalid_argument("cost must be [P, K, M] with 1 <= K, M <= 256, got [" + std::to_string(args.P) +
                                    ", " + std::to_string(args.K) + ", " + std::to_string(args.M) + "]");
    if (args.C < 1 || args.P % args.C != 0)
        throw std::invalid_argument("C must divide P = " + std::to_string(args.P) + ", got " + std::to_string(args.C));
    if (!(args.eps > 0)) throw std::invalid_argument("expected eps > 0");
    if (!isa_usable(isa)) throw std::invalid_argument(std::string("instruction set not usable here: ") + isa_name(isa));
}

constexpr int64_t kGradBlock = 64;  // problems a thread takes at a time

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        default: return "portable";
    }
}

bool isa_compiled(Isa isa) { return solver_of(isa) != nullptr; }

bool isa_usable(Isa isa) {
    if (!isa_compiled(isa)) return false;
#ifdef SPA_FAST_X86
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == Isa::avx2) return avx2;
    if (isa == Isa::avx512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#endif
    return true;
}

Isa best_isa() {
    static const Isa best = isa_usable(Isa::avx512) ? Isa::avx512 : isa_usable(Isa::avx2) ? Isa::avx2 : Isa::portable;
    return best;
}

bool openmp_enabled() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

void sinkhorn_fwd(const SinkhornArgs& args, int threads, Isa isa) {
    check(args, isa);
    if (args.max_iter < 1 || !(args.tol >= 0)) throw std::invalid_argument("expected max_iter >= 1, tol >= 0");

    const LaneSolver& solver = *solver_of(isa);
    const int64_t groups = (args.P + solver.lanes - 1) / solver.lanes;
    run_team(groups, threads, solver.workspace_bytes(args.K, args.M),
             [&](int64_t group, char* memory) { solver.solve(args, group, memory); });
}

void sinkhorn_bwd(const SinkhornGradArgs& args, int threads, Isa isa) {
    check(args, isa);
    GradSolver* solve = grad_portable;
#ifdef SPA_FAST_X86
    if (isa != Isa::portable) solve = isa == Isa::avx2 ? grad_avx2 : grad_avx512;
#endif
#ifdef _OPENMP
    const int64_t blocks = (args.P + kGradBlock - 1) / kGradBlock;
    const int team = static_cast<int>(std::min<int64_t>(threads, blocks));
    if (team > 1) {
#pragma omp parallel for num_threads(team) schedule(static)
        for (int64_t block = 0; block < blocks; ++block)
            solve(args, block * kGradBlock, std::min(args.P, (block + 1) * kGradBlock));
        return;
    }
#else
    (void)threads;
#endif
    solve(args, 0, args.P);
}

}  // namespace spa_fast
