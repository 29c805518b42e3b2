// Both gradients of y = x W^T from one decoding of W, for tens of rows of x.
#pragma once

#include "args.h"

namespace placekern::cuda {

// How the work is cut up, which says what sizes the arrays of a call have.
struct LinearBackwardPlan {
    int warps;    // of a block; 0: no block finds room in shared memory
    int columns;  // rows of x and grad_y taken together, 16 or 32
    int chunks;   // of so many rows
    int splits;   // blocks that share the rows of the weight
    int64_t partials;
};

struct LinearBackwardCall {
    DeviceWeight weight;
    Dtype dtype;  // of x and grad_y: float16 or bfloat16
    LinearBackwardPlan plan;
    int64_t N;
    const void* x;  // [N, K], rows x_stride elements apart
    int64_t x_stride;
    const void* grad_y;     // [chunks, M, columns] on 16 bytes, zeros behind N
    float* grad_x;          // [splits, N, K] or null; the gradient is the sum over splits
    double* grad_codebook;  // [partials, 2^bits] or null; the gradient is the sum over partials
};

// A plan for a call with these fields; `grad_x` and `grad_codebook` say which gradients are wanted.
// Without rows, columns or entries there are no splits and no partials: sums over them are zeros.
LinearBackwardPlan linear_backward_plan(const DeviceWeight& weight, Dtype dtype, int64_t N,
                                        bool grad_x, bool grad_codebook, int device);

// Needs compute capability 8.0; 7.5 for float16. No atomics: the result depends on the plan only.
void linear_backward(const LinearBackwardCall& call, const Queue& queue);

}  // namespace placekern::cuda
