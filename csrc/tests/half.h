// 16-bit numbers, apart from what is tested.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float from_bf16(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }

inline float from_f16(uint16_t bits) {
    const int exponent = bits >> 10 & 31, digits = bits & 1023;
    const double magnitude = exponent == 31  ? (digits ? std::numeric_limits<double>::quiet_NaN()
                                                       : std::numeric_limits<double>::infinity())
                             : exponent == 0 ? std::ldexp(digits, -24)
                                             : std::ldexp(1024 + digits, exponent - 25);
    return static_cast<float>(bits & 0x8000 ? -magnitude : magnitude);
}

// Of a finite number, rounded to nearest even.
inline uint16_t to_bf16(float x) {
    const uint32_t bits = as_bits(x);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Of 0 or a number that is normal in fp16 and has no more digits.
inline uint16_t to_f16(float x) {
    const uint32_t bits = as_bits(x);
    return static_cast<uint16_t>((bits >> 16 & 0x8000) | (x == 0 ? 0 : ((bits & 0x7fffffff) - (112u << 23)) >> 13));
}
