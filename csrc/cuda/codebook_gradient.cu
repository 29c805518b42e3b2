// The gradient of a codebook: the sum over the positions of each code of G = grad_y^T X^T, which is
// never written. A block has 128 rows and 128 columns (slots) of the weight and adds up its part of
// G in registers over a piece of N; only then are codes read, and G is added to bins.
//
// A warp has 32 rows and 64 slots, which are two units of the dense layout: lane 4 g + q ends with
// G of rows g, g + 8, g + 16, g + 24 and of slots 16 q to 16 q + 15, the elements whose codes it
// would own there (layout.cuh). Slots 2q, 2q + 1 of product j stand for slots 16 q + 2 j, + 1.
//
// What limits it: with many columns, shared memory and the L2 cache where operands are copied, else
// instructions that gather windows of an image (16 elements a thread for 16 products a warp), or
// float32 multiply-adds; with few, bins.
#include "codebook_gradient_copied.cuh"

#include <algorithm>

namespace placekern::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;
constexpr int kWarpRows = kTile / kRowWarps;

// Codes of the pairs layout, as offsets of their bins: plan.code_rows rows of a tile at a time,
// each padded for the banks.
constexpr int kCodeRowBytes = (kTile + 8) * static_cast<int>(sizeof(uint16_t));

// Fills in item i of the work. Blocks side by side have the same columns, which they read from the
// same images.
template <bool kPairs, int kStep>
__device__ void fill_item(Item& item, const CodebookGradientCall& call, int i) {
    const CodebookGradientPlan& plan = call.plan;
    const int tile = i / plan.row_tiles % plan.column_tiles;
    item.row0 = static_cast<int>(call.first) / kUnitRows * kUnitRows + i % plan.row_tiles * kTile;
    item.windows = static_cast<int>(call.weight.windows());
    item.window = tile / 2;
    item.first_place = tile % 2 * kTile;
    item.column0 = kPairs ? item.window * kPairsWindow + item.first_place : tile * kTile;
    const int N = static_cast<int>(call.N);
    const int steps = (N + kStep - 1) / kStep;
    const int size = (steps + plan.splits - 1) / plan.splits * kStep;
    item.n0 = min(i / plan.row_tiles / plan.column_tiles * size, N);
    item.n_end = min(item.n0 + size, N);
}

// Adds a unit of G to the bins of its codes; where a row is not `real`, zeros.
template <int kWidth, class F>
__device__ __forceinline__ void add_unit(const CodeBins<kWidth>& bins, const float (&sums)[8][4],
                                         const bool (&real)[2], F offset_of) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const int offset[4] = {offset_of(2 * j), offset_of(2 * j + 1), offset_of(16 + 2 * j),
                               offset_of(17 + 2 * j)};
        const float value[4] = {real[0] ? sums[j][0] : 0.0f, real[0] ? sums[j][1] : 0.0f,
                                real[1] ? sums[j][2] : 0.0f, real[1] ? sums[j][3] : 0.0f};
        bins.add(offset, value);
    }
}

// Adds a unit of G to bins. Rows of other groups add zeros.
template <int kWidth>
__device__ void add_dense(const CodebookGradientCall& call, int m, int column,
                          const float (&sums)[8][4], const CodeBins<kWidth>& bins, int lane) {
    const DeviceWeight& weight = call.weight;
    if (m >= weight.M || column >= weight.K) return;
    const int64_t unit = m / kUnitRows * weight.units() + column / kUnitColumns;
    const auto codes = load_codes<kWidth>(weight.codes + unit * kUnitBytes<kWidth>, lane);
    const bool real[2] = {is_of(call, m + lane / 4), is_of(call, m + 8 + lane / 4)};
    add_unit(bins, sums, real, [&](int j) { return CodeBins<kWidth>::offset(codes, j); });
    if (!has_escapes(weight)) return;
    for_escapes(weight, unit, [&](int row, int at) {
        if (!is_of(call, m + row) || owner_of(row, at) != lane) return;
        const int own = element_of(row, at);
        float value = 0.0f;
#pragma unroll
        for (int j = 0; j < kUnitCodes; ++j)
            value = j == own ? sums[j % 16 / 2][j / 16 * 2 + j % 2] : value;
        bins.add_spare(value);
    });
}

