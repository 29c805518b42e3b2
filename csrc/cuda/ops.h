// The ops that the bindings call. All run on the caller's device and stream, allocate nothing, wait
// for nothing, and throw with the sizes when a launch fails.
#pragma once

#include "args.h"

namespace placekern::cuda {

struct Properties {
    int multiprocessors;
    int shared_memory;  // bytes that a block may take
    int capability;     // 10 * major + minor
};

// Number of devices; 0 on a machine without a GPU or without its driver.
int device_count();

Properties properties(int device);

void direct(const DirectArgs& args, const Queue& queue);

// Needs compute capability 8.0; 7.5 for float16. False, and nothing is computed, where no tile of
// the product fits into shared memory; more splits of an image make them smaller. And where a
// kernel with its dilation reaches farther than 32,767 pixels. In the dense layout groups of a
// convolution have a multiple of 16 rows.
bool matmul(const MatmulArgs& args, const Queue& queue);

// How many blocks of matmul should share a sum: as many as the device holds at once, so that none
// waits for another to end. `groups`: of the convolution, 0 where the source is rows. Asks the
// driver what fits; for the caller to remember.
int matmul_splits(const DeviceWeight& weight, Dtype dtype, int64_t N, int groups, int device);

void decode(const DecodeArgs& args, const Queue& queue);

// Adds the partial sums in the order of their split, then bias and ReLU; nothing without splits.
void finish(const Output& out, const Queue& queue);

}  // namespace placekern::cuda
