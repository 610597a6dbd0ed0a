// One vector of W floats, what is computed with it, and how costs get in and out of it.
//
// For files compiled once per instruction set (SPA_FAST_ISA, SPA_FAST_LANES and the -m flags come from CMake).
// Everything here has internal linkage and calls no inline library function: the linker could hand an AVX-512 copy of
// one to portable code.
#pragma once

#include <cstdint>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace spa_fast {
namespace {

constexpr int W = SPA_FAST_LANES;
constexpr int H = W / 2;  // fp64 lanes

typedef float F __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));
typedef uint32_t U __attribute__((vector_size(W * 4)));
typedef uint16_t U16 __attribute__((vector_size(W * 2)));
typedef double D __attribute__((vector_size(H * 8)));
typedef int64_t I64 __attribute__((vector_size(H * 8)));
typedef uint64_t U64 __attribute__((vector_size(H * 8)));
typedef float FH __attribute__((vector_size(H * 4)));
typedef int32_t IH __attribute__((vector_size(H * 4)));

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kInf = __builtin_inff();

template <class V, class T>
inline V splat(T x) {
    return x - V{};
}
template <class V>
inline V min(V x, V y) {
    return x < y ? x : y;
}
template <class V>
inline V max(V x, V y) {
    return x > y ? x : y;
}
inline F abs(F x) { return (F)((U)x & 0x7fffffffu); }
inline D abs(D x) { return (D)((U64)x & 0x7fffffffffffffffu); }

template <class V>
inline V load(const void* from) {
    V x;
    __builtin_memcpy(&x, from, sizeof(V));
    return x;
}
template <class V>
inline void store(void* to, V x) {
    __builtin_memcpy(to, &x, sizeof(V));
}

template <class M>
inline bool any(M mask) {
    uint64_t words[sizeof(M) / 8], all = 0;
    __builtin_memcpy(words, &mask, sizeof(M));
    for (uint64_t word : words) all |= word;
    return all != 0;
}

// Adding 1.5 * 2^mantissa rounds to an integer and leaves it in the low bits. 2^r - 1 = r q(r) on [-1/2, 1/2] by
// Chebyshev interpolation of q; relative error 5e-9 (fp32, before rounding) and 4e-14 (fp64). |x| must stay inside the
// exponent range.
inline F exp2(F x) {
    const F rounded = x + 0x1.8p23f;
    const F r = x - (rounded - 0x1.8p23f);
    F p = r * 1.54531629e-4f + 1.33908634e-3f;
    p = p * r + 9.61808256e-3f;
    p = p * r + 5.55035711e-2f;
    p = p * r + 0.240226508f;
    p = p * r + 0.693147188f;
    p = p * r + 1.0f;
    return (F)((U)p + ((U)rounded << 23));
}
inline D exp2(D x) {
    const D rounded = x + 0x1.8p52;
    const D r = x - (rounded - 0x1.8p52);
    D p = r * 1.02031210633917292e-7 + 1.3255224878668817e-6;
    p = p * r + 1.5252686846267719e-5;
    p = p * r + 1.54034558524538394e-4;
    p = p * r + 1.33335581790431111e-3;
    p = p * r + 9.61812915940255819e-3;
    p = p * r + 5.55041086647604239e-2;
    p = p * r + 0.240226506958129882;
    p = p * r + 0.693147180559945309;
    p = p * r + 1.0;
    return (D)((U64)p + ((U64)rounded << 52));
}

// log2(x) = e + 2/ln2 atanh((m - 1) / (m + 1)), x = 2^e m, m in [sqrt(1/2), sqrt(2)). Positive normal x.
inline F log2(F x) {
    const I e = ((I)x - 0x3f3504f3) >> 23;
    const F m = (F)((U)x - ((U)e << 23));
    const F z = (m - 1.0f) / (m + 1.0f), w = z * z;
    F p = w * 0.320598895f + 0.412198573f;
    p = p * w + 0.577078016f;
    p = p * w + 0.961796694f;
    p = p * w + 2.88539008f;
    return __builtin_convertvector(e, F) + z * p;
}
inline D log2(D x) {
    const I64 e = ((I64)x - 0x3fe6a09e667f3bcd) >> 52;
    const D m = (D)((U64)x - ((U64)e << 52));
    const D z = (m - 1.0) / (m + 1.0), w = z * z;
    D p = w * (2 / kLn2 / 17) + 2 / kLn2 / 15;
    for (int k = 13; k > 0; k -= 2) p = p * w + 2 / kLn2 / k;
    return __builtin_convertvector(e, D) + z * p;
}

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

