// matmul on the pairs layout: a warp scatters the entries of 16 rows and one window over a zeroed
// tile of shared memory, and reads operands from there. What limits it is shared memory.
#pragma once

#include <algorithm>

#include "matmul.cuh"

namespace placekern::cuda {
namespace {

// How many 16-row blocks a warp has: two, so that X is read half as often. The first is held in
// registers while the second is put together; for that TF32 operands take too many.
template <class T>
constexpr int kPairsBlocks = sizeof(T) == 2 ? 2 : 1;

template <int kWidth, int kTiles, class T>
struct PairsShared {
    static constexpr int kColumns = 8 * kTiles;
    static constexpr int kStride = tile_stride<T>(kWindowSlots);
    static constexpr int kRowBytes = kStride * sizeof(T);
    static size_t bytes(bool image, int64_t windows_per_split) {
        const size_t loop =
            Table<kWidth>::kBytes + (kWarps * kUnitRows + kColumns) * kRowBytes +
            (image ? kColumns * sizeof(Pixel) + windows_per_split * kWindowSlots * sizeof(Tap) : 0);
        return std::max(loop, Staged<kTiles, kPairsBlocks<T>>::kBytes);
    }
};

// A lane's share of the runs of a row, window after window: two lanes a row, chunk after chunk.
class RowRuns {
  public:
    // Goes on from chunk `cursor` with the window whose count of chunks is at `place`; `left`:
    // windows.
    __device__ __forceinline__ void begin(const DeviceWeight& weight, int cursor, unsigned place,
                                          int left) {
        next_ = reinterpret_cast<const uint4*>(weight.codes) + cursor + threadIdx.x % 2;
        place_ = place;
        count_ = 0;
        following_ = left > 0 ? __ldg(weight.run_chunks() + place_) : 0;
        start(weight, left);
    }

    // Calls f with each chunk of the window, and starts the next; `left`: windows with this one.
    template <class F>
    __device__ __forceinline__ void take(const DeviceWeight& weight, int left, F f) {
        const int own = count_ - static_cast<int>(threadIdx.x % 2);
#pragma unroll 1
        for (int first = 0; first < own; first += 2 * kAhead) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int place = first + 2 * i;
                if (place < own) {
                    const uint4 chunk = ahead_[i];
                    if (place + 2 * kAhead < own) ahead_[i] = __ldcs(next_ + place + 2 * kAhead);
                    f(chunk);
                }
            }
        }
        start(weight, left - 1);
    }

  private:
    static constexpr int kAhead = 4;  // chunks on their way

    __device__ __forceinline__ void start(const DeviceWeight& weight, int left) {
        next_ += count_;
        count_ = following_;
        const int own = count_ - static_cast<int>(threadIdx.x % 2);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            // Not read later unless it was read here.
            if (2 * i < own) ahead_[i] = __ldcs(next_ + 2 * i);
        }
        // A count is read a window ahead too: loads of chunks need not wait for it.
        ++place_;
        following_ = left > 1 ? __ldg(weight.run_chunks() + place_) : 0;
    }

    const uint4* next_;  // of the window that is on its way
    int count_;          // of its chunks
    int following_;      // of those of the window behind it
    unsigned place_;     // of that count
    uint4 ahead_[kAhead];
};

// sums += a X for one unit with 16-bit operands that come by matrices. Those of the last block of
// rows are in the tile `own`; those of the first of two are held.
template <int kTiles, int kRowBlocks, class T>
__device__ __forceinline__ void multiply(float (&sums)[kRowBlocks][kTiles][4],
                                         const Operand<T>& held, const T* own, const T* tile,
                                         int stride, int unit, int lane) {
    const T* const row = tile + lane % 8 * stride + unit * kUnitColumns + lane / 8 * 8;
#pragma unroll
    for (int s = 0; s < Operand<T>::kSteps; s += 2) {
        uint32_t a[2][4];
        Operand<T>::load(a[0], own, stride, unit, s, lane);
        Operand<T>::load(a[1], own, stride, unit, s + 1, lane);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            uint32_t x[4];
            load_matrices(x, row + t * 8 * stride + 16 * s);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t b[2] = {x[2 * i], x[2 * i + 1]};
                if constexpr (kRowBlocks == 2) mma(sums[0][t], held.a[s + i], b, T());
                mma(sums[kRowBlocks - 1][t], a[i], b, T());
            }
        }
    }
}

// Writes the eight values of a chunk into a row of a tile; padding goes to places from 248 on.
template <class T>
__device__ __forceinline__ void scatter(T* row, const uint4& chunk, const uint32_t value[kChunk]) {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
        const int place = tile_place<T>(chunk_byte(chunk, j));
        if constexpr (sizeof(T) == 2)
            reinterpret_cast<unsigned short*>(row)[place] = static_cast<unsigned short>(value[j]);
        else
            reinterpret_cast<uint32_t*>(row)[place] = value[j];
    }
}

// Blocks for 16 columns that a multiprocessor's shared memory has room for; it is largest on
// Hopper.
__device__ constexpr int resident_blocks_of_16() {
#if __CUDA_ARCH__ >= 900
    return 3;
#else
    return 2;
#endif
}

