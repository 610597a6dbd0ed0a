// spa_fast_core against closed forms and an fp64 log-domain oracle, on every instruction set this processor has.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "half.h"
#include "sinkhorn.h"
#include "sinkhorn_lanes.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

using namespace spa_fast;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Problems {
    int64_t P, K, M;
    std::vector<float> cost, a, b;  // a and b per problem
    double eps = 0.1;
    int64_t max_iter = 50;
    double tol = 0;
    bool value = false;
    int threads = 1;
    int64_t C = 1;  // side by side
    bool similarity = false;

    Problems(int64_t P_, int64_t K_, int64_t M_)
        : P(P_), K(K_), M(M_), cost(P * K * M), a(P * K, 1.0f / K), b(P * M, 1.0f / M) {}
};

Problems random_problems(int64_t P, int64_t K, int64_t M, float scale = 2, unsigned seed = 0) {
    Problems problems(P, K, M);
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> uniform(0, scale);
    for (float& entry : problems.cost) entry = uniform(random);
    return problems;
}

// Sets some weights to zero and normalises the rest.
void set_weights(std::vector<float>& weights, int64_t n, unsigned seed, double zero_share) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> uniform(0, 1);
    for (size_t start = 0; start < weights.size(); start += n) {
        double total = 0;
        for (int64_t i = 0; i < n; ++i) {
            const bool zero = i > 0 && uniform(random) < zero_share;
            total += weights[start + i] = zero ? 0 : static_cast<float>(0.1 + uniform(random));
        }
        for (int64_t i = 0; i < n; ++i) weights[start + i] = static_cast<float>(weights[start + i] / total);
    }
}

struct Result {
    std::vector<float> score, f, g, marginal_error;
    std::vector<int32_t> n_iter;

    bool operator==(const Result& other) const {
        const auto same = [](const auto& x, const auto& y) {
            return x.size() == y.size() && (x.empty() || !std::memcmp(x.data(), y.data(), x.size() * sizeof(x[0])));
        };
        return same(score, other.score) && same(f, other.f) && same(g, other.g) &&
               same(marginal_error, other.marginal_error) && same(n_iter, other.n_iter);
    }
};

TransportBatch batch(const Problems& p, const void* cost, CostType type) {
    return {cost, type, p.C, p.similarity, p.a.data(), p.K, p.b.data(), p.M, p.P, p.K, p.M, p.eps};
}

SinkhornArgs arguments(const Problems& p, const void* cost, CostType type, Result& out) {
    out.score.assign(p.P, kNan);
    out.f.assign(p.P * p.K, kNan);
    out.g.assign(p.P * p.M, kNan);
    out.marginal_error.assign(p.P, kNan);
    out.n_iter.assign(p.P, -1);
    return {batch(p, cost, type),
            p.max_iter,
            p.tol,
            p.value,
            out.score.data(),
            out.f.data(),
            out.g.data(),
            out.n_iter.data(),
            out.marginal_error.data()};
}

Result solve(const Problems& p, Isa isa) {
    Result out;
    sinkhorn_fwd(arguments(p, p.cost.data(), CostType::f32, out), p.threads, isa);
    return out;
}

std::vector<float> gradient(const Problems& p, const Result& solved, const std::vector<float>& upstream, Isa isa) {
    std::vector<float> out(p.cost.size(), kNan);
    sinkhorn_bwd({batch(p, p.cost.data(), CostType::f32), upstream.data(), solved.f.data(), solved.g.data(),
                  out.data()},
                 p.threads, isa);
    return out;
}

// [P, K, M] as [P / C, K, C, M].
std::vector<float> side_by_side(const std::vector<float>& from, int64_t C, int64_t K, int64_t M) {
    std::vector<float> out(from.size());
    for (int64_t e = 0; e < static_cast<int64_t>(from.size()); ++e) {
        const int64_t p = e / (K * M), i = e / M % K;
        out[((p / C * K + i) * C + p % C) * M + e % M] = from[e];
    }
    return out;
}

struct Exact {
    std::vector<double> f, g;
    double score, marginal_error;
    int n_iter;
};

double log_sum_exp(const std::vector<double>& x) {
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    for (const double term : x) top = std::fmax(top, term);
    if (std::isinf(top)) return top;
    for (const double term : x) sum += std::exp(term - top);
    return top + std::log(sum);
}

