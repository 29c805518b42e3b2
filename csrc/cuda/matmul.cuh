// What the two matmul kernels share: operands of the tensor core, the product of a unit, and where
// the sums of a block go.
#pragma once

#include "output.cuh"
#include "source.cuh"
#include "table.cuh"

namespace placekern::cuda {
namespace {

constexpr int kWarps = 4;

// The rows of a block: kRows, all of one group of a convolution.
template <int kRows>
struct BlockRows {
    int first, end, group;

    __device__ static BlockRows of(const MatmulArgs& args) {
        const int M = static_cast<int>(args.weight.M);
        const int groups = groups_of(args.source);
        if (groups == 1) return {static_cast<int>(blockIdx.x) * kRows, M, 0};
        const int per_group = M / groups;
        const int blocks = (per_group + kRows - 1) / kRows;
        const int group = static_cast<int>(blockIdx.x) / blocks;
        const int block = static_cast<int>(blockIdx.x) % blocks;
        return {group * per_group + block * kRows, (group + 1) * per_group, group};
    }

    // As many blocks as it takes.
    static int64_t blocks(const MatmulArgs& args) {
        const int groups = groups_of(args.source);
        return groups * ((args.weight.M / groups + kRows - 1) / kRows);
    }

  private:
    PK_HOST_DEVICE static int groups_of(const Source& source) {
        return source.image ? static_cast<int>(source.shape.groups) : 1;
    }
};

// The 32 elements of a lane, as bits of T, to the operands of the steps of a unit.
template <class T>
struct Operand {
    static constexpr int kSteps = sizeof(T) == 2 ? 4 : 8;
    uint32_t a[kSteps][4];

    __device__ __forceinline__ void pack(const uint32_t (&element)[kUnitCodes]) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            if constexpr (sizeof(T) == 2) {
                a[s][0] = __byte_perm(element[4 * s], element[4 * s + 1], 0x5410);
                a[s][1] = __byte_perm(element[16 + 4 * s], element[16 + 4 * s + 1], 0x5410);
                a[s][2] = __byte_perm(element[4 * s + 2], element[4 * s + 3], 0x5410);
                a[s][3] = __byte_perm(element[16 + 4 * s + 2], element[16 + 4 * s + 3], 0x5410);
            } else {
                a[s][0] = element[2 * s];
                a[s][1] = element[16 + 2 * s];
                a[s][2] = element[2 * s + 1];
                a[s][3] = element[16 + 2 * s + 1];
            }
        }
    }

    // Step s of a unit, from a tile that holds 16 rows as they are. 16-bit numbers come by
    // matrices: their columns keep their order, and so must those of X.
    __device__ __forceinline__ static void load(uint32_t (&word)[4], const T* tile, int stride,
                                                int unit, int s, int lane) {
        static_assert(sizeof(T) == 2);
        const int column = unit * kUnitColumns + 16 * s + lane / 16 * 8;
        load_matrices(word, tile + lane % 16 * stride + column);
    }

    // A unit. Floats come as a lane has its 16 neighbours.
    __device__ __forceinline__ void load(const T* tile, int stride, int unit, int lane) {
        if constexpr (sizeof(T) == 2) {
#pragma unroll
            for (int s = 0; s < kSteps; ++s) load(a[s], tile, stride, unit, s, lane);
        } else {
            const T* const row = tile + lane / 4 * stride;
            Sixteen<T> upper, lower;
            upper.load(row, unit, lane % 4);
            lower.load(row + 8 * stride, unit, lane % 4);
#pragma unroll
            for (int s = 0; s < kSteps; ++s) {
                a[s][0] = upper.word[2 * s];
                a[s][1] = lower.word[2 * s];
                a[s][2] = upper.word[2 * s + 1];
                a[s][3] = lower.word[2 * s + 1];
            }
        }
    }
};

// sums += a X for one unit of 64 columns of the weight; `tile` holds X.
template <int kTiles, int kRowBlocks, class T>
__device__ __forceinline__ void multiply(float (&sums)[kRowBlocks][kTiles][4],
                                         const Operand<T> (&operand)[kRowBlocks], const T* tile,
                                         int stride, int unit, int lane) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        Sixteen<T> x;
        x.load(tile + (t * 8 + lane / 4) * stride, unit, lane % 4);
