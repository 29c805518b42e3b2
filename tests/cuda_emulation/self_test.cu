// Kernels that test the emulated GPU itself, driven by tests/test_cuda_emulation.py: as a library
// through run(), and as a program (kernel, variant, threads, blocks) under the sanitizers.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../../csrc/cuda/instructions.cuh"

extern __shared__ __align__(16) unsigned char placekern_shared[];

namespace {

struct Args {
    const void* in;
    void* out;
    int variant;
};

__device__ unsigned thread_number() { return blockIdx.x * blockDim.x + threadIdx.x; }

template <class T>
__device__ T* shared_array() {
    return reinterpret_cast<T*>(placekern_shared);
}

// in: uint32 [threads]; out: uint32 [threads, 16]
__global__ void collectives(Args args) {
    const unsigned x = static_cast<const unsigned*>(args.in)[thread_number()];
    unsigned* out = static_cast<unsigned*>(args.out) + 16 * thread_number();
    const unsigned all = 0xffffffffu;
    const int lane = threadIdx.x % 32;
    *out++ = __shfl_sync(all, x, lane * 7);
    *out++ = __shfl_xor_sync(all, x, 5);
    *out++ = __shfl_down_sync(all, x, 3);
    *out++ = __shfl_up_sync(all, x, 3);
    *out++ = __ballot_sync(all, x & 1);
    *out++ = __any_sync(all, x == 0);
    *out++ = __all_sync(all, x != 0);
    *out++ = __match_any_sync(all, x % 5);
    *out++ = __reduce_add_sync(all, x);
    *out++ = static_cast<unsigned>(__reduce_add_sync(all, -static_cast<int>(x % 1000)));
    *out++ = __float_as_uint(__shfl_sync(all, static_cast<float>(lane), 31));
    const unsigned long long wide = __shfl_xor_sync(all, static_cast<uint64_t>(x) << 20, 1);
    *out++ = static_cast<unsigned>(wide);
    *out++ = static_cast<unsigned>(wide >> 32);
}

// in: uint32 [3]; out: uint32 [12]
__global__ void bits(Args args) {
    const unsigned* in = static_cast<const unsigned*>(args.in);
    unsigned* out = static_cast<unsigned*>(args.out);
    const unsigned x = in[0], y = in[1], z = in[2];
    *out++ = __popc(x);
    *out++ = __popcll(static_cast<unsigned long long>(y) << 32 | x);
    *out++ = __ffs(static_cast<int>(x));
    *out++ = __clz(static_cast<int>(x));
    *out++ = __brev(x);
    *out++ = __byte_perm(x, y, z);
    *out++ = __funnelshift_l(x, y, z);
    *out++ = __funnelshift_r(x, y, z);
    *out++ = static_cast<unsigned>(__float2int_rn(__uint_as_float(x)));
    *out++ = static_cast<unsigned>(__float2int_rd(__uint_as_float(x)));
    *out++ = static_cast<unsigned>(min(static_cast<int>(x), static_cast<int>(y)));
    *out++ = max(x, y);
}

// in: float [threads]; out: uint32 [threads, 3]: half, bfloat16, TF32
__global__ void narrow(Args args) {
    const float x = static_cast<const float*>(args.in)[thread_number()];
    unsigned* out = static_cast<unsigned*>(args.out) + 3 * thread_number();
    out[0] = __half_as_ushort(__float2half_rn(x));
    out[1] = __bfloat16_as_ushort(__float2bfloat16_rn(x));
    out[2] = placekern::cuda::to_tf32(x);
}

// in: uint16 [threads]; out: float [threads, 2]: taken for half and for bfloat16
__global__ void widen(Args args) {
    const unsigned short x = static_cast<const unsigned short*>(args.in)[thread_number()];
    float* out = static_cast<float*>(args.out) + 2 * thread_number();
    out[0] = __half2float(__ushort_as_half(x));
    out[1] = __bfloat162float(__ushort_as_bfloat16(x));
}

// in: uint32 [32, 10], words of d, a and b of each lane; out: float [32, 4]
__global__ void product(Args args) {
    const unsigned* in = static_cast<const unsigned*>(args.in) + 10 * threadIdx.x;
    float d[4];
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(in[i]);
    for (int i = 0; i < 4; ++i) a[i] = in[4 + i];
    for (int i = 0; i < 2; ++i) b[i] = in[8 + i];
    if (args.variant == 0) placekern::cuda::mma(d, a, b, __half());
    if (args.variant == 1) placekern::cuda::mma(d, a, b, __nv_bfloat16());
    if (args.variant == 2) placekern::cuda::mma(d, a, b, float());
    for (int i = 0; i < 4; ++i) static_cast<float*>(args.out)[4 * threadIdx.x + i] = d[i];
}

// in, out: uint32 [32]
__global__ void transposition(Args args) {
    static_cast<unsigned*>(args.out)[threadIdx.x] =
        placekern::cuda::transpose(static_cast<const unsigned*>(args.in)[threadIdx.x]);
}

// in: uint32 [32, 4], rows of four matrices; out: uint32 [32, 4]. Variants: 0 correct, 1 a
// misaligned row, 2 not from shared memory, 3 transposed
__global__ void matrices(Args args) {
    const uint4* in = static_cast<const uint4*>(args.in) + threadIdx.x;
    uint4* shared = shared_array<uint4>() + (threadIdx.x ^ 5);  // rows may lie anywhere
    *shared = *in;
    const char* row = reinterpret_cast<const char*>(args.variant == 2 ? in : shared);
    uint32_t word[4];
    if (args.variant == 3)
        placekern::cuda::load_transposed(word, row);
    else
        placekern::cuda::load_matrices(word, row + (args.variant == 1 ? 8 : 0));
    for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(args.out)[4 * threadIdx.x + i] = word[i];
}

// in, out: uint4 [threads]. Variants: 0 correct, 1 never waits, 2 waits too late, 3 outside of the
// array, 4 a misaligned destination, 5 a misaligned source, 6 not into shared memory, 7 and 8 ask
// for the source beforehand, 8 for a part of 16 bytes
__global__ void copies(Args args) {
    const uint4* in = static_cast<const uint4*>(args.in) + threadIdx.x;
    uint4* out = static_cast<uint4*>(args.out) + threadIdx.x;
    uint4* shared = shared_array<uint4>() + threadIdx.x;
    const void* from =
        args.variant == 5 ? reinterpret_cast<const char*>(in) + 4 : static_cast<const void*>(in);
    void* to = args.variant == 4   ? reinterpret_cast<char*>(shared) + 8
               : args.variant == 6 ? static_cast<void*>(out)
                                   : static_cast<void*>(shared);
    if (args.variant > 6) placekern::cuda::prefetch_to_l2(from, args.variant == 7 ? 16 : 8);
    placekern::cuda::copy_async(to, from, args.variant != 3);
    if (args.variant != 1 && args.variant != 2) placekern::cuda::wait_for_copies();
    *out = *shared;
    if (args.variant == 2) placekern::cuda::wait_for_copies();
}

// in: uint32 [4 threads]; out: uint32 [4 threads]. Numbers on their way one behind the other, each
// a group of a thread. Variants: 0 correct, 1 waits for one group too few, 2 does not commit
__global__ void copy_groups(Args args) {
    constexpr int kAhead = 2;
    const uint32_t* in = static_cast<const uint32_t*>(args.in) + threadIdx.x;
    uint32_t* out = static_cast<uint32_t*>(args.out) + threadIdx.x;
    uint32_t* shared = shared_array<uint32_t>() + threadIdx.x;
    const auto start = [&](int i) {
        if (i < 4) placekern::cuda::copy_word_async(shared + i * blockDim.x, in + i * blockDim.x);
        if (args.variant != 2) placekern::cuda::commit_copies();
    };
    for (int i = 0; i < kAhead; ++i) start(i);
    for (int i = 0; i < 4; ++i) {
        start(i + kAhead);
        if (args.variant == 1)
            placekern::cuda::wait_for_copies_before<kAhead + 1>();
        else
            placekern::cuda::wait_for_copies_before<kAhead>();
        out[i * blockDim.x] = shared[i * blockDim.x];
    }
    placekern::cuda::wait_for_copies();
}

// out: int [1 + 2 threads]: visits, then who came; each thread comes before and behind a barrier
__global__ void order(Args args) {
    int* visits = static_cast<int*>(args.out);
    visits[1 + atomicAdd(visits, 1)] = static_cast<int>(thread_number());
    __syncthreads();
    visits[1 + atomicAdd(visits, 1)] = static_cast<int>(thread_number());
}

// out: uint32 [blocks, threads, 6]
__global__ void indices(Args args) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    unsigned* out = static_cast<unsigned*>(args.out) +
                    6 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
    const unsigned found[] = {blockIdx.x,  blockIdx.y,  blockIdx.z,
                              threadIdx.x, threadIdx.y, threadIdx.z};
    for (int i = 0; i < 6; ++i) out[i] = found[i];
}

