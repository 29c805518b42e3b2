// The columns that a weight is multiplied with, read a tile at a time: rows of a matrix, or the
// windows that a convolution sees of an image, taken from where they lie (no im2col array exists).
// In a tile a column of the product is a row of memory; its 64 (256) elements are padded so that
// the 16-byte reads of eight lanes fall into different banks.
#pragma once

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "args.h"
#include "instructions.cuh"
#include "number.cuh"

namespace placekern::cuda {

// Where element `column` of a unit of 64 lies in its padded row. Lane q reads 16 neighbours by
// 16-byte loads; those of 16-bit numbers meet no bank conflict, those of floats do unless the
// loads of the four lanes lie side by side.
template <class T>
__host__ __device__ constexpr int tile_place(int column) {
    if constexpr (sizeof(T) == 2) return column;
    return column / 64 * 64 + column % 16 / 4 * 16 + column % 64 / 16 * 4 + column % 4;
}

// Elements from one row of a tile of `columns` to the next.
template <class T>
__host__ __device__ constexpr int tile_stride(int columns) {
    return columns + (sizeof(T) == 2 ? 8 : 16);
}

// A lane's 16 neighbours of a row of a tile, as they lie in registers; word 2 s, 2 s + 1 are what
// step s of a product takes.
template <class T>
struct Sixteen {
    static constexpr int kVectors = 16 * sizeof(T) / sizeof(uint4);
    uint32_t word[4 * kVectors];

    __device__ __forceinline__ void load(const T* row, int unit, int q) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int place = tile_place<T>(unit * 64 + q * 16 + v * 16 / kVectors);
            const uint4 four = *reinterpret_cast<const uint4*>(row + place);
            word[4 * v] = four.x;
            word[4 * v + 1] = four.y;
            word[4 * v + 2] = four.z;
            word[4 * v + 3] = four.w;
        }
    }
};

// What an element k of an image's column adds to the address of its pixel. On eight bytes, so that
// it is read at once.
struct alignas(8) Tap {
    int offset;
    short dy, dx;

    // Whether it lies in an image of this size, for a pixel whose first tap is at (y, x); no
    // branch.
    __device__ __forceinline__ bool lies_inside(int y, int x, unsigned height,
                                                unsigned width) const {
        return (static_cast<unsigned>(y + dy) < height) & (static_cast<unsigned>(x + dx) < width);
    }
};

// Whether Tap has room for the taps of a convolution.
inline bool has_taps(const ConvShape& shape) {
    constexpr int64_t kFarthest = 0x7fff;
    return (shape.kernel_h - 1) * shape.dilation_h <= kFarthest &&
           (shape.kernel_w - 1) * shape.dilation_w <= kFarthest;
}

// Whether 16 bytes of an image are neighbouring elements of a column, wherever they start: with
// the weight's columns tap by tap, and the image's channels side by side.
inline bool has_vectors(const DeviceWeight& weight, const Source& source) {
    const ConvShape& s = source.shape;
    const int64_t vector = source.dtype == Dtype::kFloat32 ? 4 : 8;
    // What a dimension of one adds to an address is zero wherever an element is read.
    const auto stride = [](int64_t size, int64_t stride) { return size == 1 ? 0 : stride; };
    const int64_t on_vectors[] = {s.channels, stride(s.batch, source.stride_n),
                                  stride(s.height, source.stride_h),
                                  stride(s.width, source.stride_w)};
    return source.image && weight.taps == s.kernel_h * s.kernel_w && source.stride_c == 1 &&
           reinterpret_cast<uintptr_t>(source.x) % sizeof(uint4) == 0 &&
           std::all_of(std::begin(on_vectors), std::end(on_vectors),
                       [vector](int64_t size) { return size % vector == 0; });
}

// Fills taps [count] for the elements first, first + 1, ... by all threads of a block. Those at or
// behind K lie outside of every image of fewer than 32,767 rows; whoever reads taps must not take
// them for real in a taller one. The caller synchronises.
__device__ inline void fill_taps(Tap* taps, int count, int64_t first, const DeviceWeight& weight,
                                 const Source& source) {
    const ConvShape& s = source.shape;
    const bool by_tap = weight.taps > 1;
    const int inner = static_cast<int>(by_tap ? s.channels : s.kernel_h * s.kernel_w);
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const int k = static_cast<int>(first) + i;
        const int c = by_tap ? k % inner : k / inner;
        const int tap = by_tap ? k / inner : k % inner;
        const int dy = tap / static_cast<int>(s.kernel_w) * static_cast<int>(s.dilation_h);
        const int dx = tap % static_cast<int>(s.kernel_w) * static_cast<int>(s.dilation_w);
        taps[i].offset = c * source.stride_c + dy * source.stride_h + dx * source.stride_w;
        taps[i].dy = static_cast<short>(k < weight.K ? dy : 0x7fff);
        taps[i].dx = static_cast<short>(dx);
    }
}

// The first tap of an output pixel. On 16 bytes, so that it is read at once.
struct alignas(16) Pixel {
    int base, y, x;
    bool inside;

