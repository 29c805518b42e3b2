// Both gradients of y = x W^T from one decoding of W, for tens of rows of x.
#pragma once

#include <cstddef>

#include "args.h"

namespace placekern::cuda {

// How the work is cut up, and what a call needs beside its results.
struct LinearBackwardPlan {
    int warps;    // of a block; 0: no block finds room in shared memory
    int columns;  // rows of x and grad_y taken together, 16 or 32
    int chunks;   // of so many rows
    int splits;   // partial sums that an element of grad_x has at most; 0: there is no work
    int blocks;   // of the kernel
    int steps;    // pairs: blocks of 16 rows that each has, of one strip of columns or of several
    size_t workspace;  // bytes
};

struct LinearBackwardCall {
    DeviceWeight weight;
    Dtype dtype;  // of x, grad_y and grad_x: float16 or bfloat16
    LinearBackwardPlan plan;
    int64_t N;
    const void* x;  // [N, K], rows x_stride elements apart
    int64_t x_stride;
    // [chunks, blocks of 16 rows m, columns / 16, 8, 4, 2, 2, 2] on 16 bytes, zeros behind N and M:
    // element (n, m) at [n / columns, m / 16, n / 4 % (columns / 16), m % 8,
    // n % columns / (columns / 4), n / 2 % 2, m / 8 % 2, n % 2].
    const void* grad_y;
    void* grad_x;           // [N, K] on 8 bytes, or null
    double* grad_codebook;  // [2^bits] or null
    void* workspace;        // plan.workspace bytes on 16 bytes
};

// A plan for a call with these fields; `grad_x` and `grad_codebook` say which gradients are wanted.
LinearBackwardPlan linear_backward_plan(const DeviceWeight& weight, Dtype dtype, int64_t N,
                                        bool grad_x, bool grad_codebook, int device);

// Needs compute capability 8.0; 7.5 for float16. No atomics: the result depends on the plan only.
void linear_backward(const LinearBackwardCall& call, const Queue& queue);

}  // namespace placekern::cuda
