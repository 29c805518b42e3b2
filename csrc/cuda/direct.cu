// y = W x for one or two columns, straight from the codes.
//
// What limits it: bytes. On an H100 (3.0 TB/s, 132 SMs at 1.755 GHz) a byte of weight has time for
// ten thread-instructions. Dense layout: a position costs a shift, a mask, a lookup and a
// multiply-add, at one byte (8 bits) or 5/8. Pairs: about eight instructions for 2.25 bytes.
// The lookup is one wavefront of shared memory for 32 positions (table.cuh), so neither the table
// nor the arithmetic is the bottleneck, if enough loads are in flight: each warp keeps the next two
// or three units, or two chunks a lane, on their way while it works on as many.
//
// With several codebooks a block has 16 rows of one of them, and fills its table from that. Nothing
// is tuned for it: small codebooks are read again by every block of their group.
#include "instructions.cuh"
#include "ops.h"
#include "output.cuh"
#include "table.cuh"

namespace placekern::cuda {
namespace {

constexpr int kWarps = 8;

// A lane's 16 elements of x for each column of the batch, as they lie in memory.
template <int kN, class T>
struct Slice {
    static constexpr int kVectors = 16 * sizeof(T) / sizeof(uint4);
    uint4 x[kN][kVectors];

    __device__ __forceinline__ void load(const T* const (&from)[kN]) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v)
                x[n][v] = __ldg(reinterpret_cast<const uint4*>(from[n]) + v);
        }
    }

    // Element j of column n; both constants once their loops are unrolled.
    __device__ __forceinline__ float operator()(int n, int j) const {
        const uint4& v = x[n][j * static_cast<int>(sizeof(T)) / 16];
        const int at = j * static_cast<int>(sizeof(T)) % 16 / 4;
        const uint32_t word = at == 0 ? v.x : at == 1 ? v.y : at == 2 ? v.z : v.w;
        if constexpr (sizeof(T) == 4) {
            return __uint_as_float(word);
        } else {
            const float2 both = unpack(word, T());
            return j % 2 ? both.y : both.x;
        }
    }
};

// Units of codes that a warp has on their way: 2 KB or a little less. A multiprocessor with sixteen
// warps waits for 30 KB; by Little's law 3.0 TB/s at 700 ns take 16.
template <int kWidth>
constexpr int kUnitsAhead = kWidth == 8 ? 2 : 3;

// A block has 16 rows; its warps take turns along the columns and add up at the end.
template <int kWidth, int kN, class T>
__global__ void __launch_bounds__(kWarps* kWarp, 2) direct_dense(DirectArgs args) {
    using Codebook = Table<kWidth>;
    constexpr int kAhead = kUnitsAhead<kWidth>;
    constexpr int kRoundBytes = kWarps * kUnitBytes<kWidth>;
    const DeviceWeight& weight = args.weight;
    auto* const shared = reinterpret_cast<uint32_t*>(placekern_shared);
    auto* const sums_of_warps = reinterpret_cast<float*>(placekern_shared + Codebook::kBytes);
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    const int64_t n0 = static_cast<int64_t>(blockIdx.z) * kN;
    const int units = static_cast<int>(weight.units());
    const int per_split = (units + args.out.splits - 1) / args.out.splits;
    const int first = min(per_split * static_cast<int>(blockIdx.y), units) + warp;
    const int end = min(per_split * (static_cast<int>(blockIdx.y) + 1), units);

    const T* rows[kN];
#pragma unroll
    for (int n = 0; n < kN; ++n)
        rows[n] =
            static_cast<const T*>(args.source.x) + min(n0 + n, args.out.N - 1) * args.source.stride;
    const int64_t first_unit = int64_t{blockIdx.x} * units;
    const uint8_t* codes = weight.codes + (first_unit + first) * kUnitBytes<kWidth>;
    const int own_column = lane % 4 * 16;

    UnitCodes<kWidth> next_codes[kAhead];
    // Asks for those of `unit` and the rounds behind it. The branch is also what keeps the compiler
    // from moving loads down to where they are needed.
    const auto load = [&](int unit) {
        if (unit + (kAhead - 1) * kWarps < end) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i)
                next_codes[i] = load_codes<kWidth>(codes + i * kRoundBytes, lane);
        } else {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                next_codes[i] = {};
                if (unit + i * kWarps < end)
                    next_codes[i] = load_codes<kWidth>(codes + i * kRoundBytes, lane);
            }
        }
        codes += kAhead * kRoundBytes;
    };
    load(first);         // on their way while the table is filled
    const T* own_x[kN];  // of the unit after the next
