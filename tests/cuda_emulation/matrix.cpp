// The tensor core: products of a warp's fragments, which the last lane to come computes for all.
#include "emulated_instructions.h"

namespace emulated {
namespace {

// d += a b, 16 x 8 x depth; the lanes' d are scattered, a and b come as whole matrices. Products of
// two such numbers are exact in float32, and the sums are float32.
template <int kDepth>
void multiply(const uint64_t* values, const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
    for (int row = 0; row < 16; ++row) {
        float sums[8];
        for (int column = 0; column < 8; ++column) {
            const auto* lane = reinterpret_cast<const Operands*>(values[row % 8 * 4 + column / 2]);
            sums[column] = lane->d[row / 8 * 2 + column % 2];
        }
        for (int k = 0; k < kDepth; ++k)
            for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
        for (int column = 0; column < 8; ++column) {
            const auto* lane = reinterpret_cast<const Operands*>(values[row % 8 * 4 + column / 2]);
            lane->d[row / 8 * 2 + column % 2] = sums[column];
        }
    }
}

template <class ToFloat>
void multiply_16_bits(const uint64_t* values, ToFloat to_float) {
    float a[16][16], b[16][8];
    for (int i = 0; i < kLanes; ++i) {
        const auto* lane = reinterpret_cast<const Operands*>(values[i]);
        const int g = i / 4, q = i % 4;
        for (int word = 0; word < 4; ++word)
            for (int half = 0; half < 2; ++half)
                a[g + word % 2 * 8][2 * q + half + word / 2 * 8] =
                    to_float(static_cast<uint16_t>(lane->a[word] >> (16 * half)));
        for (int word = 0; word < 2; ++word)
            for (int half = 0; half < 2; ++half)
                b[2 * q + half + word * 8][g] =
                    to_float(static_cast<uint16_t>(lane->b[word] >> (16 * half)));
    }
    multiply(values, a, b);
}

}  // namespace

void multiply_bfloat16(const uint64_t* values) { multiply_16_bits(values, bfloat16_to_float); }

void multiply_half(const uint64_t* values) { multiply_16_bits(values, half_to_float); }

void multiply_tf32(const uint64_t* values) {
    float a[16][8], b[8][8];
    const auto to_float = [](uint32_t bits) { return reinterpret<float>(bits & ~0x1fffu); };
    for (int i = 0; i < kLanes; ++i) {
        const auto* lane = reinterpret_cast<const Operands*>(values[i]);
        const int g = i / 4, q = i % 4;
        for (int word = 0; word < 4; ++word)
            a[g + word % 2 * 8][q + word / 2 * 4] = to_float(lane->a[word]);
        for (int word = 0; word < 2; ++word) b[q + word * 4][g] = to_float(lane->b[word]);
    }
    multiply(values, a, b);
}

}  // namespace emulated
