// Philox against its published vectors, normals against fp64, draws against an fp64 oracle, on every instruction set
// this processor has. `Scalar` is the arithmetic of the CUDA kernels, compiled here for the host.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "gaussian.h"
#include "half.h"
#include "philox.h"

using namespace spa_fast;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr double kPi = 3.14159265358979323846;

// Distance in units of the last place of `want`; where that is next to nothing, of 1e-8.
double ulps(float got, double want) {
    const float size = std::max(std::fabs(static_cast<float>(want)), 1e-8f);
    return std::fabs(got - want) / (static_cast<double>(std::nextafter(size, 2 * size)) - size);
}

// Random123's kat_vectors for philox4x32-10.
void test_philox_vectors() {
    const struct {
        uint32_t counter[4], key[2], want[4];
    } known[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (const auto& vector : known) {
        uint32_t x[4];
        std::copy(vector.counter, vector.counter + 4, x);
        philox4x32<Scalar>(x, vector.key[0], vector.key[1]);
        for (int i = 0; i < 4; ++i) CHECK(x[i] == vector.want[i], "word %d: %08x, not %08x", i, x[i], vector.want[i]);
    }
}

void test_box_muller() {
    double worst = 0;
    const auto check = [&](uint32_t w, uint32_t v) {
        float z[2];
        box_muller<Scalar>(w, v, z[0], z[1]);
        const double u = static_cast<float>(static_cast<float>(w) * 0x1p-32f + 0x1p-33f);
        const double radius = std::sqrt(-2 * std::log(u)), angle = kPi * (static_cast<float>(v) * 0x1p-31f);
        worst = worse(worst, ulps(z[0], radius * std::cos(angle)));
        worst = worse(worst, ulps(z[1], radius * std::sin(angle)));
    };
    std::mt19937 random(0);
    for (int i = 0; i < 1000000; ++i) {
        const uint32_t w = random();
        check(w, random());
    }
    const uint32_t edges[] = {0,          1,          2,          0x3fffffff, 0x40000000,
                              0x7fffff80, 0x80000000, 0xaaaaaaab, 0xfffffeff, 0xffffffff};
    for (const uint32_t w : edges)
        for (const uint32_t v : edges) check(w, v);
    CHECK(worst <= 3.5, "%.2f ulp", worst);
}

struct Case {
    FactorKind kind = FactorKind::tril;
    int64_t C = 3, D = 5, n = 4, rank = 0, first = 0;
    bool shared = false;
    int threads = 1;
    std::vector<float> mean, factor, diag;
    std::vector<int64_t> ids, rows;
    int64_t seed = 0x123456789abcdef;

    Case(FactorKind kind_, int64_t C_, int64_t D_, int64_t n_, int64_t rank_ = 0, bool shared_ = false)
        : kind(kind_), C(C_), D(D_), n(n_), rank(rank_), shared(shared_) {
        std::mt19937 random(static_cast<unsigned>(D));
        std::uniform_int_distribution<int> coarse(-512, 511);  // exact in fp16
        const auto fill = [&](std::vector<float>& x, int64_t size) {
            x.resize(size);
            for (float& entry : x) entry = coarse(random) / 256.0f;
        };
        fill(mean, C * D);
        fill(factor, (shared ? 1 : C) * per_class());
        fill(diag, (shared ? 1 : C) * D);
        for (int64_t c = 0; c < C; ++c) ids.push_back(1000 * c + 7);
    }
    int64_t per_class() const {
        return kind == FactorKind::tril ? D * (D + 1) / 2 : kind == FactorKind::diag ? D : D * rank;
    }
    GaussianArgs arguments(void* out) const {
        const int64_t* from = rows.empty() ? nullptr : rows.data();
        return {kind,           C,
                D,              n,
                rank,           first,
                from,           mean.data(),
                FloatType::f32, factor.data(),
                FloatType::f32, shared ? 0 : per_class(),
                diag.data(),    shared ? 0 : D,
                ids.data(),     &seed,
                out};
    }
    std::vector<float> draw(Isa isa) const {
        std::vector<float> out(C * n * D, kNan);
        sample_gaussian_cpu(arguments(out.data()), threads, isa);
        return out;
    }
    double normal(int64_t c, int64_t i, int64_t d) const {
        float z[4];
        normals<Scalar>(static_cast<uint32_t>(d / 4), static_cast<uint32_t>(first + i), static_cast<uint32_t>(ids[c]),
                        static_cast<uint64_t>(seed), z);
        return z[d % 4];
    }
    std::vector<double> oracle() const {
        std::vector<double> out;
        for (int64_t c = 0; c < C; ++c)
            for (int64_t i = 0; i < n; ++i)
                for (int64_t d = 0; d < D; ++d) {
                    const float* own = factor.data() + (shared ? 0 : c) * per_class();
                    double x = mean[c * D + d];
                    if (kind == FactorKind::tril)
                        for (int64_t k = 0; k <= d; ++k) x += own[d * (d + 1) / 2 + k] * normal(c, i, k);
                    else if (kind == FactorKind::diag)
                        x += own[d] * normal(c, i, d);
                    else {
                        x += diag[(shared ? 0 : c) * D + d] * normal(c, i, d);
                        for (int64_t k = 0; k < rank; ++k) x += own[d * rank + k] * normal(c, i, D + k);
                    }
                    out.push_back(x);
                }
        return out;
    }
};

std::vector<Case> cases() {
    std::vector<Case> all;
    for (const int64_t D : {1, 3, 4, 7, 16, 17, 63, 130})
        for (const int64_t n : {1, 4, 5, 13})
            for (const bool shared : {false, true}) {
                all.emplace_back(FactorKind::tril, 2, D, n, 0, shared);
                all.emplace_back(FactorKind::diag, 2, D, n, 0, shared);
                all.emplace_back(FactorKind::lowrank, 2, D, n, D % 5 + 1, shared);
            }
    all.emplace_back(FactorKind::lowrank, 2, 9, 6, 40);
    return all;
}

void test_normals(Isa isa) {
    Case c(FactorKind::diag, 4, 256, 400);
    c.mean.assign(c.mean.size(), 0);
    c.factor.assign(c.factor.size(), 1);
    c.first = (int64_t{1} << 32) - 400;
    const std::vector<float> z = c.draw(isa);
    double worst = 0;
    for (size_t i = 0; i < z.size(); ++i)
        worst = worse(worst, ulps(z[i], c.normal(i / (c.n * c.D), i / c.D % c.n, i % c.D)));
    // Only code without fused operations may round differently.
    CHECK(worst <= (isa == Isa::portable ? 4 : 0), "%s: %.2f ulp from the CUDA arithmetic", isa_name(isa), worst);
}

void test_draws(Isa isa) {
    for (const Case& c : cases()) {
        const std::vector<float> got = c.draw(isa);
        const std::vector<double> want = c.oracle();
        double error = 0, size = 0;
        for (size_t i = 0; i < want.size(); ++i) {
            error = worse(error, std::fabs(got[i] - want[i]));
            size = std::fmax(size, std::fabs(want[i]));
        }
        CHECK(error <= 1e-6 * size, "%s: kind %d D %d n %d: %g", isa_name(isa), static_cast<int>(c.kind),
              static_cast<int>(c.D), static_cast<int>(c.n), error / size);
    }
}

// What a draw may not depend on, bit for bit.
void test_independence(Isa isa) {
    for (const FactorKind kind : {FactorKind::tril, FactorKind::diag, FactorKind::lowrank})
        for (const int64_t D : {5, 130}) {
            Case whole(kind, 3, D, 37, 6);
            const std::vector<float> want = whole.draw(isa);
            Case picked = whole;  // its classes 2, 0, 0 and 1, read where they lie
            picked.C = 4, picked.rows = {2, 0, 0, 1}, picked.ids.clear();
            for (const int64_t row : picked.rows) picked.ids.push_back(whole.ids[row]);
            const std::vector<float> rows = picked.draw(isa);
            for (int64_t c = 0; c < 4; ++c)
                CHECK(std::equal(want.begin() + picked.rows[c] * 37 * D, want.begin() + (picked.rows[c] + 1) * 37 * D,
                                 rows.begin() + c * 37 * D),
                      "%s: kind %d row %d", isa_name(isa), static_cast<int>(kind), static_cast<int>(picked.rows[c]));
            whole.threads = 5;
            CHECK(whole.draw(isa) == want, "%s: threads", isa_name(isa));
            for (const int64_t n : {1, 3, 4, 6, 30})
                for (const int64_t first : {0, 1, 7}) {
                    Case part = whole;  // its class 1 alone, samples first .. first + n - 1
                    part.C = 1, part.n = n, part.first = first, part.ids = {whole.ids[1]};
                    part.mean.assign(whole.mean.begin() + D, whole.mean.begin() + 2 * D);
                    const auto factor = whole.factor.begin() + whole.per_class();
                    part.factor.assign(factor, factor + whole.per_class());
                    part.diag.assign(whole.diag.begin() + D, whole.diag.begin() + 2 * D);
                    const std::vector<float> got = part.draw(isa);
                    CHECK(std::equal(got.begin(), got.end(), want.begin() + (37 + first) * D), "%s: kind %d n %d from %d",
                          isa_name(isa), static_cast<int>(kind), static_cast<int>(n), static_cast<int>(first));
                }
        }
}

void test_types(Isa isa) {
    for (const FactorKind kind : {FactorKind::tril, FactorKind::diag, FactorKind::lowrank})
        for (const FloatType type : {FloatType::f16, FloatType::bf16})
            for (const int64_t n : {3, 9}) {
                Case c(kind, 2, 37, n, 3);
                // Multiples of 2^-8 below 1: exact in bf16 too.
                for (std::vector<float>* x : {&c.mean, &c.factor, &c.diag})
                    for (float& entry : *x) entry = static_cast<int>(entry * 64) / 128.0f;
                std::vector<uint16_t> mean, factor, diag, out(c.C * c.n * c.D);
                const auto narrow = type == FloatType::f16 ? to_f16 : to_bf16;
                for (const float x : c.mean) mean.push_back(narrow(x));
                for (const float x : c.factor) factor.push_back(narrow(x));
                for (const float x : c.diag) diag.push_back(narrow(x));
                const std::vector<float> want = c.draw(isa);
                std::vector<float> wide(want.size());
                GaussianArgs args = c.arguments(wide.data());
                args.factor = factor.data(), args.factor_type = type, args.diag = diag.data();
                sample_gaussian_cpu(args, 1, isa);
                CHECK(wide == want, "%s: factor of type %d", isa_name(isa), static_cast<int>(type));
                args.mean = mean.data(), args.mean_type = type, args.out = out.data();
                sample_gaussian_cpu(args, 1, isa);
                for (size_t i = 0; i < want.size(); ++i)
                    if (type == FloatType::bf16)
                        CHECK(from_bf16(out[i]) == from_bf16(to_bf16(want[i])), "%s: output", isa_name(isa));
                    else
                        CHECK(std::fabs(from_f16(out[i]) - want[i]) <= 0x1p-11 * std::fabs(want[i]) + 0x1p-25,
                              "%s: output", isa_name(isa));
            }
}

void test_refusals() {
    const auto changed = [](auto change) {
        Case c(FactorKind::lowrank, 2, 5, 3, 2);
        change(c);
        return [c] { c.draw(Isa::portable); };
    };
    CHECK(refused(changed([](Case& c) { c.first = -1; })), "first");
    CHECK(refused(changed([](Case& c) { c.first = (int64_t{1} << 32) - 2; })), "first + n");
    CHECK(refused(changed([](Case& c) { c.rank = 0; })), "rank 0");
    Case empty(FactorKind::tril, 0, 5, 3);
    CHECK(empty.draw(best_isa()).empty(), "no class");
    CHECK(Case(FactorKind::tril, 2, 5, 0).draw(best_isa()).empty(), "no sample");
}

}  // namespace

int main() {
    test_philox_vectors();
    test_box_muller();
    on_every_isa([](Isa isa) {
        test_normals(isa);
        test_draws(isa);
        test_independence(isa);
        test_types(isa);
    });
    test_refusals();
    return failures != 0;
}