Exact exact(const Problems& p, int64_t index) {
    const int64_t K = p.K, M = p.M;
    const float* cost = p.cost.data() + index * K * M;
    const float* a = p.a.data() + index * K;
    const float* b = p.b.data() + index * M;
    Exact out{std::vector<double>(K), std::vector<double>(M), 0, 0, 0};
    const auto plan = [&](int64_t i, int64_t j) {
        if (a[i] == 0 || b[j] == 0 || std::isinf(cost[i * M + j])) return 0.0;
        return a[i] * std::exp(std::log(double(b[j])) + (out.f[i] + out.g[j] - cost[i * M + j]) / p.eps);
    };
    for (int64_t n = 1; n <= p.max_iter; ++n) {
        for (int64_t i = 0; i < K; ++i) {
            std::vector<double> terms;
            for (int64_t j = 0; j < M; ++j)
                if (b[j] > 0 && a[i] > 0)
                    terms.push_back(std::log(double(b[j])) + (out.g[j] - cost[i * M + j]) / p.eps);
            const double sum = log_sum_exp(terms);
            out.f[i] = std::isinf(sum) ? 0 : -p.eps * sum;
        }
        for (int64_t j = 0; j < M; ++j) {
            std::vector<double> terms;
            for (int64_t i = 0; i < K; ++i)
                if (a[i] > 0 && b[j] > 0)
                    terms.push_back(std::log(double(a[i])) + (out.f[i] - cost[i * M + j]) / p.eps);
            const double sum = log_sum_exp(terms);
            out.g[j] = std::isinf(sum) ? 0 : -p.eps * sum;
        }
        out.marginal_error = 0;
        for (int64_t i = 0; i < K; ++i) {
            double mass = 0;
            for (int64_t j = 0; j < M; ++j) mass += plan(i, j);
            out.marginal_error += std::fabs(mass - a[i]);
        }
        out.n_iter = static_cast<int>(n);
        if (p.tol > 0 && out.marginal_error <= p.tol) break;
    }
    for (int64_t i = 0; i < K; ++i)
        for (int64_t j = 0; j < M; ++j) {
            const double mass = plan(i, j), ab = double(a[i]) * b[j];
            if (mass > 0) out.score += mass * cost[i * M + j];
            if (p.value) out.score += p.eps * ((mass > 0 ? mass * std::log(mass / ab) : 0) - mass + ab);
        }
    return out;
}

void check_close(const Problems& p, Isa isa, const char* what) {
    const Result got = solve(p, isa);
    for (int64_t index = 0; index < p.P; ++index) {
        const Exact want = exact(p, index);
        double size = 0;
        for (int64_t e = 0; e < p.K * p.M; ++e)
            if (std::isfinite(p.cost[index * p.K * p.M + e]))
                size = std::fmax(size, std::fabs(p.cost[index * p.K * p.M + e]));
        const double tolerance = 1e-5 * size;
        CHECK(std::fabs(got.score[index] - want.score) <= 1e-5 * std::fabs(want.score) + 1e-6 * size,
              "%s %s problem %d: %.9g, expected %.9g", isa_name(isa), what, int(index), got.score[index], want.score);
        CHECK(got.n_iter[index] == want.n_iter, "%s %s: %d, expected %d", isa_name(isa), what, got.n_iter[index],
              want.n_iter);
        CHECK(std::fabs(got.marginal_error[index] - want.marginal_error) <= 2e-5 * want.marginal_error + 1e-6,
              "%s %s: %g, expected %g", isa_name(isa), what, got.marginal_error[index], want.marginal_error);
        double worst = 0;
        for (int64_t i = 0; i < p.K; ++i) worst = worse(worst, std::fabs(got.f[index * p.K + i] - want.f[i]));
        for (int64_t j = 0; j < p.M; ++j) worst = worse(worst, std::fabs(got.g[index * p.M + j] - want.g[j]));
        CHECK(worst <= tolerance, "%s %s %dx%d eps %g: potentials off by %g", isa_name(isa), what, int(p.K), int(p.M),
              p.eps, worst);
    }
}

