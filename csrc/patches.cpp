#include "patches.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "patches_lanes.h"
#include "team.h"

namespace spa_fast {
namespace {

const PatchKernel& kernel_of(Isa isa) {
#ifdef SPA_FAST_X86
    if (isa == Isa::avx512) return patches_avx512;
    if (isa == Isa::avx2) return patches_avx2;
#else
    (void)isa;
#endif
    return patches_portable;
}

const PatchGradKernel& grad_of(Isa isa) {
#ifdef SPA_FAST_X86
    if (isa == Isa::avx512) return patches_grad_avx512;
    if (isa == Isa::avx2) return patches_grad_avx2;
#else
    (void)isa;
#endif
    return patches_grad_portable;
}

constexpr int64_t kChunk = 1 << 22;  // numbers of a chunk's unit patches, and of its gradients of similarities

void check(int64_t B, int64_t N, int64_t C, int64_t k, const Features& features, Isa isa) {
    if (B < 0 || C < 0 || k < 1 || k > N || features.M < 1 || features.D < 0)
        throw std::invalid_argument("expected patches [B, N, D], tokens [C, M, D] with M >= 1, and 1 <= k <= N");
    if (!isa_usable(isa)) throw std::invalid_argument(std::string("instruction set not usable here: ") + isa_name(isa));
}

void check_solvable(int64_t k, int64_t M, double eps) {
    if (k > kMaxSide || M > kMaxSide) throw std::invalid_argument("expected k, M <= 256");
    if (!(eps > 0)) throw std::invalid_argument("expected eps > 0");
}

// `of` each class's tokens, `row` numbers a token: their inverse norms, or they themselves at norm 1.
std::unique_ptr<float[]> of_tokens(decltype(PatchKernel::unit_rows) of, int64_t row, const Features& features,
                                   int64_t C, int threads) {
    const int64_t M = features.M, D = features.D, bytes = features.type == CostType::f32 ? 4 : 2;
    std::unique_ptr<float[]> out(new float[C * M * row]);
    run_team(C, threads, 0, [&](int64_t c, char*) {
        of(static_cast<const char*>(features.tokens) + c * M * D * bytes, features.type,
           features.token_mask ? features.token_mask + c * M : nullptr, M, D, out.get() + c * M * row);
    });
    return out;
}

// Every image with all classes, or with some of them where images are fewer than threads need.
template <class Work>
void over_parts(const SelectionArgs& args, int threads, int64_t lanes, int64_t bytes, const Work& work) {
    int64_t splits = 1;
    if (threads > 1 && args.class_conditional)
        splits = std::max<int64_t>(1, std::min((4 * threads - 1) / args.B + 1, args.C / lanes));
    const int64_t classes = ((args.C + splits - 1) / splits + lanes - 1) / lanes * lanes;
    splits = (args.C + classes - 1) / classes;
    run_team(args.B * splits, threads, bytes, [&](int64_t index, char* memory) {
        const int64_t first = index % splits * classes;
        work(PatchPart{index / splits, first, std::min(args.C, first + classes)}, memory);
    });
}

}  // namespace

void topk_patches(const TopkPatchesArgs& args, int threads, Isa isa) {
    check(args.B, args.N, args.C, args.k, args.by, isa);
    if (args.B == 0 || args.C == 0) return;
    const PatchKernel& kernel = kernel_of(isa);
    const auto tokens = of_tokens(kernel.unit_rows, unit_stride(args.by.D), args.by, args.C, threads);
    over_parts(args, threads, kernel.lanes, kernel.topk_bytes(args),
               [&](const PatchPart& part, char* memory) { kernel.topk(args, part, tokens.get(), memory); });
}

void spa_scores_fwd(const SpaScoresArgs& args, int threads, Isa isa) {
    check(args.B, args.N, args.C, args.k, args.by, isa);
    const bool apart = args.aligned.patches != nullptr;
    if (apart) check(args.B, args.N, args.C, args.k, args.aligned, isa);
    check_solvable(args.k, apart ? args.aligned.M : args.by.M, args.eps);
    if (args.max_iter < 1 || !(args.tol >= 0)) throw std::invalid_argument("expected max_iter >= 1, tol >= 0");
    if (args.B == 0 || args.C == 0) return;
    const PatchKernel& kernel = kernel_of(isa);
    const auto tokens = of_tokens(kernel.unit_rows, unit_stride(args.by.D), args.by, args.C, threads);
    std::unique_ptr<float[]> aligned;
    if (apart)
        aligned = of_tokens(kernel.unit_rows, unit_stride(args.aligned.D), args.aligned, args.C, threads);
    over_parts(args, threads, kernel.lanes, kernel.scores_bytes(args), [&](const PatchPart& part, char* memory) {
        kernel.scores(args, part, tokens.get(), aligned.get(), memory);
    });
}

void spa_scores_bwd(const SpaScoresGradArgs& args, int threads, Isa isa) {
    check(args.B, args.N, args.C, args.k, args.aligned, isa);
    check_solvable(args.k, args.aligned.M, args.eps);
    if (args.B == 0 || args.C == 0) return;
    const PatchKernel& lanes = kernel_of(isa);
    const PatchGradKernel& kernel = grad_of(isa);
    const auto norms = of_tokens(lanes.inverse_norms, 1, args.aligned, args.C, threads);
    const int64_t width = (args.aligned.D + lanes.lanes - 1) / lanes.lanes * lanes.lanes;
    const int64_t unit = args.N * width, grad = args.C * args.k * args.aligned.M;
    const int64_t images = std::min(args.B, std::max<int64_t>(1, kChunk / std::max(unit, grad)));
    const std::unique_ptr<float[]> memory(new float[images * (unit + args.N + grad)]);
    const int64_t bytes = kernel.bytes(args);
    for (int64_t first = 0; first < args.B; first += images) {
        const int64_t last = std::min(args.B, first + images);
        float* const inverse = memory.get() + images * unit;
        const GradChunk chunk{first, last, memory.get(), inverse, inverse + images * args.N, norms.get()};
        run_team(last - first, threads, bytes,
                 [&](int64_t index, char* space) { kernel.patches(args, chunk, first + index, space); });
        if (args.grad_tokens)
            run_team(args.C, threads, bytes, [&](int64_t c, char* space) { kernel.tokens(args, chunk, c, space); });
    }
}

}  // namespace spa_fast
