// grad_x = grad_y W and the gradient of the codebook, which is the sum over the positions of each
// code of G = grad_y^T x. W is decoded once for both, and G lives in registers only.
//
// A warp has a strip of 64 columns and walks down it, 16 rows at a time. A lane decodes 16
// neighbouring columns of rows g and g + 8 (layout.cuh), owns the same elements of G, and adds
// them to its own bins. x and the sums of grad_x stay in registers over the whole walk.
//
// What limits it: shared memory. A unit of 1,024 positions takes 32 wavefronts of lookups and 64 of
// bins; tensor cores and instructions need about as long at 32 rows of x. With 8 bits the bins of
// few warps fit, so loads are issued ahead of their use. Bins are dear to fill and to add up: in
// the pairs layout a block keeps them while it goes from window to window.
#include "linear_backward.cuh"

#include <algorithm>

namespace placekern::cuda {
namespace {

template <int kWidth>
constexpr int kMaxWarps = kWidth == 8 ? 6 : 4;
template <int kWidth>
constexpr int kBlocksPerMultiprocessor = kWidth == 8 ? 1 : 2;

// Reads the codes of a strip and where its escapes are, block of rows by block of rows.
template <int kWidth>
struct Ahead {
    UnitCodes<kWidth> codes;
    int escape, escape_end;
};

template <int kWidth>
class Walk {
  public:
    __device__ Walk(const DeviceWeight& weight, int64_t block, int64_t strip, int lane)
        : codes_(weight.codes + (block * weight.units() + strip) * kUnitBytes<kWidth>),
          escape_ptr_(weight.escape_ptr() + block * weight.units() + strip),
          units_(static_cast<int>(weight.units())),
          lane_(lane),
          escapes_(has_escapes(weight)) {}

    __device__ __forceinline__ Ahead<kWidth> next() {
        Ahead<kWidth> ahead;
        ahead.codes = load_codes<kWidth>(codes_, lane_);
        ahead.escape = escapes_ ? __ldg(escape_ptr_) : 0;
        ahead.escape_end = escapes_ ? __ldg(escape_ptr_ + 1) : 0;
        codes_ += int64_t{units_} * kUnitBytes<kWidth>;
        escape_ptr_ += units_;
        return ahead;
    }

  private:
    const uint8_t* codes_;
    const int* escape_ptr_;
    int units_, lane_;
    bool escapes_;
};

template <int kWidth, int kSteps, int kWanted, class T>
__global__ void __launch_bounds__(kMaxWarps<kWidth>* kWarp, kBlocksPerMultiprocessor<kWidth>)
    backward_dense(LinearBackwardCall call) {
    using Bins = CodeBins<kWidth>;
    using Table = RoundedTable<kWidth, T>;
    constexpr int kColumns = 16 * kSteps;
    const DeviceWeight& weight = call.weight;
    const auto [lane, warp] = Place::of();
    auto rows = Part<kSteps>::of(call);
    const int64_t n0 = rows.n0;
    const int64_t strip = int64_t{rows.strip} * (blockDim.x / kWarp) + warp;
    if (strip >= weight.units()) rows.end = rows.first;  // has no columns, waits at the barriers

    GradY<kSteps> next_grad_y = {};
    if (rows.first < rows.end) next_grad_y = GradY<kSteps>::load(rows.grad_y, rows.first, lane);
    Walk<kWidth> walk(weight, rows.first, strip, lane);
    Ahead<kWidth> ahead[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i)
        if (rows.first + i < rows.end) ahead[i] = walk.next();
    const auto column_of = [&](int slot) {
        const int64_t column = strip * kUnitColumns + slot;
        return column < weight.K ? column : int64_t{-1};
    };
    Strip<kSteps, kWanted, T> sums;
    const int zero = zero_code(weight);
    const uint32_t escape = to_bits(read(weight.codebook, zero), T());
    Table::fill(weight, zero);
    const auto bins = Bins::of(placekern_shared + Table::kBytes + warp * Bins::kBytes, lane);
    if constexpr ((kWanted & kGradCodebook) != 0) {
        sums.load_x(call, n0, lane, column_of);
        bins.clear();
    }
    __syncthreads();

    const auto warp_bins = Bins::of(placekern_shared + Table::kBytes + warp * Bins::kBytes, 0);
    float of_escapes = 0.0f;  // of row n0 + lane of x
    for (int64_t block = rows.first; block < rows.end; ++block) {
        const GradY<kSteps> now_grad_y = next_grad_y;
        if (block + 1 < rows.end) next_grad_y = GradY<kSteps>::load(rows.grad_y, block + 1, lane);
        const Ahead<kWidth> now = ahead[0];
        ahead[0] = ahead[1];
        if (block + 2 < rows.end) ahead[1] = walk.next();
        uint32_t element[kUnitCodes];
        int offset[kUnitCodes];
#pragma unroll
        for (int j = 0; j < kUnitCodes; ++j) {
            offset[j] = Bins::offset(now.codes, j) | lane * 4;
            element[j] = at<uint32_t>(placekern_shared, offset[j]);
        }
        for (int e = now.escape; e < now.escape_end; ++e) {
            const int place = __ldg(weight.escapes() + e);
            const int row = place / kUnitColumns, column = place % kUnitColumns;
            const int own = owner_of(row, column) == lane ? element_of(row, column) : -1;
#pragma unroll
            for (int j = 0; j < kUnitCodes; ++j) element[j] = j == own ? escape : element[j];
            if ((kWanted & kGradCodebook) != 0 && lane < kColumns && n0 + lane < call.N) {
                const T dy =
                    reinterpret_cast<const T*>(rows.grad_y)[GradY<kSteps>::place(block, row, lane)];
                const T x = static_cast<const T*>(
                    call.x)[(n0 + lane) * call.x_stride + strip * kUnitColumns + column];
                of_escapes += to_float(dy) * to_float(x);
            }
        }
        uint32_t pair[16];
#pragma unroll
        for (int i = 0; i < 16; ++i)
            pair[i] = __byte_perm(element[2 * i], element[2 * i + 1], 0x5410);
        sums.add(now_grad_y, pair, offset, warp_bins);
    }
    if constexpr ((kWanted & kGradX) != 0) sums.write_grad_x(call, rows.split, n0, lane, column_of);
    if constexpr ((kWanted & kGradCodebook) != 0) {
        bins.add_spare(of_escapes);
        __syncthreads();
        write_codebook<kWidth>(call, placekern_shared + Table::kBytes, zero);
    }
}

// A lane's share of the chunks of a row, on their way into a tile.
struct Run {
    static constexpr int kHeld = 2;
    int next, end;
    uint4 held[kHeld];