// out: one of each, summed over all threads
__global__ void atomics(Args args) {
    struct Out {
        unsigned long long wide;
        unsigned sum;
        int signed_sum, largest, smallest;
        float real;
    };
    Out* out = static_cast<Out*>(args.out);
    const int x = static_cast<int>(thread_number());
    atomicAdd(&out->wide, 1ull << 32);
    atomicAdd(&out->sum, 1u);
    atomicAdd(&out->signed_sum, -x);
    atomicMax(&out->largest, x);
    atomicMin(&out->smallest, -x);
    atomicAdd(&out->real, 0.5f);
}

// Leaves a frame that is guarded by a sanitizer, for the rest of this run.
__device__ __noinline__ void wait_in_a_frame(const void* in) {
    char bytes[100];
    std::memcpy(bytes, in, sizeof(bytes));
    __syncthreads();
    if (bytes[threadIdx.x] == 2) __trap();
}

// in: at least 100 bytes. What must end a launch. Variants: 0 a thread leaves before the barrier, 1
// half a warp at another collective, 2 two barriers, 3 another mask, 4 another width, 5 a trap, 6 a
// lane leaves its warp
__global__ void misuse(Args args) {
    const unsigned all = 0xffffffffu;
    if (args.variant == 0) {
        if (threadIdx.x == 1) return;
        wait_in_a_frame(args.in);
    }
    if (args.variant == 1) {
        if (threadIdx.x % 32 < 16)
            __ballot_sync(all, 1);
        else
            __syncwarp();
    }
    if (args.variant == 2) {
        if (threadIdx.x < 32)
            __syncthreads();
        else
            __syncthreads();
    }
    if (args.variant == 3) __shfl_sync(0xffff, 1, 0);
    if (args.variant == 4) __shfl_sync(all, 1, 0, 16);
    if (args.variant == 5) __trap();
    if (args.variant == 6 && threadIdx.x != 40) __shfl_xor_sync(all, 1, 1);
}

