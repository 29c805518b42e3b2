// The product G = grad_y^T X^T of a block of codebook_gradient: how its operands come into shared
// memory and from there to the registers.
// The surprise: nobody transposes. N is the inner dimension, and operands want neighbouring n in a
// word; a thread fetches elements of two columns of X (two rows of grad_y) and puts them together.
// (codebook_gradient_copied.cuh has the other way, for operands that lie well.)
#pragma once

#include <cstddef>
#include <type_traits>

#include "bins.cuh"
#include "codebook_gradient.h"
#include "instructions.cuh"
#include "source.cuh"

namespace placekern::cuda {

constexpr int kThreads = 8 * kWarp;
constexpr int kTile = 128;    // rows, and slots, of a block
constexpr int kRowWarps = 4;  // warps below each other
constexpr int kLines = 8;     // of a tile in shared memory: a line is one n of floats, two else
constexpr int kTileBytes = kLines * kTile * 4;
constexpr int kHeld = kLines * kTile / kThreads;  // words of a tile that a thread brings
constexpr int kBatch = 16;                        // stages whose points are computed together

// Rows of n that a stage takes.
template <class T>
constexpr int kSpan = sizeof(T) == 2 ? 2 * kLines : kLines;

// Where a column of X starts, and a row of grad_y.
struct __align__(16) Point {
    int base, y, x;  // of the image's first tap; y is far outside where there is no such n
    int grad_y;      // offset; -1 where there is no such n
};

constexpr int kOutside = -(1 << 30);

// One tile of G over one piece of N. It is kept in shared memory, to spare registers.
struct __align__(16) Item {
    int row0, column0;  // of the weight
    int n0, n_end;
    int windows, window, first_place;  // pairs: of a row, the tile's, and its first place there
};

// Shared memory in bytes: the item, then taps, points and tiles, or in their place bins.
constexpr int kItem = 0;
constexpr int kBins = kItem + static_cast<int>(sizeof(Item));
constexpr int kTaps = kBins;
template <class T>
constexpr int kPoints = kTaps + kTile * static_cast<int>(sizeof(Tap));
template <class T>
constexpr int kTiles = kPoints<T> + 2 * kBatch * kSpan<T> * static_cast<int>(sizeof(Point));
template <class T>
constexpr int kGradYTiles = kTiles<T> + 2 * kTileBytes;
template <class T>
constexpr int kStageBytes = kGradYTiles<T> + 2 * kTileBytes;

// Operands lie in the tiles as lanes want them: the words of lane 4 g + q for 16 rows, or for two
// products, are one vector. Vectors of four g change places, so that threads which store words, and
// lanes which read vectors (of floats, the same q in all lanes), meet different banks.
__device__ __forceinline__ int lane_place(int g, int q) { return 4 * (4 * g + (q ^ g / 2)); }

// In words: rows g and g + 8 of lines q, then of lines q + 4.
__device__ __forceinline__ int row_place(int row, int line) {
    return row / 16 * 128 + lane_place(row % 8, line % 4) + line / 4 * 2 + row / 8 % 2;
}

// Lines q and q + 4 of a slot, then of the one two slots on. Slots 16 u + e, 16 u + e + 2, ... are
// column 2 u + e of the products.
__device__ __forceinline__ int slot_place(int slot, int line) {
    return slot / 64 * 512 + slot / 4 % 4 * 128 +
           lane_place(slot / 16 % 4 * 2 + slot % 2, line % 4) + slot / 2 % 2 * 2 + line / 4;
}

// Whether row m of the weight takes part.
__device__ __forceinline__ bool is_of(const CodebookGradientCall& call, int m) {
    return static_cast<unsigned>(m - static_cast<int>(call.first)) <
           static_cast<unsigned>(call.rows);
}

// What a thread brings from memory for a stage: words of line threadIdx.x % 8, as raw elements.
template <class T>
class Fetch {
  public:
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
    static constexpr int kParts = 4 / sizeof(T);  // elements of a word: n and n + 1