inline F widen(const float* from) { return load<F>(from); }
inline F widen(const BFloat* from) { return (F)(__builtin_convertvector(load<U16>(from), U) << 16); }
inline F widen(const Half* from) {
#if defined(__AVX512F__)
    return (F)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    const U h = __builtin_convertvector(load<U16>(from), U), magnitude = h & 0x7fffu;
    const U rebias = splat<U>(112u << 23);
    const U normal = (magnitude << 13) + rebias + (magnitude >= 0x7c00u ? rebias : U{});
    const F subnormal = __builtin_convertvector((I)magnitude, F) * 0x1p-24f;
    return (F)((magnitude < 0x400u ? (U)subnormal : normal) | ((h & 0x8000u) << 16));
#endif
}

// The first n < W entries, 0 beyond: nothing outside of them is touched.
template <class S>
inline F widen(const S* from, int64_t n) {
    S padded[W] = {};
    __builtin_memcpy(padded, from, n * sizeof(S));
    return widen(padded);
}
#if defined(__AVX512F__)
inline F widen(const float* from, int64_t n) {
    return (F)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << n) - 1), from);
}
#endif

// Rounds to nearest even.
inline void narrow(float* to, F x) { store(to, x); }
inline void narrow(BFloat* to, F x) {
    const U bits = (U)x, rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    store(to, __builtin_convertvector(x == x ? rounded : splat<U>(0x7fc0u), U16));
}
inline void narrow(Half* to, F x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, (__m512)x, 0));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)x, 0));
#else
    const U magnitude = (U)x & 0x7fffffffu, sign = (U)x >> 16 & 0x8000u;
    const U normal = (magnitude - splat<U>(112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const U subnormal = (U)((F)magnitude + 0.5f) - 0x3f000000u;  // the sum's last place is 2^-24
    const U finite = magnitude < 0x38800000u ? subnormal : normal;
    const U special = magnitude > 0x7f800000u ? splat<U>(0x7e00u) : splat<U>(0x7c00u);
    store(to, __builtin_convertvector((magnitude < 0x47800000u ? finite : special) | sign, U16));
#endif
}
template <class S>
inline void narrow(S* to, F x, int64_t n) {
    S padded[W];
    narrow(padded, x);
    __builtin_memcpy(to, padded, n * sizeof(S));
}
#if defined(__AVX512F__)
inline void narrow(float* to, F x, int64_t n) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1 << n) - 1), (__m512)x);
}
#endif

// {x0, y0, x1, y1, ...} of the lower or the upper halves.
template <int... J>
struct Lanes {};
template <int N, int... J>
struct Count : Count<N - 1, N - 1, J...> {};
template <int... J>
struct Count<0, J...> {
    typedef Lanes<J...> type;
};
template <int Start, int... J>
inline F zip(F x, F y, Lanes<J...>) {
#ifdef __clang__
    return __builtin_shufflevector(x, y, (Start + J / 2 + J % 2 * W)...);
#else
    return __builtin_shuffle(x, y, I{(Start + J / 2 + J % 2 * W)...});
#endif
}
inline void transpose(F (&rows)[W]) {
    typedef typename Count<W>::type All;
    for (int stage = 1; stage < W; stage *= 2) {
        F zipped[W];
        for (int i = 0; i < H; ++i) {
            zipped[2 * i] = zip<0>(rows[i], rows[i + H], All());
            zipped[2 * i + 1] = zip<H>(rows[i], rows[i + H], All());
        }
        for (int i = 0; i < W; ++i) rows[i] = zipped[i];
    }
}

// Hands out consecutive aligned pieces of the workspace; with no memory it only counts.
struct Arena {
    char* memory;
    int64_t used = 0;

    template <class V>
    V* take(int64_t n) {
        V* piece = reinterpret_cast<V*>(memory + used);
        used += (n * static_cast<int64_t>(sizeof(V)) + 63) / 64 * 64;
        return piece;
    }
};

// out[e] holds entry e of all W problems; problem l starts at from + offset[l].
template <class S>
void interleave(const S* from, const int64_t* offset, int64_t n, F* out) {
    int64_t e = 0;
    for (; e + W <= n; e += W) {
        F rows[W];
        for (int l = 0; l < W; ++l) rows[l] = widen(from + offset[l] + e);
        transpose(rows);
        for (int l = 0; l < W; ++l) out[e + l] = rows[l];
    }
    if (e == n) return;
    F rows[W];
    for (int l = 0; l < W; ++l) rows[l] = widen(from + offset[l] + e, n - e);
    transpose(rows);
    for (int64_t l = 0; l < n - e; ++l) out[e + l] = rows[l];
}

}  // namespace
}  // namespace spa_fast
