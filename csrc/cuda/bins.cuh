// What the two backward kernels share: sums by code, and where the entries of a row and window lie.
// The surprise: sums need neither atomics nor an order of the codes. A lane has a bin of its own
// for every code, in a bank of its own, so lanes never meet and every sum has a fixed order.
#pragma once

#include "launch.cuh"
#include "layout.cuh"

namespace placekern::cuda {

// A number of type T so many bytes behind `base` in shared memory.
template <class T>
__device__ __forceinline__ T& at(unsigned char* base, int byte) {
    return *reinterpret_cast<T*>(base + byte);
}

// The bins of one warp: float [kRows][kWarp] in shared memory. Behind the codes is a spare row. In
// the dense layout the bin of the code that means "pruned" collects what belongs to no code, and
// the spare one has the sum of the escapes; in the pairs layout the spare one takes what is absent.
template <int kWidth>
struct CodeBins {
    static constexpr int kRowBytes = kWarp * sizeof(float);
    static constexpr int kSpare = 1 << kWidth;
    static constexpr int kRows = kSpare + 1;
    static constexpr int kBytes = kRows * kRowBytes;

    unsigned char* own;  // the lane's bin of code 0; those of other codes are kRowBytes apart

    __device__ static CodeBins of(unsigned char* bins, int lane) {
        return {bins + lane * sizeof(float)};
    }

    // The offset of a code's bin is code * kRowBytes. That of code j of a lane, straight from its
    // string of codes.
    __device__ __forceinline__ static int offset(const UnitCodes<kWidth>& codes, int j) {
        constexpr int kShift = 7;
        static_assert(kRowBytes == 1 << kShift);
        const int at = j * kWidth / 32;
        const int shift = j * kWidth % 32;
        uint32_t bits;
        if (shift + kWidth > 32)
            bits = __funnelshift_r(codes.word[at], codes.word[at + 1 < kWidth ? at + 1 : at],
                                   shift - kShift);
        else
            bits = shift < kShift ? codes.word[at] << (kShift - shift)
                                  : codes.word[at] >> (shift - kShift);
        return static_cast<int>(bits & ((kSpare - 1) << kShift));
    }

    __device__ void clear() const {
        for (int row = 0; row < kRows; ++row) at<float>(own, row * kRowBytes) = 0.0f;
    }

    // Adds four values with one wait for shared memory. Values of equal codes are added to the
    // later one beforehand: its store comes last and holds them all.
    __device__ __forceinline__ void add(const int (&offset)[4], const float (&value)[4]) const {
        float old[4], sum[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) old[i] = at<float>(own, offset[i]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sum[i] = value[i];
#pragma unroll
            for (int j = 0; j < i; ++j) {
                if (offset[j] == offset[i]) sum[i] += value[j];
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) at<float>(own, offset[i]) = old[i] + sum[i];
    }

    __device__ void add_spare(float value) const { at<float>(own, kSpare * kRowBytes) += value; }

    // The sum of a code over the lanes of a warp. `zero`: the code that means "pruned", -1 without
    // one. Neighbouring threads, with neighbouring codes, read from different banks.
    __device__ static float total(unsigned char* bins, unsigned code, int zero) {
        const unsigned row = static_cast<int>(code) == zero ? kSpare : code;
        const auto* const floats = reinterpret_cast<const float*>(bins) + row * kWarp;
        float sum = 0.0f;
#pragma unroll 8
        for (unsigned i = 0; i < kWarp; ++i) sum += floats[(row + i) % kWarp];
        return sum;
    }
};

// Finds the chunks of one row in one window, from the counts of the windows before it; by
// `lanes` neighbouring lanes: 2, 4 or 8. What `start` loads is used by `find`: a caller that has
// other work in between does not wait.
class RunFinder {
  public:
    __device__ RunFinder(const DeviceWeight& weight, int windows, int lanes)
        : counts_(weight.run_chunks()),
          chunk_ptr_(weight.chunk_ptr()),
          windows_(windows),
          lanes_(lanes),
          own_(static_cast<int>(threadIdx.x) % lanes) {}

    // Row m has no chunks where m >= end.
    __device__ __forceinline__ void start(int64_t m, int64_t end, int window) {
        window_ = window;
        const int64_t begin = m < end ? m * windows_ : 0;
        const int before = m < end ? window_ : 0;
        lead_ = static_cast<int>(begin % 4);
        words_ = reinterpret_cast<const uint32_t*>(counts_) + begin / 4;
        count_ = (lead_ + before + 3) / 4;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            const int w = own_ + i * lanes_;
            held_[i] = w < count_ ? __ldg(words_ + w) : 0;
        }
        row_first_ = m < end ? __ldg(chunk_ptr_ + m) : 0;
        chunks_ = m < end ? __ldg(counts_ + begin + window_) : 0;
    }

    // The first chunk of the run, the same in all its lanes.
    __device__ __forceinline__ int find() const {
        uint32_t sums = 0;  // of even and of odd bytes
#pragma unroll
        for (int i = 0; i < kHeld; ++i) sums += counted(held_[i], own_ + i * lanes_);
        for (int w = own_ + kHeld * lanes_; w < count_; w += lanes_)
            sums += counted(__ldg(words_ + w), w);
#pragma unroll
        for (int step = kMostLanes / 2; step > 0; step /= 2) {
            const uint32_t other = __shfl_xor_sync(kFullWarp, sums, step);
            if (step < lanes_) sums += other;
        }
        return row_first_ + static_cast<int>(sums & 0xffff) + static_cast<int>(sums >> 16);
    }

    __device__ __forceinline__ int chunks() const { return chunks_; }

  private:
    static constexpr int kMostLanes = 8;
    static constexpr int kHeld = 3;  // words of counts, enough for 96 windows and eight lanes

    // Adds up the bytes of word w that belong to windows before the row's own.
    __device__ __forceinline__ uint32_t counted(uint32_t word, int w) const {
        const int from = 4 * w - lead_;       // window of its first byte
        const int over = from + 4 - window_;  // bytes at its end that lie behind
        if (from < 0) word &= ~0u << (-8 * from);
        if (over > 0) word &= over < 4 ? ~0u >> (8 * over) : 0;
        return (word & 0x00ff00ff) + (word >> 8 & 0x00ff00ff);
    }

    const uint8_t* counts_;
    const int* chunk_ptr_;
    int windows_, lanes_, own_;
    const uint32_t* words_;
    int window_, lead_, count_, row_first_, chunks_;
    uint32_t held_[kHeld];
};

}  // namespace placekern::cuda
