// y = W X for up to some hundred columns: a warp decodes 16 rows of weights straight into the
// fragments of mma.sync. A lane owns 16 neighbouring columns of two rows (layout.cuh), X lies in
// shared memory in the same order, so fragments need neither shuffles nor ldmatrix.
//
// What limits it: bytes at 16 columns; at 64, shared memory (of 1,024 positions: 32 wavefronts of
// lookups, 64 of X, halved where a warp has 32 rows), then tensor cores.
#include "ops.h"
#include "output.cuh"
#include "source.cuh"
#include "table.cuh"

#include <algorithm>

namespace placekern::cuda {
namespace {

constexpr int kWarps = 4;

// How many 16-row blocks a warp has: with many columns, two, so that X is read half as often.
// TF32 operands take twice the registers and leave no room for it.
template <int kTiles, class T>
constexpr int kBlocks = kTiles >= 4 && sizeof(T) == 2 ? 2 : 1;

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

    // From a tile that holds the rows as they are.
    __device__ __forceinline__ void load(const T* row, const T* row_8, int unit, int q) {
        Sixteen<T> upper, lower;
        upper.load(row, unit, q);
        lower.load(row_8, unit, q);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            a[s][0] = upper.word[2 * s];
            a[s][1] = lower.word[2 * s];
            a[s][2] = upper.word[2 * s + 1];
            a[s][3] = lower.word[2 * s + 1];
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

// Writes the sums of a block. They go through shared memory where they go to y, so that the code
// for places, ReLU and types stands once, in a loop, and not once for each of up to 64 sums of a
// lane.
template <int kTiles, int kRowBlocks>
__device__ __forceinline__ void write(const float (&sums)[kRowBlocks][kTiles][4], const Output& out,
                                      int64_t n0, int lane, int warp) {
    using Staged = Staged<kTiles, kRowBlocks>;
    const int64_t m0 = static_cast<int64_t>(blockIdx.x) * Staged::kRows;
    const int rows = static_cast<int>(min(out.M - m0, int64_t{Staged::kRows}));
    const int columns = static_cast<int>(min(out.N - n0, int64_t{Staged::kColumns}));
    const int own_row = warp * kRowBlocks * kUnitRows + lane / 4;
    const int own_column = lane % 4 * 2;
    if (out.splits > 1) {
        const int step_n = rows_together(out) ? static_cast<int>(out.M) : 1;
        const int step_m = rows_together(out) ? 1 : static_cast<int>(out.N);
        float* const to = out.partial + blockIdx.z * out.M * out.N + n0 * step_n + m0 * step_m;
#pragma unroll
        for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const int n = own_column + t * 8 + r % 2;
                    const int m = own_row + block * kUnitRows + r / 2 * 8;
                    if (n < columns && m < rows)
                        to[int64_t{n} * step_n + int64_t{m} * step_m] = sums[block][t][r];
                }
            }
        }
        return;
    }
    float bias[kRowBlocks][2];
#pragma unroll
    for (int i = 0; i < 2 * kRowBlocks; ++i) {
        const int m = own_row + i * 8;
        bias[i / 2][i % 2] = m < rows ? bias_of(out, m0 + m) : 0.0f;
    }
    auto* const staged = reinterpret_cast<float*>(placekern_shared);
    __syncthreads();  // nobody reads a table or a tile any more
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int n = own_column + t * 8 + r % 2;
                const int m = own_row + block * kUnitRows + r / 2 * 8;
                staged[n * Staged::kStride + m] = sums[block][t][r] + bias[block][r / 2];
            }
        }
    }
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

// Codes of a warp on their way. Copies go to a ring of shared memory in which a lane reads only
// what it copied itself, so that it waits for nobody else. Where copies wait, on Turing, registers
// hold the next unit in its place.
template <int kWidth, int kRowBlocks>
class CodesAhead {
  public:
    static constexpr int kStageBytes = kRowBlocks * kUnitBytes<kWidth>;
    static constexpr int kStages = kStageBytes > kUnitBytes<5> ? 3 : 4;
    static constexpr int kBytes = kStages * kStageBytes;

