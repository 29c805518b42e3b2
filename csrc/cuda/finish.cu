// Adds partial sums in a fixed order; a thread an output.
#include "launch.cuh"
#include "ops.h"
#include "output.cuh"

namespace placekern::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) finish_kernel(Output out) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= out.N * out.M) return;
    const int64_t n = rows_together(out) ? i / out.M : i % out.N;
    const int64_t m = rows_together(out) ? i % out.M : i / out.N;
    float sum = 0.0f;
    for (int split = 0; split < out.splits; ++split) sum += out.partial[split * out.N * out.M + i];
    store(out, n, m, sum);
}

}  // namespace

void finish(const Output& out, const Queue& queue) {
    if (out.splits == 1) return;
    const auto blocks = static_cast<unsigned>((out.N * out.M + kThreads - 1) / kThreads);
    launch(queue, finish_kernel, dim3(blocks), kThreads, 0, out, "finish, M = ", out.M,
           ", N = ", out.N, ", splits = ", out.splits);
}

}  // namespace placekern::cuda