void test_closed_forms(Isa isa) {
    Problems single(3, 1, 1);
    single.cost = {0.0f, 1.5f, -2.0f};
    for (const double eps : {1e-4, 0.1, 100.0}) {
        single.eps = eps;
        const Result got = solve(single, isa);
        for (int p = 0; p < 3; ++p) CHECK(std::fabs(got.score[p] - single.cost[p]) <= 1e-6, "1x1: %g", got.score[p]);
    }
    // C_ij = x_i + y_j: the plan is a b^T after one iteration, whatever eps.
    Problems separable(5, 7, 9);
    std::vector<float> x(7), y(9);
    for (int i = 0; i < 7; ++i) x[i] = 0.125f * i;
    for (int j = 0; j < 9; ++j) y[j] = 0.25f * j;
    for (int e = 0; e < 5 * 63; ++e) separable.cost[e] = x[e / 9 % 7] + y[e % 9];
    set_weights(separable.a, 7, 1, 0);
    set_weights(separable.b, 9, 2, 0);
    separable.tol = 1e-5;
    for (const double eps : {1e-3, 0.1, 10.0}) {
        separable.eps = eps;
        for (const bool value : {false, true}) {
            separable.value = value;
            const Result got = solve(separable, isa);
            for (int p = 0; p < 5; ++p) {
                double want = 0;
                for (int i = 0; i < 7; ++i) want += separable.a[p * 7 + i] * x[i];
                for (int j = 0; j < 9; ++j) want += separable.b[p * 9 + j] * y[j];
                CHECK(std::fabs(got.score[p] - want) <= 1e-5 * want, "separable: %g, expected %g", got.score[p], want);
                CHECK(got.n_iter[p] == 1, "separable: %d iterations", got.n_iter[p]);
            }
        }
    }
}

void test_oracle(Isa isa) {
    const std::pair<int, int> sizes[] = {{1, 1}, {1, 7}, {5, 1}, {4, 4}, {13, 6}, {32, 16}, {63, 20}};
    for (const auto& [K, M] : sizes)
        for (const double eps : {1e-4, 1e-2, 0.03, 0.1, 1.0, 100.0})
            for (const double tol : {0.0, 1e-3}) {
                Problems p = random_problems(19, K, M, 2, K + M);
                p.eps = eps;
                p.tol = tol;
                p.max_iter = 20;
                p.value = K % 2;
                set_weights(p.a, K, 3, 0.2);
                set_weights(p.b, M, 4, 0.2);
                check_close(p, isa, "random");
            }
    for (const double eps : {1e-4, 0.1, 100.0}) {
        Problems p = random_problems(3, 8, 8, 1e4f);
        p.eps = eps;
        check_close(p, isa, "large cost");
    }
    check_close(random_problems(1, 256, 256), isa, "largest");
}

void test_forbidden_and_invalid(Isa isa) {
    Problems p = random_problems(40, 6, 5);
    p.max_iter = 200;
    const Result clean = solve(p, isa);
    const auto entry = [&p](int problem, int i, int j) -> float& { return p.cost[(problem * 6 + i) * 5 + j]; };
    entry(3, 2, 2) = kInf;
    for (int j = 0; j < 5; ++j) entry(5, 1, j) = kInf;
    for (int i = 0; i < 6; ++i) entry(6, i, 4) = kInf;
    entry(7, 0, 0) = kNan;
    entry(8, 0, 0) = -kInf;
    p.a[9 * 6] = kNan;
    for (int i = 0; i < 6; ++i) p.a[10 * 6 + i] = 0;
    for (int j = 0; j < 5; ++j) p.b[11 * 5 + j] = 0;
    p.cost[11 * 30] = kNan;
    // Without weight, an entry may hold anything.
    p.a[12 * 6 + 3] = 0;
    for (int j = 0; j < 5; ++j) entry(12, 3, j) = kNan;
    p.b[12 * 5 + 1] = 0;
    for (int i = 0; i < 6; ++i) entry(12, i, 1) = kInf;
    const Result got = solve(p, isa);
    for (const int problem : {3, 5, 6, 12}) {
        const Exact want = exact(p, problem);
        CHECK(std::fabs(got.score[problem] - want.score) <= 1e-5, "%d: %g, expected %g", problem, got.score[problem],
              want.score);
        CHECK(std::fabs(got.marginal_error[problem] - want.marginal_error) <= 1e-5, "%d: %g, expected %g", problem,
              got.marginal_error[problem], want.marginal_error);
        for (int i = 0; i < 6; ++i) CHECK(std::fabs(got.f[problem * 6 + i] - want.f[i]) <= 2e-5, "f of %d", problem);
        for (int j = 0; j < 5; ++j) CHECK(std::fabs(got.g[problem * 5 + j] - want.g[j]) <= 2e-5, "g of %d", problem);
    }
    CHECK(got.f[5 * 6 + 1] == 0 && got.marginal_error[5] > 0.1, "a row without a finite entry");
    for (const int problem : {7, 8, 9})
        CHECK(got.n_iter[problem] == 0 && std::isnan(got.score[problem]) && std::isnan(got.marginal_error[problem]) &&
                  std::isnan(got.f[problem * 6 + 1]),
              "problem %d is invalid", problem);
    for (const int problem : {10, 11}) {
        CHECK(got.score[problem] == 0 && got.marginal_error[problem] == 0 && got.n_iter[problem] == 0, "empty");
        for (int i = 0; i < 6; ++i) CHECK(got.f[problem * 6 + i] == 0, "empty");
        for (int j = 0; j < 5; ++j) CHECK(got.g[problem * 5 + j] == 0, "empty");
    }
    for (int problem = 0; problem < 40; ++problem)
        if (problem < 3 || problem == 4 || problem > 12)
            CHECK(got.score[problem] == clean.score[problem] && got.n_iter[problem] == clean.n_iter[problem] &&
                      !std::memcmp(&got.f[problem * 6], &clean.f[problem * 6], 6 * sizeof(float)),
                  "problem %d saw its neighbours", problem);
}

