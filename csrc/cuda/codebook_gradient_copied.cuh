// The product G = grad_y^T X^T of a block of codebook_gradient for 16-bit numbers that lie as a
// training step in channels_last has them: neighbours in memory are neighbouring rows of the
// weight (grad_y) and neighbouring columns (X). 16 bytes are copied at a time, and operands are
// transposed on their way from shared memory.
// The surprise: a lane's sums are not those of its own codes; they change hands at the end.
#pragma once

#include "codebook_gradient.cuh"

namespace placekern::cuda {

// A stage takes 16 n, as in the other way, and has a tile of each operand: a line of kTile elements
// for each n, padded for the banks.
constexpr int kCopiedStages = 4;  // one that is multiplied, the others on their way
constexpr int kLineBytes = (kTile + 8) * static_cast<int>(sizeof(uint16_t));
constexpr int kCopiedBytes = kSpan<__half> * kLineBytes;
constexpr int kCopiedStageBytes = 2 * kCopiedBytes;
template <class T>
constexpr int kCopiedEnd = kTiles<T> + kCopiedStages * kCopiedStageBytes;

// Whether operands are copied by 16 bytes, as they can be wherever a tile starts. Not on Turing,
// where a copy would be waited for at once.
inline bool copies_operands(const CodebookGradientCall& call, int major) {
    const Source& source = call.source;
    const GradYSource& grad_y = call.grad_y;
    const auto on_vector = [](const void* address) {
        return reinterpret_cast<uintptr_t>(address) % sizeof(uint4) == 0;
    };
    const bool x = source.image ? has_vectors(call.weight, source)
                                : source.stride % 8 == 0 && on_vector(source.x);
    return major >= 8 && source.dtype != Dtype::kFloat32 && x && grad_y.row_stride == 1 &&
           grad_y.pixel_stride % 8 == 0 && grad_y.image_stride % 8 == 0 && call.weight.M % 8 == 0 &&
           on_vector(grad_y.grad_y);
}

// A thread's share of the copies of a stage: 16 bytes of either operand.
template <class T>
class Copies {
  public:
    // The taps of the item must be there.
    __device__ __forceinline__ Copies(const CodebookGradientCall& call, const Item& item)
        : first_n_(item.n0 + line()), m_(item.row0 + vector()), k_(item.column0 + vector()) {
        const int first = static_cast<int>(call.first);
        has_rows_ = m_ + 8 > first && m_ < first + static_cast<int>(call.rows);
        if (call.source.image)
            tap_ = at<Tap>(placekern_shared, kTaps + vector() * static_cast<int>(sizeof(Tap)));
    }

    // The points of the stage must be there.
    __device__ __forceinline__ void start(const CodebookGradientCall& call, int n_end,
                                          unsigned stage) const {
        const Source& source = call.source;
        const Point point = at<Point>(
            placekern_shared,
            kPoints<T> +
                static_cast<int>((stage % (2 * kBatch) * kSpan<T> + line()) * sizeof(Point)));
        unsigned char* const to = placekern_shared + kTiles<T> +
                                  stage % kCopiedStages * kCopiedStageBytes + line() * kLineBytes +
                                  vector() * static_cast<int>(sizeof(T));
        const auto* const grad_y = static_cast<const T*>(call.grad_y.grad_y);
        const bool row = point.grad_y >= 0 && has_rows_;
        copy_async(to, row ? grad_y + point.grad_y + m_ : grad_y, row);
        const auto* const x = static_cast<const T*>(source.x);
        const int n = first_n_ + static_cast<int>(stage) * kSpan<T>;
        const T* from = x + point.base + tap_.offset;
        bool known = k_ < static_cast<int>(call.weight.K);
        if (source.image) {
            known = known &&
                    tap_.lies_inside(point.y, point.x, static_cast<unsigned>(source.shape.height),
                                     static_cast<unsigned>(source.shape.width));
        } else {
            known = known && n < n_end;
            from = x + n * source.stride + k_;
        }
        copy_async(to + kCopiedBytes, known ? from : x, known);
    }