    __device__ __forceinline__ void load(const RunFinder& finder, const uint4* chunks, int lanes) {
        const int first = finder.find();
        next = first + static_cast<int>(threadIdx.x) % lanes;
        end = first + finder.chunks();
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            // Not read later unless it was read here.
            if (next + i * lanes < end) held[i] = __ldg(chunks + next + i * lanes);
        }
    }
};

template <int kWidth, int kSteps, int kWanted, class T>
__global__ void __launch_bounds__(4 * kWarp, kBlocksPerMultiprocessor<kWidth>)
    backward_pairs(LinearBackwardCall call) {
    using Bins = CodeBins<kWidth>;
    using Tiles = PairsTiles<kWidth, T>;
    const DeviceWeight& weight = call.weight;
    const auto [lane, warp] = Place::of();
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    const int unit = static_cast<int>(blockIdx.y) * warps + warp;
    const Runs runs(weight, call.plan);
    const int first = static_cast<int>(blockIdx.x) * runs.steps;
    const int end = min(first + runs.steps, runs.windows * call.plan.chunks * runs.blocks);

    // A row has 2 * warps lanes. Its chunks are found one step before they are read, and read one
    // before they are scattered; steps of the next run follow those of the last.
    const int row_lanes = 2 * warps;
    const int row = static_cast<int>(threadIdx.x) / row_lanes;
    const auto* const chunks = reinterpret_cast<const uint4*>(weight.codes);
    RunFinder finder(weight, static_cast<int>(weight.windows()), row_lanes);
    Run run;
    int left = end - first;  // steps whose rows are not yet looked for
    int find_block = first % runs.blocks;
    int window = first / runs.blocks % runs.windows;
    const auto find_next = [&] {
        finder.start(int64_t{find_block} * kUnitRows + row, left > 0 ? weight.M : 0, window);
        --left;
        if (++find_block == runs.blocks) {
            find_block = 0;
            if (++window == runs.windows) window = 0;
        }
    };
    find_next();
    run.load(finder, chunks, row_lanes);
    find_next();
    const auto scatter = [&](int tile) {
#pragma unroll
        for (int i = 0; i < Run::kHeld; ++i) {
            if (run.next + i * row_lanes < run.end) Tiles::scatter(tile, row, run.held[i]);
        }
        for (int c = run.next + Run::kHeld * row_lanes; c < run.end; c += row_lanes)
            Tiles::scatter(tile, row, __ldg(chunks + c));
        run.load(finder, chunks, row_lanes);
        find_next();
    };

    Tiles::fill(weight);
    const auto bins = Bins::of(placekern_shared + Tiles::kBytes + warp * Bins::kBytes, lane);
    if constexpr ((kWanted & kGradCodebook) != 0) bins.clear();
    __syncthreads();
    scatter(0);
    int tile = 0;
    for (int step = first; step < end;) {
        const int own_run = step / runs.blocks;
        const int64_t column0 = int64_t{own_run % runs.windows} * kPairsWindow;
        const int64_t n0 = int64_t{own_run / runs.windows} * (16 * kSteps);
        const auto column_of = [&](int slot) {
            const int place = unit * kUnitColumns + slot;
            const int64_t column = column0 + place;
            return place < kPairsWindow && column < weight.K ? column : int64_t{-1};
        };
        const uint16_t* const grad_y = chunk_of_grad_y(call, n0);
        auto next = GradY<kSteps>::load(grad_y, step - own_run * runs.blocks, lane);
        Strip<kSteps, kWanted, T> sums;
        if constexpr ((kWanted & kGradCodebook) != 0) sums.load_x(call, n0, lane, column_of);
        const int run_end = min((own_run + 1) * runs.blocks, end);
        for (; step < run_end; ++step) {
            __syncthreads();  // this tile is full, the other one empty
            uint32_t word[kUnitCodes];
            Tiles::take(tile, unit, lane, word);
            tile = 1 - tile;
            scatter(tile);
            const GradY<kSteps> now = next;
            if (step + 1 < run_end)
                next = GradY<kSteps>::load(grad_y, step + 1 - own_run * runs.blocks, lane);
            uint32_t pair[16];
            int offset[kUnitCodes];
#pragma unroll
            for (int i = 0; i < 16; ++i)
                pair[i] = __byte_perm(word[2 * i], word[2 * i + 1], 0x5410);
#pragma unroll
            for (int j = 0; j < kUnitCodes; ++j) offset[j] = static_cast<int>(word[j] >> 16);
            sums.add(now, pair, offset, bins);
        }
        if constexpr ((kWanted & kGradX) != 0) {
            const int segment = static_cast<int>(blockIdx.x) - runs.first_block(own_run);
            sums.write_grad_x(call, segment, n0, lane, column_of);
        }
    }
    if constexpr ((kWanted & kGradCodebook) != 0) {
        __syncthreads();
        write_codebook<kWidth>(call, placekern_shared + Tiles::kBytes, -1);
    }
}

// Calls f with the kernel, the bytes of its shared memory, and how many blocks of it the registers
// of a multiprocessor have room for.
template <int kWidth, int kSteps, int kWanted, class T, class F>
void with_kernel(const DeviceWeight& weight, int warps, F f) {
    const int blocks = kBlocksPerMultiprocessor<kWidth>;
    const size_t bins = (kWanted & kGradCodebook) != 0 ? warps * CodeBins<kWidth>::kBytes : 0;
    if (weight.layout == Layout::kDense)
        f(backward_dense<kWidth, kSteps, kWanted, T>, RoundedTable<kWidth, T>::kBytes + bins,
          blocks);
    else
        f(backward_pairs<kWidth, kSteps, kWanted, T>, PairsTiles<kWidth, T>::kBytes + bins, blocks);
}

template <int kWidth, int kSteps, class T, class F>
void with_kernel(const DeviceWeight& weight, int wanted, int warps, F f) {
    if (wanted == kGradX) return with_kernel<kWidth, kSteps, kGradX, T>(weight, warps, f);
    if (wanted == kGradCodebook)
        return with_kernel<kWidth, kSteps, kGradCodebook, T>(weight, warps, f);
    with_kernel<kWidth, kSteps, kGradX | kGradCodebook, T>(weight, warps, f);
}

template <class F>
void with_kernel(const DeviceWeight& weight, Dtype dtype, int columns, int wanted, int warps, F f) {
    const auto choose = [&](auto type) {
        using T = decltype(type);
        if (weight.width() == 5)
            columns == 16 ? with_kernel<5, 1, T>(weight, wanted, warps, f)
                          : with_kernel<5, 2, T>(weight, wanted, warps, f);
        else
            columns == 16 ? with_kernel<8, 1, T>(weight, wanted, warps, f)
                          : with_kernel<8, 2, T>(weight, wanted, warps, f);
    };
    dtype == Dtype::kFloat16 ? choose(__half()) : choose(__nv_bfloat16());
}

// Splits of the rows in the dense layout: with the fewest steps of 16 rows, one after the other, on
// the busiest multiprocessor; what a block does once (clearing, writing) takes about as long as
// six.
int splits(int64_t blocks, int64_t runs, int64_t capacity) {
    int best = 1;
    int64_t fewest = 0;
    for (int splits = 1; splits <= std::min(blocks, 2 * capacity); ++splits) {
        const int64_t rounds = (runs * splits + capacity - 1) / capacity;
        const int64_t steps = rounds * ((blocks + splits - 1) / splits + 6);
        if (splits == 1 || steps < fewest) {
            fewest = steps;
            best = splits;
        }
    }
    return best;
}

}  // namespace