#pragma unroll
    for (int n = 0; n < kN; ++n) own_x[n] = rows[n] + first * kUnitColumns + own_column;
    Slice<kN, T> next_x = {};
    if (first < end) next_x.load(own_x);
    EscapedUnits<kWarps> escaped(weight.escape_ptr() + first_unit, first, end, lane);
    const int zero = zero_code(weight);
    const int64_t first_entry = weight.first_entry(int64_t{blockIdx.x} * kUnitRows);
    Codebook::fill(shared, weight, zero, ExactBits(), first_entry);
    __syncthreads();
    const Codebook table = Codebook::of(shared, lane);

    float sums[kN][2] = {};
    escaped.visit([&](int unit) {
        for_escapes(weight, first_unit + unit, [&](int row, int column) {
            if (owner_of(row, column) != lane) return;
            const float value = read(weight.codebook, first_entry + zero);
#pragma unroll
            for (int n = 0; n < kN; ++n) {
                const float term = value * to_float(rows[n][unit * kUnitColumns + column]);
                sums[n][0] += row < 8 ? term : 0.0f;
                sums[n][1] += row < 8 ? 0.0f : term;
            }
        });
    });
    // Behind the end x is zero, so that no branch splits the work.
    for (int unit = first; unit < end; unit += kAhead * kWarps) {
        UnitCodes<kWidth> now[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) now[i] = next_codes[i];
        load(unit + kAhead * kWarps);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const Slice<kN, T> x = next_x;
            next_x = {};
#pragma unroll
            for (int n = 0; n < kN; ++n) own_x[n] += kWarps * kUnitColumns;
            if (unit + (i + 1) * kWarps < end) next_x.load(own_x);
#pragma unroll
            for (int j = 0; j < kUnitCodes; ++j) {
                const float value = __uint_as_float(table.of(now[i], j));
#pragma unroll
                for (int n = 0; n < kN; ++n) sums[n][j / 16] += value * x(n, j % 16);
            }
        }
    }
    let_next_kernel_start();

#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = sums[n][half];
            sum += __shfl_xor_sync(kFullWarp, sum, 1);
            sum += __shfl_xor_sync(kFullWarp, sum, 2);
            if (lane % 4 == 0)
                sums_of_warps[(warp * kN + n) * kUnitRows + half * 8 + lane / 4] = sum;
        }
    }
    __syncthreads();
    if (threadIdx.x < kN * kUnitRows) {
        const int64_t n = n0 + threadIdx.x / kUnitRows;
        const int64_t m = static_cast<int64_t>(blockIdx.x) * kUnitRows + threadIdx.x % kUnitRows;
        float sum = 0.0f;
        for (int w = 0; w < kWarps; ++w) sum += sums_of_warps[w * kN * kUnitRows + threadIdx.x];
        if (n < args.out.N && m < args.out.M) add(args.out, blockIdx.y, n, m, sum);
    }
}

constexpr int kRowWarps = 2 * kWarps;  // of a block that takes pairs, each with a row

// Puts x into shared memory as windows of 256 slots, those behind 248 and behind K zero; by all
// threads of a block. Five loads of a thread are on their way at once: 512 threads read 16,384
// numbers of 16 bits in one go.
template <class T>
__device__ __forceinline__ void stage(T* shared, const T* x, int K, int slots) {
    constexpr int kVector = sizeof(uint4) / sizeof(T);  // divides 248
    constexpr int kAtOnce = 5;
#pragma unroll 1
    for (int begin = threadIdx.x * kVector; begin < slots;
         begin += kAtOnce * blockDim.x * kVector) {
        uint4 vector[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int slot = begin + i * blockDim.x * kVector;
            const int place = slot % kWindowSlots;
            const int column = slot / kWindowSlots * kPairsWindow + place;
            vector[i] = place < kPairsWindow && column < K && slot < slots
                            ? __ldg(reinterpret_cast<const uint4*>(x + column))
                            : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int slot = begin + i * blockDim.x * kVector;
            if (slot < slots) *reinterpret_cast<uint4*>(shared + slot) = vector[i];
        }
    }
}

