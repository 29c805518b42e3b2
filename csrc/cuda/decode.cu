// Writes rows of a weight out as a dense matrix. What limits it: the bytes that it writes.
//
// With several codebooks rows of a block may have different ones, so values are read from global
// memory, through the caches, and not from a table in shared memory. That is not tuned.
#include <type_traits>

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
// Three blocks are bound: left alone, the compiler aims at more on some devices, and spills.
template <int kWidth, bool kOneCodebook, class T>
__global__ void __launch_bounds__(kWarps* kWarp, kOneCodebook ? 3 : 1)
    decode_dense(DecodeArgs args) {
    const DeviceWeight& weight = args.weight;
    auto* const entries = reinterpret_cast<uint32_t*>(placekern_shared);
    const int lane = threadIdx.x % kWarp;
    const int64_t units = weight.units();
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    const int64_t block = args.first / kUnitRows + blockIdx.y;
    UnitCodes<kWidth> codes = {};
    Escapes escapes;
    if (unit < units) {  // on their way while the table is filled
        codes =
            load_codes<kWidth>(weight.codes + (block * units + unit) * kUnitBytes<kWidth>, lane);
        escapes = Escapes::of(weight, block * units + unit);
    }
    const int zero = zero_code(weight);
    if constexpr (kOneCodebook) {
        Table<kWidth>::fill(entries, weight, zero, ExactBits());
        __syncthreads();
    }
    if (unit >= units) return;
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
    escapes.visit(weight, [&](int row, int column) {
        const int64_t first = kOneCodebook ? 0 : weight.first_entry(block * kUnitRows + row);
        const float escape = read(weight.codebook, first + zero);
        const int own = owner_of(row, column) == lane ? element_of(row, column) : -1;
#pragma unroll
        for (int j = 0; j < kUnitCodes; ++j) value[j] = j == own ? escape : value[j];
    });
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

constexpr int kPieceWindows = 4;  // of a row, which a warp has: some 40 chunks at a density of 0.3
constexpr int kPieceSlots = kPieceWindows * kWindowSlots;
constexpr int kCodes = 256;
static_assert(kCodes == kWarps * kWarp, "a thread fills an entry of the table");

// Where the chunks of a warp's windows lie, from the first window and its row: all lanes get it.
struct PieceChunks {
    int begin, end;

    __device__ __forceinline__ static PieceChunks of(const DeviceWeight& weight, int64_t row,
                                                     int window, int lane) {
        const int start = __ldg(weight.chunk_ptr() + row);
        const int windows = static_cast<int>(weight.windows());
        const uint8_t* const counts = weight.run_chunks() + row * windows;
        const int last = min(window + kPieceWindows, windows);
        int sum = 0;  // of the windows before, and in the low byte of its own: at most 4 x 31
        for (int w = lane; w < last; w += kWarp) {
            const int count = __ldg(counts + w);
            sum += w < window ? count << 8 : count;
        }
#pragma unroll
        for (int step = kWarp / 2; step > 0; step /= 2)
            sum += __shfl_xor_sync(kFullWarp, sum, step);
        const int begin = start + (sum >> 8);
        return {begin, begin + (sum & 0xff)};
    }
};

// A warp has four windows of a row. It puts their entries among zeros in shared memory, each window
// in 256 slots, and writes them out by whole vectors, so that nobody has to clear the matrix.
template <bool kOneCodebook, class T>
__global__ void __launch_bounds__(kWarps* kWarp) decode_pairs(DecodeArgs args) {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    const DeviceWeight& weight = args.weight;
    auto* const table = reinterpret_cast<uint32_t*>(placekern_shared);
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    auto* const tile = reinterpret_cast<Bits*>(table + kCodes) + warp * kPieceSlots;
    const unsigned pieces =
        (static_cast<unsigned>(weight.windows()) + kPieceWindows - 1) / kPieceWindows;
    const unsigned own = blockIdx.x * kWarps + warp;
    const int64_t row = own / pieces;
    const int window = static_cast<int>(own % pieces) * kPieceWindows;
    const bool real = row < args.rows;

    const int code = min(static_cast<int>(threadIdx.x), (1 << weight.bits) - 1);
    const uint32_t entry = kOneCodebook ? word_of(weight.codebook, code) : 0u;
    PieceChunks chunks = {};
    if (real) chunks = PieceChunks::of(weight, args.first + row, window, lane);
    constexpr int kVector = sizeof(uint4) / sizeof(T);
#pragma unroll
    for (int i = 0; i < kPieceSlots / kVector / kWarp; ++i)
        reinterpret_cast<uint4*>(tile)[i * kWarp + lane] = make_uint4(0, 0, 0, 0);
    Chunks<2> next;
    next.load(weight, chunks.begin + lane, chunks.end);
    if constexpr (kOneCodebook)
        table[threadIdx.x] = bits_of(value_of(entry, weight.codebook.dtype), T());
    __syncthreads();
    if (!real) return;

    const int64_t first_entry = kOneCodebook ? 0 : weight.first_entry(args.first + row);
    for (int begin = chunks.begin; begin < chunks.end; begin += 2 * kWarp) {
        const Chunks<2> now = next;
        next.load(weight, begin + 2 * kWarp + lane, chunks.end);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (begin + i * kWarp + lane >= chunks.end) break;
            Bits* const to = tile + (now.window[i] - window) * kWindowSlots;
            uint32_t value[kChunk];
#pragma unroll
            for (int j = 0; j < kChunk; ++j) {
                const int code = chunk_byte(now.pairs[i], kChunk + j);
                if constexpr (kOneCodebook) {
                    value[j] = table[code];
                } else {
                    const uint32_t word = word_of(weight.codebook, first_entry + code);
                    value[j] = bits_of(value_of(word, weight.codebook.dtype), T());
                }
            }
            // Padding goes to slots from 248 on, which are not written out.
#pragma unroll
            for (int j = 0; j < kChunk; ++j)
                to[chunk_byte(now.pairs[i], j)] = static_cast<Bits>(value[j]);
        }
    }
    __syncwarp();

    auto* const to = static_cast<Bits*>(args.dense.data) + row * weight.K;
    const int first = window * kPairsWindow;
    const int count = min(static_cast<int>(weight.K) - first, kPieceWindows * kPairsWindow);
    const auto slot_of = [](int column) {
        return column / kPairsWindow * kWindowSlots + column % kPairsWindow;
    };
    if (args.taps > 1) {  // a tap after the other, so that neighbouring lanes write neighbours
        const int taps = args.taps;
        const int channels = static_cast<int>(weight.K) / taps;
        for (int tap = 0; tap < taps; ++tap) {
            const int begin = (first - tap + taps - 1) / taps;  // tap - first < taps
            for (int c = begin + lane; c * taps + tap < first + count; c += kWarp)
                to[tap * channels + c] = tile[slot_of(c * taps + tap - first)];
        }
    } else if (weight.K % kVector ==
               0) {  // then rows start on 16 bytes, and windows of 248 columns do
#pragma unroll
        for (int i = 0; i < (kPieceSlots / kVector + kWarp - 1) / kWarp; ++i) {
            const int column = (i * kWarp + lane) * kVector;
            if (column < count)
                *reinterpret_cast<uint4*>(to + first + column) =
                    *reinterpret_cast<const uint4*>(tile + slot_of(column));
        }
    } else {
        for (int column = lane; column < count; column += kWarp)
            to[first + column] = tile[slot_of(column)];
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
        const size_t shared = one ? Table<kWidth>::kBytes : 0;
        launch(queue, one ? decode_dense<kWidth, true, T> : decode_dense<kWidth, false, T>,
               {grid, kWarps * kWarp, shared}, args, "decode, rows = ", args.rows,
               ", K = ", weight.K);
    });
}

