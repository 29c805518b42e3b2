// Adds partial sums in a fixed order; a thread an output.
#include "instructions.cuh"
#include "launch.cuh"
#include "ops.h"
#include "output.cuh"

namespace placekern::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) finish_kernel(Output out) {
    wait_for_previous_kernel();
    const unsigned i = blockIdx.x * kThreads + threadIdx.x;
    if (i >= out.N * out.M) return;
    const bool together = rows_together(out);
    const auto inner = static_cast<unsigned>(together ? out.M : out.N);
    const unsigned n = together ? i / inner : i % inner;
    const unsigned m = together ? i % inner : i / inner;
    float sum = 0.0f;
#pragma unroll 8
    for (int split = 0; split < out.splits; ++split) sum += out.partial[split * out.N * out.M + i];
    store(out, n, m, sum);
}

}  // namespace

void finish(const Output& out, const Queue& queue) {
    if (out.splits == 1) return;
    PK_CHECK(out.N * out.M <= INT32_MAX, "finish: ", out.N, " x ", out.M,
             " outputs, expected less than 2^31; use smaller batches");
    const auto blocks = static_cast<unsigned>((out.N * out.M + kThreads - 1) / kThreads);
    launch(queue, finish_kernel, {dim3(blocks), kThreads, 0, true}, out, "finish, M = ", out.M,
           ", N = ", out.N, ", splits = ", out.splits);
}

}  // namespace placekern::cuda