    // `rows`: where the first unit of each block of rows is.
    __device__ CodesAhead(unsigned char* ring, const uint8_t* const (&rows)[kRowBlocks], int lane)
        : ring_(reinterpret_cast<uint32_t*>(ring)), lane_(lane) {
#pragma unroll
        for (int b = 0; b < kRowBlocks; ++b) from_[b] = rows[b];
    }

    // Units that are on their way while one is worked on.
    __device__ static int depth() { return copies_wait() ? kStages - 1 : 1; }

    // Starts the next unit, into the stage behind that of the last; never into one that was taken
    // since the last wait.
    __device__ __forceinline__ void start() {
#pragma unroll
        for (int b = 0; b < kRowBlocks; ++b) {
            if (copies_wait())
                copy(ring_ + (next_ * kRowBlocks + b) * kWords, from_[b]);
            else
                held_[b] = load_codes<kWidth>(from_[b], lane_);
            from_[b] += kUnitBytes<kWidth>;
        }
        next_ = next_ == kStages - 1 ? 0 : next_ + 1;
    }

    // The oldest unit, which must have been waited for.
    __device__ __forceinline__ void take(UnitCodes<kWidth> (&codes)[kRowBlocks]) {
#pragma unroll
        for (int b = 0; b < kRowBlocks; ++b) {
            if (copies_wait())
                codes[b] = read(ring_ + (now_ * kRowBlocks + b) * kWords);
            else
                codes[b] = held_[b];
        }
        now_ = now_ == kStages - 1 ? 0 : now_ + 1;
    }

  private:
    static constexpr int kWords = kUnitBytes<kWidth> / 4;
    static constexpr int kQuads = kWidth / 4 * 4;  // words of a lane that are copied in fours

    __device__ __forceinline__ void copy(uint32_t* to, const uint8_t* unit) const {
        const auto* const from = reinterpret_cast<const uint32_t*>(unit);
#pragma unroll
        for (int w = 0; w < kQuads; w += 4) {
            const int place = word_place<kWidth>(lane_, w);
            copy_async(to + place, from + place, true);
        }
#pragma unroll
        for (int w = kQuads; w < kWidth; ++w) {
            const int place = word_place<kWidth>(lane_, w);
            copy_word_async(to + place, from + place);
        }
    }

    __device__ __forceinline__ UnitCodes<kWidth> read(const uint32_t* from) const {
        UnitCodes<kWidth> codes;
#pragma unroll
        for (int w = 0; w < kQuads; w += 4) {
            const auto four = *reinterpret_cast<const uint4*>(from + word_place<kWidth>(lane_, w));
            codes.word[w] = four.x;
            codes.word[w + 1] = four.y;
            codes.word[w + 2] = four.z;
            codes.word[w + 3] = four.w;
        }
#pragma unroll
        for (int w = kQuads; w < kWidth; ++w) codes.word[w] = from[word_place<kWidth>(lane_, w)];
        return codes;
    }

    uint32_t* ring_;
    const uint8_t* from_[kRowBlocks];
    UnitCodes<kWidth> held_[kRowBlocks];
    int lane_;
    int now_ = 0, next_ = 0;  // stages
};

// Which units of a block of rows have escapes, 32 at a time: most have none, and where they begin
// and end would have to be read, and waited for, for each.
class EscapesAhead {
  public:
    EscapesAhead() = default;
    // `ptr`: of the first of `count` units.
    __device__ EscapesAhead(const int* ptr, int count, int lane)
        : ptr_(ptr), count_(count), lane_(lane) {
        look(0);
    }

    // Whether unit i has any; asked for i = 0, 1, 2, ... by all lanes.
    __device__ __forceinline__ bool of(int i) {
        if (i % kWarp == 0) {
            units_ = __ballot_sync(kFullWarp, begin_ != end_);
            look(i + kWarp);
        }
        return units_ >> i % kWarp & 1;
    }

  private:
    __device__ __forceinline__ void look(int i) {
        const bool real = i + lane_ < count_;
        begin_ = real ? __ldg(ptr_ + i + lane_) : 0;
        end_ = real ? __ldg(ptr_ + i + lane_ + 1) : 0;
    }

    const int* ptr_;
    int count_, lane_;
    int begin_, end_;  // of unit `lane` of the next 32
    unsigned units_ = 0;
};

