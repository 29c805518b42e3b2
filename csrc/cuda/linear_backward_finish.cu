// Adds up the partial sums of the linear backward, in the order of their segments and blocks.
// The surprise: how many partial sums an element has depends on its column. Runs of the pairs
// layout are cut into more or fewer segments, and what no segment wrote is not read.
#include "linear_backward.cuh"

namespace placekern::cuda {
namespace {

constexpr int kFinishThreads = 8 * kWarp;

// The blocks of the last kernel: first a warp for each code, then kTogether elements of grad_x for
// each thread, row after row.
struct Finish {
    int code_blocks, row_blocks;  // row_blocks: of one row of grad_x
    int64_t rows;

    PK_HOST_DEVICE explicit Finish(const LinearBackwardCall& call) {
        const int codes = call.grad_codebook ? 1 << call.weight.bits : 0;
        constexpr int kWarps = kFinishThreads / kWarp;
        code_blocks = (codes + kWarps - 1) / kWarps;
        const int64_t columns = call.weight.K % 4 == 0 ? call.weight.K / 4 : call.weight.K;
        row_blocks = static_cast<int>((columns + kFinishThreads - 1) / kFinishThreads);
        rows = call.grad_x ? call.N : 0;
    }

    PK_HOST_DEVICE unsigned blocks() const {
        return static_cast<unsigned>(code_blocks + rows * row_blocks);
    }
};

// Partial sums that column k of row n has.
__device__ int partial_sums(const LinearBackwardCall& call, int n, int k) {
    if (call.weight.layout == Layout::kDense || call.plan.splits == 0) return call.plan.splits;
    const Runs runs(call.weight, call.plan);
    return runs.segments(n / call.plan.columns * runs.windows + k / kPairsWindow);
}

// A lane takes every 32nd block.
__device__ void finish_codebook(const LinearBackwardCall& call, int code) {
    const int lane = threadIdx.x % kWarp;
    const int blocks = call.plan.splits > 0 ? call.plan.blocks : 0;
    const double* const from = Partials::of(call).codebook + code;
    double sum = 0.0;
#pragma unroll 4
    for (int block = lane; block < blocks; block += kWarp)
        sum += from[static_cast<int64_t>(block) << call.weight.bits];
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
    if (lane == 0) call.grad_codebook[code] = sum;
}

// Neighbouring columns, kTogether of which are in one strip and lie at 16 bytes.
template <int kTogether, class T>
__global__ void __launch_bounds__(kFinishThreads) finish_backward(LinearBackwardCall call) {
    const Finish finish(call);
    const int block = static_cast<int>(blockIdx.x) - finish.code_blocks;
    if (block < 0) {
        const int code = (blockIdx.x * kFinishThreads + threadIdx.x) / kWarp;
        if (code < 1 << call.weight.bits) finish_codebook(call, code);
        return;
    }
    const int n = block / finish.row_blocks;
    const int k = (block % finish.row_blocks * kFinishThreads + threadIdx.x) * kTogether;
    if (k >= call.weight.K) return;
    const int64_t place = n * call.weight.K + k;
    const int64_t size = call.N * call.weight.K;
    const float* from = Partials::of(call).x + place;
    float sum[kTogether] = {};
    const int count = partial_sums(call, n, k);
#pragma unroll 4
    for (int i = 0; i < count; ++i, from += size) {
        if constexpr (kTogether == 4) {
            const float4 four = *reinterpret_cast<const float4*>(from);
            sum[0] += four.x;
            sum[1] += four.y;
            sum[2] += four.z;
            sum[3] += four.w;
        } else {
            sum[0] += *from;
        }
    }
    uint16_t* const to = static_cast<uint16_t*>(call.grad_x) + place;
    if constexpr (kTogether == 4)
        *reinterpret_cast<uint2*>(to) =
            make_uint2(to_bits(sum[0], T()) | to_bits(sum[1], T()) << 16,
                       to_bits(sum[2], T()) | to_bits(sum[3], T()) << 16);
    else
        *to = static_cast<uint16_t>(to_bits(sum[0], T()));
}

}  // namespace

void finish_linear_backward(const LinearBackwardCall& call, const Queue& queue) {
    const Finish finish(call);
    if (finish.blocks() == 0) return;
    const auto start = [&](auto kernel) {
        launch(queue, kernel, {dim3(finish.blocks()), kFinishThreads}, call,
               "linear_backward: adding ", call.plan.splits, " sums, K = ", call.weight.K,
               ", N = ", call.N);
    };
    const bool wide = call.weight.K % 4 == 0;
    if (call.dtype == Dtype::kFloat16)
        wide ? start(finish_backward<4, __half>) : start(finish_backward<1, __half>);
    else
        wide ? start(finish_backward<4, __nv_bfloat16>) : start(finish_backward<1, __nv_bfloat16>);
}

}  // namespace placekern::cuda
