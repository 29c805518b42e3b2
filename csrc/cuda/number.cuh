// Conversions of the numbers that kernels read and write: float32, float16, bfloat16.
// A kernel is a template over the type; the host picks the instance by `Dtype`.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "args.h"

namespace placekern::cuda {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// The two 16-bit numbers of a word as floats, the lower half first.
__device__ __forceinline__ float2 unpack(uint32_t word, __half) {
    return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(word))),
                       __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16))));
}
__device__ __forceinline__ float2 unpack(uint32_t word, __nv_bfloat16) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

// A float rounded to T, as the bits of T in the low half of a word.
__device__ __forceinline__ uint32_t to_bits(float value, __half) {
    return __half_as_ushort(__float2half_rn(value));
}
__device__ __forceinline__ uint32_t to_bits(float value, __nv_bfloat16) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// The same for any T: a float as it is.
__device__ __forceinline__ uint32_t bits_of(float value, float) { return __float_as_uint(value); }
template <class T>
__device__ __forceinline__ uint32_t bits_of(float value, T) {
    return to_bits(value, T());
}

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// Element i of an array whose type is known when it is read. Not for inner loops.
__device__ inline float read(const Vector& from, int64_t i) {
    switch (from.dtype) {
        case Dtype::kFloat16:
            return to_float(static_cast<const __half*>(from.data)[i]);
        case Dtype::kBfloat16:
            return to_float(static_cast<const __nv_bfloat16*>(from.data)[i]);
        default:
            return static_cast<const float*>(from.data)[i];
    }
}

// The same in two halves: the bits as they lie in memory, through the cache of what no kernel
// writes, and their value. Loads can be on their way together, as no conversion waits between them.
__device__ __forceinline__ uint32_t word_of(const Vector& from, int64_t i) {
    return from.dtype == Dtype::kFloat32 ? __ldg(static_cast<const uint32_t*>(from.data) + i)
                                         : __ldg(static_cast<const uint16_t*>(from.data) + i);
}
__device__ __forceinline__ float value_of(uint32_t word, Dtype dtype) {
    const float value = __uint_as_float(word << (dtype == Dtype::kBfloat16 ? 16 : 0));
    return dtype == Dtype::kFloat16 ? unpack(word, __half()).x : value;
}

__device__ inline void write(const VectorOut& to, int64_t i, float value) {
    switch (to.dtype) {
        case Dtype::kFloat16:
            static_cast<__half*>(to.data)[i] = __float2half_rn(value);
            break;
        case Dtype::kBfloat16:
            static_cast<__nv_bfloat16*>(to.data)[i] = __float2bfloat16_rn(value);
            break;
        default:
            static_cast<float*>(to.data)[i] = value;
    }
}

// Calls f(T()) with the type that `dtype` names.
template <class F>
void with_type(Dtype dtype, F f) {
    switch (dtype) {
        case Dtype::kFloat16:
            return f(__half());
        case Dtype::kBfloat16:
            return f(__nv_bfloat16());
        default:
            return f(float());
    }
}

}  // namespace placekern::cuda
