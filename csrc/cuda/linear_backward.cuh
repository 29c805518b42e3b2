// What a warp of the linear backward keeps in registers, and the tile that pairs are written into.
// The surprise: nothing of a product is ever exchanged between lanes. Slots 2q, 2q + 1 of product j
// stand for columns 16q + 2j, 16q + 2j + 1, which are the lane's own; W becomes an operand by
// transposing words in registers. Rows of x are permuted likewise, so that a lane reads grad_y by
// one vector a row.
#pragma once

#include "bins.cuh"
#include "instructions.cuh"
#include "linear_backward.h"
#include "number.cuh"

namespace placekern::cuda {

constexpr int kGradX = 1;  // what is wanted, as bits
constexpr int kGradCodebook = 2;
constexpr int kProducts = kUnitColumns / 8;  // 16 x 8 products across a strip

// The blocks of 16 rows that a split has.
struct RowBlocks {
    int64_t first, end;

    __device__ static RowBlocks of(const LinearBackwardCall& call) {
        const int64_t blocks = call.weight.blocks();
        const int64_t size = (blocks + call.plan.splits - 1) / call.plan.splits;
        const int64_t first = size * blockIdx.y;
        return {first, min(first + size, blocks)};
    }
};

// Where a thread stands in its block, and the block's part of the work.
template <int kSteps>
struct Part {
    int lane, warp;
    int64_t n0;              // of the 16 kSteps rows of x and grad_y, the first
    const uint16_t* grad_y;  // [M, 16 kSteps]
    RowBlocks rows;          // of the weight

    __device__ static Part of(const LinearBackwardCall& call) {
        const int64_t n0 = static_cast<int64_t>(blockIdx.z) * (16 * kSteps);
        return {static_cast<int>(threadIdx.x) % kWarp, static_cast<int>(threadIdx.x) / kWarp, n0,
                static_cast<const uint16_t*>(call.grad_y) + n0 * call.weight.M,
                RowBlocks::of(call)};
    }
};

// 16 rows m of grad_y^T, as operands: lane 4 g + q has rows g and g + 8, and of each 4 * kSteps
// neighbouring n.
template <int kSteps>
struct GradY {
    static constexpr int kColumns = 16 * kSteps;
    uint32_t word[2][2 * kSteps];

    // Reads [16, kColumns] from `own` on, where the lane's part of row g lies; `left` of the rows
    // from row g on exist.
    __device__ __forceinline__ void load(const uint16_t* own, int left) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint16_t* const from = own + 8 * half * kColumns;
            const bool real = 8 * half < left;
            if constexpr (kSteps == 2) {
                const uint4 four =
                    real ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
                word[half][0] = four.x;
                word[half][1] = four.y;
                word[half][2] = four.z;
                word[half][3] = four.w;
            } else {
                const uint2 two =
                    real ? __ldg(reinterpret_cast<const uint2*>(from)) : make_uint2(0, 0);
                word[half][0] = two.x;
                word[half][1] = two.y;
            }
        }
    }
};

// Reads grad_y [M, kColumns] block by block.
template <int kSteps>
struct GradYWalk {
    static constexpr int kColumns = 16 * kSteps;
    const uint16_t* own;
    int left;

    __device__ GradYWalk(const uint16_t* grad_y, int64_t m0, int64_t M, int lane)
        : own(grad_y + (m0 + lane / 4) * kColumns + lane % 4 * (4 * kSteps)),
          left(static_cast<int>(M - m0) - lane / 4) {}

    __device__ __forceinline__ GradY<kSteps> next() {
        GradY<kSteps> grad_y;
        grad_y.load(own, left);
        own += kUnitRows * kColumns;
        left -= kUnitRows;
        return grad_y;
    }
};

// A strip of 64 columns: what a warp keeps in registers while it walks.
template <int kSteps, int kWanted, class T>
class Strip {
  public:
    // What the walk adds to must be there before it. The caller synchronises.
    template <int kWidth, class F>
    __device__ __forceinline__ void begin(const LinearBackwardCall& call, int64_t n0, int lane,
                                          F column_of, const CodeBins<kWidth>& bins) {
        if constexpr ((kWanted & kGradCodebook) != 0) {
            load_x(call, n0, lane, column_of);
            bins.clear();
        }
    }

