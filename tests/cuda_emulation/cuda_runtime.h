// Stands in for CUDA's header where there is no GPU: kernels compile for the host and run on the
// machine of machine.cpp, on host pointers. One surprise: `__shared__` is for the one dynamic array
// only; a shared variable inside a kernel does not compile (section of a local variable).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>  // uses the word __noinline__ itself, so it has to come before the macro
#include <tuple>
#include <utility>

#include "machine.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __shared__ __attribute__((section(".bss.emulated_shared"), visibility("hidden")))

constexpr int warpSize = emulated::kLanes;

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorMisalignedAddress = 716,
    cudaErrorLaunchFailure = 719,
};

enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMaxThreadsPerMultiProcessor = 39,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

enum cudaStreamCaptureStatus {
    cudaStreamCaptureStatusNone = 0,
    cudaStreamCaptureStatusActive = 1,
};

using cudaStream_t = struct CUstream_st*;

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    union {
        int programmaticStreamSerializationAllowed;
    } val;
};

struct cudaLaunchConfig_t {
    dim3 gridDim;
    dim3 blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

const char* cudaGetErrorString(cudaError_t status);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);

namespace emulated {
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t resident_blocks(int* blocks, int threads, size_t shared);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*run)(void*),
                   void* arguments);
}  // namespace emulated

template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value) {
    return emulated::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// Of a kernel whose registers set no limit.
template <class T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T*, int threads,
                                                          size_t shared) {
    return emulated::resident_blocks(blocks, threads, shared);
}

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Actual&&... actual) {
    using Call = std::tuple<void (*)(Expected...), Expected...>;
    Call call(kernel, std::forward<Actual>(actual)...);
    const auto run = [](void* call) {
        std::apply([](auto kernel, const auto&... arguments) { kernel(arguments...); },
                   *static_cast<Call*>(call));
    };
    return emulated::launch(*config, reinterpret_cast<const void*>(kernel), run, &call);
}

#include "device_functions.h"
