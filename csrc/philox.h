// Counter-based normals: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), then Box
// and Muller:
//
//     counter = (dimension / 4, sample, class id, 0),   key = (low, high half of the seed)
//     u = fl(w) 2^-32 + 2^-33 in (0, 1],   v = fl(w') 2^-31 in [0, 2]          (fl: rounding to fp32)
//     z = sqrt(-2 ln u) cos(pi v), sqrt(-2 ln u) sin(pi v),      (w, w') = words (0, 1), then words (2, 3)
//
// One text for g++ and nvcc, for numbers and for vectors: `Ops` says what a lane is. Every sum is written as the fused
// operation that it must be, so wherever there are such operations the normals are the same bits.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SPA_FAST_HD __host__ __device__
#else
#define SPA_FAST_HD
#endif

namespace spa_fast {

struct Scalar {
    typedef float F;
    typedef int32_t I;
    typedef uint32_t U;

    SPA_FAST_HD static F mad(F a, F b, F c) { return fmaf(a, b, c); }
    SPA_FAST_HD static U high(U a, uint32_t b) { return static_cast<U>(static_cast<uint64_t>(a) * b >> 32); }
    SPA_FAST_HD static F sqrt(F x) { return sqrtf(x); }
    SPA_FAST_HD static F from(U x) { return static_cast<F>(x); }
    SPA_FAST_HD static F from(I x) { return static_cast<F>(x); }
    SPA_FAST_HD static F splat(float x) { return x; }
    SPA_FAST_HD static U bits(F x) {
#ifdef __CUDA_ARCH__
        return __float_as_uint(x);
#else
        U u;
        std::memcpy(&u, &x, sizeof(u));
        return u;
#endif
    }
    SPA_FAST_HD static F number(U x) {
#ifdef __CUDA_ARCH__
        return __uint_as_float(x);
#else
        F f;
        std::memcpy(&f, &x, sizeof(f));
        return f;
#endif
    }
};

template <class Ops>
SPA_FAST_HD inline void philox4x32(typename Ops::U (&x)[4], uint32_t key0, uint32_t key1) {
    typedef typename Ops::U U;
    for (int round = 0; round < 10; ++round) {
        const U high0 = Ops::high(x[0], 0xD2511F53u), low0 = x[0] * 0xD2511F53u;
        const U high2 = Ops::high(x[2], 0xCD9E8D57u), low2 = x[2] * 0xCD9E8D57u;
        x[0] = high2 ^ x[1] ^ key0;
        x[1] = low2;
        x[2] = high0 ^ x[3] ^ key1;
        x[3] = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// -2 ln u for u in [2^-33, 1]: u = 2^e m with m in [2/3, 4/3), f = m - 1, and -2 ln m = -2 f + f^2 R(f), R minimax to
// 5e-9. No constant is cut in two: float(-2 ln 2) is good to 2^-28.
template <class Ops>
SPA_FAST_HD inline typename Ops::F minus_two_log(typename Ops::F u) {
    typedef typename Ops::F F;
    typedef typename Ops::I I;
    typedef typename Ops::U U;
    const I e = (I)(Ops::bits(u) - 0x3f2aaaabu) >> 23;
    const F f = Ops::number(Ops::bits(u) - ((U)e << 23)) - 1.0f;
    F r = Ops::mad(f, Ops::splat(0x1.109ffep-2f), Ops::splat(-0x1.1ed8fap-2f));
    r = Ops::mad(r, f, Ops::splat(0x1.eeb886p-3f));
    r = Ops::mad(r, f, Ops::splat(-0x1.1ebca6p-2f));
    r = Ops::mad(r, f, Ops::splat(0x1.55cd10p-2f));
    r = Ops::mad(r, f, Ops::splat(-0x1.99d212p-2f));
    r = Ops::mad(r, f, Ops::splat(0x1.fffd6ap-2f));
    r = Ops::mad(r, f, Ops::splat(-0x1.555502p-1f));
    r = Ops::mad(r, f, Ops::splat(1.0f));
    const F log_m = Ops::mad(f * f, r, f * -2.0f);
    return Ops::mad(Ops::from(e), Ops::splat(-0x1.62e430p+0f), log_m);
}

// cos and sin of pi v for v in [0, 2]: v = r + q / 2 exactly, |r| <= 1/4, polynomials minimax to 4e-9.
template <class Ops>
SPA_FAST_HD inline void cos_sin_pi(typename Ops::F v, typename Ops::F& cosine, typename Ops::F& sine) {
    typedef typename Ops::F F;
    typedef typename Ops::U U;
    const F rounded = Ops::mad(v, Ops::splat(2.0f), Ops::splat(0x1.8p23f));  // q in the low bits
    const U q = Ops::bits(rounded);
    const F r = Ops::mad(rounded - 0x1.8p23f, Ops::splat(-0.5f), v), w = r * r;
    F s = Ops::mad(w, Ops::splat(-0x1.2dd046p-1f), Ops::splat(0x1.466032p+1f));
    s = Ops::mad(s, w, Ops::splat(-0x1.4abbc0p+2f));
    s = Ops::mad(s, w, Ops::splat(-0x1.777a5cp-24f));  // pi - float(pi)
    s = Ops::mad(r, Ops::splat(0x1.921fb6p+1f), r * s);
    F c = Ops::mad(w, Ops::splat(0x1.d9f7bcp-3f), Ops::splat(-0x1.55c664p+0f));
    c = Ops::mad(c, w, Ops::splat(0x1.03c1dep+2f));
    c = Ops::mad(c, w, Ops::splat(-0x1.3bd3ccp+2f));
    c = Ops::mad(c, w, Ops::splat(1.0f));
    cosine = Ops::number(Ops::bits((q & 1u) != 0u ? s : c) ^ ((q + 1u) & 2u) << 30);
    sine = Ops::number(Ops::bits((q & 1u) != 0u ? c : s) ^ (q & 2u) << 30);
}

template <class Ops>
SPA_FAST_HD inline void box_muller(typename Ops::U w, typename Ops::U v, typename Ops::F& z0, typename Ops::F& z1) {
    typedef typename Ops::F F;
    const F u = Ops::mad(Ops::from(w), Ops::splat(0x1p-32f), Ops::splat(0x1p-33f));
    const F radius = Ops::sqrt(minus_two_log<Ops>(u));
    F cosine, sine;
    cos_sin_pi<Ops>(Ops::from(v) * 0x1p-31f, cosine, sine);
    z0 = radius * cosine;
    z1 = radius * sine;
}

// The normals of dimensions 4 * block .. 4 * block + 3.
template <class Ops>
SPA_FAST_HD inline void normals(typename Ops::U block, typename Ops::U sample, typename Ops::U class_id, uint64_t seed,
                                typename Ops::F (&z)[4]) {
    typename Ops::U x[4] = {block, sample, class_id, block ^ block};
    philox4x32<Ops>(x, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    box_muller<Ops>(x[0], x[1], z[0], z[1]);
    box_muller<Ops>(x[2], x[3], z[2], z[3]);
}

}  // namespace spa_fast