LinearBackwardPlan linear_backward_plan(const DeviceWeight& weight, Dtype dtype, int64_t N,
                                        bool grad_x, bool grad_codebook, int device) {
    PK_CHECK(weight.one_codebook(), "linear_backward: group_size is ", weight.group_size,
             " of M = ", weight.M, ", expected one codebook; use codebook_gradient");
    PK_CHECK(dtype != Dtype::kFloat32,
             "linear_backward: x is float32, expected float16 or bfloat16; use codebook_gradient");
    LinearBackwardPlan plan = {};
    plan.columns = N <= 16 ? 16 : 32;
    plan.chunks = static_cast<int>((N + plan.columns - 1) / plan.columns);
    if (dtype == Dtype::kBfloat16 && attribute(cudaDevAttrComputeCapabilityMajor, device) < 8)
        return plan;  // Turing has no bfloat16 product
    const int wanted = (grad_x ? kGradX : 0) | (grad_codebook ? kGradCodebook : 0);
    const auto limit = static_cast<size_t>(shared_limit(device));
    const bool dense = weight.layout == Layout::kDense;
    const int most = !dense || weight.width() == 5 ? 4 : kMaxWarps<8>;
    int resident = 1;  // blocks that a multiprocessor holds
    for (int warps = most; warps >= 2 && plan.warps == 0; warps = dense ? warps - 1 : warps / 2) {
        with_kernel(weight, dtype, plan.columns, wanted, warps,
                    [&](auto, size_t shared, int blocks) {
                        if (shared > limit) return;
                        plan.warps = warps;
                        resident = std::min(blocks, static_cast<int>(limit / shared));
                    });
    }
    if (plan.warps == 0 || N == 0 || weight.M == 0 || weight.K == 0) return plan;

    const int64_t capacity = int64_t{resident} * attribute(cudaDevAttrMultiProcessorCount, device);
    const int64_t side = across(weight, plan.warps);
    if (dense) {
        plan.splits = splits(weight.blocks(), side * plan.chunks, capacity);
        plan.blocks = static_cast<int>(side * plan.chunks * plan.splits);
    } else {
        const int64_t runs = weight.windows() * plan.chunks, steps = runs * weight.blocks();
        const int64_t share = std::max<int64_t>(capacity / side, 1);  // blocks of a part
        if (steps + share > INT32_MAX) {
            plan.warps = 0;
            return plan;
        }
        plan.steps = static_cast<int>((steps + share - 1) / share);
        plan.blocks = static_cast<int>(side * ((steps + plan.steps - 1) / plan.steps));
        for (int run = 0; run < runs; ++run)
            plan.splits = std::max(plan.splits, Runs(weight, plan).segments(run));
    }
    if (grad_codebook) plan.workspace += (sizeof(double) * plan.blocks) << weight.bits;
    if (grad_x) plan.workspace += sizeof(float) * plan.splits * N * weight.K;
    return plan;
}

void linear_backward(const LinearBackwardCall& call, const Queue& queue) {
    const LinearBackwardPlan& plan = call.plan;
    const int wanted = (call.grad_x ? kGradX : 0) | (call.grad_codebook ? kGradCodebook : 0);
    PK_CHECK(plan.warps > 0,
             "linear_backward: no block fits into shared memory; use codebook_gradient");
    if (wanted == 0) return;
    if (plan.splits > 0) {
        const auto side = static_cast<unsigned>(across(call.weight, plan.warps));
        const dim3 grid =
            call.weight.layout == Layout::kDense
                ? dim3(side, static_cast<unsigned>(plan.splits), static_cast<unsigned>(plan.chunks))
                : dim3(static_cast<unsigned>(plan.blocks) / side, side);
        with_kernel(call.weight, call.dtype, plan.columns, wanted, plan.warps,
                    [&](auto kernel, size_t shared, int) {
                        launch(queue, kernel, {grid, plan.warps * kWarp, shared}, call,
                               "linear_backward, M = ", call.weight.M, ", K = ", call.weight.K,
                               ", N = ", call.N);
                    });
    }
    finish_linear_backward(call, queue);
}

}  // namespace placekern::cuda