// A warp has a row; its lanes take turns along the chunks. x lies in shared memory with the zeros
// that padding pairs point to, or, where it does not fit, is gathered through the L1 cache, which
// takes more registers than two blocks leave on Turing.
template <int kWidth, int kN, class T, bool kSharedX>
__global__ void __launch_bounds__(kRowWarps* kWarp, kSharedX ? 2 : 1)
    direct_pairs(DirectArgs args) {
    using Codebook = Table<kWidth>;
    constexpr int kAhead = 2;  // 34 KB of a multiprocessor with two blocks
    const DeviceWeight& weight = args.weight;
    auto* const shared = reinterpret_cast<uint32_t*>(placekern_shared);
    auto* const shared_x = reinterpret_cast<T*>(placekern_shared + Codebook::kBytes);
    const int lane = threadIdx.x % kWarp;
    const int64_t n0 = static_cast<int64_t>(blockIdx.z) * kN;
    const int64_t m0 = static_cast<int64_t>(blockIdx.x) * kRowWarps;
    const int64_t m = m0 + threadIdx.x / kWarp;
    const int slots = static_cast<int>(weight.windows()) * kWindowSlots;
    const T* rows[kN];
#pragma unroll
    for (int n = 0; n < kN; ++n)
        rows[n] =
            static_cast<const T*>(args.source.x) + min(n0 + n, args.out.N - 1) * args.source.stride;

    // All that comes from memory is asked for before anything is waited for; the chunks as soon as
    // it is known where they lie.
    const int row_first = m < weight.M ? __ldg(weight.chunk_ptr() + m) : 0;
    const int row_end = m < weight.M ? __ldg(weight.chunk_ptr() + m + 1) : 0;
    const auto entries = Codebook::Entries::load(weight, weight.first_entry(m0));
    if constexpr (kSharedX) {
#pragma unroll
        for (int n = 0; n < kN; ++n)
            stage(shared_x + n * slots, rows[n], static_cast<int>(weight.K), slots);
    }
    // Of whole warps: the 32 chunks that one takes at once were put together for its banks.
    const int share = (row_end - row_first + args.out.splits - 1) / args.out.splits;
    const int per_split = (share + kWarp - 1) / kWarp * kWarp;
    const int first = min(row_first + per_split * static_cast<int>(blockIdx.y), row_end);
    const int end = min(first + per_split, row_end);
    Chunks<kAhead> next;
    next.load(weight, first + lane, end);
    Codebook::fill(shared, weight, -1, ExactBits(), entries);
    __syncthreads();
    if (m >= weight.M) return;  // whole warps; nothing below waits for the block
    const Codebook table = Codebook::of(shared, lane);

    float sums[kN] = {};
    for (int begin = first; begin < end; begin += kAhead * kWarp) {
        const Chunks<kAhead> now = next;
        next.load(weight, begin + kAhead * kWarp + lane, end);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
#pragma unroll
            for (int j = 0; j < kChunk; ++j) {
                const float value = __uint_as_float(table.of(now.pairs[i], j));
                // A window's slots start on a power of two: union instead of addition.
                constexpr int kLog = sizeof(T) == 4 ? 2 : 1;
                const unsigned slot = scaled_chunk_byte<kLog>(now.pairs[i], j) |
                                      static_cast<unsigned>(now.window[i]) * (kWindowSlots << kLog);
                const int place = chunk_byte(now.pairs[i], j);
#pragma unroll
                for (int n = 0; n < kN; ++n) {
                    if constexpr (kSharedX) {
                        const auto* const x = reinterpret_cast<const char*>(shared_x + n * slots);
                        sums[n] += value * to_float(*reinterpret_cast<const T*>(x + slot));
                    } else if (place < kPairsWindow) {
                        sums[n] += value * to_float(rows[n][now.window[i] * kPairsWindow + place]);
                    }
                }
            }
        }
    }
    let_next_kernel_start();
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int step = kWarp / 2; step > 0; step /= 2)
            sums[n] += __shfl_xor_sync(kFullWarp, sums[n], step);
        if (lane == 0 && n0 + n < args.out.N) add(args.out, blockIdx.y, n0 + n, m, sums[n]);
    }
}

template <int kWidth, int kN, class T>
void launch_direct(const DirectArgs& args, const Queue& queue) {
    const DeviceWeight& weight = args.weight;
    const auto columns = static_cast<unsigned>((args.out.N + kN - 1) / kN);
    const auto splits = static_cast<unsigned>(args.out.splits);
    const auto run = [&](auto kernel, int64_t blocks, int threads, size_t shared) {
        launch(queue, kernel,
               {dim3(static_cast<unsigned>(blocks), splits, columns), threads, shared}, args,
               "linear, M = ", weight.M, ", K = ", weight.K, ", N = ", args.out.N);
    };
    if (weight.layout == Layout::kDense) {
        constexpr size_t kSums = sizeof(float) * kWarps * kN * kUnitRows;
        run(direct_dense<kWidth, kN, T>, weight.blocks(), kWarps * kWarp,
            Table<kWidth>::kBytes + kSums);
        return;
    }
    const size_t shared = Table<kWidth>::kBytes + kN * weight.windows() * kWindowSlots * sizeof(T);
    const int64_t blocks = (weight.M + kRowWarps - 1) / kRowWarps;
    if (shared <= static_cast<size_t>(shared_limit(queue.device)))
        run(direct_pairs<kWidth, kN, T, true>, blocks, kRowWarps * kWarp, shared);
    else
        run(direct_pairs<kWidth, kN, T, false>, blocks, kRowWarps * kWarp, Table<kWidth>::kBytes);
}

}  // namespace

void direct(const DirectArgs& args, const Queue& queue) {
    if (args.out.N == 0 || args.out.M == 0) return;
    PK_CHECK(args.weight.one_codebook() || args.weight.group_size % kUnitRows == 0,
             "direct: group_size is ", args.weight.group_size, ", expected a multiple of ",
             kUnitRows, "; decode the weight instead");
    with_type(args.source.dtype, [&](auto type) {
        using T = decltype(type);
        if (args.weight.width() == 5)
            args.out.N == 1 ? launch_direct<5, 1, T>(args, queue)
                            : launch_direct<5, 2, T>(args, queue);
        else
            args.out.N == 1 ? launch_direct<8, 1, T>(args, queue)
                            : launch_direct<8, 2, T>(args, queue);
    });
    finish(args.out, queue);
}

}  // namespace placekern::cuda