    __device__ __forceinline__ void load(const CodebookGradientCall& call, const Item& item,
                                         unsigned stage) {
        const int line = threadIdx.x % kLines;
        const int n = item.n0 + stage * kSpan<T> + line * kParts;
        Point point[kParts];
#pragma unroll
        for (int p = 0; p < kParts; ++p)
            point[p] = at<Point>(placekern_shared + kPoints<T>,
                                 (stage % (2 * kBatch) * kSpan<T> + line * kParts + p) *
                                     static_cast<int>(sizeof(Point)));
        load_x(call, item, n, point);
        const int m = item.row0 + row();
        const auto* from =
            static_cast<const Bits*>(call.grad_y.grad_y) + m * call.grad_y.row_stride;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            const bool real = is_of(call, m + i * kStep);
#pragma unroll
            for (int p = 0; p < kParts; ++p)
                grad_y_[i][p] = real && point[p].grad_y >= 0 ? __ldg(from + point[p].grad_y) : 0;
            from += kStep * call.grad_y.row_stride;
        }
    }

    __device__ __forceinline__ void store(const CodebookGradientCall& call, int tile) const {
        const int line = threadIdx.x % kLines;
        unsigned char* const grad_y =
            placekern_shared + (kGradYTiles<T> + tile * kTileBytes + 4 * row_place(row(), line));
        unsigned char* const x = placekern_shared + (kTiles<T> + tile * kTileBytes);
#pragma unroll
        for (int i = 0; i < kHeld; ++i) at<uint32_t>(grad_y, i * 8 * kStep * 4) = word(grad_y_[i]);
        if (call.source.image) {
#pragma unroll
            for (int i = 0; i < kHeld; ++i)
                at<uint32_t>(x, 4 * slot_place(image_slot() + i % 2 * kStep, line) +
                                    i / 2 * 512 * 4) = word(x_[i]);
        } else {
            unsigned char* const first = x + 4 * slot_place(rows_slot(), line);
#pragma unroll
            for (int i = 0; i < kHeld; ++i)
                at<uint32_t>(first, 4 * (i / 2 * 2 + i % 2 * 16)) = rows_word(i);
        }
    }

  private:
    static constexpr int kStep = kThreads / kLines;  // rows or slots between two words of a thread

    // The first slot of a thread. Of an image, neighbouring threads have neighbouring lines, which
    // are neighbouring pixels.
    __device__ __forceinline__ static int image_slot() { return threadIdx.x / kLines; }
    __device__ __forceinline__ static int rows_slot() { return threadIdx.x / kLines * kHeld; }
    // The first row. The four rows of a warp are stored to different banks.
    __device__ __forceinline__ static int row() {
        const int place = threadIdx.x / kLines;
        return (place & 0x11) | (place & 2) << 2 | (place & 0xc) >> 1;
    }

    __device__ __forceinline__ void load_x(const CodebookGradientCall& call, const Item& item,
                                           int n, const Point (&point)[kParts]) {
        const Source& source = call.source;
        const auto* const x = static_cast<const Bits*>(source.x);
        if (!source.image) {
            const int k = item.column0 + rows_slot();
#pragma unroll
            for (int p = 0; p < kParts; ++p) {
                const Bits* const from = x + int64_t{n + p} * source.stride + k;
                const bool real = n + p < item.n_end && k < static_cast<int>(call.weight.K);
                if constexpr (sizeof(T) == 2) {
                    const uint2 four =
                        real ? __ldg(reinterpret_cast<const uint2*>(from)) : make_uint2(0, 0);
                    x_[0][p] = four.x;
                    x_[1][p] = four.y;
                } else {
                    const uint4 four =
                        real ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
                    x_[0][p] = four.x;
                    x_[1][p] = four.y;
                    x_[2][p] = four.z;
                    x_[3][p] = four.w;
                }
            }
            return;
        }
        const int left = static_cast<int>(call.weight.K) - item.column0 - image_slot();
        const auto height = static_cast<unsigned>(source.shape.height);
        const auto width = static_cast<unsigned>(source.shape.width);
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            // One by one: a Tap read at once takes two neighbouring registers, of which there are
            // none left.
            const int tap = (image_slot() + i * kStep) * static_cast<int>(sizeof(Tap));
            const int offset = at<int>(placekern_shared + kTaps, tap + offsetof(Tap, offset));
            const short dy = at<short>(placekern_shared + kTaps, tap + offsetof(Tap, dy));
            const short dx = at<short>(placekern_shared + kTaps, tap + offsetof(Tap, dx));
            const bool inside = i * kStep < left;
#pragma unroll
            for (int p = 0; p < kParts; ++p) {
                const bool real = inside && static_cast<unsigned>(point[p].y + dy) < height &&
                                  static_cast<unsigned>(point[p].x + dx) < width;
                x_[i][p] = real ? __ldg(x + (point[p].base + offset)) : 0;
            }
        }
    }

    __device__ __forceinline__ static uint32_t word(const uint32_t (&element)[kParts]) {
        if constexpr (kParts == 1) return element[0];
        return __byte_perm(element[0], element[kParts - 1], 0x5410);
    }
    // Rows of 16-bit numbers come as words of two slots.
    __device__ __forceinline__ uint32_t rows_word(int i) const {
        if constexpr (kParts == 1) return x_[i][0];
        return __byte_perm(x_[i / 2][0], x_[i / 2][kParts - 1], i % 2 == 0 ? 0x5410 : 0x7632);
    }

    uint32_t x_[kHeld][kParts];
    uint32_t grad_y_[kHeld][kParts];
};

