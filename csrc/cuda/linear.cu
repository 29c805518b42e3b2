// Fully connected forward on the GPU, plain and exact: a warp per row of the weight, float32
// throughout. It proves the path from Python to the device; it reads every code with byte loads and
// is not fast.
#include "check.cuh"
#include "codebook.cuh"
#include "linear.h"

namespace placekern::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr int kColumns = 4;  // columns of the batch that share one decoding

__device__ int64_t row_start(const Weight<float>& w, int64_t m) {
    return w.row_ptr32 ? w.row_ptr32[m] : w.row_ptr64[m];
}

__device__ void add(const LinearArgs<float>& args, int64_t n0, int64_t k, float value,
                    float* sums) {
    for (int n = 0; n < kColumns; ++n) {
        if (n0 + n < args.N) sums[n] += value * args.x[(n0 + n) * args.weight.K + k];
    }
}

__global__ void linear_kernel(const LinearArgs<float> args) {
    const Weight<float>& w = args.weight;
    const int lane = threadIdx.x % kWarp;
    const int64_t m = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
    if (m >= w.M) return;
    for (int64_t n0 = 0; n0 < args.N; n0 += kColumns) {
        float sums[kColumns] = {};
        int64_t entry = row_start(w, m);
        if (w.layout == Layout::kMask) {
            const uint8_t* row = w.positions + m * ((w.K + 7) / 8);
            for (int64_t k = 0; k < w.K; k += kWarp) {
                const uint32_t mask = read_mask(row, k, w.K);
                if (mask >> lane & 1) {
                    const int rank = __popc(mask & ((1u << lane) - 1));
                    add(args, n0, k + lane, w.codebook[read_code(w.codes, entry + rank, w.bits)],
                        sums);
                }
                entry += __popc(mask);
            }
        } else {
            const int64_t windows = (w.K + kWindow - 1) / kWindow;
            const uint8_t* places = w.positions + w.M * windows;
            for (int64_t window = 0; window < windows; ++window) {
                const int count = w.positions[m * windows + window];
                for (int e = lane; e < count; e += kWarp) {
                    const int64_t k = window * kWindow + places[entry + e];
                    add(args, n0, k, w.codebook[read_code(w.codes, entry + e, w.bits)], sums);
                }
                entry += count;
            }
        }
        for (int n = 0; n < kColumns; ++n) {
            for (int step = kWarp / 2; step > 0; step /= 2)
                sums[n] += __shfl_xor_sync(0xffffffffu, sums[n], step);
            if (lane == n && n0 + n < args.N) {
                float y = sums[n] + (args.bias ? args.bias[m] : 0.0f);
                args.y[(n0 + n) * w.M + m] = args.relu && y < 0.0f ? 0.0f : y;
            }
        }
    }
}

}  // namespace

int device_count() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

void linear(const LinearArgs<float>& args, int device, uintptr_t stream) {
    if (args.N == 0 || args.weight.M == 0) return;
    int previous = 0;
    PK_CUDA_CHECK(cudaGetDevice(&previous), "linear: cudaGetDevice");
    PK_CUDA_CHECK(cudaSetDevice(device), "linear: cudaSetDevice(", device, ")");
    const int64_t blocks = (args.weight.M + kWarpsPerBlock - 1) / kWarpsPerBlock;
    linear_kernel<<<static_cast<unsigned>(blocks), kWarp * kWarpsPerBlock, 0,
                    reinterpret_cast<cudaStream_t>(stream)>>>(args);
    const cudaError_t launched = cudaGetLastError();
    cudaSetDevice(previous);
    PK_CUDA_CHECK(launched, "linear launch, M = ", args.weight.M, ", K = ", args.weight.K,
                  ", N = ", args.N);
}

}  // namespace placekern::cuda