// A problem alone, in any place of a batch, on any number of threads: the same bits.
void test_batch_invariance(Isa isa) {
    for (const double eps : {0.003, 0.05, 0.1})  // mixes the branches, then kernel space alone
        for (const double tol : {0.0, 1e-3}) {
            Problems p = random_problems(37, 11, 6, 1, 5);
            for (int64_t e = 0; e < 66; ++e) p.cost[20 * 66 + e] *= 50;
            set_weights(p.a, 11, 6, 0.1);
            p.eps = eps;
            p.tol = tol;
            const Result batch = solve(p, isa);
            p.threads = 4;
            CHECK(solve(p, isa) == batch, "threads change bits");
            for (int64_t index = 0; index < p.P; ++index) {
                Problems one(1, 11, 6);
                one.cost.assign(p.cost.begin() + index * 66, p.cost.begin() + (index + 1) * 66);
                one.a.assign(p.a.begin() + index * 11, p.a.begin() + (index + 1) * 11);
                one.eps = eps;
                one.tol = tol;
                const Result got = solve(one, isa);
                CHECK(got.score[0] == batch.score[index] && got.n_iter[0] == batch.n_iter[index] &&
                          got.marginal_error[0] == batch.marginal_error[index] &&
                          !std::memcmp(got.f.data(), &batch.f[index * 11], 11 * sizeof(float)) &&
                          !std::memcmp(got.g.data(), &batch.g[index * 6], 6 * sizeof(float)),
                      "%s: problem %d alone differs", isa_name(isa), int(index));
            }
        }
}

void test_masked_suffix_is_a_slice(Isa isa) {
    for (const double eps : {0.003, 0.1})
        for (const bool value : {false, true}) {
            Problems full = random_problems(21, 29, 13);
            full.eps = eps;
            full.value = value;
            full.tol = 1e-3;
            const int64_t K = 21, M = 10;
            Problems part(full.P, K, M);
            set_weights(part.a, K, 7, 0.1);
            set_weights(part.b, M, 8, 0.1);
            part.eps = eps;
            part.value = value;
            part.tol = full.tol;
            for (int64_t p = 0; p < full.P; ++p) {
                for (int64_t i = 0; i < full.K; ++i) full.a[p * full.K + i] = i < K ? part.a[p * K + i] : 0;
                for (int64_t j = 0; j < full.M; ++j) full.b[p * full.M + j] = j < M ? part.b[p * M + j] : 0;
                for (int64_t i = 0; i < K; ++i)
                    for (int64_t j = 0; j < M; ++j)
                        part.cost[(p * K + i) * M + j] = full.cost[(p * full.K + i) * full.M + j];
            }
            const Result masked = solve(full, isa), sliced = solve(part, isa);
            for (int64_t p = 0; p < full.P; ++p) {
                CHECK(masked.score[p] == sliced.score[p] && masked.n_iter[p] == sliced.n_iter[p] &&
                          masked.marginal_error[p] == sliced.marginal_error[p],
                      "%s eps %g: %.9g, %.9g", isa_name(isa), eps, masked.score[p], sliced.score[p]);
                CHECK(!std::memcmp(&masked.f[p * full.K], &sliced.f[p * K], K * sizeof(float)), "f");
                CHECK(!std::memcmp(&masked.g[p * full.M], &sliced.g[p * M], M * sizeof(float)), "g");
                for (int64_t i = K; i < full.K; ++i) CHECK(masked.f[p * full.K + i] == 0, "f of a masked row");
            }
        }
}

