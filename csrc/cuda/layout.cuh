// The bytes of a weight in GPU memory, as placekern/device_packing.py writes them, and
// csrc/cpu/pack_pairs.cpp the pairs.
// The surprise: no code means zero. In the dense layout the rarest code stands for "pruned", and
// the entries that really have it are listed apart ("escapes"), so all 2^bits centroids are kept.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "args.h"

namespace placekern::cuda {

constexpr int kUnitCodes = 32;     // of a lane: 16 columns of row g, then of row g + 8
constexpr int kWindowSlots = 256;  // places 248 to 255 mean "no entry"; x has zeros there

// Dense: the code that means "pruned".
__device__ inline int zero_code(const DeviceWeight& weight) {
    return reinterpret_cast<const int*>(weight.positions)[0];
}

// Dense: whether any entry has that code.
__device__ inline bool has_escapes(const DeviceWeight& weight) {
    return weight.escape_ptr()[weight.blocks() * weight.units()] > 0;
}

// Byte c (0 to 15) of a chunk, places first: c < 8 the place of pair c, else the code of pair c -
// 8. `c` is a constant once its loop is unrolled.
__host__ __device__ __forceinline__ unsigned chunk_byte(const uint4& chunk, int c) {
    const uint32_t word = c < 4 ? chunk.x : c < 8 ? chunk.y : c < 12 ? chunk.z : chunk.w;
    return word >> (8 * (c % 4)) & 0xff;
}

// chunk_byte times 2^kLog: a shift and a mask, as for the byte alone.
template <int kLog>
__host__ __device__ __forceinline__ unsigned scaled_chunk_byte(const uint4& chunk, int c) {
    const uint32_t word = c < 4 ? chunk.x : c < 8 ? chunk.y : c < 12 ? chunk.z : chunk.w;
    const int shift = 8 * (c % 4) - kLog;
    return (shift < 0 ? word << -shift : word >> shift) & 0xffu << kLog;
}

// Chunks of a lane, on their way from memory.
template <int kAhead>
struct Chunks {
    uint4 pairs[kAhead];
    int window[kAhead];

    // The chunks `first`, first + 32, ... before `end`. The branch is also what keeps the compiler
    // from moving loads down to where they are needed.
    __device__ __forceinline__ void load(const DeviceWeight& weight, int first, int end) {
        const uint4* const from = reinterpret_cast<const uint4*>(weight.codes) + first;
        const uint8_t* const windows = weight.chunk_windows() + first;
        if (first + (kAhead - 1) * 32 < end) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                pairs[i] = __ldcs(from + i * 32);
                window[i] = __ldcs(windows + i * 32);
            }
        } else {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const bool real = first + i * 32 < end;
                // Else eight times place 255, where x is zero, and code 0.
                pairs[i] = real ? __ldcs(from + i * 32) : make_uint4(~0u, ~0u, 0, 0);
                window[i] = real ? __ldcs(windows + i * 32) : 0;
            }
        }
    }
};

// The codes that a lane owns in a unit of the dense layout: a string of 32 codes, little-endian.
template <int kWidth>
struct UnitCodes {
    uint32_t word[kWidth];

    // Code j, 0 to 31: column 16 q + j % 16 of row g + 8 (j / 16), for lane 4 g + q. `j` is a
    // constant once its loop is unrolled.
    __host__ __device__ __forceinline__ unsigned operator[](int j) const { return scaled<0>(j); }

    // Code j times 2^kLog: a shift and a mask, as for the code alone.
    template <int kLog>
    __host__ __device__ __forceinline__ unsigned scaled(int j) const {
        constexpr unsigned kMask = ((1u << kWidth) - 1) << kLog;
        const int at = j * kWidth / 32;
        const int shift = j * kWidth % 32;
        if (shift + kWidth > 32) {  // it straddles two words
            const uint32_t low = word[at] >> shift;
            const uint32_t high = word[at + 1 < kWidth ? at + 1 : at] << (32 - shift);
            return (low | high) << kLog & kMask;
        }
        return (shift < kLog ? word[at] << (kLog - shift) : word[at] >> (shift - kLog)) & kMask;
    }
};

// Bytes of a unit.
template <int kWidth>
constexpr int kUnitBytes = 128 * kWidth;