template <int kWidth, int kTiles, class T>
struct DenseShared {
    using Codes = CodesAhead<kWidth, kBlocks<kTiles, T>>;
    static constexpr int kColumns = 8 * kTiles;
    static constexpr int kStride = tile_stride<T>(kUnitColumns);
    // Tiles of X: one that is read, the others on their way. TF32 takes twice the room.
    static constexpr int kXTiles = sizeof(T) == 2 ? 3 : 2;
    static constexpr int kTile = kColumns * kStride;
    static constexpr int kRing = kWarps * Codes::kBytes;
    static constexpr int kFixed =
        Table<kWidth>::kBytes + kXTiles * kTile * static_cast<int>(sizeof(T));
    // Groups of copies that may be on their way while a unit is worked on. Each round makes two, of
    // the unit kXTiles - 1 ahead for X and then of the one kStages - 1 ahead for the codes.
    static constexpr int kLatest = std::min(1 + 2 * (kXTiles - 2), 2 * (Codes::kStages - 2));
    static size_t bytes(bool image, int64_t units_per_split, bool ring) {
        const size_t loop = kFixed + (ring ? kRing : 0) +
                            (image ? units_per_split * kUnitColumns * sizeof(Tap) : 0);
        return std::max(loop, Staged<kTiles, kBlocks<kTiles, T>>::kBytes);
    }
};

template <int kWidth, int kTiles, class T>
__global__ void __launch_bounds__(kWarps* kWarp, 2) matmul_dense(MatmulArgs args) {
    using Shared = DenseShared<kWidth, kTiles, T>;
    using Codes = typename Shared::Codes;
    constexpr int kRowBlocks = kBlocks<kTiles, T>;
    const DeviceWeight& weight = args.weight;
    auto* const entries = reinterpret_cast<uint32_t*>(placekern_shared);
    auto* const tiles = reinterpret_cast<T*>(placekern_shared + Table<kWidth>::kBytes);
    unsigned char* const rings = placekern_shared + Shared::kFixed;
    auto* const taps = reinterpret_cast<Tap*>(rings + (copies_wait() ? Shared::kRing : 0));
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    const int64_t n0 = static_cast<int64_t>(blockIdx.y) * Shared::kColumns;
    const int64_t block0 = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kRowBlocks;
    const int64_t units = weight.units();
    const int64_t per_split = (units + args.out.splits - 1) / args.out.splits;
    const int64_t first = per_split * blockIdx.z;
    const int count = static_cast<int>(min(per_split, units - first));  // negative: none left

    // Blocks of rows behind the last one decode the last one again and write nothing.
    const uint8_t* rows[kRowBlocks];
    int64_t first_unit[kRowBlocks];
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b) {
        first_unit[b] = min(block0 + b, weight.blocks() - 1) * units + first;
        rows[b] = weight.codes + first_unit[b] * kUnitBytes<kWidth>;
    }
    const auto fill = [&](int i, int tile) {
        fill_tile<Shared::kColumns>(
            tiles + tile * Shared::kTile, args.source, taps + i * kUnitColumns, n0, args.out.N,
            (first + i) * kUnitColumns, weight.K, kUnitColumns, kUnitColumns);
    };
    // On their way while the table is filled; of an image, X needs taps first.
    Codes codes(rings + warp * Codes::kBytes, rows, lane);
