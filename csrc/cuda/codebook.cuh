// Reading single codes and mask words from a QuantSparseWeight in device memory.
#pragma once

#include "../args.h"

namespace placekern::cuda {

// Code of entry `entry`. A code may straddle two bytes; the second is read only then, or harmlessly
// from the padding behind the stream.
__host__ __device__ inline int read_code(const uint8_t* codes, int64_t entry, int bits) {
    const int64_t bit = entry * bits;
    const int shift = static_cast<int>(bit & 7);
    const unsigned pair = codes[bit >> 3] | static_cast<unsigned>(codes[(bit >> 3) + 1]) << 8;
    return static_cast<int>(pair >> shift & ((1u << bits) - 1));
}

// Mask bits of columns 8 * byte .. 8 * byte + 31 of a row; bits past `K` are cleared.
__host__ __device__ inline uint32_t read_mask(const uint8_t* row, int64_t column, int64_t K) {
    uint32_t word = 0;
    for (int i = 0; i < 4 && column + 8 * i < K; ++i)
        word |= static_cast<uint32_t>(row[column / 8 + i]) << (8 * i);
    return K - column >= 32 ? word : word & ((1u << (K - column)) - 1);
}

}  // namespace placekern::cuda