// Each thread reads what another wrote. in, out: int [threads]. Variants: 0 correct, 1 without the
// barrier, 2 one thread writes again behind it, as others read
__global__ void block_exchange(Args args) {
    int* shared = shared_array<int>();
    shared[threadIdx.x] = static_cast<const int*>(args.in)[thread_number()];
    if (args.variant != 1) __syncthreads();
    if (args.variant == 2 && threadIdx.x == 0) shared[0] = 0;
    static_cast<int*>(args.out)[thread_number()] = shared[blockDim.x - 1 - threadIdx.x];
    __syncthreads();
}

// As above within a warp. Variants: 0 correct, 1 without the barrier, 2 a shuffle instead of it
__global__ void warp_exchange(Args args) {
    int* shared = shared_array<int>();
    for (int round = 0; round < 3; ++round) {
        shared[threadIdx.x] = static_cast<const int*>(args.in)[thread_number()];
        if (args.variant == 0) __syncwarp();
        if (args.variant == 2) __shfl_xor_sync(0xffffffffu, 1, 1);
        static_cast<int*>(args.out)[thread_number()] = shared[threadIdx.x ^ 1];
        __syncwarp();
    }
}

// Variants: 0 each block writes its own part, 1 all write the first number, 2 all add to it
__global__ void grid_exchange(Args args) {
    int* out = static_cast<int*>(args.out);
    shared_array<int>()[threadIdx.x] = 1;  // the same addresses in every block, no race
    if (args.variant == 0) out[thread_number()] = 1;
    if (args.variant == 1 && threadIdx.x == 0) out[0] = 1;
    if (args.variant == 2) atomicAdd(out, 1);
}

// The last block to come sums what all have written. out: int [2 + blocks]: tickets, the sum, the
// parts. Variants: 0 correct, 1 without the fence of the writer, 2 without that of the reader
__global__ void last_block(Args args) {
    int* out = static_cast<int*>(args.out);
    if (threadIdx.x != 0) return;
    out[2 + blockIdx.x] = 1;
    if (args.variant != 1) __threadfence();
    if (atomicAdd(out, 1) != static_cast<int>(gridDim.x) - 1) return;
    if (args.variant != 2) __threadfence();
    for (unsigned i = 0; i < gridDim.x; ++i) out[1] += out[2 + i];
}