  private:
    static constexpr int kVectors = kTile / 8;
    static_assert(kThreads == kVectors * kSpan<T>);
    __device__ __forceinline__ static int vector() { return threadIdx.x % kVectors * 8; }
    __device__ __forceinline__ static int line() { return threadIdx.x / kVectors; }

    int first_n_, m_, k_;
    bool has_rows_;
    Tap tap_ = {};
};

// sums += grad_y^T X^T over a stage; of product j, slots 8 j to 8 j + 7 of the warp's.
template <class T>
__device__ __forceinline__ void multiply_copied(Sums& sums, unsigned stage, int lane, int warp) {
    const unsigned char* const grad_y =
        placekern_shared + kTiles<T> + stage % kCopiedStages * kCopiedStageBytes;
    const unsigned char* const x = grad_y + kCopiedBytes;
    const int near = lane % 8 + lane / 16 * 8, far = lane % 16;  // n of the line a lane names
    const int row = warp % kRowWarps * 32 + lane / 8 % 2 * 8;
    const int slot = warp / kRowWarps * kUnitColumns + lane / 16 * 8;
    uint32_t left[2][4];
#pragma unroll
    for (int b = 0; b < 2; ++b)
        load_transposed(left[b], grad_y + near * kLineBytes + 2 * (row + b * kUnitRows));
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        uint32_t right[4];
        load_transposed(right, x + far * kLineBytes + 2 * (slot + j * 8));
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            mma(sums[b][j], left[b], {right[0], right[1]}, T());
            mma(sums[b][j + 1], left[b], {right[2], right[3]}, T());
        }
    }
}

// Of eight products across, those of neighbouring slots become those of a lane's own codes: lane
// 4 g + q gets slots 16 q to 16 q + 15. The four lanes of a g transpose what they have, 4 x 4.
__device__ __forceinline__ void change_hands(Sums& sums, int lane) {
    const int q = lane % 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // row block, element of a product
        const int b = i / 4, r = i % 4;
        float own[8], got[8] = {};
#pragma unroll
        for (int j = 0; j < 8; ++j) own[j] = sums[b][j][r];
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // of a lane's slots
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                // Products 2 q and 2 q + 1 are lane q's; what comes from lane p is product p of the
                // half.
                const int partner = q ^ step;
                float given = own[half];
#pragma unroll
                for (int c = 1; c < 4; ++c) given = c == partner ? own[2 * c + half] : given;
                const float taken = step == 0 ? given : __shfl_xor_sync(kFullWarp, given, step);
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    got[4 * half + c] = c == partner ? taken : got[4 * half + c];
            }
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[b][j][r] = got[j];
    }
}

// G of an item whose taps and first points are there. Nobody reads the tiles any more when it ends.
template <class T>
__device__ __forceinline__ void multiply_item(Sums& sums, const CodebookGradientCall& call,
                                              const Item& item, unsigned stages, int lane,
                                              int warp) {
    constexpr unsigned kAhead = kCopiedStages - 1;
    const Copies<T> copies(call, item);
    const int n_end = item.n_end;
    const auto fetch = [&](unsigned stage) {
        if (stage < stages) copies.start(call, n_end, stage);
        commit_copies();
        if (stage % kBatch == 1) fill_points<T>(call, item, stage / kBatch + 1);
    };
    for (unsigned stage = 0; stage < kAhead; ++stage) fetch(stage);
    for (unsigned stage = 0; stage < stages; ++stage) {
        wait_for_copies_before<kAhead - 1>();
        __syncthreads();  // the stage is there, and the one before it is multiplied
        fetch(stage + kAhead);
        multiply_copied<T>(sums, stage, lane, warp);
    }
    __syncthreads();
    change_hands(sums, lane);
}

}  // namespace placekern::cuda