void launch_pairs(const DecodeArgs& args, const Queue& queue) {
    const DeviceWeight& weight = args.weight;
    const int64_t pieces = (weight.windows() + kPieceWindows - 1) / kPieceWindows;
    const auto blocks = static_cast<unsigned>((args.rows * pieces + kWarps - 1) / kWarps);
    with_type(args.dense.dtype, [&](auto type) {
        using T = decltype(type);
        launch(queue, weight.one_codebook() ? decode_pairs<true, T> : decode_pairs<false, T>,
               {dim3(blocks), kWarps * kWarp, 4 * kCodes + kWarps * kPieceSlots * sizeof(T)}, args,
               "decode, rows = ", args.rows, ", K = ", weight.K);
    });
}

}  // namespace

void decode(const DecodeArgs& args, const Queue& queue) {
    PK_CHECK(args.taps == 1 || args.weight.taps == 1, "decode: columns that lie by ",
             args.weight.taps, " taps already, expected taps = 1, not ", args.taps);
    if (args.rows == 0 || args.weight.K == 0) return;
    if (args.weight.layout == Layout::kPairs)
        launch_pairs(args, queue);
    else if (args.weight.width() == 5)
        launch_dense<5>(args, queue);
    else
        launch_dense<8>(args, queue);
}

}  // namespace placekern::cuda
