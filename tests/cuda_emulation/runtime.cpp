// CUDA's host functions for one device with one stream, which runs a launch before it returns.
// PLACEKERN_EMULATED_CAPABILITY (9.0) and PLACEKERN_EMULATED_SHARED (232448, bytes a block may ask
// for) make it another device.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "cuda_runtime.h"

namespace {

constexpr int kSharedUnasked = 48 * 1024;
constexpr int kReserved = 1024;  // of a multiprocessor's shared memory, for each block
constexpr int kMostBlocks = 32;  // of a multiprocessor

std::mutex device_mutex;  // the machine runs one launch at a time
std::unordered_map<const void*, int> allowed_shared;
thread_local emulated::Outcome last_outcome;  // its text explains its status, until another comes
thread_local cudaError_t last_error = cudaSuccess;
int launched_capability;
std::atomic<long> unwaited;  // threads of an early launch that have yet to wait

cudaError_t remember(cudaError_t status) {
    if (status != cudaSuccess) last_error = status;
    return status;
}

int shared_limit() {
    const char* text = std::getenv("PLACEKERN_EMULATED_SHARED");
    const int limit = text == nullptr ? 227 * 1024 : std::atoi(text);
    return limit < static_cast<int>(emulated::kMaxShared) ? limit : emulated::kMaxShared;
}

cudaError_t refuse(cudaError_t status, const char* text) {
    last_outcome.status = status;
    std::snprintf(last_outcome.text, sizeof(last_outcome.text), "%s", text);
    return remember(status);
}

int read_capability() {
    const char* text = std::getenv("PLACEKERN_EMULATED_CAPABILITY");
    int major = 9, minor = 0;
    if (text != nullptr) std::sscanf(text, "%d.%d", &major, &minor);
    return 10 * major + minor;
}

}  // namespace

namespace emulated {

int capability() { return launched_capability; }

void wait_for_previous_kernel() { --unwaited; }

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        if (value < 0 || value > shared_limit())
            return refuse(cudaErrorInvalidValue,
                          "invalid argument: more shared memory than a block may have");
        const std::lock_guard<std::mutex> lock(device_mutex);
        allowed_shared[kernel] = value;
    }
    return cudaSuccess;
}

cudaError_t resident_blocks(int* blocks, int threads, size_t shared) {
    if (threads < 1 || threads > kMaxThreads)
        return refuse(cudaErrorInvalidValue, "invalid argument: threads of a block");
    const size_t of_shared = (shared_limit() + kReserved) / (shared + kReserved);
    const size_t of_threads = 2 * kMaxThreads / threads;
    *blocks = static_cast<int>(of_shared < of_threads ? of_shared : of_threads);
    if (*blocks > kMostBlocks) *blocks = kMostBlocks;
    return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*run)(void*),
                   void* arguments) {
    const dim3 grid = config.gridDim, block = config.blockDim;
    const auto within = [](dim3 size, unsigned x, unsigned y, unsigned z) {
        return size.x >= 1 && size.x <= x && size.y >= 1 && size.y <= y && size.z >= 1 &&
               size.z <= z;
    };
    if (!within(grid, 0x7fffffff, 65535, 65535) || !within(block, kMaxThreads, kMaxThreads, 64) ||
        static_cast<uint64_t>(block.x) * block.y * block.z > kMaxThreads)
        return refuse(cudaErrorInvalidConfiguration, "invalid configuration argument");
    const std::lock_guard<std::mutex> lock(device_mutex);
    const auto asked = allowed_shared.find(kernel);
    const int allowed = asked == allowed_shared.end()    ? kSharedUnasked
                        : asked->second > kSharedUnasked ? asked->second
                                                         : kSharedUnasked;
    if (config.dynamicSmemBytes >
        static_cast<size_t>(allowed < shared_limit() ? allowed : shared_limit()))
        return refuse(cudaErrorInvalidValue,
                      "invalid argument: more shared memory than the kernel was allowed");
    const bool early =
        config.numAttrs == 1 && config.attrs->val.programmaticStreamSerializationAllowed;
    launched_capability = read_capability();
    if (early && launched_capability < 90)
        return refuse(cudaErrorInvalidValue, "invalid argument: launched early before Hopper");
    unwaited =
        early ? static_cast<long>(grid.x) * grid.y * grid.z * block.x * block.y * block.z : 0;
    last_outcome = run_grid(grid, block, config.dynamicSmemBytes, run, arguments);
    if (last_outcome.status == cudaSuccess && unwaited > 0)
        return refuse(cudaErrorLaunchFailure,
                      "launched early, and a thread never waits for the kernel before it");
    return remember(static_cast<cudaError_t>(last_outcome.status));
}

}  // namespace emulated

const char* cudaGetErrorString(cudaError_t status) {
    if (status != cudaSuccess && status == last_outcome.status) return last_outcome.text;
    switch (status) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
        case cudaErrorInvalidDevice:
            return "invalid device ordinal";
        case cudaErrorMisalignedAddress:
            return "misaligned address";
        case cudaErrorLaunchFailure:
            return "unspecified launch failure";
    }
    return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    return remember(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device != 0) return remember(cudaErrorInvalidDevice);
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock:
            *value = emulated::kMaxThreads;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlock:
            *value = kSharedUnasked;
            return cudaSuccess;
        case cudaDevAttrWarpSize:
            *value = warpSize;
            return cudaSuccess;
        case cudaDevAttrMultiProcessorCount:
            *value = 4;
            return cudaSuccess;
        case cudaDevAttrMaxThreadsPerMultiProcessor:
            *value = 2 * emulated::kMaxThreads;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor:
            *value = read_capability() / 10;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor:
            *value = read_capability() % 10;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = shared_limit() + kReserved;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = shared_limit();
            return cudaSuccess;
    }
    return remember(cudaErrorInvalidValue);
}

cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t) {
    std::memset(memory, byte, bytes);
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
