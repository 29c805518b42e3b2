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
    const auto read = [device](cudaDeviceAttr attribute) {
        int value = 0;
        PK_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device), "properties of device ",
                      device);
        return value;
    };
    return {read(cudaDevAttrMultiProcessorCount), shared_limit(device),
            10 * read(cudaDevAttrComputeCapabilityMajor) + read(cudaDevAttrComputeCapabilityMinor)};
}

}  // namespace placekern::cuda