// Every 16-bit pattern is widened exactly: a 1x1 problem's score is its cost.
void test_half_costs(Isa isa) {
    Problems p(1 << 16, 1, 1);
    p.max_iter = 1;
    std::vector<uint16_t> bits(p.P);
    for (int64_t i = 0; i < p.P; ++i) bits[i] = static_cast<uint16_t>(i);
    for (const CostType type : {CostType::f16, CostType::bf16}) {
        Result out;
        sinkhorn_fwd(arguments(p, bits.data(), type, out), 1, isa);
        for (uint32_t i = 0; i < bits.size(); ++i) {
            const float want = type == CostType::f16 ? from_f16(bits[i]) : from_bf16(bits[i]);
            if (want == kInf)
                CHECK(out.score[i] == 0 && out.marginal_error[i] == 1, "forbidden: %g", out.score[i]);
            else if (!std::isfinite(want))
                CHECK(std::isnan(out.score[i]), "%x: %g", i, out.score[i]);
            else
                CHECK(std::fabs(out.score[i] - want) <= 1e-6 * std::fabs(want), "%x: %g, expected %g", i, out.score[i],
                      want);
        }
    }
}

void test_gradient(Isa isa) {
    const std::pair<int, int> sizes[] = {{1, 1}, {1, 7}, {5, 1}, {4, 4}, {13, 6}, {32, 16}, {9, 37}};
    for (const auto& [K, M] : sizes)
        for (const double eps : {1e-3, 0.03, 0.1, 100.0}) {
            Problems p = random_problems(70, K, M, 2, K + M);
            p.eps = eps;
            set_weights(p.a, K, 3, 0.2);
            set_weights(p.b, M, 4, 0.2);
            const Result solved = solve(p, isa);
            std::vector<float> upstream(p.P);
            for (int64_t index = 0; index < p.P; ++index) upstream[index] = 0.5f - 0.03f * index;
            const std::vector<float> got = gradient(p, solved, upstream, isa);
            for (int64_t e = 0; e < p.P * K * M; ++e) {
                const int64_t index = e / (K * M), row = e / M, column = index * M + e % M;
                const double plan =
                    p.a[row] * double(p.b[column]) *
                    std::exp((double(solved.f[row]) + solved.g[column] - double(p.cost[e])) / eps);
                const double want = upstream[index] * plan;
                const bool weightless = p.a[row] == 0 || p.b[column] == 0;
                const double tolerance = weightless ? 0 : (2e-6 + 5e-7 / eps) * std::fabs(want) + 1e-30;
                CHECK(std::fabs(got[e] - (weightless ? 0 : want)) <= tolerance, "%s %dx%d eps %g: %.9g, expected %.9g",
                      isa_name(isa), K, M, eps, got[e], want);
            }
            p.threads = 3;
            const auto same = [&](const std::vector<float>& x, const std::vector<float>& y) {
                return !std::memcmp(x.data(), y.data(), x.size() * sizeof(float));
            };
            CHECK(same(gradient(p, solved, upstream, isa), got), "threads change bits");
            Problems beside = p;
            beside.C = 7;
            beside.cost = side_by_side(p.cost, 7, K, M);
            CHECK(solve(beside, isa) == solved, "%s: side by side differs", isa_name(isa));
            CHECK(same(gradient(beside, solved, upstream, isa), side_by_side(got, 7, K, M)), "side by side differs");
            for (float& entry : beside.cost) entry = 1 - entry;
            for (float& entry : p.cost) entry = 1 - (1 - entry);
            beside.similarity = true;
            const Result similar = solve(beside, isa);
            CHECK(same(gradient(beside, similar, upstream, isa),
                       side_by_side(gradient(p, similar, upstream, isa), 7, K, M)),
                  "%s: the gradient of a similarity is that of its cost", isa_name(isa));
        }
}

