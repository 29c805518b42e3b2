// The AVX-512 level (F, BW, DQ, VL, VBMI, VBMI2: Ice Lake and Zen 4 onwards), float32.
// Codebooks live in registers: a lookup is a byte or a float permute, never a gather.
#if defined(__x86_64__)
#include <immintrin.h>
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dispatch.h"
#include "scratch.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                    \
    __attribute__((target(                                                                       \
        "avx2,fma,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2"))), \
    apply_to = function)
#else
#pragma GCC target( \
    "avx2,fma,bmi,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")
#endif

namespace placekern::avx512 {

#include "common-inl.h"

template <class T>
struct Vec;

template <>
struct Vec<float> {
    static constexpr int lanes = 16;
    __m512 v;

    static Vec zero() { return {_mm512_setzero_ps()}; }
    static Vec broadcast(float a) { return {_mm512_set1_ps(a)}; }
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vec load_partial(const float* p, int n) {
        return {
            _mm512_maskz_loadu_ps(static_cast<__mmask16>(n >= lanes ? 0xffff : (1 << n) - 1), p)};
    }
    // The values in the lanes whose bits are set, in order; zero in the others.
    static Vec expand(const float* p, uint64_t mask) {
        __m512 values = _mm512_loadu_ps(p);
        // Keeps the compiler from folding the load: expanding from memory is several times slower.
        __asm__("" : "+v"(values));
        return {_mm512_maskz_expand_ps(static_cast<__mmask16>(mask), values)};
    }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    float sum() const { return _mm512_reduce_add_ps(v); }
};

// Not friends in the class: gcc compiles those without the target of the pragma.
inline Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}

void unpack_codes(const uint8_t* stream, int64_t bit, int bits, int n, uint8_t* codes) {
    // Eight codes fill `bits` bytes: a permute brings them to one 64-bit lane, a multishift cuts
    // them out.
    alignas(64) uint8_t bytes[64], shifts[64];
    for (int i = 0; i < 64; ++i) {
        bytes[i] = static_cast<uint8_t>(i / 8 * bits + i % 8);
        shifts[i] = static_cast<uint8_t>(i % 8 * bits + bit % 8);
    }
    const __m512i bring = _mm512_load_si512(bytes);
    const __m512i shift = _mm512_load_si512(shifts);
    const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
    const uint8_t* in = stream + bit / 8;
    for (int i = 0; i < n; i += 64, in += 8 * bits) {
        const __m512i words = _mm512_permutexvar_epi8(bring, _mm512_loadu_si512(in));
        _mm512_storeu_si512(codes + i,
                            _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, words), mask));
    }
}

template <class T>
struct Codebook;

template <>
struct Codebook<float> {
    bool small;  // 32 entries or fewer: they are two registers of floats
    alignas(64) float entries[32];
    alignas(64) uint8_t planes[4][kMaxCodes];  // byte i of every entry, for byte permutes

    Codebook(const float* codebook, int bits) : small(bits <= 5) {
        std::memset(entries, 0, sizeof(entries));
        std::memset(planes, 0, sizeof(planes));
        for (int c = 0; c < 1 << bits; ++c) {
            if (small) entries[c] = codebook[c];
            uint32_t word;
            std::memcpy(&word, codebook + c, sizeof(word));
            for (int i = 0; i < 4; ++i) planes[i][c] = static_cast<uint8_t>(word >> (8 * i));
        }
    }

    void lookup(const uint8_t* codes, int n, float* values) const {
        if (small) {
            lookup_small(codes, n, values);
        } else {
            lookup_large(codes, n, values);
        }
    }

  private:
    void lookup_small(const uint8_t* codes, int n, float* values) const {
        const __m512 low = _mm512_load_ps(entries), high = _mm512_load_ps(entries + 16);
        for (int i = 0; i < n; i += 16) {
            const __m512i index =
                _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
            _mm512_storeu_ps(values + i, _mm512_permutex2var_ps(low, index, high));
        }
    }

    __m512i plane(int i, __m512i codes, __mmask64 upper) const {
        const __m512i* table = reinterpret_cast<const __m512i*>(planes[i]);
        const __m512i low = _mm512_permutex2var_epi8(table[0], codes, table[1]);
        const __m512i high = _mm512_permutex2var_epi8(table[2], codes, table[3]);
        return _mm512_mask_blend_epi8(upper, low, high);
    }

