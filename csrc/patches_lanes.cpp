// An image against classes: similarities of a few classes' tokens with all of its patches, a patch per lane, leave the
// L1 cache only as what is kept of them.
#include "patches_lanes.h"
#include "selection.h"
#include "sinkhorn_lanes.h"
#include "unit_rows.h"

#define SPA_FAST_JOIN(x, y) x##y
#define SPA_FAST_NAME(stem, isa) SPA_FAST_JOIN(stem, isa)

namespace spa_fast {
namespace {

const LaneSolver& solver = SPA_FAST_NAME(lanes_, SPA_FAST_ISA);

constexpr int64_t kPad = 16;  // as in unit_stride

int64_t vectors(int64_t n) { return (n + W - 1) / W; }

// Similarities of one image's patches and what is selected by them.
struct Selector {
    const SelectionArgs& args;
    int64_t image, block;  // classes multiplied at a time
    int64_t tile_row;
    F *groups, *relevance, *best;
    I* keys;
    float *norms, *tile;
    int32_t *number, *key, *chosen, *column;

    Selector(Arena& arena, const SelectionArgs& given, int64_t image_) : args(given), image(image_) {
        const int64_t M = args.by.M, n = vectors(args.N), side = args.N + W;
        block = M < kBlock ? kBlock / M : 1;
        tile_row = n * W + kPad;
        groups = arena.take<F>(n * args.by.D);
        relevance = arena.take<F>(n);
        best = arena.take<F>(n);
        keys = arena.take<I>(n);
        norms = arena.take<float>(args.N);
        tile = arena.take<float>(block * M * tile_row);
        int32_t** const numbers[] = {&number, &key, &chosen, &column};
        for (int32_t** piece : numbers) *piece = arena.take<int32_t>(side);
    }

    const bool* token_mask(int64_t c) const {
        return args.by.token_mask ? args.by.token_mask + c * args.by.M : nullptr;
    }
    const bool* mask() const { return args.patch_mask ? args.patch_mask + image * args.N : nullptr; }

    void pack(const int32_t* index, int64_t count) {
        pack_unit(args.by.patches, args.by.type, image * args.N, index, count, args.by.D, norms, groups);
    }

    // use(c, similarities [M, count] of class c, a row of which is tile_row long); `relevance` is reduced from them.
    template <class Use>
    void over_classes(const PatchPart& part, const float* tokens, int64_t count, const Use& use) {
        const int64_t M = args.by.M, D = args.by.D, row = unit_stride(D);
        for (int64_t c = part.first_class; c < part.last_class; c += block) {
            const int64_t n = part.last_class - c < block ? part.last_class - c : block;
            multiply(tokens + c * M * row, row, 1, n * M, groups, vectors(count), D, tile, tile_row);
            for (int64_t i = 0; i < n; ++i) {
                const float* const similarities = tile + i * M * tile_row;
                reduce_tokens(similarities, tile_row, M, token_mask(c + i), vectors(count), args.reduce, relevance);
                use(c + i, similarities);
            }
        }
    }

    void choose(const F* r) {
        const int64_t N = args.N;
        for (int64_t g = 0; g < vectors(N); ++g) keys[g] = order_of(r[g]);
        int32_t* const key_of = reinterpret_cast<int32_t*>(keys);
        if (mask())
            for (int64_t i = 0; i < N; ++i) key_of[i] = mask()[i] ? key_of[i] : INT32_MIN;
        for (int64_t i = N; i < vectors(N) * W; ++i) key_of[i] = INT32_MIN;
        select_largest(keys, vectors(N), args.k, number, key, chosen);
    }

    int64_t* write_indices(int64_t c) const {
        int64_t* const out = args.indices + (image * args.C + c) * args.k;
        for (int64_t i = 0; i < args.k; ++i) out[i] = chosen[i];
        return out;
    }

    // use(c, similarities, column): kept patch i is in lane column[i]; `chosen` tells which it is.
    template <class Use>
    void run(const PatchPart& part, const float* tokens, const Use& use) {
        const int64_t N = args.N;
        inverse_norms(static_cast<const char*>(args.by.patches) +
                          image * N * args.by.D * (args.by.type == CostType::f32 ? 4 : 2),
                      args.by.type, mask(), N, args.by.D, norms);
        pack(nullptr, N);
        if (args.class_conditional) {
            over_classes(part, tokens, N, [&](int64_t c, const float* similarities) {
                choose(relevance);
                use(c, similarities, chosen);
            });
            return;
        }
        for (int64_t g = 0; g < vectors(N); ++g) best[g] = splat<F>(-kInf);
        over_classes(part, tokens, N, [&](int64_t c, const float*) {
            if (count_of(token_mask(c), args.by.M) == 0) return;
            for (int64_t g = 0; g < vectors(N); ++g)
                best[g] = ((relevance[g] > best[g]) | (relevance[g] != relevance[g])) ? relevance[g] : best[g];
        });
        choose(best);
        pack(chosen, args.k);
        for (int32_t i = 0; i < args.k; ++i) column[i] = i;
        over_classes(part, tokens, args.k,
                     [&](int64_t c, const float* similarities) { use(c, similarities, column); });
    }
};

int64_t topk_bytes(const TopkPatchesArgs& args) {
    Arena arena{nullptr};
    Selector selector(arena, args, 0);
    return arena.used;
}

void topk(const TopkPatchesArgs& args, const PatchPart& part, const float* tokens, void* workspace) {
    Arena arena{static_cast<char*>(workspace)};
    Selector selector(arena, args, part.image);
    const int64_t M = args.by.M, k = args.k;
    selector.run(part, tokens, [&](int64_t c, const float* similarities, const int32_t* column) {
        selector.write_indices(c);
        const float* const r = reinterpret_cast<const float*>(selector.relevance);
        const bool* const mask = selector.token_mask(c);
        const int64_t out = (part.image * args.C + c) * k;
        for (int64_t i = 0; i < k; ++i) {
            const float best = r[column[i]];
            int32_t first = 0;
            if (args.reduce == Reduce::max)
                for (int64_t j = M - 1; j >= 0; --j) {
                    const float s = similarities[j * selector.tile_row + column[i]];
                    if ((!mask || mask[j]) && !(s < best)) first = static_cast<int32_t>(j);
                }
            args.scores[out + i] = best;
            args.argmax[out + i] = first;
        }
    });
}

// Kept similarities of up to W classes, which are then solved side by side.
struct Aligner {
    const SpaScoresArgs& args;
    int64_t image, M, pending = 0;
    int64_t unit_row;
    float *sim, *a, *b, *marginal_error;
    float *unit, *norms;  // of the aligned features, where they are others
    F* sums;
    const float** kept;
    void* solver_memory;

