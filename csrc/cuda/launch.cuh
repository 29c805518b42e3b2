// Launching on the caller's device and stream; a launch that fails throws with its sizes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../check.h"
#include "args.h"

// PK_CUDA_CHECK(cudaGetLastError(), "linear launch, M = ", M, ", N = ", N);
#define PK_CUDA_CHECK(call, ...)                                                   \
    do {                                                                           \
        const cudaError_t status = (call);                                         \
        if (status != cudaSuccess) {                                               \
            cudaGetLastError(); /* else the next good launch would report it */    \
            throw std::runtime_error(                                              \
                ::placekern::join(__VA_ARGS__, ": ", cudaGetErrorString(status))); \
        }                                                                          \
    } while (0)

// Dynamic shared memory of every kernel; each casts it to what it keeps there.
extern __shared__ __align__(16) unsigned char placekern_shared[];

namespace placekern::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Makes a device the current one for a scope.
class DeviceScope {
  public:
    explicit DeviceScope(int device) : device_(device) {
        PK_CUDA_CHECK(cudaGetDevice(&previous_), "cudaGetDevice");
        // Setting it anyway would put the device's primary context in the place of a caller's own.
        if (previous_ != device_)
            PK_CUDA_CHECK(cudaSetDevice(device), "cudaSetDevice(", device, ")");
    }
    ~DeviceScope() {
        if (previous_ != device_) cudaSetDevice(previous_);
    }
    DeviceScope(const DeviceScope&) = delete;
    DeviceScope& operator=(const DeviceScope&) = delete;

  private:
    int device_;
    int previous_ = 0;
};

inline int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    PK_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device), "attribute ", name, " of device ",
                  device);
    return value;
}

// Bytes of shared memory that a block may take on a device, when it asks for them.
inline int shared_limit(int device) {
    return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Lets a kernel take `shared` bytes of dynamic shared memory on the current device, `device`.
template <class Args, class... Words>
void allow_shared(void (*kernel)(Args), size_t shared, int device, const Words&... words) {
    if (shared <= 48 * 1024) return;  // which it may take unasked
    // Always the most that there is: the limit belongs to the kernel, and a smaller one could reach
    // it from another thread between this line and a launch.
    PK_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       shared_limit(device)),
                  words..., ", ", shared, " bytes of shared memory");
}

// Blocks of a launch: how many, and what each takes.
struct Grid {
    dim3 blocks;
    int threads;
    size_t shared = 0;  // bytes of dynamic shared memory
    // May start while the kernel before it on the stream still runs, once that one lets it
    // (instructions.cuh). Its threads wait for that one's end before they touch memory.
    bool early = false;
};

// Runs `kernel(args)`. The words behind it are for the message: what was launched, with which
// sizes.
template <class Args, class... Words>
void launch(const Queue& queue, void (*kernel)(Args), const Grid& grid, const Args& args,
            const Words&... words) {
    const DeviceScope scope(queue.device);
    allow_shared(kernel, grid.shared, queue.device, words...);
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid.blocks;
    config.blockDim = dim3(grid.threads);
    config.dynamicSmemBytes = grid.shared;
    config.stream = reinterpret_cast<cudaStream_t>(queue.stream);
    config.attrs = &early;
    config.numAttrs =
        grid.early && attribute(cudaDevAttrComputeCapabilityMajor, queue.device) >= 9 ? 1 : 0;
    PK_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args), words..., ", grid ", grid.blocks.x,
                  " x ", grid.blocks.y, " x ", grid.blocks.z, " of ", grid.threads, " threads");
    PK_CUDA_CHECK(cudaGetLastError(), words...);
}

}  // namespace placekern::cuda
