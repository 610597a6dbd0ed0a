// From the similarities of one class's tokens with patches, a patch per lane, to the k patches that agree best.
//
// Included by files compiled once per instruction set, as vector.h.
#pragma once

#include "patches.h"
#include "vector.h"

namespace spa_fast {
namespace {

inline int64_t count_of(const bool* mask, int64_t n) {
    if (!mask) return n;
    int64_t active = 0;
    for (int64_t i = 0; i < n; ++i) active += mask[i];
    return active;
}

// r[g]: tokens of `tile` [M, groups W], a row of which is tile_row long, reduced; masked ones take no part, 0 without
// any. NaN spreads.
inline void reduce_tokens(const float* tile, int64_t tile_row, int64_t M, const bool* mask, int64_t groups,
                          Reduce reduce, F* r) {
    const int64_t count = count_of(mask, M);
    for (int64_t g = 0; g < groups; ++g) {
        const auto over_tokens = [&](auto&& take) {
            for (int64_t j = 0; j < M; ++j)
                if (!mask || mask[j]) take(load<F>(tile + j * tile_row + g * W));
        };
        F best = splat<F>(-kInf), sum = {}, weights = {};
        if (reduce != Reduce::mean) over_tokens([&](F s) { best = ((s > best) | (s != s)) ? s : best; });
        if (reduce == Reduce::mean) over_tokens([&](F s) { sum += s; });
        if (reduce == Reduce::softmax)
            over_tokens([&](F s) {
                const F weight = exp2((s - best) * static_cast<float>(kLog2E / kSoftmaxTemperature));
                weights += weight;
                sum += weight * s;
            });
        r[g] = count == 0                  ? F{}
               : reduce == Reduce::max     ? best
               : reduce == Reduce::softmax ? sum / weights
                                           : sum / static_cast<float>(count);
    }
}

// An integer that orders as the float does: -0 as 0, NaN as +inf.
inline I order_of(F x) {
    const I bits = (I)(x == x ? x + 0.0f : splat<F>(kInf));
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

inline int sum(I x) {
    int total = 0;
    for (int l = 0; l < W; ++l) total += x[l];
    return total;
}

inline int64_t count_from(const I* keys, int64_t groups, int32_t least) {
    I count = {};
    for (int64_t g = 0; g < groups; ++g) count -= keys[g] >= least;
    return sum(count);
}

// Moves lanes of `mask` to out, their numbers and their keys, in order; writes up to W past the end.
inline int64_t compress(I keys, I mask, int64_t first, int32_t* number, int32_t* key) {
#if defined(__AVX512F__)
    const __mmask16 lanes = _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
    const __m512i step = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i numbers = _mm512_add_epi32(step, _mm512_set1_epi32(static_cast<int>(first)));
    _mm512_storeu_si512(number, _mm512_maskz_compress_epi32(lanes, numbers));
    _mm512_storeu_si512(key, _mm512_maskz_compress_epi32(lanes, (__m512i)keys));
    return __builtin_popcount(lanes);
#else
    int64_t n = 0;
    for (int l = 0; l < W; ++l) {
        number[n] = static_cast<int32_t>(first + l);
        key[n] = keys[l];
        n -= mask[l];
    }
    return n;
#endif
}

// The numbers of the k largest of `keys`, falling, equal ones by lowest number. `number`, `key`: room for k + W each;
// lanes past the last patch hold the least key and, being last, are never reached.
inline void select_largest(const I* keys, int64_t groups, int64_t k, int32_t* number, int32_t* key, int32_t* out) {
    // k or more keys reach `low`, fewer `high`.
    I least = keys[0], most = keys[0];
    for (int64_t g = 1; g < groups; ++g) {
        least = min(least, keys[g]);
        most = max(most, keys[g]);
    }
    int64_t low = least[0], high = most[0];
    for (int l = 1; l < W; ++l) {
        low = least[l] < low ? least[l] : low;
        high = most[l] > high ? most[l] : high;
    }
    int64_t above = 0, reached = groups * W;
    for (++high; reached != k && high - low > 1;) {
        const int64_t middle = low + (high - low) / 2, count = count_from(keys, groups, static_cast<int32_t>(middle));
        if (count >= k)
            low = middle, reached = count;
        else
            high = middle, above = count;
    }
    int64_t n = 0, ties = k - above;
    const bool exact = reached == k;
    for (int64_t g = 0; g < groups && n < k; ++g) {
        I mask = keys[g] >= static_cast<int32_t>(low);
        if (!any(mask)) continue;
        if (!exact)
            for (int l = 0; l < W; ++l)
                if (keys[g][l] == low) mask[l] = ties-- > 0 ? -1 : 0;
        n += compress(keys[g], mask, g * W, number + n, key + n);
    }
    // The place of each: how many are larger, or equal and before it.
    for (int64_t i = 0; i < k; i += W) {
        const I own = load<I>(key + i);
        I place = {};
        int64_t j = 0;
        for (; j < i; ++j) place -= key[j] >= own;
        for (int l = 0; l < W && j < k; ++l, ++j) {
            I later;
            for (int m = 0; m < W; ++m) later[m] = m > l ? -1 : 0;
            place -= (key[j] > own) | ((key[j] == own) & later);
        }
        for (; j < k; ++j) place -= key[j] > own;
        for (int64_t l = 0; l < W && i + l < k; ++l) out[place[l]] = number[i + l];
    }
}

}  // namespace
}  // namespace spa_fast