    Aligner(Arena& arena, const SpaScoresArgs& given, int64_t image_) : args(given), image(image_) {
        const int64_t k = args.k;
        M = apart() ? args.aligned.M : args.by.M;
        sim = arena.take<float>(W * k * M);
        a = arena.take<float>(W * k);
        b = arena.take<float>(W * M);
        marginal_error = arena.take<float>(W);
        solver_memory = arena.take<char>(solver.workspace_bytes(k, M));
        if (!apart()) return;
        unit_row = unit_stride(args.aligned.D);
        unit = arena.take<float>(args.N * unit_row);
        norms = arena.take<float>(args.N);
        sums = arena.take<F>(kDotRows * M);
        kept = arena.take<const float*>(k);
    }

    bool apart() const { return args.aligned.patches != nullptr; }
    const bool* patch_mask() const { return args.patch_mask ? args.patch_mask + image * args.N : nullptr; }
    const bool* token_mask() const { return apart() ? args.aligned.token_mask : args.by.token_mask; }

    void begin() {
        for (int64_t i = 0; i < W * args.k; ++i) a[i] = 1.0f / static_cast<float>(args.k);
        for (int64_t j = 0; j < W * M; ++j) b[j] = 1.0f / static_cast<float>(M);
        if (!apart()) return;
        const Features& from = args.aligned;
        const int64_t N = args.N, bytes = from.type == CostType::f32 ? 4 : 2;
        inverse_norms(static_cast<const char*>(from.patches) + image * N * from.D * bytes, from.type, patch_mask(), N,
                      from.D, norms);
        unit_rows(from.patches, from.type, image * N, N, from.D, norms, unit, unit_row);
    }

    void add(int64_t c, const Selector& selector, const float* similarities, const int32_t* column,
             const float* aligned_tokens) {
        const int64_t k = args.k;
        const int64_t* const indices = selector.write_indices(c);
        float* const to = sim + pending * k * M;
        if (apart()) {
            for (int64_t i = 0; i < k; ++i) kept[i] = unit + indices[i] * unit_row;
            dots(kept, k, aligned_tokens + c * M * unit_row, unit_row, M, padded(args.aligned.D), sums, to);
        } else {
            for (int64_t j = 0; j < M; ++j)
                for (int64_t i = 0; i < k; ++i) to[i * M + j] = similarities[j * selector.tile_row + column[i]];
        }
        if (patch_mask()) uniform_weights(patch_mask(), indices, k, a + pending * k);
        if (token_mask()) uniform_weights(token_mask() + c * M, nullptr, M, b + pending * M);
        if (++pending == W) solve(c + 1);
    }

    // The pending classes, the last of which is end - 1.
    void solve(int64_t end) {
        if (pending == 0) return;
        const int64_t k = args.k, first = image * args.C + end - pending;
        const SinkhornArgs problems{{sim, CostType::f32, 1, true, a, patch_mask() ? k : 0, b, token_mask() ? M : 0,
                                     pending, k, M, args.eps},
                                    args.max_iter,
                                    args.tol,
                                    args.value,
                                    args.score + first,
                                    args.f + first * k,
                                    args.g + first * M,
                                    args.n_iter + first,
                                    marginal_error};
        solver.solve(problems, 0, solver_memory);
        pending = 0;
    }
};

int64_t scores_bytes(const SpaScoresArgs& args) {
    Arena arena{nullptr};
    Selector selector(arena, args, 0);
    Aligner aligner(arena, args, 0);
    return arena.used;
}

void scores(const SpaScoresArgs& args, const PatchPart& part, const float* tokens, const float* aligned_tokens,
            void* workspace) {
    Arena arena{static_cast<char*>(workspace)};
    Selector selector(arena, args, part.image);
    Aligner aligner(arena, args, part.image);
    aligner.begin();
    selector.run(part, tokens, [&](int64_t c, const float* similarities, const int32_t* column) {
        aligner.add(c, selector, similarities, column, aligned_tokens);
    });
    aligner.solve(part.last_class);
}

void tokens_at_norm_1(const void* rows, CostType type, const bool* mask, int64_t count, int64_t width, float* out) {
    for (int64_t i = 0; i < count; ++i)
        with_row(rows, type, i, width, [&](auto row) {
            const float inverse = mask && !mask[i] ? 0 : inverse_norm(row, width);
            unit_rows(row, type, 0, 1, width, &inverse, out + i * unit_stride(width), 0);
        });
}

}  // namespace

extern const PatchKernel SPA_FAST_NAME(patches_, SPA_FAST_ISA);
const PatchKernel SPA_FAST_NAME(patches_, SPA_FAST_ISA) = {W, inverse_norms, tokens_at_norm_1, topk_bytes, topk, scores_bytes, scores};

}  // namespace spa_fast
