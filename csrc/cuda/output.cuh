// Where results go: straight to y with bias and ReLU, or, where several blocks share the columns of
// the weight, to partial sums that `finish` adds in a fixed order. No atomics: the result does not
// depend on which block ends first.
#pragma once

#include "number.cuh"

namespace placekern::cuda {

// Whether neighbouring rows of the weight are neighbours in y; else pixels are.
__device__ inline bool rows_together(const Output& out) { return out.row_stride == 1; }

// What y[n, m] has added to its sum.
__device__ inline float bias_of(const Output& out, int64_t m) {
    return out.bias.data ? read(out.bias, m) : 0.0f;
}

// y[n, m] = sum, which has its bias, after ReLU.
__device__ inline void store_biased(const Output& out, int64_t n, int64_t m, float sum) {
    // Of 32 bits: a division of 64 takes a hundred instructions.
    const int64_t image =
        out.pixels == 1 ? n : static_cast<unsigned>(n) / static_cast<unsigned>(out.pixels);
    const int64_t place =
        image * out.image_stride + (n - image * out.pixels) * out.pixel_stride + m * out.row_stride;
    // Not fmaxf: a NaN must come through.
    write(out.y, place, out.relu && sum < 0.0f ? 0.0f : sum);
}

// y[n, m] = sum + bias, then ReLU.
__device__ inline void store(const Output& out, int64_t n, int64_t m, float sum) {
    store_biased(out, n, m, sum + bias_of(out, m));
}

// Where the partial sums of a split go: that of y[n, m] to at(n, m).
struct Partial {
    float* sums;
    int step_n, step_m;

    __device__ static Partial of(const Output& out, int split) {
        const bool together = rows_together(out);
        return {out.partial + split * out.M * out.N, together ? static_cast<int>(out.M) : 1,
                together ? 1 : static_cast<int>(out.N)};
    }

    __device__ float& at(int64_t n, int64_t m) const { return sums[n * step_n + m * step_m]; }
};

// Takes the sum that split `split` has for n < N, m < M.
__device__ inline void add(const Output& out, int split, int64_t n, int64_t m, float sum) {
    if (out.splits == 1)
        store(out, n, m, sum);
    else
        Partial::of(out, split).at(n, m) = sum;
}

}  // namespace placekern::cuda