#pragma unroll
        for (int s = 0; s < Operand<T>::kSteps; ++s) {
            uint32_t b[2] = {x.word[2 * s], x.word[2 * s + 1]};
            if constexpr (sizeof(T) == 4) {
                b[0] = to_tf32(__uint_as_float(b[0]));
                b[1] = to_tf32(__uint_as_float(b[1]));
            }
#pragma unroll
            for (int block = 0; block < kRowBlocks; ++block)
                mma(sums[block][t], operand[block].a[s], b, T());
        }
    }
}

// Sums of a block in shared memory, column by column; padded, so that the stores of a warp fall
// into different banks.
template <int kTiles, int kRowBlocks>
struct Staged {
    static constexpr int kRows = kWarps * kRowBlocks * kUnitRows;
    static constexpr int kColumns = 8 * kTiles;
    static constexpr int kStride = kRows + 4;
    static constexpr size_t kBytes = kColumns * kStride * sizeof(float);
};

// Calls f(n, m, i, sum) for each sum of a lane: column and row within the block, and which of the
// lane's rows that is.
template <int kTiles, int kRowBlocks, class F>
__device__ __forceinline__ void for_sums(const float (&sums)[kRowBlocks][kTiles][4], int lane,
                                         int warp, F f) {
    const int own_row = warp * kRowBlocks * kUnitRows + lane / 4;
    const int own_column = lane % 4 * 2;
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int i = 2 * block + r / 2;
                f(own_column + t * 8 + r % 2, own_row + i * 8, i, sums[block][t][r]);
            }
        }
    }
}

// Writes the sums of a block, whose rows begin at m0 and end before m_end. They go through shared
// memory where they go to y, so that the code for places, ReLU and types stands once, in a loop,
// and not once for each of up to 64 sums of a lane.
template <int kTiles, int kRowBlocks>
__device__ __forceinline__ void write(const float (&sums)[kRowBlocks][kTiles][4], const Output& out,
                                      int m0, int m_end, int n0, int lane, int warp) {
    using Staged = Staged<kTiles, kRowBlocks>;
    const int rows = min(m_end - m0, Staged::kRows);
    const int columns = static_cast<int>(min(out.N - n0, int64_t{Staged::kColumns}));
    if (out.splits > 1) {
        Partial to = Partial::of(out, static_cast<int>(blockIdx.z));
        to.sums = &to.at(n0, m0);
        for_sums(sums, lane, warp, [&](int n, int m, int, float sum) {
            if (n < columns && m < rows) to.at(n, m) = sum;
        });
        return;
    }
    float bias[2 * kRowBlocks];
#pragma unroll
    for (int i = 0; i < 2 * kRowBlocks; ++i) {
        const int m = warp * kRowBlocks * kUnitRows + lane / 4 + i * 8;
        bias[i] = m < rows ? bias_of(out, m0 + m) : 0.0f;
    }
    auto* const staged = reinterpret_cast<float*>(placekern_shared);
    __syncthreads();  // nobody reads a table or a tile any more
    for_sums(sums, lane, warp, [&](int n, int m, int i, float sum) {
        staged[n * Staged::kStride + m] = sum + bias[i];
    });
    __syncthreads();
    // Neighbouring threads write neighbours of y.
    const bool together = rows_together(out);
#pragma unroll 1
    for (int i = threadIdx.x; i < Staged::kRows * Staged::kColumns; i += kWarps * kWarp) {
        const int n = together ? i / Staged::kRows : i % Staged::kColumns;
        const int m = together ? i % Staged::kRows : i / Staged::kColumns;
        if (n < columns && m < rows)
            store_biased(out, n0 + n, m0 + m, staged[n * Staged::kStride + m]);
    }
}

template <class T>
struct OperandBits {
    __device__ uint32_t operator()(float value) const {
        if constexpr (sizeof(T) == 2) return to_bits(value, T());
        return to_tf32(value);
    }
};

}  // namespace
}  // namespace placekern::cuda
