// Half precision, stored as its bits; arithmetic goes through float, by an explicit conversion.
#pragma once

#include "cuda_runtime.h"

namespace emulated {

inline float half_to_float(uint16_t half) {
    const unsigned sign = (half & 0x8000u) << 16;
    const unsigned magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00)  // infinity, NaN
        return reinterpret<float>(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x400) return reinterpret<float>(sign | (magnitude + 0x1c000) << 13);
    const float value = static_cast<float>(magnitude) * 0x1p-24f;  // subnormal: exact
    return sign != 0 ? -value : value;
}

inline uint16_t float_to_half(float value) {
    const unsigned bits = reinterpret<unsigned>(value);
    const unsigned sign = bits >> 16 & 0x8000u;
    const unsigned magnitude = bits & 0x7fffffffu;
    unsigned half;
    if (magnitude > 0x7f800000u) return 0x7fff;  // the device's NaN
    if (magnitude >= 0x477ff000u) {              // 65,520 rounds to infinity
        half = 0x7c00;
    } else if (magnitude >= 0x38800000u) {
        half = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
    } else {  // subnormal: the sum's last bit is 2^-24, so that the processor rounds
        half = reinterpret<unsigned>(reinterpret<float>(magnitude) + 0.5f) - 0x3f000000u;
    }
    return static_cast<uint16_t>(sign | half);
}

}  // namespace emulated

struct __half {
    uint16_t bits;

    __half() = default;
    __half(float value) : bits(emulated::float_to_half(value)) {}
    operator float() const { return emulated::half_to_float(bits); }
};

struct alignas(4) __half2 {
    __half x, y;
};

using half = __half;
using half2 = __half2;

// The device rounds these to half precision; float arithmetic would not, so there are none.
__half operator+(__half, __half) = delete;
__half operator-(__half, __half) = delete;
__half operator*(__half, __half) = delete;
__half operator/(__half, __half) = delete;

inline __half __float2half_rn(float value) { return __half(value); }
inline __half __float2half(float value) { return __half(value); }
inline float __half2float(__half value) { return value; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) {
    __half value;
    value.bits = bits;
    return value;
}

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float2half2_rn(float x) { return {__half(x), __half(x)}; }
inline __half2 __float22half2_rn(float2 pair) { return __floats2half2_rn(pair.x, pair.y); }
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }
inline __half __low2half(__half2 pair) { return pair.x; }
inline __half __high2half(__half2 pair) { return pair.y; }
inline float __low2float(__half2 pair) { return pair.x; }
inline float __high2float(__half2 pair) { return pair.y; }
