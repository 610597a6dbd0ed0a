// Similarities, selection and the fused score against plain fp64 loops, on every instruction set this processor has.
// Buffers are exactly as large as the contracts say, which a sanitizer checks.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "half.h"
#include "patches.h"
#include "similarity.h"

using namespace spa_fast;

namespace {

// Numbers in a type, and what they are in fp64.
struct Numbers {
    std::vector<float> f32;
    std::vector<uint16_t> bits;
    std::vector<double> exact;
    CostType type;

    Numbers(int64_t n, CostType type_, unsigned seed) : exact(n), type(type_) {
        std::mt19937 random(seed);
        std::uniform_int_distribution<int> mantissa(-127, 127);  // fits every type
        if (type == CostType::f32)
            f32.resize(n);
        else
            bits.resize(n);
        for (int64_t i = 0; i < n; ++i) {
            const float x = static_cast<float>(mantissa(random)) / 64;
            exact[i] = x;
            if (type == CostType::f32) f32[i] = x;
            if (type == CostType::bf16) bits[i] = to_bf16(x);
            if (type == CostType::f16) bits[i] = to_f16(x);
        }
    }

    const void* data() const { return type == CostType::f32 ? static_cast<const void*>(f32.data()) : bits.data(); }
};

struct Mask {
    std::unique_ptr<bool[]> on;