// Writes the codes of plan.code_rows rows of the tile of an item, from row `first` on, by all
// threads: 2 or 8 neighbouring ones have a row. Rows of other groups have none.
template <int kWidth>
__device__ void fill_codes(const CodebookGradientCall& call, const Item& item, int first_row,
                           unsigned char* codes) {
    constexpr uint32_t kAbsent = CodeBins<kWidth>::kSpare * CodeBins<kWidth>::kRowBytes * 0x10001u;
    constexpr int kHeld = 5;  // chunks of a thread on their way at once
    const int row_lanes = kThreads / call.plan.code_rows;
    const int own = static_cast<int>(threadIdx.x) % row_lanes;
    const int own_row = static_cast<int>(threadIdx.x) / row_lanes;
    const int m = item.row0 + first_row + own_row;
    RunFinder finder(call.weight, item.windows, row_lanes);
    finder.start(m, is_of(call, m) ? m + 1 : 0, item.window);
    unsigned char* const row = codes + own_row * kCodeRowBytes;
    for (int byte = 16 * own; byte < kCodeRowBytes; byte += 16 * row_lanes)
        at<uint4>(row, byte) = make_uint4(kAbsent, kAbsent, kAbsent, kAbsent);
    const auto* const chunks = reinterpret_cast<const uint4*>(call.weight.codes) + finder.find();
    const auto slots = static_cast<unsigned>(min(kTile, kPairsWindow - item.first_place));
    __syncwarp();
#pragma unroll 1
    for (int first = own; first < finder.chunks(); first += kHeld * row_lanes) {
        uint4 chunk[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            // Not read later unless it was read here.
            if (first + i * row_lanes < finder.chunks())
                chunk[i] = __ldg(chunks + first + i * row_lanes);
        }
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            if (first + i * row_lanes >= finder.chunks()) break;
#pragma unroll
            for (int j = 0; j < kChunk; ++j) {
                const unsigned slot = chunk_byte(chunk[i], j) - item.first_place;
                const unsigned offset =
                    chunk_byte(chunk[i], kChunk + j) * CodeBins<kWidth>::kRowBytes;
                if (slot < slots) at<uint16_t>(row, 2 * slot) = static_cast<uint16_t>(offset);
            }
        }
    }
}

// Adds a unit of G to bins, by the codes of the tile from the unit's first on.
template <int kWidth>
__device__ void add_pairs(const unsigned char* codes, const float (&sums)[8][4],
                          const CodeBins<kWidth>& bins, int lane) {
    uint32_t word[kUnitCodes / 2];
#pragma unroll
    for (int v = 0; v < 4; ++v) {
        const uint4 four = *reinterpret_cast<const uint4*>(
            codes + (v / 2 * 8 + lane / 4) * kCodeRowBytes + 2 * (lane % 4 * 16 + v % 2 * 8));
        word[4 * v] = four.x;
        word[4 * v + 1] = four.y;
        word[4 * v + 2] = four.z;
        word[4 * v + 3] = four.w;
    }
    add_unit(bins, sums, {true, true}, [&](int j) {
        return static_cast<int>(j % 2 == 0 ? word[j / 2] & 0xffff : word[j / 2] >> 16);
    });
}