    // Columns of slots come from `column_of`; -1: none.
    template <class F>
    __device__ __forceinline__ void load_x(const LinearBackwardCall& call, int64_t n0, int lane,
                                           F column_of) {
#pragma unroll
        for (int j = 0; j < kProducts; ++j) {
            const int64_t column = column_of(lane / 8 * 16 + 2 * j + lane / 4 % 2);
#pragma unroll
            for (int i = 0; i < 2 * kSteps; ++i) {
                uint32_t pair[2];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int64_t n = n0 + 4 * kSteps * (lane % 4) + 2 * i + r;
                    pair[r] = n < call.N && column >= 0
                                  ? __ldg(static_cast<const uint16_t*>(call.x) + n * call.x_stride +
                                          column)
                                  : 0;
                }
                x_[j][i / 2][i % 2] = pair[0] | pair[1] << 16;
            }
        }
    }

    // Takes 16 rows: pair [16] has two neighbouring columns of W a word, first of row g; offset
    // [32] says which bin takes each element of G.
    template <int kWidth>
    __device__ __forceinline__ void add(const GradY<kSteps>& grad_y, const uint32_t (&pair)[16],
                                        const int (&offset)[kUnitCodes],
                                        const CodeBins<kWidth>& bins) {
        uint32_t of_g[kSteps][4], of_x[kSteps][4];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            of_g[s][0] = grad_y.word[0][2 * s];
            of_g[s][1] = grad_y.word[1][2 * s];
            of_g[s][2] = grad_y.word[0][2 * s + 1];
            of_g[s][3] = grad_y.word[1][2 * s + 1];
            if constexpr ((kWanted & kGradX) != 0) {
                of_x[s][0] = transpose(of_g[s][0]);
                of_x[s][1] = transpose(of_g[s][2]);
                of_x[s][2] = transpose(of_g[s][1]);
                of_x[s][3] = transpose(of_g[s][3]);
            }
        }
#pragma unroll
        for (int j = 0; j < kProducts; ++j) {
            if constexpr ((kWanted & kGradX) != 0) {
                const uint32_t w[2] = {transpose(pair[j]), transpose(pair[8 + j])};
#pragma unroll
                for (int s = 0; s < kSteps; ++s) mma(grad_x_[s][j], of_x[s], w, T());
            }
            if constexpr ((kWanted & kGradCodebook) != 0) {
                float g[4] = {};
#pragma unroll
                for (int s = 0; s < kSteps; ++s) mma(g, of_g[s], x_[j][s], T());
                bins.add({offset[2 * j], offset[2 * j + 1], offset[16 + 2 * j], offset[17 + 2 * j]},
                         g);
            }
        }
    }

    // A lane has 16 neighbouring columns of each of its rows n.
    template <class F>
    __device__ __forceinline__ void write_grad_x(const LinearBackwardCall& call, int64_t n0,
                                                 int lane, F column_of) const {
        const int64_t K = call.weight.K;
#pragma unroll
        for (int i = 0; i < 2 * kSteps; ++i) {
            const int64_t n = n0 + 4 * kSteps * (lane / 8) + 2 * i + lane / 4 % 2;
            if (n >= call.N) continue;
            float* const to = call.grad_x + (blockIdx.y * call.N + n) * K;
#pragma unroll
            for (int slot = 0; slot < 16; slot += 4) {
                const float (&left)[4] = grad_x_[i / 2][slot / 2];
                const float (&right)[4] = grad_x_[i / 2][slot / 2 + 1];
                const int r = i % 2 * 2;
                const int64_t column = column_of(lane % 4 * 16 + slot);
                if (K % 4 == 0) {
                    if (column >= 0)
                        *reinterpret_cast<float4*>(to + column) =
                            make_float4(left[r], left[r + 1], right[r], right[r + 1]);
                    continue;
                }
                const float value[4] = {left[r], left[r + 1], right[r], right[r + 1]};
#pragma unroll
                for (int v = 0; v < 4; ++v) {
                    const int64_t own = column_of(lane % 4 * 16 + slot + v);
                    if (own >= 0) to[own] = value[v];
                }
            }
        }
    }

  private:
    uint32_t x_[kProducts][kSteps][2];
    float grad_x_[kSteps][kProducts][4] = {};
};

// Adds up the bins of a block, after a barrier.
template <int kWidth>
__device__ void write_codebook(const LinearBackwardCall& call, unsigned char* bins, int zero) {
    const int64_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int codes = 1 << call.weight.bits;
    for (int code = threadIdx.x; code < codes; code += blockDim.x) {
        double sum = 0.0;
        for (int warp = 0; warp < blockDim.x / kWarp; ++warp)
            sum += CodeBins<kWidth>::total(bins + warp * CodeBins<kWidth>::kBytes, code, zero);
        call.grad_codebook[block * codes + code] = sum;
    }
}

// The codebook of the dense layout, rounded to T, with a copy for each lane: entries lie as far
// apart as bins do, and one offset serves both.
template <int kWidth, class T>
struct RoundedTable {
    static constexpr int kRowBytes = CodeBins<kWidth>::kRowBytes;
    static constexpr int kEntries = 1 << kWidth;
    static constexpr int kBytes = kEntries * kRowBytes;

