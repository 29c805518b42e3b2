// Turns a CUDA status into an exception that says which call failed and with which sizes.
#pragma once

#include <cuda_runtime.h>

#include "../check.h"

// PK_CUDA_CHECK(cudaGetLastError(), "linear launch, M = ", M, ", N = ", N);
#define PK_CUDA_CHECK(call, ...)                                                   \
    do {                                                                           \
        const cudaError_t status = (call);                                         \
        if (status != cudaSuccess)                                                 \
            throw std::runtime_error(                                              \
                ::placekern::join(__VA_ARGS__, ": ", cudaGetErrorString(status))); \
    } while (0)