template <int kWidth, bool kPairs, bool kCopied, class T>
__global__ void __launch_bounds__(kThreads, 2) gradient(CodebookGradientCall call) {
    using Bins = CodeBins<kWidth>;
    constexpr int kSet = Bins::kBytes;
    const DeviceWeight& weight = call.weight;
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    const int zero = kPairs ? -1 : zero_code(weight);
    const int items = call.plan.row_tiles * call.plan.column_tiles * call.plan.splits;
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
        Item& item = at<Item>(placekern_shared, kItem);
        if (threadIdx.x == 0) fill_item<kPairs, kSpan<T>>(item, call, i);
        __syncthreads();
        if (call.source.image)
            fill_taps(&at<Tap>(placekern_shared, kTaps), kTile, item.column0, weight, call.source);
        fill_points<T>(call, item, 0);
        __syncthreads();
        Sums sums = {};
        const auto stages = static_cast<unsigned>(item.n_end - item.n0 + kSpan<T> - 1) / kSpan<T>;
        if constexpr (kCopied) {
            multiply_item<T>(sums, call, item, stages, lane, warp);
        } else {
            // A stage is fetched while the one before it is multiplied; behind the last come zeros.
            for (unsigned next = 0; next <= stages; ++next) {
                Fetch<T> fetch;
                fetch.load(call, item, next);
                if (next % kBatch == 1) fill_points<T>(call, item, next / kBatch + 1);
                if (next > 0) multiply<T>(sums, (next - 1) % 2, lane, warp);
                fetch.store(call, next % 2);
                __syncthreads();
            }
        }

        unsigned char* const all_bins = placekern_shared + kBins;
#pragma unroll 1
        for (int byte = 16 * threadIdx.x; byte < call.plan.sets * kSet; byte += 16 * kThreads)
            at<uint4>(all_bins, byte) = make_uint4(0, 0, 0, 0);
        unsigned char* const codes = all_bins + call.plan.sets * kSet;
        const int turn =
            warp % kRowWarps * 2 + warp / kRowWarps;  // warps of the same rows together
        for (int first = 0; first < kWarps; first += call.plan.sets) {
            __syncthreads();
            if constexpr (kPairs) {
                const int first_row = first / 2 * kWarpRows;
                if (first % 2 == 0 && (first_row & (call.plan.code_rows - 1)) == 0) {
                    fill_codes<kWidth>(call, item, first_row, codes);
                    __syncthreads();
                }
            }
            if (turn / call.plan.sets * call.plan.sets != first) continue;
            const Bins bins = Bins::of(all_bins + (turn - first) * kSet, lane);
            const int first_slot = warp / kRowWarps * kUnitColumns;
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                const int row = warp % kRowWarps * kWarpRows + b * kUnitRows;
                if constexpr (kPairs)
                    add_pairs(
                        codes + (row & (call.plan.code_rows - 1)) * kCodeRowBytes + 2 * first_slot,
                        sums[b], bins, lane);
                else
                    add_dense(call, item.row0 + row, item.column0 + first_slot, sums[b], bins,
                              lane);
            }
        }
        __syncthreads();
        if (threadIdx.x < 1 << weight.bits) {
            double& total = call.partial[(blockIdx.x << weight.bits) + threadIdx.x];
            double sum = i == blockIdx.x ? 0.0 : total;
            for (int set = 0; set < call.plan.sets; ++set)
                sum += Bins::total(all_bins + set * kSet, threadIdx.x, zero);
            total = sum;
        }
    }
}

// Calls f with the kernel, the bytes of a set of bins, and those of the tiles that lie there
// before: where operands are copied, they may yet come in the other way.
template <int kWidth, bool kPairs, class F>
void with_kernel(Dtype dtype, bool copied, F f) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        constexpr int kSet = CodeBins<kWidth>::kBytes;
        if constexpr (sizeof(T) == 2) {
            if (copied) {
                constexpr int kStage = std::max(kStageBytes<T>, kCopiedEnd<T>);
                return f(gradient<kWidth, kPairs, true, T>, kSet, kStage);
            }
        }
        f(gradient<kWidth, kPairs, false, T>, kSet, kStageBytes<T>);
    });
}

template <class F>
void with_kernel(const DeviceWeight& weight, Dtype dtype, bool copied, F f) {
    if (weight.layout == Layout::kPairs)
        weight.width() == 5 ? with_kernel<5, true>(dtype, copied, f)
                            : with_kernel<8, true>(dtype, copied, f);
    else
        weight.width() == 5 ? with_kernel<5, false>(dtype, copied, f)
                            : with_kernel<8, false>(dtype, copied, f);
}

// Bytes of shared memory that a block takes.
int shared_bytes(const CodebookGradientPlan& plan, int set, int stage) {
    return std::max(kBins + plan.sets * set + plan.code_rows * kCodeRowBytes, stage);
}

}  // namespace