    Mask(int64_t n, unsigned seed) : on(new bool[n]) {
        std::mt19937 random(seed);
        for (int64_t i = 0; i < n; ++i) on[i] = random() % 4 != 0;
    }
};

double cosine(const double* x, const double* y, int64_t D) {
    double xy = 0, xx = 0, yy = 0;
    for (int64_t d = 0; d < D; ++d) {
        xy += x[d] * y[d];
        xx += x[d] * x[d];
        yy += y[d] * y[d];
    }
    return xx > 0 && yy > 0 ? xy / std::sqrt(xx * yy) : 0;
}

void test_similarity(Isa isa) {
    const int64_t sizes[][4] = {{1, 1, 1, 1}, {2, 5, 70, 7}, {1, 130, 33, 63}, {3, 49, 3, 129}, {1, 20, 300, 513}};
    for (const auto& [P, R, Q, D] : sizes)
        for (const CostType type : {CostType::f32, CostType::f16, CostType::bf16}) {
            const Numbers x(P * R * D, type, 1), y(P * Q * D, type, 2);
            for (const bool columns : {false, true}) {
                // Stored [P, D, R] the same numbers are another matrix.
                const int64_t row = columns ? 1 : D, x_step = columns ? R : 1, y_step = columns ? Q : 1;
                std::vector<float> out(P * R * Q, NAN);
                similarity({{x.data(), R, row, x_step, R * D}, {y.data(), Q, row, y_step, Q * D}, type, P, D, false,
                            out.data()},
                           2, isa);
                for (int64_t e = 0; e < P * R * Q; ++e) {
                    const int64_t p = e / (R * Q), r = e / Q % R, q = e % Q;
                    double want = 0;
                    for (int64_t d = 0; d < D; ++d)
                        want += x.exact[p * R * D + r * row + d * x_step] * y.exact[p * Q * D + q * row + d * y_step];
                    CHECK(std::fabs(out[e] - want) <= 1e-6 * D, "%s: %g, expected %g", isa_name(isa), out[e], want);
                }
            }
        }
}

struct Case {
    int64_t B, N, C, M, D, k;
};
constexpr Case kCases[] = {{1, 1, 1, 1, 1, 1},   {2, 17, 3, 2, 7, 17},     {1, 197, 5, 6, 33, 16},
                           {3, 33, 18, 5, 64, 8}, {1, 70, 2, 60, 129, 64}, {2, 16, 17, 1, 100, 15}};

Features features(const Numbers& patches, const Numbers& tokens, const Case& size, const bool* mask) {
    return {patches.data(), tokens.data(), patches.type, size.M, size.D, mask};
}

void test_selection(Isa isa) {
    for (const Case& size : kCases)
        for (const CostType type : {CostType::f32, CostType::f16, CostType::bf16})
            for (const bool masked : {false, true})
                for (const Reduce reduce : {Reduce::max, Reduce::mean, Reduce::softmax}) {
                    const int64_t B = size.B, N = size.N, C = size.C, M = size.M, D = size.D, k = size.k;
                    const Numbers patches(B * N * D, type, 3), tokens(C * M * D, type, 4);
                    const Mask patch_mask(B * N, 5), token_mask(C * M, 6);
                    std::vector<float> scores(B * C * k, NAN);
                    std::vector<int64_t> indices(B * C * k, -1);
                    std::vector<int32_t> argmax(B * C * k, -1);
                    topk_patches({{features(patches, tokens, size, masked ? token_mask.on.get() : nullptr),
                                   masked ? patch_mask.on.get() : nullptr, B, N, C, k, reduce, true, indices.data()},
                                  scores.data(),
                                  argmax.data()},
                                 3, isa);
                    for (int64_t p = 0; p < B * C; ++p) {
                        const int64_t b = p / C, c = p % C;
                        const auto on = [&](int64_t n) { return !masked || patch_mask.on[b * N + n]; };
                        std::vector<double> r(N);
                        for (int64_t n = 0; n < N; ++n) {
                            double top = -2, sum = 0, weights = 0, weighted = 0;
                            int64_t count = 0;
                            for (int64_t j = 0; j < M; ++j) {
                                if (masked && !token_mask.on[c * M + j]) continue;
                                const double s =
                                    on(n) ? cosine(&patches.exact[(b * N + n) * D], &tokens.exact[(c * M + j) * D], D)
                                          : 0;
                                top = std::fmax(top, s);
                                sum += s;
                                ++count;
                                weights += std::exp(s / kSoftmaxTemperature);
                                weighted += s * std::exp(s / kSoftmaxTemperature);
                            }
                            r[n] = count == 0                ? 0
                                   : reduce == Reduce::max  ? top
                                   : reduce == Reduce::mean ? sum / count
                                                            : weighted / weights;
                        }
                        std::vector<double> best;
                        for (int64_t n = 0; n < N; ++n) best.push_back(on(n) ? r[n] : -2);
                        std::sort(best.rbegin(), best.rend());
                        std::vector<bool> seen(N, false);
                        for (int64_t i = 0; i < k; ++i) {
                            const int64_t n = indices[p * k + i];
                            CHECK(n >= 0 && n < N && !seen[n], "index %d", int(n));
                            seen[n] = true;
                            CHECK(std::fabs((on(n) ? r[n] : -2) - best[i]) <= 2e-6, "%s: %g, expected %g",
                                  isa_name(isa), r[n], best[i]);
                            CHECK(std::fabs(scores[p * k + i] - r[n]) <= 2e-6, "%s: score %g, expected %g",
                                  isa_name(isa), scores[p * k + i], r[n]);
                            CHECK(argmax[p * k + i] >= 0 && argmax[p * k + i] < M, "argmax");
                        }
                    }
                }
}

// The fused score is that of the solver on similarities of what it says it has chosen, and its gradient that of the
// similarities' by finite differences of <P, S> at a fixed plan.
void test_scores(Isa isa) {
    for (const Case& size : kCases)
        for (const CostType type : {CostType::f32, CostType::f16, CostType::bf16})
            for (const int variant : {0, 1, 2, 3}) {
                const int64_t B = size.B, N = size.N, C = size.C, M = size.M, D = size.D, k = size.k;
                const bool masked = variant & 1, apart = variant & 2;
                const Numbers patches(B * N * D, type, 7), tokens(C * M * D, type, 8);
                const Numbers others(B * N * D, CostType::f32, 9), other_tokens(C * M * D, CostType::f32, 10);
                const Mask patch_mask(B * N, 11), token_mask(C * M, 12);
                const bool* const on_patches = masked ? patch_mask.on.get() : nullptr;
                const bool* const on_tokens = masked ? token_mask.on.get() : nullptr;
                const Features own = features(patches, tokens, size, on_tokens);
                const Features by = apart ? features(others, other_tokens, size, nullptr) : own;
                const Features none{nullptr, nullptr, CostType::f32, 0, 0, nullptr};
                std::vector<float> score(B * C, NAN), f(B * C * k, NAN), g(B * C * M, NAN);
                std::vector<int64_t> indices(B * C * k, -1);
                std::vector<int32_t> n_iter(B * C, -1);
                SpaScoresArgs args{{by, on_patches, B, N, C, k, Reduce::max, variant < 2, indices.data()},
                                   apart ? own : none,
                                   0.1,
                                   50,
                                   0,
                                   false,
                                   score.data(),
                                   f.data(),
                                   g.data(),
                                   n_iter.data()};
                spa_scores_fwd(args, 2, isa);
                std::vector<float> sim(B * C * k * M), a(B * C * k), b(B * C * M);
                for (int64_t p = 0; p < B * C; ++p) {
                    const int64_t image = p / C, c = p % C;
                    const auto patch_on = [&](int64_t i) {
                        return !masked || patch_mask.on[image * N + indices[p * k + i]];
                    };
                    const auto token_on = [&](int64_t j) { return !masked || token_mask.on[c * M + j]; };
                    int64_t rows = 0, columns = 0;
                    for (int64_t i = 0; i < k; ++i) rows += patch_on(i);
                    for (int64_t j = 0; j < M; ++j) columns += token_on(j);
                    for (int64_t i = 0; i < k; ++i) a[p * k + i] = patch_on(i) ? 1.0f / rows : 0;
                    for (int64_t j = 0; j < M; ++j) b[p * M + j] = token_on(j) ? 1.0f / columns : 0;
                    for (int64_t i = 0; i < k; ++i)
                        for (int64_t j = 0; j < M; ++j)
                            sim[(p * k + i) * M + j] = static_cast<float>(
                                cosine(&patches.exact[(image * N + indices[p * k + i]) * D],
                                       &tokens.exact[(c * M + j) * D], D));
                }
                std::vector<float> want(B * C), u(f.size()), v(g.size()), error(B * C);
                std::vector<int32_t> steps(B * C);
                const TransportBatch batch{sim.data(), CostType::f32, 1,     true, a.data(), k,
                                           b.data(),   M,             B * C, k,    M,        0.1};
                sinkhorn_fwd({batch, 50, 0, false, want.data(), u.data(), v.data(), steps.data(), error.data()}, 1,
                             isa);
                std::vector<float> upstream(B * C);
                for (int64_t p = 0; p < B * C; ++p) {
                    upstream[p] = 0.5f - 0.1f * p;
                    CHECK(n_iter[p] == steps[p], "%d iterations, expected %d", n_iter[p], steps[p]);
                    CHECK(std::fabs(score[p] - want[p]) <= 1e-5, "%s: %g, expected %g", isa_name(isa), score[p],
                          want[p]);
                }
                std::vector<float> grad_sim(sim.size());
                sinkhorn_bwd({batch, upstream.data(), f.data(), g.data(), grad_sim.data()}, 1, isa);
                std::vector<double> want_patches(B * N * D), want_tokens(C * M * D);
                for (int64_t e = 0; e < B * C * k * M; ++e) {
                    const int64_t p = e / (k * M), n = p / C * N + indices[e / M], j = p % C * M + e % M;
                    const double *x = &patches.exact[n * D], *y = &tokens.exact[j * D];
                    double xx = 0, yy = 0;
                    for (int64_t d = 0; d < D; ++d) xx += x[d] * x[d], yy += y[d] * y[d];
                    if (grad_sim[e] == 0 || xx == 0 || yy == 0) continue;
                    const double s = cosine(x, y, D), weight = grad_sim[e];
                    for (int64_t d = 0; d < D; ++d) {
                        want_patches[n * D + d] += weight * (y[d] / std::sqrt(xx * yy) - s * x[d] / xx);
                        want_tokens[j * D + d] += weight * (x[d] / std::sqrt(xx * yy) - s * y[d] / yy);
                    }
                }
                std::vector<float> grad_patches(B * N * D, NAN), grad_tokens(C * M * D, NAN);
                std::vector<uint16_t> half(type == CostType::f32 ? 0 : B * N * D, 0x7fff);
                spa_scores_bwd({own, on_patches, B, N, C, k, indices.data(), 0.1, false, upstream.data(), f.data(),
                                g.data(),
                                type == CostType::f32 ? static_cast<void*>(grad_patches.data()) : half.data(),
                                grad_tokens.data()},
                               2, isa);
                double worst = 0;
                for (int64_t e = 0; e < C * M * D; ++e)
                    worst = worse(worst, std::fabs(grad_tokens[e] - want_tokens[e]));
                // Half of a last place.
                const double rounding = type == CostType::f32 ? 0 : type == CostType::f16 ? 0x1p-11 : 0x1p-8;
                for (int64_t e = 0; e < B * N * D; ++e) {
                    if (type != CostType::f32)
                        grad_patches[e] = type == CostType::f16 ? from_f16(half[e]) : from_bf16(half[e]);
                    const double error = std::fabs(grad_patches[e] - want_patches[e]);
                    worst = worse(worst, error - rounding * std::fabs(want_patches[e]));
                }
                CHECK(worst <= 2e-5, "%s: gradients off by %g", isa_name(isa), worst);
                // Each alone, as one of the two may be asked for.
                std::vector<float> alone(C * M * D, NAN);
                spa_scores_bwd({own, on_patches, B, N, C, k, indices.data(), 0.1, false, upstream.data(), f.data(),
                                g.data(), nullptr, alone.data()},
                               1, isa);
                CHECK(!std::memcmp(alone.data(), grad_tokens.data(), alone.size() * 4), "threads change bits");
            }
}

void test_bad_arguments() {
    float x[8] = {}, out[8];
    const Rows rows{x, 2, 2, 1, 0}, columns{x, 2, 1, 2, 0}, neither{x, 2, 3, 2, 0};
    const auto multiplied = [&](const Rows& left, bool normalize) {
        similarity({left, rows, CostType::f32, 1, 2, normalize, out}, 1, Isa::portable);
    };
    CHECK(refused([&] { multiplied(neither, false); }), "neither rows nor columns");
    CHECK(refused([&] { multiplied(columns, true); }), "columns to be normalised");
    int64_t index[8];
    int32_t first[8];
    const Features two{x, x, CostType::f32, 1, 2, nullptr};
    for (const int64_t k : {0, 3})
        CHECK(refused([&] {
                  topk_patches({{two, nullptr, 1, 2, 1, k, Reduce::max, true, index}, out, first}, 1, Isa::portable);
              }),
              "k = %d of 2", int(k));
}

}  // namespace

int main() {
    on_every_isa([](Isa isa) {
        test_similarity(isa);
        test_selection(isa);
        test_scores(isa);
    });
    test_bad_arguments();
    return failures != 0;
}