#pragma unroll
    for (int round = 1 - Codes::kStages; round < 0; ++round) {
        const int x = round + Shared::kXTiles - 1, c = round + Codes::kStages - 1;
        if (x >= 0 && x < count && !args.source.image) fill(x, x);
        commit_copies();
        if (c < min(count, Codes::depth())) codes.start();
        commit_copies();
    }
    EscapesAhead escapes[kRowBlocks];
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b)
        escapes[b] = EscapesAhead(weight.escape_ptr() + first_unit[b], count, lane);
    const int zero = zero_code(weight);
    const uint32_t escape = OperandBits<T>()(read(weight.codebook, zero));
    Table<kWidth>::fill(entries, weight, zero, OperandBits<T>());
    if (args.source.image && count > 0) {
        fill_taps(taps, count * kUnitColumns, first * kUnitColumns, weight.K, args.source);
        __syncthreads();
        for (int i = 0; i < min(count, Shared::kXTiles - 1); ++i) fill(i, i);
    }
    const auto table = Table<kWidth>::of(entries, lane);

    float sums[kRowBlocks][kTiles][4] = {};
    int tile = 0, spare_tile = Shared::kXTiles - 1;
    for (int i = 0; i < count; ++i) {
        wait_for_copies_before<Shared::kLatest>();
        __syncthreads();  // this tile is complete, and nobody reads the spare one any more
        UnitCodes<kWidth> now[kRowBlocks];
        codes.take(now);
        if (i + Shared::kXTiles - 1 < count) fill(i + Shared::kXTiles - 1, spare_tile);
        commit_copies();
        if (i + Codes::depth() < count) codes.start();
        commit_copies();
        Operand<T> operand[kRowBlocks];
#pragma unroll
        for (int b = 0; b < kRowBlocks; ++b) {
            uint32_t element[kUnitCodes];
#pragma unroll
            for (int j = 0; j < kUnitCodes; ++j) element[j] = table.of(now[b], j);
            if (escapes[b].of(i)) {
                for_escapes(weight, first_unit[b] + i, [&](int row, int column) {
                    const int own = owner_of(row, column) == lane ? element_of(row, column) : -1;
#pragma unroll
                    for (int j = 0; j < kUnitCodes; ++j)
                        element[j] = j == own ? escape : element[j];
                });
            }
            operand[b].pack(element);
        }
        multiply<kTiles, kRowBlocks, T>(sums, operand, tiles + tile * Shared::kTile,
                                        Shared::kStride, 0, lane);
        spare_tile = tile;
        tile = tile == Shared::kXTiles - 1 ? 0 : tile + 1;
    }
    write<kTiles, kRowBlocks>(sums, args.out, n0, lane, warp);
}

template <int kWidth, int kTiles, class T>
struct PairsShared {
    static constexpr int kColumns = 8 * kTiles;
    static constexpr int kStride = tile_stride<T>(kWindowSlots);
    static constexpr int kRowBytes = kStride * sizeof(T);
    static size_t bytes(bool image, int64_t windows_per_split) {
        const size_t loop = Table<kWidth>::kBytes + (kWarps * kUnitRows + kColumns) * kRowBytes +
                            (image ? windows_per_split * kWindowSlots * sizeof(Tap) : 0);
        return std::max(loop, Staged<kTiles, 1>::kBytes);
    }
};

// A lane's share of the runs of a window: two lanes a row, chunk after chunk.
struct Run {
    static constexpr int kAhead = 4;  // chunks on their way while the last window is multiplied
    int next, end;
    uint4 ahead[kAhead];

    __device__ __forceinline__ void start(const uint4* chunks, int first, int count, int half) {
        next = first + half;
        end = first + count;
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            // Not read later unless it was read here.
            if (next + 2 * i < end) ahead[i] = __ldcs(chunks + next + 2 * i);
        }
    }
};

// Writes the eight values of a chunk into a row of a tile; padding goes to place 248.
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

