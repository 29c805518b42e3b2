// Writes rows of a weight out as a dense matrix. What limits it: the bytes that it writes.
//
// With several codebooks rows of a unit may have different ones, so values are read from global
// memory, through the caches, and not from a table in shared memory. That is not tuned.
#include "ops.h"
#include "table.cuh"

namespace placekern::cuda {
namespace {

constexpr int kWarps = 8;

// Four or eight floats as one vector of T.
__device__ __forceinline__ uint4 vector_of(const float* value, float) {
    return make_uint4(__float_as_uint(value[0]), __float_as_uint(value[1]),
                      __float_as_uint(value[2]), __float_as_uint(value[3]));
}
template <class T>
__device__ __forceinline__ uint4 vector_of(const float* value, T) {
    const auto pair = [value](int j) {
        return to_bits(value[j], T()) | to_bits(value[j + 1], T()) << 16;
    };
    return make_uint4(pair(0), pair(2), pair(4), pair(6));
}

// A warp has a unit. Where rows start on 16 bytes, a lane writes its 16 columns by whole vectors.
template <int kWidth, bool kOneCodebook, class T>
__global__ void __launch_bounds__(kWarps* kWarp) decode_dense(DecodeArgs args) {
    const DeviceWeight& weight = args.weight;
    auto* const entries = reinterpret_cast<uint32_t*>(placekern_shared);
    const int zero = zero_code(weight);
    if constexpr (kOneCodebook) {
        Table<kWidth>::fill(entries, weight, zero, ExactBits());
        __syncthreads();
    }
    const int lane = threadIdx.x % kWarp;
    const int64_t units = weight.units();
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    const int64_t block = args.first / kUnitRows + blockIdx.y;
    if (unit >= units) return;
    const auto codes =
        load_codes<kWidth>(weight.codes + (block * units + unit) * kUnitBytes<kWidth>, lane);
    float value[kUnitCodes];
    if constexpr (kOneCodebook) {
        const auto table = Table<kWidth>::of(entries, lane);
#pragma unroll
        for (int j = 0; j < kUnitCodes; ++j) value[j] = __uint_as_float(table.of(codes, j));
    } else {
        const int64_t row = block * kUnitRows + lane / 4;
        const int64_t first[2] = {weight.first_entry(row), weight.first_entry(row + 8)};
#pragma unroll
        for (int j = 0; j < kUnitCodes; ++j) {
            const int code = static_cast<int>(codes[j]);
            value[j] = code == zero ? 0.0f : read(weight.codebook, first[j / 16] + code);
        }
    }
    if (has_escapes(weight)) {
        const float only = kOneCodebook ? read(weight.codebook, zero) : 0.0f;
        for_escapes(weight, block * units + unit, [&](int row, int column) {
            float escape = only;
            if constexpr (!kOneCodebook) {
                const int64_t first = weight.first_entry(block * kUnitRows + row);
                escape = read(weight.codebook, first + zero);
            }
            const int own = owner_of(row, column) == lane ? element_of(row, column) : -1;
#pragma unroll
            for (int j = 0; j < kUnitCodes; ++j) value[j] = j == own ? escape : value[j];
        });
    }
    const int64_t column = unit * kUnitColumns + lane % 4 * 16;
    constexpr int kVector = sizeof(uint4) / sizeof(T);
    const bool whole = weight.K % kVector == 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t row = static_cast<int64_t>(blockIdx.y) * kUnitRows + half * 8 + lane / 4;
        if (row >= args.rows) continue;
        T* const to = static_cast<T*>(args.dense.data) + row * weight.K + column;
#pragma unroll
        for (int v = 0; v < 16; v += kVector) {
            const float* const part = value + half * 16 + v;
            if (whole && column + v < weight.K) {
                *reinterpret_cast<uint4*>(to + v) = vector_of(part, T());
            } else {
#pragma unroll
                for (int j = 0; j < kVector; ++j)
                    if (column + v + j < weight.K) to[v + j] = from_float<T>(part[j]);
            }
        }
    }
}

// A warp has a row; a lane writes the eight values of a chunk where they belong.
__global__ void __launch_bounds__(kWarps* kWarp) decode_pairs(DecodeArgs args) {
    const DeviceWeight& weight = args.weight;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    if (row >= args.rows) return;
    const int64_t first_entry = weight.first_entry(args.first + row);
    const int end = weight.chunk_ptr()[args.first + row + 1];
    for (int c = weight.chunk_ptr()[args.first + row] + threadIdx.x % kWarp; c < end; c += kWarp) {
        const uint4 chunk = __ldcs(reinterpret_cast<const uint4*>(weight.codes) + c);
        const int64_t first = row * weight.K + weight.chunk_windows()[c] * kPairsWindow;
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
            const int place = chunk_byte(chunk, j);
            if (place < kPairsWindow)
                write(args.dense, first + place,
                      read(weight.codebook, first_entry + chunk_byte(chunk, kChunk + j)));
        }
    }
}

template <int kWidth>
void launch_dense(const DecodeArgs& args, const Queue& queue) {
    const DeviceWeight& weight = args.weight;
    const dim3 grid(static_cast<unsigned>((weight.units() + kWarps - 1) / kWarps),
                    static_cast<unsigned>((args.rows + kUnitRows - 1) / kUnitRows));
    with_type(args.dense.dtype, [&](auto type) {
        using T = decltype(type);
        const bool one = weight.one_codebook();
        launch(queue, one ? decode_dense<kWidth, true, T> : decode_dense<kWidth, false, T>, grid,
               kWarps * kWarp, one ? Table<kWidth>::kBytes : 0, args, "decode, rows = ", args.rows,
               ", K = ", weight.K);
    });
}

}  // namespace

void decode(const DecodeArgs& args, const Queue& queue) {
    if (args.rows == 0 || args.weight.K == 0) return;
    if (args.weight.layout == Layout::kPairs) {
        const auto blocks = static_cast<unsigned>((args.rows + kWarps - 1) / kWarps);
        launch(queue, decode_pairs, dim3(blocks), kWarps * kWarp, 0, args,
               "decode, rows = ", args.rows, ", K = ", args.weight.K);
    } else if (args.weight.width() == 5) {
        launch_dense<5>(args, queue);
    } else {
        launch_dense<8>(args, queue);
    }
}

}  // namespace placekern::cuda