// <P, S> against the plan of the cost 1 - S, and of similarities that 1 - S would lose.
void test_similarity(Isa isa) {
    for (const double eps : {1e-3, 0.1, 100.0})
        for (const bool value : {false, true}) {
            Problems p = random_problems(37, 9, 6, 2, 7);
            set_weights(p.a, 9, 3, 0.2);
            p.eps = eps;
            p.value = value;
            for (int i = 0; i < 9; ++i) p.cost[2 * 54 + i * 6 + 3] = kInf;
            for (int j = 0; j < 6; ++j) p.cost[4 * 54 + j] = kInf;
            Problems s = p;
            s.similarity = true;
            for (size_t e = 0; e < s.cost.size(); ++e) {
                s.cost[e] = 1 - p.cost[e];
                p.cost[e] = 1 - s.cost[e];
            }
            const Result got = solve(s, isa);
            for (int64_t index = 0; index < p.P; ++index) {
                const Exact want = exact(p, index);
                double mass = 0;
                for (int e = 0; e < 54; ++e)
                    if (std::isfinite(p.cost[index * 54 + e]))
                        mass += p.a[index * 9 + e / 6] * double(p.b[e % 6]) *
                                std::exp((want.f[e / 6] + want.g[e % 6] - p.cost[index * 54 + e]) / eps);
                const double score = value ? want.score : mass - want.score;
                CHECK(std::fabs(got.score[index] - score) <= 2e-5, "%s eps %g problem %d: %.9g, expected %.9g",
                      isa_name(isa), eps, int(index), got.score[index], score);
                for (int i = 0; i < 9; ++i)
                    // Where a column is out of reach, f drifts by about eps an iteration.
                    CHECK(std::fabs(got.f[index * 9 + i] - want.f[i]) <= 2e-5 + 1e-6 * std::fabs(want.f[i]),
                          "%s: f of %d", isa_name(isa), int(index));
            }
            if (value) continue;
            Problems tiny = s;
            double mean = 0;
            for (float& entry : tiny.cost) entry = std::isfinite(entry) ? entry * 1e-12f : 1e-12f;
            for (int e = 0; e < 54; ++e) mean += tiny.a[e / 6] / 6.0 * tiny.cost[e];
            const Result small = solve(tiny, isa);
            CHECK(std::fabs(small.score[0] - mean) <= 1e-17, "%s: %g, expected %g", isa_name(isa), small.score[0], mean);
            for (float& entry : tiny.cost) entry = 0;
            for (const float score : solve(tiny, isa).score)
                CHECK(score == 0 && !std::signbit(score), "nothing scores %g", score);
        }
}

// Address space without memory behind it: only pages that are touched exist. Null where the system refuses.
template <class T>
T* reserve(int64_t n, std::vector<std::pair<void*, size_t>>& reserved) {
#if defined(__linux__)
    const size_t bytes = static_cast<size_t>(n) * sizeof(T);
    void* const memory =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    reserved.emplace_back(memory, bytes);
    return static_cast<T*>(memory);
#else
    (void)n;
    (void)reserved;
    return nullptr;
#endif
}