// Computes the points of stages batch * kBatch and so on, by all threads of a block.
template <class T>
__device__ void fill_points(const CodebookGradientCall& call, const Item& item, unsigned batch) {
    constexpr int kCount = kBatch * kSpan<T>;
    const int i = threadIdx.x;
    const int n = item.n0 + batch * kCount + i;
    if (i >= kCount) return;
    Point point = {0, kOutside, 0, -1};
    if (n < item.n_end) {
        const int pixels = static_cast<int>(call.grad_y.pixels);
        const int image = n / pixels;
        point.grad_y = image * static_cast<int>(call.grad_y.image_stride) +
                       n % pixels * static_cast<int>(call.grad_y.pixel_stride);
        if (call.source.image) {
            const Pixel pixel = Pixel::of(n, call.N, call.source);
            point.base = pixel.base;
            point.y = pixel.y;
            point.x = pixel.x;
        }
    }
    at<Point>(placekern_shared + kPoints<T>,
              (batch % 2 * kCount + i) * static_cast<int>(sizeof(Point))) = point;
}

// A lane's part of G: two blocks of 16 rows, eight products across.
using Sums = float[2][8][4];

__device__ __forceinline__ void read(uint32_t (&word)[4], int byte) {
    const uint4 four = at<uint4>(placekern_shared, byte);
    word[0] = four.x;
    word[1] = four.y;
    word[2] = four.z;
    word[3] = four.w;
}

// sums += grad_y^T X^T over a stage.
template <class T>
__device__ __forceinline__ void multiply(Sums& sums, int tile, int lane, int warp) {
    const int g = lane / 4, q = lane % 4;
    const int rows = kGradYTiles<T> + tile * kTileBytes + warp % kRowWarps * (2 * 512);
    const int slots = kTiles<T> + tile * kTileBytes + warp / kRowWarps * (4 * 512);
    if constexpr (sizeof(T) == 2) {
        uint32_t left[2][4];
#pragma unroll
        for (int b = 0; b < 2; ++b) read(left[b], rows + b * 512 + 4 * lane_place(g, q));
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            uint32_t right[4];
            read(right, slots + j / 2 * 512 + 4 * lane_place(g, q));
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                mma(sums[b][j], left[b], {right[0], right[1]}, T());
                mma(sums[b][j + 1], left[b], {right[2], right[3]}, T());
            }
        }
    } else {
#pragma unroll 1                                // registers would not do for the loads of more
        for (int line = 0; line < 4; ++line) {  // and line + 4
            uint32_t left[2][4];
#pragma unroll
            for (int b = 0; b < 2; ++b) read(left[b], rows + b * 512 + 4 * lane_place(g, line));
#pragma unroll
            for (int v = 0; v < 8; ++v) {
                const int j = v / 2 * 2, e = v % 2;
                uint32_t right[4];
                read(right, slots + j / 2 * 512 + 4 * lane_place(2 * q + e, line));
#pragma unroll
                for (int w = 0; w < 16; ++w) {  // row block, next product, line, row half
                    const int b = w / 8, next = w / 4 % 2, half = w / 2 % 2, r = w % 2;
                    sums[b][j + next][2 * r + e] += __uint_as_float(left[b][2 * half + r]) *
                                                    __uint_as_float(right[2 * next + half]);
                }
            }
        }
    }
}

}  // namespace placekern::cuda
