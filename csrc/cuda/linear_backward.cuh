// What a warp of the linear backward keeps in registers, and the tile that pairs are written into.
// The surprise: nothing of a product is ever exchanged between lanes. Slots 2q, 2q + 1 of product j
// stand for columns 16q + 2j, 16q + 2j + 1, which are the lane's own; W becomes an operand by
// transposing words in registers. Rows of x are permuted likewise, and grad_y comes in the order in
// which lanes hold it.
#pragma once

#include "bins.cuh"
#include "instructions.cuh"
#include "linear_backward.h"
#include "number.cuh"

namespace placekern::cuda {

constexpr int kGradX = 1;  // what is wanted, as bits
constexpr int kGradCodebook = 2;
constexpr int kProducts = kUnitColumns / 8;  // 16 x 8 products across a strip

// Partial sums, one after the other in the workspace.
struct Partials {
    double* codebook;  // [plan.blocks, 2^bits]
    float* x;          // [plan.splits, N, K]; what nobody writes, nobody reads

    PK_HOST_DEVICE static Partials of(const LinearBackwardCall& call) {
        auto* const codebook = static_cast<double*>(call.workspace);
        const int64_t sums = int64_t{call.plan.blocks} << call.weight.bits;
        return {codebook, reinterpret_cast<float*>(codebook + (call.grad_codebook ? sums : 0))};
    }
};

// Blocks side by side. Of the dense layout: strips of columns, one for each warp; of pairs: parts
// of a window, of 64 slots for each warp.
PK_HOST_DEVICE inline int across(const DeviceWeight& weight, int warps) {
    if (weight.layout == Layout::kPairs) return kWindowSlots / kUnitColumns / warps;
    return static_cast<int>((weight.units() + warps - 1) / warps);
}

// Where a thread stands in its block.
struct Place {
    int lane, warp;

    __device__ static Place of() {
        return {static_cast<int>(threadIdx.x) % kWarp, static_cast<int>(threadIdx.x) / kWarp};
    }
};

__device__ inline const uint16_t* chunk_of_grad_y(const LinearBackwardCall& call, int64_t n0) {
    return static_cast<const uint16_t*>(call.grad_y) + n0 * call.weight.blocks() * kUnitRows;
}

// What a block of the dense layout has: a strip of a chunk, and a split of the rows.
template <int kSteps>
struct Part {
    int strip, split;
    int64_t n0;              // of the 16 kSteps rows of x and grad_y, the first
    const uint16_t* grad_y;  // of these rows
    int64_t first, end;      // blocks of 16 rows of the weight

    __device__ static Part of(const LinearBackwardCall& call) {
        const int64_t n0 = static_cast<int64_t>(blockIdx.z) * (16 * kSteps);
        const int64_t blocks = call.weight.blocks();
        const int64_t size = (blocks + call.plan.splits - 1) / call.plan.splits;
        const int64_t first = size * blockIdx.y;
        return {static_cast<int>(blockIdx.x),
                static_cast<int>(blockIdx.y),
                n0,
                chunk_of_grad_y(call, n0),
                first,
                min(first + size, blocks)};
    }
};

// How the steps of the pairs layout are shared out. A step is a block of 16 rows of a run, which is
// a window of a chunk; runs lie one behind the other, and a block takes plan.steps steps in a row.
// So a run is cut into segments, of neighbouring blocks.
struct Runs {
    int windows, blocks;  // blocks: of 16 rows, in a run
    int steps;            // of a block

    PK_HOST_DEVICE Runs(const DeviceWeight& weight, const LinearBackwardPlan& plan)
        : windows(static_cast<int>(weight.windows())),
          blocks(static_cast<int>(weight.blocks())),
          steps(plan.steps) {}

    // The first block that has steps of a run, and how many have.
    PK_HOST_DEVICE int first_block(int run) const { return run * blocks / steps; }
    PK_HOST_DEVICE int segments(int run) const {
        return ((run + 1) * blocks - 1) / steps - first_block(run) + 1;
    }
};

// A block of 16 rows m of grad_y^T, as the left operands of kSteps products. Lane 4 g + q has rows
// g (words 0, 2) and g + 8 (words 1, 3), and of each 4 kSteps neighbouring n, two a word.
template <int kSteps>
struct GradY {
    uint32_t word[kSteps][4];

    // grad_y of a chunk is uint16 [blocks][kSteps][32 lanes][4 words][2].
    __device__ __forceinline__ static GradY load(const uint16_t* grad_y, int64_t block, int lane) {
        const auto* const own = reinterpret_cast<const uint4*>(grad_y) + block * (kSteps * kWarp);
        GradY operands;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            const uint4 four = __ldg(own + s * kWarp + lane);
            operands.word[s][0] = four.x;
            operands.word[s][1] = four.y;
            operands.word[s][2] = four.z;
            operands.word[s][3] = four.w;
        }
        return operands;
    }

    // Where a number lies in a chunk.
    __device__ static int64_t place(int64_t block, int row, int n) {
        const int q = n / (4 * kSteps), s = n / 4 % kSteps, h = n / 2 % 2;
        const int64_t lane = (block * kSteps + s) * kWarp + row % 8 * 4 + q;
        return lane * 8 + (h * 2 + row / 8) * 2 + n % 2;
    }
};

// A strip of 64 columns: what a warp keeps in registers while it walks.
template <int kSteps, int kWanted, class T>
class Strip {
  public:
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
        const auto& of_g = grad_y.word;
        uint32_t of_x[kSteps][4];
        if constexpr ((kWanted & kGradX) != 0) {
#pragma unroll
            for (int s = 0; s < kSteps; ++s) {
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

    // Writes partial sums `split`. A lane has 16 neighbouring columns of each of its rows n.
    template <class F>
    __device__ __forceinline__ void write_grad_x(const LinearBackwardCall& call, int split,
                                                 int64_t n0, int lane, F column_of) const {
        const int64_t K = call.weight.K;
#pragma unroll
        for (int i = 0; i < 2 * kSteps; ++i) {
            const int64_t n = n0 + 4 * kSteps * (lane / 8) + 2 * i + lane / 4 % 2;
            if (n >= call.N) continue;
            float* const to = Partials::of(call).x + (split * call.N + n) * K;
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
        Partials::of(call).codebook[block * codes + code] = sum;
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

    // Writes eight entries of a row. Padding comes to slots from 248 on, where nobody looks.
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

// Adds up the partial sums of all blocks, into what is wanted.
void finish_linear_backward(const LinearBackwardCall& call, const Queue& queue);

}  // namespace placekern::cuda