// Pairs are scattered over a zeroed tile of a warp's 16 rows and one window; then as above.
template <int kWidth, int kTiles, class T>
__global__ void __launch_bounds__(kWarps* kWarp, 2) matmul_pairs(MatmulArgs args) {
    using Shared = PairsShared<kWidth, kTiles, T>;
    const DeviceWeight& weight = args.weight;
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    auto* const entries = reinterpret_cast<uint32_t*>(placekern_shared);
    auto* const tile = reinterpret_cast<T*>(placekern_shared + Table<kWidth>::kBytes);
    T* const own = tile + (Shared::kColumns + warp * kUnitRows) * Shared::kStride;
    auto* const taps =
        reinterpret_cast<Tap*>(tile + (Shared::kColumns + kWarps * kUnitRows) * Shared::kStride);
    const int64_t n0 = static_cast<int64_t>(blockIdx.y) * Shared::kColumns;
    const int64_t row0 = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kUnitRows;
    const int64_t windows = weight.windows();
    const int64_t per_split = (windows + args.out.splits - 1) / args.out.splits;
    const int64_t first = per_split * blockIdx.z;
    const int64_t end = min(first + per_split, windows);

    const uint4* const chunks = reinterpret_cast<const uint4*>(weight.codes);
    const int64_t m = row0 + lane / 2;
    const uint8_t* const counts = weight.run_chunks() + min(m, weight.M - 1) * windows;
    int cursor = __ldg(weight.chunk_ptr() + min(m, weight.M - 1));
    for (int64_t w = 0; w < first; ++w) cursor += __ldg(counts + w);
    Run run = {};
    int count = m < weight.M && first < end ? __ldg(counts + first) : 0;
    run.start(chunks, cursor, count, lane % 2);

    Table<kWidth>::fill(entries, weight, -1, OperandBits<T>());
    if (args.source.image && first < end) {
        for (int64_t w = first; w < end; ++w)
            fill_taps(taps + (w - first) * kWindowSlots, kWindowSlots, w * kPairsWindow, weight.K,
                      args.source);
    }
    __syncthreads();
    const auto table = Table<kWidth>::of(entries, lane);

    float sums[1][kTiles][4] = {};
    for (int64_t window = first; window < end; ++window) {
        fill_tile<Shared::kColumns>(tile, args.source, taps + (window - first) * kWindowSlots, n0,
                                    args.out.N, window * kPairsWindow, weight.K, kWindowSlots,
                                    kPairsWindow);
        for (int i = lane; i < kUnitRows * Shared::kRowBytes / 16; i += kWarp)
            reinterpret_cast<uint4*>(own)[i] = make_uint4(0, 0, 0, 0);
        __syncwarp();
        const auto place = [&](const uint4& chunk) {
            uint32_t value[kChunk];
#pragma unroll
            for (int j = 0; j < kChunk; ++j) value[j] = table.of(chunk, j);
            scatter(own + lane / 2 * Shared::kStride, chunk, value);
        };
#pragma unroll
        for (int i = 0; i < Run::kAhead; ++i)
            if (run.next + 2 * i < run.end) place(run.ahead[i]);
        for (int c = run.next + 2 * Run::kAhead; c < run.end; c += 2) place(__ldcs(chunks + c));
        cursor += count;
        count = m < weight.M && window + 1 < end ? __ldg(counts + window + 1) : 0;
        run.start(chunks, cursor, count, lane % 2);
        wait_for_copies();
        __syncthreads();
        const T* const row = own + lane / 4 * Shared::kStride;
#pragma unroll
        for (int unit = 0; unit < kWindowSlots / kUnitColumns; ++unit) {
            Operand<T> operand[1];
            operand[0].load(row, row + 8 * Shared::kStride, unit, lane % 4);
            multiply<kTiles, 1, T>(sums, operand, tile, Shared::kStride, unit, lane);
        }
        __syncthreads();  // X and the own rows are read; the next window may overwrite them
    }
    write<kTiles, 1>(sums, args.out, n0, lane, warp);
}

// Calls f with the kernel for `tiles` times 8 columns, the rows of a block and its shared memory;
// `ring`: copies do not wait on the device.
template <int kWidth, int kTiles, class T, class F>
void with_kernel(const MatmulArgs& args, bool ring, F f) {
    const int splits = args.out.splits;
    const auto share = [splits](int64_t steps) { return (steps + splits - 1) / splits; };
    if (args.weight.layout == Layout::kDense) {
        f(matmul_dense<kWidth, kTiles, T>, kWarps * kBlocks<kTiles, T> * kUnitRows,
          DenseShared<kWidth, kTiles, T>::bytes(args.source.image, share(args.weight.units()),
                                                ring));
    } else {
        f(matmul_pairs<kWidth, kTiles, T>, kWarps * kUnitRows,
          PairsShared<kWidth, kTiles, T>::bytes(args.source.image, share(args.weight.windows())));
    }
}

template <class F>
void with_kernel(const MatmulArgs& args, bool ring, int tiles, F f) {
    with_type(args.source.dtype, [&](auto type) {
        using T = decltype(type);
        const bool narrow = args.weight.width() == 5;
        if (tiles == 2)
            narrow ? with_kernel<5, 2, T>(args, ring, f) : with_kernel<8, 2, T>(args, ring, f);
        else if (tiles == 4)
            narrow ? with_kernel<5, 4, T>(args, ring, f) : with_kernel<8, 4, T>(args, ring, f);
        else
            narrow ? with_kernel<5, 8, T>(args, ring, f) : with_kernel<8, 8, T>(args, ring, f);
    });
}

