// What patches.cpp needs of one build of patches_lanes.cpp and patches_grad.cpp (one per instruction set).
#pragma once

#include "patches.h"

namespace spa_fast {

// Classes first_class to last_class - 1 for one image: all of them unless the selection is class-conditional.
struct PatchPart {
    int64_t image, first_class, last_class;
};

// Images first_image to last_image - 1, that many [.., N, D rounded up to lanes] unit patches, [.., N] inverse norms
// and [.., C, k, M] gradients of similarities; all of the tokens' gradient is in after the last.
struct GradChunk {
    int64_t first_image, last_image;
    float *unit, *norms, *grad_sim;
    const float* token_norms;
};

// Numbers from one row at norm 1 to the next: rows of a power of two would share few sets of the L1 cache.
constexpr int64_t unit_stride(int64_t width) { return (width + 15) / 16 * 16 + 16; }

struct PatchKernel {
    int64_t lanes;
    // 1 / |row| of `count` contiguous rows, 0 where the mask is false.
    void (*inverse_norms)(const void* rows, CostType type, const bool* mask, int64_t count, int64_t width, float* out);
    // The same rows at norm 1, unit_stride(width) apart, zeros after them to a multiple of a vector.
    void (*unit_rows)(const void* rows, CostType type, const bool* mask, int64_t count, int64_t width, float* out);
    // Tokens at norm 1, as unit_rows leaves them. Workspaces: multiples of 64 bytes.
    int64_t (*topk_bytes)(const TopkPatchesArgs& args);
    void (*topk)(const TopkPatchesArgs& args, const PatchPart& part, const float* tokens, void* workspace);
    int64_t (*scores_bytes)(const SpaScoresArgs& args);
    void (*scores)(const SpaScoresArgs& args, const PatchPart& part, const float* tokens, const float* aligned_tokens,
                   void* workspace);
};

struct PatchGradKernel {
    int64_t (*bytes)(const SpaScoresGradArgs& args);
    // Fills an image's share of the chunk and writes its grad_patches.
    void (*patches)(const SpaScoresGradArgs& args, const GradChunk& chunk, int64_t image, void* workspace);
    // Adds the chunk's images to grad_tokens of a class.
    void (*tokens)(const SpaScoresGradArgs& args, const GradChunk& chunk, int64_t c, void* workspace);
};

extern const PatchKernel patches_portable, patches_avx2, patches_avx512;
extern const PatchGradKernel patches_grad_portable, patches_grad_avx2, patches_grad_avx512;

}  // namespace spa_fast
