// y = W X for a layer's rows, or the windows of a small convolution: a warp decodes 16 or 32 rows
// of weights into the fragments of mma.sync. In the dense layout a lane owns 16 neighbouring
// columns of two rows (layout.cuh), and X lies in shared memory in the same order, so fragments
// need neither shuffles nor ldmatrix. Pairs are scattered over a tile of rows first.
//
// What limits it: bytes at 16 columns of the dense layout; at 64, and for pairs, shared memory. Of
// 1,024 positions of the dense layout: 32 wavefronts of lookups, 64 of X for 64 columns, halved
// where a warp has 32 rows.
#include <algorithm>

#include "matmul_dense.cuh"
#include "matmul_pairs.cuh"
#include "ops.h"

namespace placekern::cuda {
namespace {

// Calls f with the kernel for `tiles` times 8 columns, how many blocks have all rows, and the
// shared memory of each; `ring`: copies do not wait on the device.
template <int kWidth, int kTiles, class T, class F>
void with_kernel(const MatmulArgs& args, bool ring, F f) {
    const int splits = args.out.splits;
    const auto share = [splits](int64_t steps) { return (steps + splits - 1) / splits; };
    if (args.weight.layout == Layout::kDense) {
        constexpr int kRows = kWarps * kBlocks<kTiles, T> * kUnitRows;
        f(matmul_dense<kWidth, kTiles, T>, BlockRows<kRows>::blocks(args),
          DenseShared<kWidth, kTiles, T>::bytes(args.source.image, share(args.weight.units()),
                                                ring));
    } else {
        constexpr int kRows = kWarps * kPairsBlocks<T> * kUnitRows;
        f(matmul_pairs<kWidth, kTiles, T>, BlockRows<kRows>::blocks(args),
          PairsShared<kWidth, kTiles, T>::bytes(args.source.image, share(args.weight.windows())));
    }
}

template <class F>
void with_kernel(const MatmulArgs& args, bool ring, int tiles, F f) {
    with_type(args.source.dtype, [&](auto type) {
        using T = decltype(type);
        const bool narrow = args.weight.width() == 5;
        if (tiles == 2)
            narrow ? with_kernel<5, 2, T>(args, ring, f) : with_kernel<8, 2, T>(args, ring, f);
        else if (tiles == 4)
            narrow ? with_kernel<5, 4, T>(args, ring, f) : with_kernel<8, 4, T>(args, ring, f);
        else
            narrow ? with_kernel<5, 8, T>(args, ring, f) : with_kernel<8, 8, T>(args, ring, f);
    });
}

// How many blocks of a kernel a multiprocessor holds at once.
template <class Args>
int resident_blocks(void (*kernel)(Args), size_t shared, int device) {
    const DeviceScope scope(device);
    allow_shared(kernel, shared, device, "matmul");
    int blocks = 0;
    PK_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kWarps * kWarp, shared),
        "matmul, blocks with ", shared, " bytes of shared memory");
    return blocks;
}

// The most columns, in eights, whose tiles fit; 0 when none do.
int fitting_tiles(const MatmulArgs& args, bool ring, int device) {
    const auto limit = static_cast<size_t>(shared_limit(device));
    const int64_t N = args.out.N;
    for (int tiles = N <= 16 ? 2 : N <= 32 ? 4 : 8; tiles >= 2; tiles /= 2) {
        bool fits = false;
        with_kernel(args, ring, tiles,
                    [&](auto, int64_t, size_t shared) { fits = shared <= limit; });
        if (fits) return tiles;
    }
    return 0;
}

}  // namespace

bool matmul(const MatmulArgs& asked, const Queue& queue) {
    MatmulArgs args = asked;
    const Output& out = args.out;
    PK_CHECK(args.weight.one_codebook(), "matmul: group_size is ", args.weight.group_size,
             " of M = ", args.weight.M, ", expected one codebook; decode the weight instead");
    PK_CHECK(out.M <= INT32_MAX && out.N <= INT32_MAX, "matmul: M = ", out.M, ", N = ", out.N,
             ", expected less than 2^31 of each; use smaller batches");
    if (out.N == 0 || out.M == 0) return true;
    if (args.source.image) {
        const ConvShape& shape = args.source.shape;
        PK_CHECK(shape.groups == 1 || args.weight.layout == Layout::kPairs ||
                     args.weight.M / shape.groups % kUnitRows == 0,
                 "matmul: ", args.weight.M, " rows in ", shape.groups,
                 " groups of a convolution, expected a multiple of 16 in each in the dense layout");
        if (!has_taps(shape)) return false;
    }
    args.source.vectors = has_vectors(args.weight, args.source);
    const bool ring = attribute(cudaDevAttrComputeCapabilityMajor, queue.device) >= 8;
    const int tiles = fitting_tiles(args, ring, queue.device);
    if (tiles == 0) return false;
    with_kernel(args, ring, tiles, [&](auto kernel, int64_t row_blocks, size_t shared) {
        const dim3 grid(static_cast<unsigned>(row_blocks),
                        static_cast<unsigned>((out.N + 8 * tiles - 1) / (8 * tiles)),
                        static_cast<unsigned>(out.splits));
        launch(queue, kernel, {grid, kWarps * kWarp, shared}, args, "matmul, M = ", out.M,
               ", K = ", args.weight.K, ", N = ", out.N);
    });
    finish(out, queue);
    return true;
}

int matmul_splits(const DeviceWeight& weight, Dtype dtype, int64_t N, int groups, int device) {
    // Beyond four blocks a multiprocessor has enough loads on their way, and partial sums only
    // grow.
    constexpr int64_t kMostResident = 4;
    MatmulArgs args = {};
    args.weight = weight;
    args.source.dtype = dtype;
    args.source.image = groups > 0;
    args.source.shape.groups = groups;
    args.out.N = N;
    const bool ring = attribute(cudaDevAttrComputeCapabilityMajor, device) >= 8;
    const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
    // A block of the dense layout has four units at least, so that its prologue is worth it.
    const bool dense = weight.layout == Layout::kDense;
    const int64_t steps = std::max<int64_t>(dense ? weight.units() : weight.windows(), 1);
    const int64_t most = dense ? steps / 4 : steps;
    int best = 1;
    size_t known_shared = 0;  // bytes that `resident` is about
    int64_t resident = 0;
    for (args.out.splits = 1; args.out.splits <= most; ++args.out.splits) {
        const int tiles =
            fitting_tiles(args, ring, device);  // an image's grow with the steps of a block
        int64_t blocks = args.out.splits;
        if (tiles == 0) continue;
        with_kernel(args, ring, tiles, [&](auto kernel, int64_t row_blocks, size_t shared) {
            blocks *= row_blocks * ((N + 8 * tiles - 1) / (8 * tiles));
            if (shared != known_shared) resident = resident_blocks(kernel, shared, device);
            known_shared = shared;
        });
        if (blocks <= std::min(resident, kMostResident) * multiprocessors) best = args.out.splits;
        if (blocks > kMostResident * multiprocessors) break;
    }
    const int64_t share = (steps + best - 1) / best;
    return static_cast<int>((steps + share - 1) / share);  // those that get any
}

}  // namespace placekern::cuda
