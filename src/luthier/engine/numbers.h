// One number: bfloat16 widened and rounded, and the exponential. What is sixteen at once is in lanes.h.
//
// Sources: bfloat16 as the upper half of a float32, rounded to nearest, ties to even; the exponential is a Cody-Waite
// reduction and a polynomial of degree 6 with the coefficients of Cephes (Moshier 1992).
//
// It does not know what is computed.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

using bf16 = uint16_t;

inline float wide(float x) { return x; }
inline float wide(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline void put(float& to, float x) { to = x; }
inline void put(bf16& to, float x) {  // to nearest, ties to even; what is not a number stays so
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : bf16(rounded);
}

inline float power(float x) {  // e to the x; at -87 and below 1.6e-38, which is nothing beside a sum
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    const float whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
    const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * rest + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    const int32_t bits = (int32_t(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return y * scale;
}

}  // namespace
