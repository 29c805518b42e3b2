// The AVX2 level (with FMA and BMI2), float32. Includes first, then the target, then the namespace:
// so no function of a header is compiled for AVX2 and then called by the portable level.
#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dispatch.h"
#include "scratch.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2,popcnt")
#endif

namespace placekern::avx2 {

#include "common-inl.h"

// For each byte of a mask, the places of its bits, and the rank of each place. Made at compile
// time: a constructor would run AVX2 code when the library is loaded, on whatever processor loads
// it.
struct MaskTables {
    alignas(64) uint8_t columns[256][8];
    alignas(64) uint8_t ranks[256][8];

    constexpr MaskTables() : columns(), ranks() {
        for (int mask = 0; mask < 256; ++mask) {
            int count = 0;
            for (int bit = 0; bit < 8; ++bit) {
                ranks[mask][bit] = static_cast<uint8_t>(count);
                if (mask >> bit & 1) columns[mask][count++] = static_cast<uint8_t>(bit);
            }
        }
    }
};
constexpr MaskTables kMaskTables;

template <class T>
struct Vec;

template <>
struct Vec<float> {
    static constexpr int lanes = 8;
    __m256 v;

    static Vec zero() { return {_mm256_setzero_ps()}; }
    static Vec broadcast(float a) { return {_mm256_set1_ps(a)}; }
    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Vec load_partial(const float* p, int n) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return {_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane))};
    }
    // The values in the lanes whose bits are set, in order; zero in the others.
    static Vec expand(const float* p, uint64_t mask) {
        const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i ranks = _mm256_cvtepu8_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kMaskTables.ranks[mask])));
        const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit);
        const __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), ranks);
        return {_mm256_and_ps(spread, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit)))};
    }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    float sum() const {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
};

// Not friends in the class: gcc compiles those without the target of the pragma.
inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}

void unpack_codes(const uint8_t* stream, int64_t bit, int bits, int n, uint8_t* codes) {
    // Spreads eight codes of a word to eight bytes in one instruction.
    const uint64_t fields = 0x0101010101010101ull * ((1u << bits) - 1);
    for (int i = 0; i < n; i += 8, bit += 8 * bits) {
        uint64_t word;
        std::memcpy(&word, stream + bit / 8, sizeof(word));
        word = _pdep_u64(word >> (bit % 8), fields);
        std::memcpy(codes + i, &word, sizeof(word));
    }
}

template <class T>
struct Codebook {
    T entries[kMaxCodes];

    Codebook(const T* codebook, int bits) { std::memcpy(entries, codebook, sizeof(T) << bits); }

    // Plain loads: they beat vgatherdps on processors that pay for the gather-sampling mitigation.
    void lookup(const uint8_t* codes, int n, T* values) const {
        for (int i = 0; i < n; i += 8) {
            uint64_t word;
            std::memcpy(&word, codes + i, sizeof(word));
            for (int j = 0; j < 8; ++j) values[i + j] = entries[word >> (8 * j) & 0xff];
        }
    }
};

int columns_of_mask(uint64_t mask, int base, uint8_t* columns) {
    int count = 0;
    for (int byte = 0; byte < 8; ++byte) {
        const int bits = static_cast<int>(mask >> (8 * byte) & 0xff);
        uint64_t places;
        std::memcpy(&places, kMaskTables.columns[bits], sizeof(places));
        places += 0x0101010101010101ull * (base + 8 * byte);
        std::memcpy(columns + count, &places, sizeof(places));
        count += __builtin_popcount(bits);
    }
    return count;
}

constexpr int kDenseRows = 6;  // rows x vectors of sums that fit the registers
constexpr int kDenseVecs = 2;
constexpr double kDecodeDensity = 0.58;  // from which a convolution decodes instead of going direct

#include "decode-inl.h"
#include "im2col-inl.h"
#include "linear-inl.h"
#include "linear_backward-inl.h"
#include "conv2d-inl.h"
#include "conv2d_backward-inl.h"
#include "kmeans-inl.h"

void linear(const LinearArgs<float>& args) { linear_impl(args); }
void linear_backward(const LinearBackwardArgs<float>& args) { linear_backward_impl(args); }
void conv2d(const Conv2dArgs<float>& args) { conv2d_impl(args); }
void conv2d_backward(const Conv2dBackwardArgs<float>& args) { conv2d_backward_impl(args); }
void kmeans_assign(const KmeansAssignArgs& args) {
    kmeans_assign_impl(args, BinarySearch(args.boundaries, args.count));
}

}  // namespace placekern::avx2

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
