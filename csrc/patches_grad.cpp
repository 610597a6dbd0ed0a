// The gradient at fixed plans: kept similarities are computed again, their gradients are added to patches by images
// and to tokens by classes. Every sum runs in the order of classes or of images.
#include "patches_lanes.h"
#include "sinkhorn_lanes.h"
#include "unit_rows.h"

#define SPA_FAST_JOIN(x, y) x##y
#define SPA_FAST_NAME(stem, isa) SPA_FAST_JOIN(stem, isa)

namespace spa_fast {
namespace {

// Rows and vectors of a row that are held in registers.
constexpr int kHeld = W == 16 ? 6 : 3, kWide = W == 16 ? 4 : 3;

template <int N>
struct Number {
    static constexpr int value = N;
};
template <class S>
S* writable(const S* x) {
    return const_cast<S*>(x);
}

// rows[i] += sum_j weight[i, j] y_j for J of the tokens.
template <int J, int V>
void spread_tile(const float* weight, int64_t M, int64_t k, const float* y, int64_t y_row, float* const* rows,
                 int64_t d) {
    F held[J][V];
#pragma GCC unroll 6
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) held[j][v] = load<F>(y + j * y_row + d + v * W);
    for (int64_t i = 0; i < k; ++i) {
        float* const to = rows[i] + d;
        F sum[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[v] = load<F>(to + v * W);
#pragma GCC unroll 6
        for (int j = 0; j < J; ++j) {
            const F factor = splat<F>(weight[i * M + j]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[v] += factor * held[j][v];
        }
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(to + v * W, sum[v]);
    }
}

// y_j += sum_i weight[i, j] rows[i], likewise.
template <int J, int V>
void collect_tile(const float* weight, int64_t M, int64_t k, float* y, int64_t y_row, float* const* rows, int64_t d) {
    F sum[J][V];
#pragma GCC unroll 6
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[j][v] = load<F>(y + j * y_row + d + v * W);
    for (int64_t i = 0; i < k; ++i) {
        const float* const from = rows[i] + d;
        F held[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) held[v] = load<F>(from + v * W);
#pragma GCC unroll 6
        for (int j = 0; j < J; ++j) {
            const F factor = splat<F>(weight[i * M + j]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[j][v] += factor * held[v];
        }
    }
#pragma GCC unroll 6
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(y + j * y_row + d + v * W, sum[j][v]);
}

// tile(J, V, first token, first number) over all of M tokens and `width` numbers, a multiple of W.
template <class Tile>
inline void over_tiles(int64_t M, int64_t width, const Tile& tile) {
    const int64_t step = even_step(M, kHeld);
    const auto held = [&](auto v, int64_t j, int64_t d) {
        switch (M - j < step ? M - j : step) {
            case 1: return tile(Number<1>(), v, j, d);
            case 2: return tile(Number<2>(), v, j, d);
            case 3: return tile(Number<3>(), v, j, d);
            case 4: return tile(Number<kHeld == 3 ? 3 : 4>(), v, j, d);
            case 5: return tile(Number<kHeld == 3 ? 3 : 5>(), v, j, d);
            default: return tile(Number<kHeld>(), v, j, d);
        }
    };
    int64_t d = 0;
    for (; d + kWide * W <= width; d += kWide * W)
        for (int64_t j = 0; j < M; j += step) held(Number<kWide>(), j, d);
    for (; d < width; d += W)
        for (int64_t j = 0; j < M; j += step) held(Number<1>(), j, d);
}

// out = (grad - unit <grad, unit>) / norm, 0 where the inverse is.
template <class S>
void through_norm(const float* grad, const float* unit, float inverse, int64_t width, S* out) {
    F products = {};
    for (int64_t d = 0; d < width; d += W) products += load<F>(grad + d) * load<F>(unit + d);
    float along[W];
    sum_lanes(&products, 1, along);
    const F factor = splat<F>(inverse);
    for (int64_t d = 0; d < width; d += W) {
        const F x = scaled(load<F>(grad + d) - along[0] * load<F>(unit + d), factor);
        if (width - d < W)
            narrow(out + d, x, width - d);
        else
            narrow(out + d, x);
    }
}

struct Space {
    int64_t width;  // of rows in fp32
    float *tokens, *grad, *a, *b;
    F* sums;
    float** rows;

    Space(Arena& arena, const SpaScoresGradArgs& args) {
        const int64_t M = args.aligned.M, most = args.N > M ? args.N : M;
        width = padded(args.aligned.D);
        tokens = arena.take<float>(M * width);
        grad = arena.take<float>(most * width);
        a = arena.take<float>(args.k);
        b = arena.take<float>(M);
        sums = arena.take<F>(kDotRows * M);
        rows = arena.take<float*>(args.k);
    }
};

int64_t bytes(const SpaScoresGradArgs& args) {
    Arena arena{nullptr};
    Space space(arena, args);
    return arena.used;
}

// Row pointers of what is kept for an image and a class.
void point(const SpaScoresGradArgs& args, int64_t image, int64_t c, float* from, int64_t width, float** rows) {
    const int64_t* const index = args.indices + (image * args.C + c) * args.k;
    for (int64_t i = 0; i < args.k; ++i) rows[i] = from + index[i] * width;
}

void grad_patches(const SpaScoresGradArgs& args, const GradChunk& chunk, int64_t image, void* workspace) {
    Arena arena{static_cast<char*>(workspace)};
    Space s(arena, args);
    const Features& from = args.aligned;
    const int64_t N = args.N, C = args.C, k = args.k, M = from.M, D = from.D, local = image - chunk.first_image;
    const bool* const mask = args.patch_mask ? args.patch_mask + image * N : nullptr;
    float* const unit = chunk.unit + local * N * s.width;
    float* const norms = chunk.norms + local * N;
    const int64_t size = from.type == CostType::f32 ? 4 : 2;
    inverse_norms(static_cast<const char*>(from.patches) + image * N * D * size, from.type, mask, N, D, norms);
    unit_rows(from.patches, from.type, image * N, N, D, norms, unit, s.width);
    for (int64_t e = 0; e < N * s.width; ++e) s.grad[e] = 0;
    for (int64_t i = 0; i < k; ++i) s.a[i] = 1.0f / static_cast<float>(k);
    for (int64_t j = 0; j < M; ++j) s.b[j] = 1.0f / static_cast<float>(M);
    for (int64_t c = 0; c < C; ++c) {
        const int64_t p = image * C + c;
        float* const grad_sim = chunk.grad_sim + (local * C + c) * k * M;
        unit_rows(from.tokens, from.type, c * M, M, D, chunk.token_norms + c * M, s.tokens, s.width);
        point(args, image, c, unit, s.width, s.rows);
        dots(s.rows, k, s.tokens, s.width, M, s.width, s.sums, grad_sim);
        if (mask) uniform_weights(mask, args.indices + p * k, k, s.a);
        if (from.token_mask) uniform_weights(from.token_mask + c * M, nullptr, M, s.b);
        // The value is that of the cost 1 - S and falls with S.
        const float upstream = args.value ? -args.grad_score[p] : args.grad_score[p];
        SPA_FAST_NAME(grad_, SPA_FAST_ISA)
        ({{grad_sim, CostType::f32, 1, true, s.a, 0, s.b, 0, 1, k, M, args.eps},
          &upstream,
          args.f + p * k,
          args.g + p * M,
          grad_sim},
         0, 1);
        if (!args.grad_patches) continue;
        point(args, image, c, s.grad, s.width, s.rows);
        over_tiles(M, s.width, [&](auto held, auto wide, int64_t j, int64_t d) {
            spread_tile<held.value, wide.value>(grad_sim + j, M, k, s.tokens + j * s.width, s.width, s.rows, d);
        });
    }
    if (!args.grad_patches) return;
    with_row(args.grad_patches, from.type, image * N, D, [&](auto out) {
        for (int64_t n = 0; n < N; ++n)
            through_norm(s.grad + n * s.width, unit + n * s.width, norms[n], D, writable(out) + n * D);
    });
}

void grad_tokens(const SpaScoresGradArgs& args, const GradChunk& chunk, int64_t c, void* workspace) {
    Arena arena{static_cast<char*>(workspace)};
    Space s(arena, args);
    const Features& from = args.aligned;
    const int64_t k = args.k, M = from.M, D = from.D;
    float* const out = args.grad_tokens + c * M * D;
    for (int64_t j = 0; j < M; ++j)
        for (int64_t d = 0; d < s.width; ++d)
            s.grad[j * s.width + d] = chunk.first_image > 0 && d < D ? out[j * D + d] : 0;
    for (int64_t image = chunk.first_image; image < chunk.last_image; ++image) {
        const int64_t local = image - chunk.first_image;
        const float* const grad_sim = chunk.grad_sim + (local * args.C + c) * k * M;
        point(args, image, c, chunk.unit + local * args.N * s.width, s.width, s.rows);
        over_tiles(M, s.width, [&](auto held, auto wide, int64_t j, int64_t d) {
            collect_tile<held.value, wide.value>(grad_sim + j, M, k, s.grad + j * s.width, s.width, s.rows, d);
        });
    }
    const bool last = chunk.last_image == args.B;
    if (last) unit_rows(from.tokens, from.type, c * M, M, D, chunk.token_norms + c * M, s.tokens, s.width);
    for (int64_t j = 0; j < M; ++j) {
        const float* const grad = s.grad + j * s.width;
        if (last)
            through_norm(grad, s.tokens + j * s.width, chunk.token_norms[c * M + j], D, out + j * D);
        else
            for (int64_t d = 0; d < D; ++d) out[j * D + d] = grad[d];
    }
}

}  // namespace

extern const PatchGradKernel SPA_FAST_NAME(patches_grad_, SPA_FAST_ISA);
const PatchGradKernel SPA_FAST_NAME(patches_grad_, SPA_FAST_ISA) = {bytes, grad_patches, grad_tokens};

}  // namespace spa_fast