    // From byte 0 of shared memory on, with zeros for code `zero` and behind the codebook.
    __device__ static void fill(const DeviceWeight& weight, int zero) {
        for (int i = threadIdx.x; i < kEntries * kWarp; i += blockDim.x) {
            const int code = i / kWarp;
            const bool real = code < 1 << weight.bits && code != zero;
            at<uint32_t>(placekern_shared, 4 * i) =
                real ? to_bits(read(weight.codebook, code), T()) : 0;
        }
    }
};

// Pairs become words in a tile of 16 rows and a window: in the upper half of a word the offset of
// its bin, in the lower half the value. One tile is filled while the other is read, and emptied by
// those who read it, so one barrier a block of rows is enough. A block of two warps fills whole
// tiles, too, and takes half of them.
template <int kWidth, class T>
struct PairsTiles {
    static constexpr int kRowBytes = kWindowSlots * sizeof(uint32_t);
    static constexpr int kTileBytes = kUnitRows * kRowBytes;
    static constexpr int kFirst = kRowBytes;  // before it, from byte 0 on: a word for each code
    static constexpr int kBytes = kFirst + 2 * kTileBytes;
    static constexpr uint32_t kAbsent =
        uint32_t{CodeBins<kWidth>::kSpare} * CodeBins<kWidth>::kRowBytes << 16;

    __device__ static void fill(const DeviceWeight& weight) {
        for (int i = threadIdx.x; i < 1 << weight.bits; i += blockDim.x) {
            const uint32_t offset = i * CodeBins<kWidth>::kRowBytes;
            at<uint32_t>(placekern_shared, 4 * i) =
                to_bits(read(weight.codebook, i), T()) | offset << 16;
        }
        for (int byte = 4 * threadIdx.x; byte < 2 * kTileBytes; byte += 4 * blockDim.x)
            at<uint32_t>(placekern_shared, kFirst + byte) = kAbsent;
    }

    // Writes eight entries of a row. Padding comes to slots behind 248, where nobody looks.
    __device__ __forceinline__ static void scatter(int tile, int row, const uint4& chunk) {
        const uint32_t place[2] = {places(chunk.x, row), places(chunk.y, row)};
        const uint32_t code[2] = {chunk.z, chunk.w};
        const int to = kFirst + (tile * kUnitRows + row) * kRowBytes;
        uint32_t word[kChunk];  // all read before the first is written: one wait, not eight
#pragma unroll
        for (int j = 0; j < kChunk; ++j)
            word[j] = at<uint32_t>(placekern_shared, times_4(code[j / 4], j % 4));
#pragma unroll
        for (int j = 0; j < kChunk; ++j)
            at<uint32_t>(placekern_shared, to | times_4(place[j / 4], j % 4)) = word[j];
    }

    // Takes a lane's 32 words of unit `unit` out of a tile.
    __device__ __forceinline__ static void take(int tile, int unit, int lane,
                                                uint32_t (&word)[kUnitCodes]) {
        const bool last = unit == kWindowSlots / kUnitColumns - 1 && lane % 4 == 3;
#pragma unroll
        for (int i = 0; i < kUnitCodes; i += 4) {
            const int row = lane / 4 + i / 16 * 8;
            const int slot = i % 16 * 4 | lane % 4 * 4;  // as `places` makes it
            auto& four = at<uint4>(placekern_shared,
                                   kFirst + (tile * kUnitRows + row) * kRowBytes +
                                       4 * ((unit * kUnitColumns | slot) ^ (row & 1) << 4));
            const uint4 taken = four;
            four = make_uint4(kAbsent, kAbsent, kAbsent, kAbsent);
            const bool padding = last && i % 16 >= kPairsWindow % 16;
            word[i] = padding ? kAbsent : taken.x;
            word[i + 1] = padding ? kAbsent : taken.y;
            word[i + 2] = padding ? kAbsent : taken.z;
            word[i + 3] = padding ? kAbsent : taken.w;
        }
    }

  private:
    // Four places at once: swaps bits 2, 3 and 4, 5, so that the vectors which four lanes take lie
    // side by side, and puts every other row into the other half of the banks.
    __device__ __forceinline__ static uint32_t places(uint32_t four, int row) {
        const uint32_t changed = (four >> 2 ^ four) & 0x0c0c0c0c;
        return four ^ changed ^ changed << 2 ^ (row & 1) * 0x10101010;
    }

    __device__ __forceinline__ static int times_4(uint32_t four, int j) {
        return static_cast<int>(j == 0 ? four << 2 : four >> (8 * j - 2)) & 0x3fc;
    }
};

}  // namespace placekern::cuda
