// What the kernels are asked to do, as plain structs for both compilers; no CUDA header is needed.
// Addresses are of device memory, borrowed for the call.
#pragma once

#include <cstdint>

#include "../args.h"

#ifdef __CUDACC__
#define PK_HOST_DEVICE __host__ __device__
#else
#define PK_HOST_DEVICE
#endif

namespace placekern::cuda {

// Where an op runs: a CUDA device and a cudaStream_t of it, as an integer.
struct Queue {
    int device;
    uintptr_t stream;
};

// The numbers that kernels read and write; sums are float32.
enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// An array whose type is known when it is read: codebooks and biases, which may be float32 beside
// bfloat16 activations.
struct Vector {
    const void* data;  // null: absent
    Dtype dtype;
};

struct VectorOut {
    void* data;
    Dtype dtype;
};

constexpr int kUnitRows = 16;     // a unit of the dense layout: what a warp decodes at once,
constexpr int kUnitColumns = 64;  // and four (TF32: eight) steps of a tensor core

// A weight [M, K] in device memory. Each group of `group_size` rows, the last perhaps of fewer, has
// a codebook, and a non-zero's value is codebook[row / group_size][code].
struct DeviceWeight {
    int64_t M, K;
    int bits;  // of a code, 1 to 8
    Layout layout;
    const uint8_t* positions;
    const uint8_t* codes;
    Vector codebook;     // [codebooks, 2^bits]
    int64_t group_size;  // rows that share a codebook; M when there is one
    int taps;  // of a filter whose columns lie tap by tap, k = tap * (K / taps) + channel;
               // 1: as a linear layer has them, or k = channel * (K / channels) + tap

    PK_HOST_DEVICE bool one_codebook() const { return group_size >= M; }
    // Where the codebook of a row starts, in entries.
    PK_HOST_DEVICE int64_t first_entry(int64_t row) const {
        return one_codebook() ? 0 : row / group_size << bits;
    }

    // The width a code takes in the dense layout, and so the size of the lookup table.
    PK_HOST_DEVICE int width() const { return bits <= 5 ? 5 : 8; }
    PK_HOST_DEVICE int64_t blocks() const { return (M + kUnitRows - 1) / kUnitRows; }
    PK_HOST_DEVICE int64_t units() const { return (K + kUnitColumns - 1) / kUnitColumns; }
    PK_HOST_DEVICE int64_t windows() const { return (K + kPairsWindow - 1) / kPairsWindow; }

    // Dense: positions = int32 code that means "pruned", int32 [blocks * units + 1] where the
    // escapes of a unit start, uint16 [escapes] row * 64 + column within the unit.
    PK_HOST_DEVICE const int* escape_ptr() const {
        return reinterpret_cast<const int*>(positions) + 1;
    }
    PK_HOST_DEVICE const uint16_t* escapes() const {
        return reinterpret_cast<const uint16_t*>(escape_ptr() + blocks() * units() + 1);
    }

    // Pairs: positions = int32 [M + 1] first chunk of a row, uint8 [M, windows] chunks of a run,
    // uint8 [chunks] the window of a chunk; codes = [chunks] 8 places, 8 codes.
    PK_HOST_DEVICE const int* chunk_ptr() const { return reinterpret_cast<const int*>(positions); }
    PK_HOST_DEVICE const uint8_t* run_chunks() const { return positions + 4 * (M + 1); }
    PK_HOST_DEVICE const uint8_t* chunk_windows() const { return run_chunks() + M * windows(); }
};

// X [K, N]. As rows: column n is x[n, :], K contiguous elements on 16 bytes, zeros behind K up to
// the next multiple of 64. As an image: n counts output pixels (batch, row, column), and k the
// channels and taps (ky, kx) of an image [batch, channels, height, width], in the weight's order.
struct Source {
    const void* x;
    Dtype dtype;
    int64_t stride;  // rows: elements from one to the next
    bool image;
    ConvShape shape;
    int stride_n, stride_c, stride_h, stride_w;  // of the image, in elements
    bool vectors;                                // image: see has_vectors in source.cuh
};

// y[n, m] lies at (n / pixels) * image_stride + (n % pixels) * pixel_stride + m * row_stride.
// Linear: pixels 1, image_stride M, row_stride 1. Convolution: n counts output pixels.
struct Output {
    VectorOut y;
    Vector bias;  // [M], may be absent
    bool relu;
    int64_t M, N;
    int64_t pixels, image_stride, pixel_stride, row_stride;

    int splits;      // blocks that share a sum; 1: no partial sums
    float* partial;  // when splits > 1: [splits, N, M], or [splits, M, N] where pixels lie together
};

// y = W X for a few columns, float32 throughout; the source is rows. group_size is a multiple of 16
// where there are several codebooks.
struct DirectArgs {
    DeviceWeight weight;
    Source source;
    Output out;
};

// y = W X on tensor cores: float16 and bfloat16 as they are, float32 rounded to TF32. One codebook
// only.
struct MatmulArgs {
    DeviceWeight weight;
    Source source;
    Output out;
};

// Rows of a weight as a dense matrix.
struct DecodeArgs {
    DeviceWeight weight;
    int64_t first, rows;  // of the weight; first is a multiple of 16
    int taps;  // of a filter: column k is written to (k % taps) * (K / taps) + k / taps, as a
               // tensor in channels_last has it; pairs only. 1: to k
    VectorOut dense;  // [rows, K] on 16 bytes; all of it is written
};

}  // namespace placekern::cuda