// Variants: 0 the last number of shared memory, 1 the one behind it, 2 the one before the first, 3
// a vector that is not on its alignment, 4 the number behind out. out: int [threads]
__global__ void bounds(Args args) {
    int* shared = shared_array<int>();
    int* out = static_cast<int*>(args.out);
    volatile int place = 63;  // the compiler shall not see it
    if (args.variant == 1) place = 64;
    if (args.variant == 2) place = -1;
    shared[place] = 1;
    if (args.variant == 3) *reinterpret_cast<uint4*>(shared + 1 + threadIdx.x % 2) = uint4{};
    out[args.variant == 4 ? gridDim.x * blockDim.x : thread_number()] = 1;
}

// out: uint32 [threads], shared memory as it was found; then it is written
__global__ void fresh(Args args) {
    static_cast<unsigned*>(args.out)[thread_number()] = shared_array<unsigned>()[threadIdx.x];
    shared_array<unsigned>()[threadIdx.x] = 0;
}

// in: float [threads]; out: float [threads], after variant rounds of sums over the warp
__global__ void speed(Args args) {
    float sum = static_cast<const float*>(args.in)[thread_number()];
    for (int i = 0; i < args.variant; ++i) sum = 0.5f * __shfl_xor_sync(0xffffffffu, sum, 1);
    static_cast<float*>(args.out)[thread_number()] = sum;
}

// Uses much of the stack.
__global__ void deep(Args args) {
    int numbers[2000];
    for (int i = 0; i < 2000; ++i) numbers[i] = i;
    static_cast<int*>(args.out)[thread_number()] = numbers[1000 + threadIdx.x];
}

struct Entry {
    const char* name;
    void (*kernel)(Args);
};
#define ENTRY(kernel) {#kernel, kernel}
const Entry kEntries[] = {ENTRY(collectives),   ENTRY(bits),           ENTRY(narrow),
                          ENTRY(widen),         ENTRY(product),        ENTRY(transposition),
                          ENTRY(matrices),      ENTRY(copies),         ENTRY(copy_groups),
                          ENTRY(order),         ENTRY(indices),        ENTRY(atomics),
                          ENTRY(misuse),        ENTRY(block_exchange), ENTRY(warp_exchange),
                          ENTRY(grid_exchange), ENTRY(last_block),     ENTRY(bounds),
                          ENTRY(fresh),         ENTRY(speed),          ENTRY(deep)};

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

struct Launch {
    unsigned grid[3], block[3];
    unsigned shared, allowed;  // bytes; allowed through cudaFuncSetAttribute, 0: not called
};

// The status of a launch of a kernel, -1 where there is none of that name.
EXPORTED int run(const char* name, const Launch* launch, const void* in, void* out, int variant) {
    for (const Entry& entry : kEntries) {
        if (std::strcmp(name, entry.name) != 0) continue;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(launch->grid[0], launch->grid[1], launch->grid[2]);
        config.blockDim = dim3(launch->block[0], launch->block[1], launch->block[2]);
        config.dynamicSmemBytes = launch->shared;
        if (launch->allowed != 0) {
            const cudaError_t status = cudaFuncSetAttribute(
                entry.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch->allowed);
            if (status != cudaSuccess) return status;
        }
        return cudaLaunchKernelEx(&config, entry.kernel, Args{in, out, variant});
    }
    return -1;
}

EXPORTED const char* error_text(int status) {
    return cudaGetErrorString(static_cast<cudaError_t>(status));
}

EXPORTED int last_error() { return cudaGetLastError(); }

// 1 if a barrier outside of a kernel is refused.
EXPORTED int barrier_of_the_host() {
    try {
        __syncthreads();
    } catch (const std::logic_error&) {
        return 1;
    }
    return 0;
}

EXPORTED int device_attribute(int attribute) {
    int value = -1;
    cudaDeviceGetAttribute(&value, static_cast<cudaDeviceAttr>(attribute), 0);
    return value;
}

// The kernel twice, on two threads of the host, then one that needs the stack: launches, and what
// the host does between them, are in order, whatever became of the launch before.
int main(int count, char** words) {
    if (count != 5) return 2;
    const unsigned threads = std::atoi(words[3]), blocks = std::atoi(words[4]);
    const Launch launch{{blocks, 1, 1}, {threads, 1, 1}, 256, 0};
    std::vector<int> in(threads * blocks, 1), out(threads * blocks);
    int status = 0;
    const auto once = [&] {
        cudaMemsetAsync(out.data(), 0, out.size() * sizeof(int));
        status = run(words[1], &launch, in.data(), out.data(), std::atoi(words[2]));
        in[0] += out[0];
        std::printf("%s\n", error_text(status));
    };
    once();
    std::thread(once).join();
    run("deep", &launch, in.data(), out.data(), 0);
    return status == 0 ? 0 : 1;
}
