// The gradient of a codebook for any number of columns: a batch, or the pixels of a convolution.
#pragma once

#include "args.h"

namespace placekern::cuda {

// grad_y[n, m] lies at (n / pixels) * image_stride + (n % pixels) * pixel_stride + m * row_stride;
// m counts the rows of the whole weight.
struct GradYSource {
    const void* grad_y;
    int64_t pixels, image_stride, pixel_stride, row_stride;
};

// How the work is cut up: the weight into tiles of 128 x 128, N into splits.
struct CodebookGradientPlan {
    int sets;  // warps of a block that add to bins at a time
    int row_tiles, column_tiles, splits;
    int64_t blocks;  // each takes some of them, and writes partial sums
    int code_rows;   // pairs: rows of a tile whose codes are in shared memory at a time
};

// sum over the positions (m, k) with code c, m in [first, first + rows), of
// sum_n grad_y[n, m] X[k, n].
struct CodebookGradientCall {
    DeviceWeight weight;
    CodebookGradientPlan plan;
    int64_t first, rows;  // all rows, or those that share a codebook and a group; any `first`
    int64_t N;
    Source source;  // X [K, N]; products of float32 are exact to float32
    GradYSource grad_y;
    double* partial;  // [blocks, 2^bits]; the gradient is the sum over blocks
};

// A plan for a call with these fields. Without rows, columns or entries there are no blocks: a sum
// over them is zeros.
CodebookGradientPlan codebook_gradient_plan(const DeviceWeight& weight, Dtype dtype, int64_t first,
                                            int64_t rows, int64_t N, int device);

// bfloat16 needs compute capability 8.0. No atomics: the result depends on the plan only.
void codebook_gradient(const CodebookGradientCall& call, const Queue& queue);

}  // namespace placekern::cuda
