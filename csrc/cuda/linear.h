// Launchers of the CUDA backend: device pointers in the args, the caller's stream, errors thrown.
#pragma once

#include <cstdint>

#include "../args.h"

namespace placekern::cuda {

// Number of devices; 0 on a machine without a GPU or without its driver.
int device_count();

// `stream` is a cudaStream_t as an integer; `args.threads` is not used.
void linear(const LinearArgs<float>& args, int device, uintptr_t stream);

}  // namespace placekern::cuda