    __device__ static Pixel of(int64_t n, int64_t N, const Source& source, int group = 0) {
        const ConvShape& s = source.shape;
        const int out_w = static_cast<int>(s.out_width);
        const int out_size = static_cast<int>(s.out_height) * out_w;
        const int at = static_cast<int>(n < N ? n : 0);
        const int image = at / out_size;
        Pixel pixel;
        pixel.y =
            at % out_size / out_w * static_cast<int>(s.stride_h) - static_cast<int>(s.padding_top);
        pixel.x = at % out_w * static_cast<int>(s.stride_w) - static_cast<int>(s.padding_left);
        pixel.base = image * source.stride_n +
                     group * static_cast<int>(s.channels) * source.stride_c +
                     pixel.y * source.stride_h + pixel.x * source.stride_w;
        pixel.inside = n < N;
        return pixel;
    }

    // Whether a tap of it lies in an image of this size; no branch.
    __device__ __forceinline__ bool has(const Tap& tap, unsigned height, unsigned width) const {
        return inside & tap.lies_inside(y, x, height, width);
    }
};

// Fills pixels [kColumns] for the columns n0, n0 + 1, ... and a group of channels, by all threads
// of a block. The caller synchronises.
template <int kColumns>
__device__ __forceinline__ void fill_pixels(Pixel* pixels, int n0, int64_t N, const Source& source,
                                            int group) {
    for (int i = threadIdx.x; i < kColumns; i += blockDim.x)
        pixels[i] = Pixel::of(n0 + i, N, source, group);
}

// Starts copying vectors of 16 bytes to tile [kColumns, tile_stride]; a thread has the same slots
// of several columns. The first `elements` of kSlots slots are elements, the rest zeros.
template <int kThreads, int kColumns, int kSlots, class T>
__device__ __forceinline__ void copy_tile(T* tile, const Source& source, const Pixel* pixels,
                                          const Tap* taps, int n0, int64_t N, int first_k,
                                          int elements) {
    constexpr int kStride = tile_stride<T>(kSlots);
    constexpr int kVector = sizeof(uint4) / sizeof(T);
    constexpr int kVectors = kSlots / kVector;
    constexpr int kStep = kThreads / kVectors;
    static_assert(kColumns % kStep == 0);
    const auto* const x = static_cast<const T*>(source.x);
    const int slot = static_cast<int>(threadIdx.x) % kVectors * kVector;
    const int column = static_cast<int>(threadIdx.x) / kVectors;
    T* const to = tile + column * kStride + tile_place<T>(slot);
    if (source.image) {
        const Tap tap = taps[slot];
        const auto height = static_cast<unsigned>(source.shape.height);
        const auto width = static_cast<unsigned>(source.shape.width);
#pragma unroll
        for (int i = 0; i < kColumns; i += kStep) {
            const Pixel pixel = pixels[column + i];
            const bool known = (slot < elements) & pixel.has(tap, height, width);
            copy_async(to + i * kStride, x + (known ? pixel.base + tap.offset : 0), known);
        }
    } else {
        const T* from = x + (n0 + column) * source.stride + first_k + slot;
        const int columns = slot < elements ? min(static_cast<int>(N) - n0, kColumns) : 0;
#pragma unroll
        for (int i = 0; i < kColumns; i += kStep) {
            const bool known = column + i < columns;
            copy_async(to + i * kStride, known ? from : x, known);
            from += kStep * source.stride;
        }
    }
}

// The same by single elements of an image. Neighbouring threads take neighbouring pixels, which lie
// together there. Eight loads of a thread are on their way before it waits for the first.
template <int kThreads, int kColumns, int kSlots, class T>
__device__ __forceinline__ void gather_tile(T* tile, const Source& source, const Pixel* pixels,
                                            const Tap* taps, int elements) {
    constexpr int kStride = tile_stride<T>(kSlots);
    constexpr int kBatch = 8;
    constexpr int kStep = kThreads / kColumns;
    static_assert(kSlots % (kBatch * kStep) == 0);
    using Bits = std::conditional_t<sizeof(T) == 2, unsigned short, uint32_t>;
    const auto* const x = static_cast<const Bits*>(source.x);
    const int column = static_cast<int>(threadIdx.x) % kColumns;
    auto* const row = reinterpret_cast<Bits*>(tile + column * kStride);
    const Pixel pixel = pixels[column];
    const auto height = static_cast<unsigned>(source.shape.height);
    const auto width = static_cast<unsigned>(source.shape.width);
#pragma unroll 1
    for (int first = threadIdx.x / kColumns; first < kSlots; first += kBatch * kStep) {
        Bits value[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int slot = first + i * kStep;
            const Tap tap = taps[slot];
            const bool known = (slot < elements) & pixel.has(tap, height, width);
            value[i] = known ? __ldg(x + (pixel.base + tap.offset)) : Bits{0};
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) row[tile_place<T>(first + i * kStep)] = value[i];
    }
}

// Starts filling tile [kColumns, tile_stride] with the elements from first_k on of columns n0, n0 +
// 1, ..., by all kThreads threads of a block: `real` of kSlots slots, where there are so many
// before K, and zeros behind them. Complete after wait_for_copies() and a barrier. For images,
// `pixels` are those of the columns and `taps` of the slots.
template <int kThreads, int kColumns, int kSlots, class T>
__device__ __forceinline__ void fill_tile(T* tile, const Source& source, const Pixel* pixels,
                                          const Tap* taps, int n0, int64_t N, int first_k,
                                          int64_t K, int real) {
    const int elements = min(real, static_cast<int>(K) - first_k);
    if (!source.image || source.vectors)
        copy_tile<kThreads, kColumns, kSlots>(tile, source, pixels, taps, n0, N, first_k, elements);
    else
        gather_tile<kThreads, kColumns, kSlots>(tile, source, pixels, taps, elements);
}

}  // namespace placekern::cuda