CodebookGradientPlan codebook_gradient_plan(const DeviceWeight& weight, Dtype dtype, int64_t first,
                                            int64_t rows, int64_t N, int device) {
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    PK_CHECK(dtype != Dtype::kBfloat16 || major >= 8,
             "codebook_gradient: x is bfloat16 and device ", device, " has compute capability ",
             major, ".x, expected 8.0 or newer; use float16 or float32");
    // They may be, as far as it is known here.
    const bool copied = major >= 8 && dtype != Dtype::kFloat32 && weight.M % 8 == 0;
    // As many sets of bins as two blocks find room for, then as many rows of codes.
    const bool pairs = weight.layout == Layout::kPairs;
    CodebookGradientPlan plan = {1, 0, 0, 0, 0, pairs ? kWarpRows : 0};
    int64_t resident = 1;  // blocks that a multiprocessor holds
    with_kernel(weight, dtype, copied, [&](auto, int set, int stage) {
        for (int sets = kWarps; sets > 0 && resident == 1; sets /= 2) {
            const int least = kWarpRows * std::max(sets / 2, 1);  // of the warps that add at a time
            for (const int code_rows : {kTile, least}) {
                const CodebookGradientPlan wish = {sets, 0, 0, 0, 0, pairs ? code_rows : 0};
                if (2 * shared_bytes(wish, set, stage) > shared_limit(device)) continue;
                plan = wish;
                resident = 2;
                break;
            }
        }
    });
    if (rows == 0 || weight.K == 0 || N == 0) return plan;

    plan.row_tiles = static_cast<int>((first % kUnitRows + rows + kTile - 1) / kTile);
    plan.column_tiles = static_cast<int>((weight.K + kTile - 1) / kTile);
    if (weight.layout == Layout::kPairs) {  // two a window, the last one perhaps with one
        const int64_t last = weight.K - (weight.windows() - 1) * kPairsWindow;
        plan.column_tiles = static_cast<int>(2 * weight.windows() - (last <= kTile ? 1 : 0));
    }

    // The fewest stages, one after the other, of the busiest multiprocessor. Adding a tile to bins
    // takes about as many instructions as eight, or thirty-two where operands are copied.
    const int64_t adding = copied ? 32 : 8;
    const int64_t span = dtype == Dtype::kFloat32 ? kSpan<float> : kSpan<__half>;
    const int64_t stages = (N + span - 1) / span;
    const int64_t capacity = resident * attribute(cudaDevAttrMultiProcessorCount, device);
    const int64_t tiles = int64_t{plan.row_tiles} * plan.column_tiles;
    int64_t fewest = 0;
    for (int splits = 1; splits <= std::min<int64_t>(stages, capacity); ++splits) {
        const int64_t rounds = (tiles * splits + capacity - 1) / capacity;
        const int64_t steps = rounds * ((stages + splits - 1) / splits + adding);
        if (splits == 1 || steps < fewest) {
            fewest = steps;
            plan.splits = splits;
        }
    }
    plan.blocks = std::min(tiles * plan.splits, capacity);
    return plan;
}

void codebook_gradient(const CodebookGradientCall& call, const Queue& queue) {
    const CodebookGradientPlan& plan = call.plan;
    if (plan.blocks == 0) return;
    const GradYSource& grad_y = call.grad_y;
    const int64_t last = call.N - 1;
    const int64_t reach = last / grad_y.pixels * grad_y.image_stride +
                          std::min(last, grad_y.pixels - 1) * grad_y.pixel_stride;
    PK_CHECK(last < INT32_MAX && reach <= INT32_MAX, "codebook_gradient: N = ", call.N,
             " reaches element ", reach,
             " of grad_y, expected less than 2^31; use smaller batches");
    const ConvShape& shape = call.source.shape;
    PK_CHECK(!call.source.image || has_taps(shape), "codebook_gradient: a kernel of ",
             shape.kernel_h, " x ", shape.kernel_w, " with dilation ", shape.dilation_h, " x ",
             shape.dilation_w, " reaches over more than 32,767 pixels; train it on the CPU");
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, queue.device);
    const bool copied = copies_operands(call, major);
    with_kernel(call.weight, call.source.dtype, copied, [&](auto kernel, int set, int stage) {
        const auto shared = static_cast<size_t>(shared_bytes(plan, set, stage));
        launch(queue, kernel, {dim3(static_cast<unsigned>(plan.blocks)), kThreads, shared}, call,
               "codebook_gradient, rows = ", call.rows, ", K = ", call.weight.K, ", N = ", call.N);
    });
}

}  // namespace placekern::cuda
