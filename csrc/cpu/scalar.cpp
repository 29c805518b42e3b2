// The portable level: plain C++ for any processor, and the only level for float64.
// A Vec is an array of eight here; the compiler may or may not turn its loops into vector
// instructions.
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dispatch.h"
#include "scratch.h"

namespace placekern::scalar {

#include "common-inl.h"

template <class T>
struct Vec {
    static constexpr int lanes = 8;
    T v[lanes];

    static Vec broadcast(T a) {
        Vec r;
        for (int i = 0; i < lanes; ++i) r.v[i] = a;
        return r;
    }
    static Vec zero() { return broadcast(T(0)); }
    static Vec load(const T* p) {
        Vec r;
        std::memcpy(r.v, p, sizeof(r.v));
        return r;
    }
    static Vec load_partial(const T* p, int n) {
        Vec r = zero();
        std::memcpy(r.v, p, sizeof(T) * smaller(n, lanes));
        return r;
    }
    // The values in the lanes whose bits are set, in order; zero in the others.
    static Vec expand(const T* p, uint64_t mask) {
        Vec r;
        for (int i = 0; i < lanes; ++i) {
            const T choice[2] = {T(0), *p};  // indexed, not branched on: a mask cannot be predicted
            const int bit = static_cast<int>(mask >> i & 1);
            r.v[i] = choice[bit];
            p += bit;
        }
        return r;
    }
    void store(T* p) const { std::memcpy(p, v, sizeof(v)); }
    T sum() const { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }
    friend Vec operator+(Vec a, const Vec& b) {
        for (int i = 0; i < lanes; ++i) a.v[i] += b.v[i];
        return a;
    }
    friend Vec fma(const Vec& a, const Vec& b, Vec c) {
        for (int i = 0; i < lanes; ++i) c.v[i] += a.v[i] * b.v[i];
        return c;
    }
};

void unpack_codes(const uint8_t* stream, int64_t bit, int bits, int n, uint8_t* codes) {
    const uint64_t mask = (uint64_t{1} << bits) - 1;
    for (int i = 0; i < n; i += 8, bit += 8 * bits) {
        uint64_t word;
        std::memcpy(&word, stream + bit / 8, sizeof(word));
        word >>= bit % 8;  // eight codes of at most 7 bits and a shift of at most 7 fit in 63 bits
        for (int j = 0; j < 8; ++j) codes[i + j] = static_cast<uint8_t>(word >> (j * bits) & mask);
    }
}

template <class T>
struct Codebook {
    T entries[kMaxCodes];

    Codebook(const T* codebook, int bits) { std::memcpy(entries, codebook, sizeof(T) << bits); }

    void lookup(const uint8_t* codes, int n, T* values) const {
        for (int i = 0; i < n; ++i) values[i] = entries[codes[i]];
    }
};

int columns_of_mask(uint64_t mask, int base, uint8_t* columns) {
    int count = 0;
    for (; mask != 0; mask &= mask - 1)
        columns[count++] = static_cast<uint8_t>(base + __builtin_ctzll(mask));
    return count;
}

constexpr int kDenseRows = 2;  // rows x vectors of sums that fit the registers
constexpr int kDenseVecs = 1;
constexpr double kDecodeDensity = 0.7;  // from which a convolution decodes instead of going direct

#include "decode-inl.h"
#include "im2col-inl.h"
#include "linear-inl.h"
#include "linear_backward-inl.h"
#include "conv2d-inl.h"
#include "conv2d_backward-inl.h"
#include "kmeans-inl.h"

void linear(const LinearArgs<float>& args) { linear_impl(args); }
void linear(const LinearArgs<double>& args) { linear_impl(args); }
void linear_backward(const LinearBackwardArgs<float>& args) { linear_backward_impl(args); }
void linear_backward(const LinearBackwardArgs<double>& args) { linear_backward_impl(args); }
void conv2d(const Conv2dArgs<float>& args) { conv2d_impl(args); }
void conv2d(const Conv2dArgs<double>& args) { conv2d_impl(args); }
void conv2d_backward(const Conv2dBackwardArgs<float>& args) { conv2d_backward_impl(args); }
void conv2d_backward(const Conv2dBackwardArgs<double>& args) { conv2d_backward_impl(args); }
void kmeans_assign(const KmeansAssignArgs& args) {
    kmeans_assign_impl(args, BinarySearch(args.boundaries, args.count));
}

}  // namespace placekern::scalar
