// What an op is asked to do, as plain structs that the CPU and the CUDA backend share.
// They hold borrowed pointers only: whoever fills one keeps the memory alive for the call.
#pragma once

#include <cstdint>

namespace placekern {

// How the columns of the non-zeros are kept; docs/format.md has the bytes.
enum class Layout : int {
    kMask = 0,    // one bit a position, rows padded to whole bytes
    kWindow = 1,  // per row and window of 128 columns a count, then one byte an entry: its place in
                  // the window
    kDense = 2,   // on a GPU: a code for every position; csrc/cuda/layout.cuh
    kPairs = 3,   // on a GPU: (place, code) pairs in windows of 248 columns
};

constexpr int kWindow = 128;       // columns decoded at a time; a place in a window fits a byte
constexpr int kPairsWindow = 248;  // columns of a window of pairs; places behind them: no entry
constexpr int kChunk = 8;          // pairs of one row and window, in 16 bytes
constexpr int kMaxCodes = 256;     // entries of the largest codebook, 2^8
constexpr int kReadPadding =
    64;  // bytes behind `positions` and `codes` that vector loads may touch

// A QuantSparseWeight: [M, K], row-major. Each group of `group_size` rows, the last perhaps of
// fewer, has a codebook, and a non-zero's value is codebook[row / group_size][code].
template <class T>
struct Weight {
    int64_t M, K;
    int bits;  // of a code, 1 to 8
    Layout layout;
    const int32_t* row_ptr32;  // [M + 1]; null when row_ptr64 is given
    const int64_t* row_ptr64;  // [M + 1]; only past 2^31 non-zeros
    const uint8_t*
        positions;  // kMask: [M, ceil(K / 8)]; kWindow: counts [M, ceil(K / 128)], places [nnz]
    const uint8_t* codes;  // [ceil(nnz * bits / 8)], little-endian bit stream
    const T* codebook;     // [codebooks, 2^bits]
    int64_t group_size;    // rows that share a codebook; M when there is one

    int64_t codebooks() const { return group_size < M ? (M + group_size - 1) / group_size : 1; }
    int64_t row_start(int64_t m) const { return row_ptr32 ? row_ptr32[m] : row_ptr64[m]; }
    int64_t mask_row_bytes() const { return (K + 7) / 8; }
    int64_t windows() const { return (K + kWindow - 1) / kWindow; }
};

// y[N, M] = x[N, K] weight^T + bias, then ReLU when asked for.
template <class T>
struct LinearArgs {
    Weight<T> weight;
    int64_t N;
    const T* x;     // [N, K]
    const T* bias;  // [M] or null
    T* y;           // [N, M]
    bool relu;
    int threads;
};

// grad_x[N, K] = grad_y weight; grad_codebook[g, c] = sum over the entries of group g with code c
// of (grad_y^T x)[m, k].
template <class T>
struct LinearBackwardArgs {
    Weight<T> weight;
    int64_t N;
    const T* x;             // [N, K]
    const T* grad_y;        // [N, M]
    T* grad_x;              // [N, K] or null
    double* grad_codebook;  // [codebooks, 2^bits] or null
    int threads;
};

// Sizes of a convolution; x is [batch, groups * channels, height, width] and
// k = (channel * kernel_h + ky) * kernel_w + kx within a group.
struct ConvShape {
    int64_t batch, groups, channels;  // channels: of x, per group
    int64_t height, width;
    int64_t out_height, out_width;
    int64_t kernel_h, kernel_w;
    int64_t stride_h, stride_w;
    int64_t padding_top, padding_left;
    int64_t dilation_h, dilation_w;

    int64_t pixels() const { return batch * out_height * out_width; }
};

// An image tensor [batch, channels, height, width] with any strides, counted in elements.
template <class T>
struct Image {
    T* data;
    int64_t stride_n, stride_c, stride_h, stride_w;
};

// The two ways to compute a convolution; see csrc/cpu/conv2d-inl.h.
enum class Way : int { kAuto = 0, kDirect = 1, kDecode = 2 };

template <class T>
struct Conv2dArgs {
    Weight<T> weight;  // M = all output channels, K = channels * kernel_h * kernel_w
    ConvShape shape;
    Image<const T> x;
    const T* bias;  // [M] or null
    Image<T> y;
    bool relu;
    Way way;
    int threads;
};

template <class T>
struct Conv2dBackwardArgs {
    Weight<T> weight;
    ConvShape shape;
    Image<const T> x;
    Image<const T> grad_y;
    Image<T> grad_x;        // data null: not asked for; else zeroed by the caller
    double* grad_codebook;  // [codebooks, 2^bits] or null
    int threads;
};

// The nearest of `count` sorted centroids for each point: the number of boundaries below it, so a
// tie goes down.
struct KmeansAssignArgs {
    int64_t n;
    int count;                // 1 to 256
    const float* points;      // [n]
    const float* boundaries;  // [count - 1], midpoints of neighbouring centroids, not falling
    uint8_t* codes;           // [n]
    double* sums;             // [count]
    int64_t* counts;          // [count]
    int threads;
};

// The entries of a weight [M, K], to be written as pairs; placekern/device_packing.py has the
// bytes.
struct PackPairsArgs {
    int64_t M, K;
    const int64_t* row_ptr;    // [M + 1]
    const int32_t* col_ind;    // [nnz], rising in each row
    const uint8_t* codes;      // [nnz]
    const int32_t* chunk_ptr;  // [M + 1]: the first chunk of each row
    uint8_t* chunks;           // [chunk_ptr[M], 16]
    int threads;
};

}  // namespace placekern
