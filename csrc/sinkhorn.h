// Batched entropic transport: the contract between the solvers and whoever calls them.
//
// For each of P problems with cost C [K, M], weights a [K], b [M] and plan
//     P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)
// one iteration is f_i = -eps logsumexp_j(log b_j + (g_j - C_ij) / eps), then the same for g_j over rows; g starts at
// 0. A problem stops when sum_i |sum_j P_ij - a_i| <= tol (tol = 0: never) or after max_iter iterations. Zero weights
// take their row or column out, whatever its cost holds: potential and plan 0. +inf forbids a pair; a row or column
// without a finite pair has potential 0. NaN, -inf and weights that are negative or not finite make that problem's
// outputs NaN after 0 iterations; without any weight in a or in b they are 0.
// A problem's result depends neither on its neighbours nor on trailing zero weights, bit for bit.
#pragma once

#include <cstdint>

namespace spa_fast {

enum class CostType : int { f32 = 0, f16 = 1, bf16 = 2 };

constexpr int64_t kMaxSide = 256;

struct TransportBatch {
    const void* cost;  // contiguous [P / C, K, C, M]; C = 1 is [P, K, M]
    CostType cost_type;
    int64_t C;        // problems side by side: a GEMM of patches [B * K] with tokens [C * M] leaves them so
    bool similarity;  // `cost` holds S, C_ij = 1 - S_ij
    const float* a;   // row weights, problem p at a + p * a_stride; stride 0 shares one row
    int64_t a_stride;
    const float* b;
    int64_t b_stride;
    int64_t P, K, M;  // 1 <= K, M <= kMaxSide
    double eps;       // in units of cost, > 0
};

struct SinkhornArgs : TransportBatch {
    int64_t max_iter;  // >= 1
    double tol;
    bool value;             // score is <P, C> + eps KL(P | a b^T) instead of <P, C> or, of a similarity, <P, S>
    float* score;           // [P]
    float* f;               // [P, K], units of cost
    float* g;               // [P, M]
    int32_t* n_iter;        // [P]
    float* marginal_error;  // [P], of the returned potentials
};

struct SinkhornGradArgs : TransportBatch {
    const float* grad_score;  // [P]
    const float* f;           // [P, K], as sinkhorn_fwd returned them
    const float* g;           // [P, M]
    void* grad_cost;          // as `cost`, in its type and order
};

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

const char* isa_name(Isa isa);
bool isa_compiled(Isa isa);
bool isa_usable(Isa isa);  // compiled, and this processor has it
Isa best_isa();
bool openmp_enabled();

// Runs on up to `threads` OpenMP threads (one where OpenMP is absent). Throws std::invalid_argument on sizes out of
// range or an unusable isa, std::bad_alloc.
void sinkhorn_fwd(const SinkhornArgs& args, int threads, Isa isa);

// grad_cost_ij = grad_score P_ij: the gradient of <P, C> or <P, S> for a plan held fixed, and with respect to C of the
// value at convergence. Exactly 0 where there is no weight; 0 for forbidden pairs and empty problems; NaN where the
// problem's potentials are. Threads, exceptions and independence of neighbours as sinkhorn_fwd; allocates nothing.
void sinkhorn_bwd(const SinkhornGradArgs& args, int threads, Isa isa);

}  // namespace spa_fast
