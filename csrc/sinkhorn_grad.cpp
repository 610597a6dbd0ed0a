// The gradient, W entries of one row at a time: every entry is computed from its own cost and potentials alone.
#include "sinkhorn_lanes.h"
#include "vector.h"

namespace spa_fast {
namespace {

// 2^x; 0 below the normal numbers and for NaN, which arises only where there is no weight.
inline F exp2_or_zero(F x) { return x >= -126.0f ? exp2(min(x, splat<F>(127.0f))) : F{}; }

template <class S>
struct Row {
    const S* cost;
    S* grad;
    F f, coefficient, scale;
    bool similarity;

    F entry(F read, F g, F b) const {
        const F cost = similarity ? 1.0f - read : read;
        const F plan = b * exp2_or_zero((f - cost + g) * scale);
        return b == 0.0f ? F{} : coefficient * plan;
    }
};

template <class S>
void solve(const SinkhornGradArgs& args, int64_t first, int64_t last) {
    const int64_t K = args.K, M = args.M, C = args.C, whole = M / W * W;
    const F scale = splat<F>(static_cast<float>(kLog2E / args.eps));
    for (int64_t p = first; p < last; ++p) {
        const int64_t offset = (p / C) * K * C * M + p % C * M;
        const S* const cost = static_cast<const S*>(args.cost) + offset;
        S* const grad = static_cast<S*>(args.grad_cost) + offset;
        const float* const a = args.a + p * args.a_stride;
        const float* const b = args.b + p * args.b_stride;
        const float* const f = args.f + p * K;
        const float* const g = args.g + p * M;
        const float upstream = args.grad_score[p];
        for (int64_t i = 0; i < K; ++i) {
            // f of an invalid problem is NaN and poisons the row; else it is finite.
            const float coefficient = a[i] == 0.0f ? 0.0f : upstream * a[i] + 0.0f * f[i];
            const Row<S> row{cost + i * C * M, grad + i * C * M, splat<F>(f[i]), splat<F>(coefficient), scale,
                             args.similarity};
            const I active = splat<F>(a[i]) != 0.0f;
            for (int64_t j = 0; j < whole; j += W) {
                const F x = row.entry(widen(row.cost + j), load<F>(g + j), load<F>(b + j));
                narrow(row.grad + j, active ? x : F{});
            }
            if (whole < M) {
                const int64_t n = M - whole;
                const F x = row.entry(widen(row.cost + whole, n), widen(g + whole, n), widen(b + whole, n));
                narrow(row.grad + whole, active ? x : F{}, n);
            }
        }
    }
}

}  // namespace

#define SPA_FAST_JOIN(x, y) x##y
#define SPA_FAST_NAME(isa) SPA_FAST_JOIN(grad_, isa)
void SPA_FAST_NAME(SPA_FAST_ISA)(const SinkhornGradArgs& args, int64_t first, int64_t last) {
    switch (args.cost_type) {
        case CostType::f32: return solve<float>(args, first, last);
        case CostType::f16: return solve<Half>(args, first, last);
        case CostType::bf16: return solve<BFloat>(args, first, last);
    }
}

}  // namespace spa_fast
