// CHECK(condition, format, ...) prints and counts a failure; `main` of a test returns whether there was one.
#pragma once

#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "sinkhorn.h"

inline int failures = 0;

#define CHECK(condition, ...)                                           \
    do {                                                                \
        if (!(condition)) {                                             \
            ++failures;                                                 \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            std::printf(__VA_ARGS__);                                   \
            std::printf("\n");                                          \
        }                                                               \
    } while (0)

// The larger of two errors; NaN, which std::max and std::fmax pass over, is the largest.
inline double worse(double x, double y) { return std::isnan(x) || x >= y ? x : y; }

template <class Call>
bool refused(Call call) {
    try {
        call();
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

// tests(isa) on every instruction set that this processor has.
template <class Tests>
void on_every_isa(Tests tests) {
    using spa_fast::Isa;
    for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
        if (!spa_fast::isa_usable(isa)) {
            std::printf("%s: not on this processor\n", spa_fast::isa_name(isa));
            continue;
        }
        tests(isa);
        std::printf("%s: %d failures so far\n", spa_fast::isa_name(isa), failures);
    }
}