    void lookup_large(const uint8_t* codes, int n, float* values) const {
        // Transposes 4 x 4 blocks of codes beforehand: the interleaving of the planes then ends in
        // order.
        const __m512i order =
            _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        for (int i = 0; i < n; i += 64) {
            const __m512i c = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes + i));
            const __mmask64 upper = _mm512_movepi8_mask(c);
            const __m512i b0 = plane(0, c, upper), b1 = plane(1, c, upper);
            const __m512i b2 = plane(2, c, upper), b3 = plane(3, c, upper);
            const __m512i low_a = _mm512_unpacklo_epi8(b0, b1),
                          low_b = _mm512_unpackhi_epi8(b0, b1);
            const __m512i high_a = _mm512_unpacklo_epi8(b2, b3),
                          high_b = _mm512_unpackhi_epi8(b2, b3);
            _mm512_storeu_si512(values + i, _mm512_unpacklo_epi16(low_a, high_a));
            _mm512_storeu_si512(values + i + 16, _mm512_unpackhi_epi16(low_a, high_a));
            _mm512_storeu_si512(values + i + 32, _mm512_unpacklo_epi16(low_b, high_b));
            _mm512_storeu_si512(values + i + 48, _mm512_unpackhi_epi16(low_b, high_b));
        }
    }
};

int columns_of_mask(uint64_t mask, int base, uint8_t* columns) {
    alignas(64) static constexpr uint8_t kPlaces[64] = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
        22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
        44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    const __m512i places =
        _mm512_add_epi8(_mm512_load_si512(kPlaces), _mm512_set1_epi8(static_cast<char>(base)));
    // Compressed in a register and stored whole: compressing into memory is microcoded on Zen 4.
    _mm512_storeu_si512(columns, _mm512_maskz_compress_epi8(mask, places));
    return __builtin_popcountll(mask);
}

constexpr int kDenseRows = 6;  // rows x vectors of sums that fit the registers
constexpr int kDenseVecs = 4;
constexpr double kDecodeDensity = 0.55;  // from which a convolution decodes instead of going direct

#include "decode-inl.h"
#include "im2col-inl.h"
#include "linear-inl.h"
#include "linear_backward-inl.h"
#include "conv2d-inl.h"
#include "conv2d_backward-inl.h"
#include "kmeans-inl.h"

// Sixteen binary searches at a time. Level l of the search has 2^l boundaries to choose from, which
// fit registers and are chosen by permutes: one register to level 4, eight at level 7.
struct VectorSearch {
    int levels;                        // ceil(log2(count))
    alignas(64) float tables[8][128];  // [level][which of its boundaries]

    VectorSearch(const float* boundaries, int count) : levels(0) {
        while (1 << levels < count) ++levels;
        for (int l = 0; l < 8; ++l) {
            for (int i = 0; i < 128; ++i) {
                const int at = l < levels && i < 1 << l
                                   ? (i << (levels - l)) + (1 << (levels - 1 - l)) - 1
                                   : kMaxCodes;
                tables[l][i] = at < count - 1 ? boundaries[at] : INFINITY;
            }
        }
    }

    __m512 pair(const float* table, __m512i code) const {
        return _mm512_permutex2var_ps(_mm512_load_ps(table), code, _mm512_load_ps(table + 16));
    }

    __m512 boundary(int level, __m512i code) const {
        const float* table = tables[level];
        if (level <= 4) return _mm512_permutexvar_ps(code, _mm512_load_ps(table));
        if (level == 5) return pair(table, code);
        const __mmask16 bit5 = _mm512_test_epi32_mask(code, _mm512_set1_epi32(32));
        const __m512 low = _mm512_mask_blend_ps(bit5, pair(table, code), pair(table + 32, code));
        if (level == 6) return low;
        const __m512 high =
            _mm512_mask_blend_ps(bit5, pair(table + 64, code), pair(table + 96, code));
        return _mm512_mask_blend_ps(_mm512_test_epi32_mask(code, _mm512_set1_epi32(64)), low, high);
    }

    void operator()(const float* points, int n, uint8_t* codes) const {
        const __m512i one = _mm512_set1_epi32(1);
        for (int i = 0; i < n; i += 16) {
            const __mmask16 lanes =
                static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
            const __m512 x = _mm512_maskz_loadu_ps(lanes, points + i);
            __m512i code = _mm512_setzero_si512();
            for (int l = 0; l < levels; ++l) {
                const __mmask16 above = _mm512_cmp_ps_mask(x, boundary(l, code), _CMP_GT_OQ);
                code = _mm512_add_epi32(code, code);
                code = _mm512_mask_add_epi32(code, above, code, one);
            }
            _mm_mask_storeu_epi8(codes + i, lanes, _mm512_cvtepi32_epi8(code));
        }
    }
};

void linear(const LinearArgs<float>& args) { linear_impl(args); }
void linear_backward(const LinearBackwardArgs<float>& args) { linear_backward_impl(args); }
void conv2d(const Conv2dArgs<float>& args) { conv2d_impl(args); }
void conv2d_backward(const Conv2dBackwardArgs<float>& args) { conv2d_backward_impl(args); }
void kmeans_assign(const KmeansAssignArgs& args) {
    kmeans_assign_impl(args, VectorSearch(args.boundaries, args.count));
}

}  // namespace placekern::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