// Where word w of a lane lies in its unit, in words: four of a lane side by side for one 16-byte
// load; what is left over of the width lies word by word.
template <int kWidth>
__host__ __device__ __forceinline__ int word_place(int lane, int w) {
    constexpr int kQuads = kWidth / 4;
    return w < 4 * kQuads ? (w / 4 * 32 + lane) * 4 + w % 4
                          : kQuads * 128 + (w - 4 * kQuads) * 32 + lane;
}

// Reads a lane's codes of the unit that starts at `unit`; weights are read once, so the loads ask
// to be dropped from the caches first.
template <int kWidth>
__device__ __forceinline__ UnitCodes<kWidth> load_codes(const uint8_t* unit, int lane) {
    UnitCodes<kWidth> codes;
    const auto* words = reinterpret_cast<const uint32_t*>(unit);
#pragma unroll
    for (int w = 0; w < kWidth / 4 * 4; w += 4) {
        const uint4 four =
            __ldcs(reinterpret_cast<const uint4*>(words + word_place<kWidth>(lane, w)));
        codes.word[w] = four.x;
        codes.word[w + 1] = four.y;
        codes.word[w + 2] = four.z;
        codes.word[w + 3] = four.w;
    }
#pragma unroll
    for (int w = kWidth / 4 * 4; w < kWidth; ++w)
        codes.word[w] = __ldcs(words + word_place<kWidth>(lane, w));
    return codes;
}

// Where the escapes of a unit lie.
struct Escapes {
    int begin = 0, end = 0;

    __device__ __forceinline__ static Escapes of(const DeviceWeight& weight, int64_t unit) {
        return {__ldg(weight.escape_ptr() + unit), __ldg(weight.escape_ptr() + unit + 1)};
    }

    // Calls f(row, column) for each, the same in every lane of a warp.
    template <class F>
    __device__ __forceinline__ void visit(const DeviceWeight& weight, F f) const {
#pragma unroll 1
        for (int e = begin; e < end; ++e) {
            const int place = __ldg(weight.escapes() + e);
            f(place / kUnitColumns, place % kUnitColumns);
        }
    }
};

// Calls f(row, column) for each escape of unit `unit`, the same in every lane of a warp.
template <class F>
__device__ __forceinline__ void for_escapes(const DeviceWeight& weight, int64_t unit, F f) {
    Escapes::of(weight, unit).visit(weight, f);
}

// Dense: which of the units first, first + kStep, ... before `end` have escapes, `ptr` being where
// those of unit 0 start. A warp looks at 32 units at once, and 32 units ahead: asked unit by unit,
// nearly all would wait for nothing.
template <int kStep>
class EscapedUnits {
  public:
    EscapedUnits() = default;
    __device__ __forceinline__ EscapedUnits(const int* ptr, int first, int end, int lane)
        : ptr_(ptr), first_(first), end_(end), lane_(lane) {
        look();
    }

    // A bit for each of the next 32 units, the same in every lane of the warp.
    __device__ __forceinline__ unsigned next() {
        const unsigned found = __ballot_sync(0xffffffffu, begin_ != stop_);
        first_ += 32 * kStep;
        look();
        return found;
    }

    // Calls f(unit) for those that have, the same in every lane of the warp, in ascending order.
    template <class F>
    __device__ __forceinline__ void visit(F f) {
#pragma unroll 1
        while (first_ < end_) {
            const int first = first_;
#pragma unroll 1
            for (unsigned found = next(); found != 0; found &= found - 1)
                f(first + (__ffs(found) - 1) * kStep);
        }
    }

  private:
    __device__ __forceinline__ void look() {
        const int own = first_ + lane_ * kStep;
        begin_ = own < end_ ? __ldg(ptr_ + own) : 0;
        stop_ = own < end_ ? __ldg(ptr_ + own + 1) : 0;
    }

    const int* ptr_;
    int first_, end_, lane_;
    int begin_, stop_;  // of the escapes of the lane's unit
};

// The lane that owns an element of a unit, and which of its 32.
__host__ __device__ __forceinline__ int owner_of(int row, int column) {
    return row % 8 * 4 + column / 16;
}
__host__ __device__ __forceinline__ int element_of(int row, int column) {
    return row / 8 * 16 + column % 16;
}

}  // namespace placekern::cuda
