// matmul on the dense layout. Codes and X are on their way three or four units ahead; what limits
// it at 16 columns is bytes.
#pragma once

#include <algorithm>

#include "matmul.cuh"

namespace placekern::cuda {
namespace {

// How many 16-row blocks a warp has: with many columns, two, so that X is read half as often.
// TF32 operands take twice the registers and leave no room for it.
template <int kTiles, class T>
constexpr int kBlocks = kTiles >= 4 && sizeof(T) == 2 ? 2 : 1;

// Codes of a warp on their way. With a ring, copies go to one in shared memory, in which a lane
// reads only what it copied itself, so that it waits for nobody else. Else registers hold the next
// unit, and those behind it are asked for as far as the L2 cache.
template <int kWidth, int kRowBlocks, bool kRing>
class CodesAhead {
  public:
    static constexpr int kStageBytes = kRowBlocks * kUnitBytes<kWidth>;
    static constexpr int kStages = kStageBytes > kUnitBytes<5> ? 3 : 4;
    static constexpr int kBytes = kRing ? kStages * kStageBytes : 0;

    // `rows`: where the first of `count` units of each block of rows is.
    __device__ CodesAhead(unsigned char* ring, const uint8_t* const (&rows)[kRowBlocks], int count,
                          int lane)
        : ring_(reinterpret_cast<uint32_t*>(ring)), lane_(lane) {
#pragma unroll
        for (int b = 0; b < kRowBlocks; ++b) {
            from_[b] = rows[b];
            if (!has_ring() && lane == 0 && count > 1)
                prefetch_to_l2(rows[b] + kUnitBytes<kWidth>,
                               min(count - 1, kFar - 1) * kUnitBytes<kWidth>);
        }
    }

    // Whether there is a ring: not where copies wait, on Turing.
    __device__ static bool has_ring() { return kRing && copies_wait(); }

    // Units that are on their way while one is worked on.
    __device__ static int depth() { return has_ring() ? kStages - 1 : 1; }

    // Starts the next unit, into the stage behind that of the last; never into one that was taken
    // since the last wait. `left`: units with this one.
    __device__ __forceinline__ void start(int left) {
#pragma unroll
        for (int b = 0; b < kRowBlocks; ++b) {
            if (has_ring()) {
                copy(ring_ + (next_ * kRowBlocks + b) * kWords, from_[b]);
            } else {
                held_[b] = load_codes<kWidth>(from_[b], lane_);
                if (left > kFar && lane_ == 0)
                    prefetch_to_l2(from_[b] + kFar * kUnitBytes<kWidth>, kUnitBytes<kWidth>);
            }
            from_[b] += kUnitBytes<kWidth>;
        }
        next_ = next_ == kStages - 1 ? 0 : next_ + 1;
    }

    // The oldest unit, which must have been waited for.
    __device__ __forceinline__ void take(UnitCodes<kWidth> (&codes)[kRowBlocks]) {
#pragma unroll
        for (int b = 0; b < kRowBlocks; ++b) {
            if (has_ring())
                codes[b] = read(ring_ + (now_ * kRowBlocks + b) * kWords);
            else
                codes[b] = held_[b];
        }
        now_ = now_ == kStages - 1 ? 0 : now_ + 1;
    }

  private:
    static constexpr int kFar = 3;  // units ahead of the one that registers hold
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

template <int kWidth, int kTiles, class T>
struct DenseShared {
    // Times 64 columns, a unit takes longer than memory does, and what limits it is shared memory.
    static constexpr bool kHasRing = kTiles < 8;
    using Codes = CodesAhead<kWidth, kBlocks<kTiles, T>, kHasRing>;
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
        const size_t loop =
            kFixed + (ring ? kRing : 0) +
            (image ? kColumns * sizeof(Pixel) + units_per_split * kUnitColumns * sizeof(Tap) : 0);
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
    auto* const pixels = reinterpret_cast<Pixel*>(rings + (Codes::has_ring() ? Shared::kRing : 0));
    auto* const taps = reinterpret_cast<Tap*>(pixels + Shared::kColumns);
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    const int n0 = static_cast<int>(blockIdx.y) * Shared::kColumns;
    const auto block_rows = BlockRows<kWarps * kRowBlocks * kUnitRows>::of(args);
    const int64_t block0 = block_rows.first / kUnitRows + warp * kRowBlocks;
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
        fill_tile<kWarps * kWarp, Shared::kColumns, kUnitColumns>(
            tiles + tile * Shared::kTile, args.source, pixels, taps + i * kUnitColumns, n0,
            args.out.N, static_cast<int>(first + i) * kUnitColumns, weight.K, kUnitColumns);
    };
    // On their way while the table is filled; of an image, X needs taps first.
    Codes codes(rings + warp * Codes::kBytes, rows, count, lane);
#pragma unroll
    for (int round = 1 - Codes::kStages; round < 0; ++round) {
        const int x = round + Shared::kXTiles - 1, c = round + Codes::kStages - 1;
        if (x >= 0 && x < count && !args.source.image) fill(x, x);
        commit_copies();
        if (c < min(count, Codes::depth())) codes.start(count - c);
        commit_copies();
    }
    EscapedUnits<1> escapes[kRowBlocks];
    unsigned escaped[kRowBlocks] = {};  // of the 32 units about this one
#pragma unroll
    for (int b = 0; b < kRowBlocks; ++b)
        escapes[b] = EscapedUnits<1>(weight.escape_ptr() + first_unit[b], 0, count, lane);
    const int zero = zero_code(weight);
    const uint32_t escape = OperandBits<T>()(read(weight.codebook, zero));
    Table<kWidth>::fill(entries, weight, zero, OperandBits<T>());
    if (args.source.image && count > 0) {
        fill_pixels<Shared::kColumns>(pixels, n0, args.out.N, args.source, block_rows.group);
        fill_taps(taps, count * kUnitColumns, first * kUnitColumns, weight, args.source);
        __syncthreads();
        for (int i = 0; i < min(count, Shared::kXTiles - 1); ++i) fill(i, i);
        wait_for_copies();  // they are in no group
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
        if (i + Codes::depth() < count) codes.start(count - i - Codes::depth());
        commit_copies();
        Operand<T> operand[kRowBlocks];
#pragma unroll
        for (int b = 0; b < kRowBlocks; ++b) {
            uint32_t element[kUnitCodes];
#pragma unroll
            for (int j = 0; j < kUnitCodes; ++j) element[j] = table.of(now[b], j);
            if (i % kWarp == 0) escaped[b] = escapes[b].next();
            if (escaped[b] >> i % kWarp & 1) {
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
    let_next_kernel_start();
    write<kTiles, kRowBlocks>(sums, args.out, block_rows.first, block_rows.end, n0, lane, warp);
}

}  // namespace
}  // namespace placekern::cuda
