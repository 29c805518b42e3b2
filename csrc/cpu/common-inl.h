// Small functions that every body uses. They are repeated in each ISA's namespace on purpose: one
// copy in a shared header could be compiled for AVX-512 and then called by the portable level.

template <class U>
constexpr U smaller(U a, U b) {
    return b < a ? b : a;
}

template <class U>
constexpr U larger(U a, U b) {
    return a < b ? b : a;
}

// The epilogue of one output; as in torch, ReLU lets NaN through.
template <class T>
T finish(T y, const T* bias, int64_t m, bool relu) {
    if (bias) y += bias[m];
    return relu && y < T(0) ? T(0) : y;
}