// Pairs are scattered over a zeroed tile of 16 rows of a warp and one window; then as above.
template <int kWidth, int kTiles, class T>
__global__ void __launch_bounds__(kWarps* kWarp, kTiles == 2 ? resident_blocks_of_16() : 2)
    matmul_pairs(MatmulArgs args) {
    using Shared = PairsShared<kWidth, kTiles, T>;
    constexpr int kRowBlocks = kPairsBlocks<T>;
    constexpr int kUnits = kWindowSlots / kUnitColumns;
    constexpr int kRowVectors = kWindowSlots * sizeof(T) / (16 * kWarp);  // of a row, for a lane
    const DeviceWeight& weight = args.weight;
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    auto* const entries = reinterpret_cast<uint32_t*>(placekern_shared);
    auto* const tile = reinterpret_cast<T*>(placekern_shared + Table<kWidth>::kBytes);
    T* const own = tile + (Shared::kColumns + warp * kUnitRows) * Shared::kStride;
    auto* const pixels =
        reinterpret_cast<Pixel*>(tile + (Shared::kColumns + kWarps * kUnitRows) * Shared::kStride);
    auto* const taps = reinterpret_cast<Tap*>(pixels + Shared::kColumns);
    const int n0 = static_cast<int>(blockIdx.y) * Shared::kColumns;
    const auto block_rows = BlockRows<kWarps * kRowBlocks * kUnitRows>::of(args);
    const int64_t row0 = block_rows.first + warp * kRowBlocks * kUnitRows;
    const int windows = static_cast<int>(weight.windows());
    const int per_split = (windows + args.out.splits - 1) / args.out.splits;
    const int first = min(per_split * static_cast<int>(blockIdx.z), windows);
    const int count = min(per_split, windows - first);

    // Rows behind the last one take its chunks again and write nothing.
    RowRuns runs[kRowBlocks];
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) {
        const int64_t m = min(row0 + b * kUnitRows + lane / 2, weight.M - 1);
        int cursor = __ldg(weight.chunk_ptr() + m);
        const auto place = static_cast<unsigned>(m * windows);
        for (int w = 0; w < first; ++w) cursor += __ldg(weight.run_chunks() + place + w);
        runs[b].begin(weight, cursor, place + first, count);
    }

    Table<kWidth>::fill(entries, weight, -1, OperandBits<T>());
    if (args.source.image) {
        fill_pixels<Shared::kColumns>(pixels, n0, args.out.N, args.source, block_rows.group);
        for (int i = 0; i < count; ++i)
            fill_taps(taps + i * kWindowSlots, kWindowSlots, (first + i) * kPairsWindow, weight,
                      args.source);
    }
    __syncthreads();
    const auto table = Table<kWidth>::of(entries, lane);
    const auto place = [&](const uint4& chunk) {
        uint32_t value[kChunk];
#pragma unroll
        for (int j = 0; j < kChunk; ++j) value[j] = table.of(chunk, j);
        scatter(own + lane / 2 * Shared::kStride, chunk, value);
    };

    float sums[kRowBlocks][kTiles][4] = {};
    for (int i = 0; i < count; ++i) {
        fill_tile<kWarps * kWarp, Shared::kColumns, kWindowSlots>(
            tile, args.source, pixels, taps + i * kWindowSlots, n0, args.out.N,
            (first + i) * kPairsWindow, weight.K, kPairsWindow);
        Operand<T> held[kUnits];  // of the first of two blocks
#pragma unroll
        for (int b = 0; b < kRowBlocks; ++b) {
#pragma unroll
            for (int v = 0; v < kUnitRows * kRowVectors; ++v) {
                T* const cleared = own + v / kRowVectors * Shared::kStride;
                reinterpret_cast<uint4*>(cleared)[v % kRowVectors * kWarp + lane] =
                    make_uint4(0, 0, 0, 0);
            }
            __syncwarp();
            runs[b].take(weight, count - i, place);
            if (b == kRowBlocks - 1) break;
            __syncwarp();
#pragma unroll
            for (int unit = 0; unit < kUnits; ++unit)
                held[unit].load(own, Shared::kStride, unit, lane);
            __syncwarp();  // the tile is read, and may be cleared for the next block
        }
        wait_for_copies();
        __syncthreads();
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
            if constexpr (sizeof(T) == 2) {
                multiply<kTiles, kRowBlocks, T>(sums, held[unit], own, tile, Shared::kStride, unit,
                                                lane);
            } else {
                Operand<T> operand[1];
                operand[0].load(own, Shared::kStride, unit, lane);
                multiply<kTiles, 1, T>(sums, operand, tile, Shared::kStride, unit, lane);
            }
        }
        __syncthreads();  // X and the own rows are read; the next window may overwrite them
    }
    let_next_kernel_start();
    write<kTiles, kRowBlocks>(sums, args.out, block_rows.first, block_rows.end, n0, lane, warp);
}

}  // namespace
}  // namespace placekern::cuda