int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    PK_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device), "properties of device ", device);
    return value;
}

// How many blocks of a kernel a multiprocessor holds at once.
template <class Args>
int resident_blocks(void (*kernel)(Args), size_t shared, int device) {
    const DeviceScope scope(device);
    if (shared > 48 * 1024) {  // else no block would be allowed
        PK_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared)),
                      "matmul, ", shared, " bytes of shared memory");
    }
    int blocks = 0;
    PK_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kWarps * kWarp, shared),
        "matmul, blocks with ", shared, " bytes of shared memory");
    return blocks;
}

// The most columns, in eights, whose tiles fit; 0 when none do.
int fitting_tiles(const MatmulArgs& args, bool ring, int device) {
    const auto limit = static_cast<size_t>(shared_limit(device));
    const int64_t N = args.out.N;
    for (int tiles = N <= 16 ? 2 : N <= 32 ? 4 : 8; tiles >= 2; tiles /= 2) {
        bool fits = false;
        with_kernel(args, ring, tiles, [&](auto, int, size_t shared) { fits = shared <= limit; });
        if (fits) return tiles;
    }
    return 0;
}

}  // namespace

bool matmul(const MatmulArgs& args, const Queue& queue) {
    const Output& out = args.out;
    PK_CHECK(args.weight.one_codebook(), "matmul: group_size is ", args.weight.group_size,
             " of M = ", args.weight.M, ", expected one codebook; decode the weight instead");
    if (out.N == 0 || out.M == 0) return true;
    if (args.source.image && !has_taps(args.source.shape)) return false;
    const bool ring = attribute(cudaDevAttrComputeCapabilityMajor, queue.device) >= 8;
    const int tiles = fitting_tiles(args, ring, queue.device);
    if (tiles == 0) return false;
    with_kernel(args, ring, tiles, [&](auto kernel, int rows, size_t shared) {
        const dim3 grid(static_cast<unsigned>((out.M + rows - 1) / rows),
                        static_cast<unsigned>((out.N + 8 * tiles - 1) / (8 * tiles)),
                        static_cast<unsigned>(out.splits));
        launch(queue, kernel, grid, kWarps * kWarp, shared, args, "matmul, M = ", out.M,
               ", K = ", args.weight.K, ", N = ", out.N);
    });
    finish(out, queue);
    return true;
}

int matmul_splits(const DeviceWeight& weight, Dtype dtype, int64_t N, bool image, int device) {
    // Beyond four blocks a multiprocessor has enough loads on their way, and partial sums only
    // grow.
    constexpr int64_t kMostResident = 4;
    MatmulArgs args = {};
    args.weight = weight;
    args.source.dtype = dtype;
    args.source.image = image;
    args.out.N = N;
    const bool ring = attribute(cudaDevAttrComputeCapabilityMajor, device) >= 8;
    const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
    // A block of the dense layout has four units at least, so that its prologue is worth it.
    const int64_t steps = weight.layout == Layout::kDense ? weight.units() / 4 : weight.windows();
    int best = 1;
    size_t known_shared = 0;  // bytes that `resident` is about
    int64_t resident = 0;
    for (args.out.splits = 1; args.out.splits <= steps; ++args.out.splits) {
        const int tiles =
            fitting_tiles(args, ring, device);  // an image's grow with the steps of a block
        int64_t blocks = args.out.splits;
        if (tiles == 0) continue;
        with_kernel(args, ring, tiles, [&](auto kernel, int rows, size_t shared) {
            blocks *= (weight.M + rows - 1) / rows * ((N + 8 * tiles - 1) / (8 * tiles));
            if (shared != known_shared) resident = resident_blocks(kernel, shared, device);
            known_shared = shared;
        });
        if (blocks <= std::min(resident, kMostResident) * multiprocessors) best = args.out.splits;
        if (blocks > kMostResident * multiprocessors) break;
    }
    return best;
}

}  // namespace placekern::cuda
