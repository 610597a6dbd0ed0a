// Patches selected by semantic tokens, and the selected ones aligned by transport: the contract.
//
//     S_{b,c,n,j} = cos(patch_bn, token_cj),   r_{b,c,n} = reduce_j S_{b,c,n,j}
//     I_{b,c} = the k patches of largest r, falling, equal values by lowest index
//     score_{b,c} = <P, S_I>, P the plan of cost 1 - S_I and uniform weights over the unmasked
// A vector of norm 0 and a masked one count as the zero vector, whatever they hold: similarity 0, gradient 0. Masked
// tokens take no part in the reduction, nor a class without any in max_c; masked patches are selected after all others,
// in order of index, and have no weight. Without any patch or token left the score is 0.
// Threads and exceptions as sinkhorn_fwd. Results depend neither on threads nor on B and C, bit for bit (gradients sum
// over classes or images, in their order). Extra memory is the tokens at norm 1, and for each thread an image at norm 1,
// tiles and a solver's workspace, a few MB; for the gradient 16 MB of images at norm 1 and 16 MB of gradients of
// similarities, or those of one image.
#pragma once

#include "sinkhorn.h"

namespace spa_fast {

enum class Reduce : int { max = 0, mean = 1, softmax = 2 };
constexpr float kSoftmaxTemperature = 0.1f;

struct Features {
    const void* patches;  // [B, N, D] contiguous
    const void* tokens;   // [C, M, D] contiguous
    CostType type;        // of both
    int64_t M, D;
    const bool* token_mask;  // [C, M], true takes part; null: all do
};

struct SelectionArgs {
    Features by;
    const bool* patch_mask;  // [B, N] or null
    int64_t B, N, C, k;      // 1 <= k <= N
    Reduce reduce;
    bool class_conditional;  // false: one selection an image, by max_c r
    int64_t* indices;        // [B, C, k]
};

struct TopkPatchesArgs : SelectionArgs {
    float* scores;    // [B, C, k], r of the selected; 0 where masked
    int32_t* argmax;  // [B, C, k], the first unmasked token of the largest similarity; 0 unless reduce is max
};

struct SpaScoresArgs : SelectionArgs {
    Features aligned;  // patches null: `by` is aligned as well
    double eps;        // this and what follows as in SinkhornArgs; k, M <= kMaxSide
    int64_t max_iter;
    double tol;
    bool value;       // score is the regularised transport value instead
    float* score;     // [B, C]
    float* f;         // [B, C, k]
    float* g;         // [B, C, M]
    int32_t* n_iter;  // [B, C]
};

struct SpaScoresGradArgs {
    Features aligned;
    const bool* patch_mask;
    int64_t B, N, C, k;
    const int64_t* indices;
    double eps;
    bool value;
    const float* grad_score;  // [B, C]
    const float* f;
    const float* g;
    void* grad_patches;  // as patches, in their type; null: not wanted
    float* grad_tokens;  // [C, M, D]; null: not wanted
};

void topk_patches(const TopkPatchesArgs& args, int threads, Isa isa);
void spa_scores_fwd(const SpaScoresArgs& args, int threads, Isa isa);

// For a plan held fixed: the gradient of <P, S>, and at convergence that of the value.
void spa_scores_bwd(const SpaScoresGradArgs& args, int threads, Isa isa);

}  // namespace spa_fast
