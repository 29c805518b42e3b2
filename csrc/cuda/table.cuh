// The codebook in shared memory, laid out so that no two lanes ever wait for each other.
// 256 entries are kept 32 times, once for each bank: lane l reads copy l. 32 entries are one row of
// banks, where equal codes are a broadcast, and need no copies.
#pragma once

#include "launch.cuh"
#include "layout.cuh"
#include "number.cuh"

namespace placekern::cuda {

template <int kWidth>
struct Table {
    static constexpr int kEntries = 1 << kWidth;
    static constexpr int kCopies = kWidth == 8 ? 32 : 1;
    static constexpr int kBytes = kEntries * kCopies * 4;

    static constexpr int kLog = kWidth == 8 ? 7 : 2;  // of the bytes from one entry to the next

    const unsigned char* entries;
    unsigned copy;  // bytes to this lane's

    __device__ __forceinline__ uint32_t operator[](unsigned code) const { return at(code << kLog); }

    // The value of a lane's code j of a unit.
    __device__ __forceinline__ uint32_t of(const UnitCodes<kWidth>& codes, int j) const {
        return at(codes.template scaled<kLog>(j));
    }

    // The value of pair j of a chunk.
    __device__ __forceinline__ uint32_t of(const uint4& chunk, int j) const {
        return at(scaled_chunk_byte<kLog>(chunk, kChunk + j));
    }

    // Or, not plus: a mask and a union are one instruction.
    __device__ __forceinline__ uint32_t at(unsigned offset) const {
        return *reinterpret_cast<const uint32_t*>(entries + (offset | copy));
    }

    // Codes of a thread in `fill`, whose blocks have kEntries / kAtOnce threads or more.
    static constexpr int kAtOnce = kWidth == 8 ? 2 : 1;

    // The thread's entries of the codebook that starts at `first`, on their way from memory.
    struct Entries {
        uint32_t word[kAtOnce];

        __device__ static Entries load(const DeviceWeight& weight, int64_t first) {
            Entries entries;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int code = min(code_of(i), (1 << weight.bits) - 1);
                entries.word[i] = word_of(weight.codebook, first + code);
            }
            return entries;
        }

        __device__ static int code_of(int i) {
            return static_cast<int>(threadIdx.x + i * blockDim.x);
        }
    };

    // Fills kBytes of shared memory with bits(value) of each entry of the codebook that starts at
    // `first`, 0 for code `zero` and behind the codebook; by all threads of a block. The caller
    // synchronises.
    template <class F>
    __device__ static void fill(uint32_t* shared, const DeviceWeight& weight, int zero, F bits,
                                int64_t first = 0) {
        fill(shared, weight, zero, bits, Entries::load(weight, first));
    }

    // The same with entries that were asked for before.
    template <class F>
    __device__ static void fill(uint32_t* shared, const DeviceWeight& weight, int zero, F bits,
                                const Entries& entries) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int code = Entries::code_of(i);
            const bool real = code < 1 << weight.bits && code != zero;
            const float value = real ? value_of(entries.word[i], weight.codebook.dtype) : 0.0f;
            if (code < kEntries) store(shared + code * kCopies, code, bits(value));
        }
    }

    __device__ static Table of(const uint32_t* shared, int lane) {
        return {reinterpret_cast<const unsigned char*>(shared),
                kCopies == 1 ? 0u : static_cast<unsigned>(4 * lane)};
    }

  private:
    // All copies of an entry. Eight lanes store 16 bytes each at once: each begins at another place
    // of its row of banks, or all eight would meet in the same four.
    __device__ __forceinline__ static void store(uint32_t* entry, unsigned code, uint32_t value) {
        if constexpr (kCopies == 1) {
            *entry = value;
        } else {
#pragma unroll
            for (unsigned i = 0; i < kCopies / 4; ++i)
                reinterpret_cast<uint4*>(entry)[(code ^ i) % 8] =
                    make_uint4(value, value, value, value);
        }
    }
};

// What a table holds: float32 as it is, TF32 rounded, 16-bit numbers in the low half of a word.
struct ExactBits {
    __device__ uint32_t operator()(float value) const { return __float_as_uint(value); }
};

}  // namespace placekern::cuda