// The last problems of a batch whose every array passes 2^31 entries, solved where they lie: the same bits as alone.
// `wide` is C, and C = P puts 2^31 entries between two rows of one problem.
template <class T>
void test_offsets_past_32_bits(Isa isa, const LaneSolver& lanes, GradSolver* grad, CostType type, bool wide) {
    constexpr int64_t K = 9, M = 8, near = 5;
    const int64_t P = (int64_t{1} << 28) + 2 * lanes.lanes, C = wide ? P : 1, first = P - near;
    std::vector<std::pair<void*, size_t>> reserved;
    T* const cost = reserve<T>(P * K * M, reserved);
    T* const grad_cost = reserve<T>(P * K * M, reserved);
    float* const a = reserve<float>(P * K, reserved);
    float* const b = reserve<float>(P * M, reserved);
    float* const f = reserve<float>(P * K, reserved);
    float* const g = reserve<float>(P * M, reserved);
    float* const score = reserve<float>(P, reserved);
    float* const error = reserve<float>(P, reserved);
    float* const upstream = reserve<float>(P, reserved);
    int32_t* const n_iter = reserve<int32_t>(P, reserved);
    if (reserved.size() < 10) {
        std::printf("%s: no address space, offsets past 2^31 not probed\n", isa_name(isa));
    } else {
        Problems p = random_problems(near, K, M, 1, 11);
        set_weights(p.a, K, 12, 0.2);
        set_weights(p.b, M, 13, 0.2);
        p.tol = 1e-4;
        const auto place = [&](int64_t problem, int64_t i, int64_t j) {
            return (problem / C * K * C + i * C + problem % C) * M + j;
        };
        std::vector<T> compact(near * K * M);
        for (int64_t e = 0; e < near * K * M; ++e) {
            // Small exponents, alike in both 16-bit formats: any bits that are a finite positive cost will do.
            if constexpr (sizeof(T) == 4)
                compact[e] = p.cost[e];
            else
                compact[e] = static_cast<T>((type == CostType::f16 ? 0x3000 : 0x3e00) + e % 256);
            cost[place(first + e / (K * M), e / M % K, e % M)] = compact[e];
        }
        std::copy(p.a.begin(), p.a.end(), a + first * K);
        std::copy(p.b.begin(), p.b.end(), b + first * M);
        for (int64_t q = 0; q < near; ++q) upstream[first + q] = 1.0f + q;

        SinkhornArgs args{{cost, type, C, false, a, K, b, M, P, K, M, p.eps}, p.max_iter, p.tol, false, score, f, g,
                          n_iter, error};
        void* const workspace = ::operator new(lanes.workspace_bytes(K, M), std::align_val_t{64});
        for (int64_t group = first / lanes.lanes; group * lanes.lanes < P; ++group) lanes.solve(args, group, workspace);
        ::operator delete(workspace, std::align_val_t{64});
        grad({args, upstream, f, g, grad_cost}, first, P);

        Result want;
        sinkhorn_fwd(arguments(p, compact.data(), type, want), 1, isa);
        std::vector<T> want_grad(compact.size());
        sinkhorn_bwd({batch(p, compact.data(), type), upstream + first, want.f.data(), want.g.data(), want_grad.data()},
                     1, isa);
        for (int64_t q = 0; q < near; ++q) {
            CHECK(want.score[q] > 0 && score[first + q] == want.score[q], "%s: score of %lld", isa_name(isa),
                  static_cast<long long>(first + q));
            CHECK(n_iter[first + q] == want.n_iter[q] && error[first + q] == want.marginal_error[q], "iterations");
        }
        CHECK(!std::memcmp(f + first * K, want.f.data(), near * K * sizeof(float)), "%s: f", isa_name(isa));
        CHECK(!std::memcmp(g + first * M, want.g.data(), near * M * sizeof(float)), "%s: g", isa_name(isa));
        for (int64_t e = 0; e < near * K * M; ++e)
            CHECK(grad_cost[place(first + e / (K * M), e / M % K, e % M)] == want_grad[e], "%s: gradient",
                  isa_name(isa));
    }
#if defined(__linux__)
    for (const auto& [memory, bytes] : reserved) munmap(memory, bytes);
#endif
}

void test_offsets_past_32_bits(Isa isa) {
    const LaneSolver* lanes = &lanes_portable;
    GradSolver* grad = grad_portable;
#ifdef SPA_FAST_X86
    if (isa != Isa::portable) lanes = isa == Isa::avx2 ? &lanes_avx2 : &lanes_avx512;
    if (isa != Isa::portable) grad = isa == Isa::avx2 ? grad_avx2 : grad_avx512;
#endif
    for (const bool wide : {false, true}) {
        test_offsets_past_32_bits<float>(isa, *lanes, grad, CostType::f32, wide);
        test_offsets_past_32_bits<uint16_t>(isa, *lanes, grad, CostType::f16, wide);
        test_offsets_past_32_bits<uint16_t>(isa, *lanes, grad, CostType::bf16, wide);
    }
}

void test_gradient_of_forbidden_and_invalid(Isa isa) {
    Problems p = random_problems(20, 6, 5);
    const std::vector<float> ones(p.P, 1);
    const std::vector<float> clean = gradient(p, solve(p, isa), ones, isa);
    p.cost[3 * 30 + 12] = kInf;
    for (int j = 0; j < 5; ++j) p.cost[4 * 30 + 5 + j] = kInf;
    p.cost[5 * 30] = kNan;
    p.cost[6 * 30 + 1] = -kInf;
    for (int i = 0; i < 6; ++i) p.a[7 * 6 + i] = 0;
    p.cost[7 * 30] = kNan;
    p.b[8 * 5 + 2] = 0;
    for (int i = 0; i < 6; ++i) p.cost[8 * 30 + i * 5 + 2] = i % 2 ? kNan : -kInf;
    p.b[5 * 5 + 4] = 0;
    const std::vector<float> got = gradient(p, solve(p, isa), ones, isa);
    CHECK(got[3 * 30 + 12] == 0 && got[3 * 30 + 11] > 0, "forbidden pair");
    for (int j = 0; j < 5; ++j) CHECK(got[4 * 30 + 5 + j] == 0 && got[4 * 30 + j] > 0, "a row without a finite entry");
    for (int e = 0; e < 30; ++e) {
        CHECK(e % 5 == 4 ? got[5 * 30 + e] == 0 : std::isnan(got[5 * 30 + e]), "invalid");
        CHECK(std::isnan(got[6 * 30 + e]), "invalid");
        CHECK(got[7 * 30 + e] == 0, "empty");
        CHECK(e % 5 == 2 ? got[8 * 30 + e] == 0 : got[8 * 30 + e] > 0, "without weight");
    }
    for (int problem = 0; problem < 20; ++problem)
        if (problem < 3 || problem > 8)
            CHECK(!std::memcmp(&got[problem * 30], &clean[problem * 30], 30 * sizeof(float)), "neighbours");
}

