// Nearest centroid, sum and count of float32 points on the GPU, in one pass over them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "args.h"

namespace placekern::cuda {

// Addresses are of device memory. Beside args.h's KmeansAssignArgs: the centroids may be in any
// order, and what else must be known about them is found out on the device.
struct KmeansAssignCall {
    int64_t n;
    int count;               // 1 to 256
    const float* points;     // [n]
    const float* centroids;  // [count]
    uint8_t* codes;   // [n]: of two centroids equally near, the smaller; of equals, the first
    double* sums;     // [count]
    int64_t* counts;  // [count]
    void* workspace;  // kmeans_assign_workspace bytes, on 16 bytes
};

size_t kmeans_assign_workspace(int64_t n, int count, int device);

// The sums depend on the number of multiprocessors and on their shared memory, by rounding; never
// on timing. Nothing is allocated and nothing waits: a CUDA graph can hold the call.
void kmeans_assign(const KmeansAssignCall& call, const Queue& queue);

}  // namespace placekern::cuda
