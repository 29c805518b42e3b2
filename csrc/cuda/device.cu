// Counts devices and reads their properties.
#include "launch.cuh"
#include "ops.h"

namespace placekern::cuda {

int device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
    cudaGetLastError();  // no driver is no error of a later call
    return 0;
}

Properties properties(int device) {
    return {attribute(cudaDevAttrMultiProcessorCount, device), shared_limit(device),
            10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                attribute(cudaDevAttrComputeCapabilityMinor, device)};
}

}  // namespace placekern::cuda