// A 1x1 problem's gradient is what comes from upstream, rounded to nearest even.
void test_half_gradients(Isa isa) {
    Problems p(1 << 16, 1, 1);
    p.cost.clear();
    const std::vector<uint16_t> zeros(p.P);
    const std::vector<float> potentials(p.P);
    std::vector<float> upstream(p.P);
    for (int64_t i = 0; i < p.P; ++i)
        upstream[i] = as_float(static_cast<uint32_t>(i) << 16 | 0x1000u * (i % 16) | (i % 7 == 0));
    for (const CostType type : {CostType::f16, CostType::bf16}) {
        std::vector<uint16_t> got(p.P, 0x1234);
        sinkhorn_bwd({batch(p, zeros.data(), type), upstream.data(), potentials.data(), potentials.data(), got.data()},
                     1, isa);
        for (int64_t i = 0; i < p.P; ++i) {
            const double x = upstream[i];
            // Lowest exponent, digits after the point and largest finite value of the format.
            const int lowest = type == CostType::f16 ? -14 : -126, digits = type == CostType::f16 ? 10 : 7;
            uint32_t want = 0;
            if (std::isnan(x)) {
                want = 0x7fff;
            } else {
                const int exponent = x == 0 || std::isinf(x) ? lowest : std::max(lowest, std::ilogb(x));
                const double steps = std::nearbyint(std::ldexp(std::fabs(x), digits - exponent));
                const double limit = std::ldexp(1, type == CostType::f16 ? 16 : 128);
                const double rounded = std::ldexp(steps, exponent - digits);
                const int infinity = type == CostType::f16 ? 0x7c00 : 0x7f80;
                const uint32_t bits = static_cast<uint32_t>((exponent - lowest) << digits);
                want = rounded >= limit ? infinity : bits + static_cast<uint32_t>(steps);
            }
            const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
            const bool nan = (got[i] & 0x7fff) > (type == CostType::f16 ? 0x7c00 : 0x7f80);
            CHECK(want == 0x7fff ? nan : got[i] == (want | sign) || (want == 0 && (got[i] & 0x7fff) == 0),
                  "%s %.9g: %x, expected %x", isa_name(isa), x, got[i], want | sign);
        }
    }
}

void test_bad_arguments() {
    const auto unsolved = [](const Problems& p) { return refused([&] { solve(p, Isa::portable); }); };
    CHECK(unsolved(Problems(1, 257, 1)), "K");
    CHECK(unsolved(Problems(1, 1, 257)), "M");
    Problems p(1, 2, 2);
    p.eps = 0;
    CHECK(unsolved(p), "eps");
    p.eps = 1;
    p.max_iter = 0;
    CHECK(unsolved(p), "max_iter");
    p.max_iter = 1;
    p.tol = -1;
    CHECK(unsolved(p), "tol");
    p.tol = 0;
    p.C = 2;
    CHECK(unsolved(p), "C");
    p.C = 1;
    CHECK(solve(Problems(0, 2, 2), Isa::portable).score.empty(), "P = 0");
}

}  // namespace

int main() {
    on_every_isa([](Isa isa) {
        test_closed_forms(isa);
        test_oracle(isa);
        test_forbidden_and_invalid(isa);
        test_batch_invariance(isa);
        test_masked_suffix_is_a_slice(isa);
        test_half_costs(isa);
        test_gradient(isa);
        test_gradient_of_forbidden_and_invalid(isa);
        test_half_gradients(isa);
        test_similarity(isa);
        test_offsets_past_32_bits(isa);
    });
    test_bad_arguments();
    return failures != 0;
}
