// Nearest centroid, sum and count of float32 points, in one pass over them. As on the CPU a code is
// the number of boundaries below the point, so that a tie goes down and NaN to code 0; a boundary
// is the midpoint of two neighbours among the sorted centroids, rounded down. Three kernels: one
// block sorts the centroids, all multiprocessors read the points, and a few blocks add their sums,
// in a fixed order.
//
// Budget of the pass. A point moves 5 bytes. A multiprocessor of an H100 moves 13 bytes a cycle at
// copy speed, so 32 points may take 12.4 cycles: 49 instructions over its four schedulers. They
// take 25 (disassembled for sm_90), and 12 to 14 turns at shared memory: two gathers with bank
// conflicts (3.5 turns each), the sums (2), the counts (2 to 4) and the points themselves (1.3).
#include "kmeans_assign.h"

#include <algorithm>

#include "kmeans_assign.cuh"

namespace placekern::cuda {
namespace {

using namespace kmeans;

constexpr int kLoads = 4;                // 16-byte loads of a lane in a tile
constexpr int kLanePoints = 4 * kLoads;  // points of a lane in a tile
constexpr int kTile = kWarp * kLanePoints;
constexpr int kWarpTiles = 4;   // tiles that are worth a warp with its tables
constexpr int kMostWarps = 16;  // of a block; a thread then has 128 registers
constexpr int kBuckets = 8192;  // a power of two

// How the points are shared out.
struct Plan {
    int blocks, warps;  // warps: of a block
    Shared shared;

    Plan(int64_t n, int count, int device) : shared{count, kBuckets} {
        const int limit = shared_limit(device);
        // Beside the sums of 256 codes, Turing's 64 KiB hold a smaller table only.
        while (shared.sums() + shared.warp_sums() > limit) shared.buckets /= 2;
        warps = std::min(kMostWarps, (limit - shared.sums()) / shared.warp_sums());
        if (warps > 8) warps -= warps % 4;  // as many on each of the four schedulers
        int processors = 0;
        PK_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
                      "multiprocessors of device ", device);
        const int64_t share = static_cast<int64_t>(kTile) * kWarpTiles * warps;
        blocks = static_cast<int>(std::min<int64_t>(processors, (n + share - 1) / share));
    }

    int shared_bytes() const { return shared.sums() + warps * shared.warp_sums(); }
};

// What the kernels hand on to each other, one after the other in the workspace.
struct Workspace {
    double* warp_sums;      // [blocks * warps][count]
    int64_t* block_counts;  // [blocks][count]
    float* boundaries;      // [kMaxCodes], infinity behind the last
    uint8_t* order;         // [kMaxCodes], the centroid of each code

    Workspace(void* start, const Plan& plan)
        : warp_sums(static_cast<double*>(start)),
          block_counts(reinterpret_cast<int64_t*>(warp_sums + static_cast<int64_t>(plan.blocks) *
                                                                  plan.warps * plan.shared.count)),
          boundaries(reinterpret_cast<float*>(block_counts + static_cast<int64_t>(plan.blocks) *
                                                                 plan.shared.count)),
          order(reinterpret_cast<uint8_t*>(boundaries + kMaxCodes)) {}

    static size_t bytes(const Plan& plan) {
        return sizeof(double) * plan.shared.count * plan.blocks * (plan.warps + 1) +
               (sizeof(float) + sizeof(uint8_t)) * kMaxCodes;
    }
};

// ---- the centroids ----

struct Sort {
    int count;
    const float* centroids;
    float* boundaries;
    uint8_t* order;
};

// NaN comes last, as torch sorts.
__device__ bool below(float a, float b) { return a < b || (b != b && a == a); }

// One block of kMaxCodes threads, a centroid each.
__global__ void sort_kernel(const Sort sort) {
    float* given = &shared_at<float>(0);
    float* sorted = given + kMaxCodes;
    const int c = threadIdx.x;
    const float mine = c < sort.count ? sort.centroids[c] : 0.0f;
    given[c] = mine;
    __syncthreads();
    if (c < sort.count) {
        int code = 0;
        for (int i = 0; i < sort.count; ++i)
            code += below(given[i], mine) || (i < c && !below(mine, given[i])) ? 1 : 0;
        sorted[code] = mine;
        sort.order[code] = static_cast<uint8_t>(c);
    }
    __syncthreads();
    float boundary = INFINITY;
    if (c < sort.count - 1) {
        const double exact = (static_cast<double>(sorted[c]) + sorted[c + 1]) / 2;
        boundary = static_cast<float>(exact);
        if (boundary > exact) boundary = nextafterf(boundary, -INFINITY);
        if (boundary != boundary) boundary = INFINITY;  // no point is above either
    }
    sort.boundaries[c] = boundary;
}

// ---- the points ----

struct Pass {
    int64_t n;
    int count, buckets;
    const float* points;
    uint8_t* codes;
    int64_t head;       // points before the first that lies at 16 bytes
    int64_t tiles;      // whole ones behind the head
    int64_t rest_warp;  // the first warp with a tile less than the others
    bool wide;          // codes behind the head lie at 4 bytes
    Workspace work;
};

__device__ __forceinline__ void load_tile(const float4* points, int64_t tile,
                                          float4 (&loads)[kLoads]) {
    const float4* from = points + tile * (kTile / 4) + threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) loads[i] = __ldcs(from + i * kWarp);
}

__device__ __forceinline__ void store_codes(uint8_t* to, const int (&codes)[4], bool wide) {
    const unsigned low = __byte_perm(codes[0], codes[1], 0x0040);
    const unsigned high = __byte_perm(codes[2], codes[3], 0x0040);
    if (wide) {
        *reinterpret_cast<uint32_t*>(to) = __byte_perm(low, high, 0x5410);
    } else {
        for (int i = 0; i < 4; ++i) to[i] = static_cast<uint8_t>(codes[i]);
    }
}

__global__ void __launch_bounds__(kMostWarps* kWarp) assign_kernel(const Pass pass) {
    const int lane = threadIdx.x % kWarp;
    const int block_warps = blockDim.x / kWarp;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * block_warps;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * block_warps + threadIdx.x / kWarp;
    const float4* body = reinterpret_cast<const float4*>(pass.points + pass.head);
    float4 next[kLoads];  // on their way while the tables are made, or the tile before is worked on
    if (warp < pass.tiles) load_tile(body, warp, next);
    const Search search(pass.work.boundaries, pass.work.order, pass.count, pass.buckets);
    Bins bins(Shared{pass.count, pass.buckets}, search.largest());
    double* row = pass.work.warp_sums + warp * pass.count;

    int until_flush = bins.flush_tiles();
    for (int64_t tile = warp; tile < pass.tiles; tile += warps) {
        float x[kLoads][4];
        int codes[kLoads][4];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            x[i][0] = next[i].x;
            x[i][1] = next[i].y;
            x[i][2] = next[i].z;
            x[i][3] = next[i].w;
        }
        if (tile + warps < pass.tiles) load_tile(body, tile + warps, next);
        // All gathers before the first store: the compiler cannot know that they do not meet.
        int all = 0;
#pragma unroll
        for (int i = 0; i < kLanePoints; ++i)
            all |= codes[i / 4][i % 4] = search.guess(x[i / 4][i % 4]);
        if (all & kMany) {
#pragma unroll
            for (int i = 0; i < kLanePoints; ++i)
                codes[i / 4][i % 4] = search.finish(codes[i / 4][i % 4], x[i / 4][i % 4]);
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i) bins.add(codes[i], x[i]);
        if (search.moved()) {
#pragma unroll
            for (int i = 0; i < kLanePoints; ++i)
                codes[i / 4][i % 4] = search.centroid(codes[i / 4][i % 4]);
        }
        uint8_t* to = pass.codes + pass.head + tile * kTile + lane * 4;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) store_codes(to + i * kWarp * 4, codes[i], pass.wide);
        if (--until_flush == 0) {
            bins.flush(row);
            until_flush = bins.flush_tiles();
        }
    }

    // The head, and what is behind the tiles: 32 points a warp.
    const int64_t tiled = pass.tiles * kTile;
    const int64_t turn = warp - pass.rest_warp + (warp < pass.rest_warp ? warps : 0);
    for (int64_t i = turn * kWarp + lane; i < pass.n - tiled; i += warps * kWarp) {
        const int64_t at = i < pass.head ? i : i + tiled;
        const float x = pass.points[at];
        const int code = search.finish(search.guess(x), x);
        bins.add(code, x);
        pass.codes[at] = static_cast<uint8_t>(search.centroid(code));
    }
    bins.flush(row);
    bins.write_counts(pass.work.block_counts + static_cast<int64_t>(blockIdx.x) * pass.count);
}

// ---- the sums ----

struct Rows {
    int count;
    int64_t warps, blocks;
    Workspace work;
    double* sums;     // [count]
    int64_t* counts;  // [count]
};

constexpr int kRowCodes = 16;  // codes of a block: 128 bytes of a row
constexpr int kRowSlots = 32;  // rows at a time

// The sum of column `code`, in the threads of slot 0. `slots`: [kRowSlots][kRowCodes].
template <class T>
__device__ T add_rows(const T* rows, int64_t n, int count, int code, T* slots) {
    const int slot = threadIdx.x / kRowCodes;
    T sum = 0;
    for (int64_t row = slot; code < count && row < n; row += kRowSlots)
        sum += rows[row * count + code];
    T* mine = slots + threadIdx.x;
    *mine = sum;
    for (int step = kRowSlots / 2; step > 0; step /= 2) {
        __syncthreads();
        if (slot < step) *mine += mine[step * kRowCodes];
    }
    return *mine;
}

__global__ void add_rows_kernel(const Rows rows) {
    const int code = blockIdx.x * kRowCodes + threadIdx.x % kRowCodes;
    double* sums = &shared_at<double>(0);
    int64_t* counts = &shared_at<int64_t>(kRowCodes * kRowSlots * sizeof(double));
    const double sum = add_rows(rows.work.warp_sums, rows.warps, rows.count, code, sums);
    const int64_t count = add_rows(rows.work.block_counts, rows.blocks, rows.count, code, counts);
    if (threadIdx.x < kRowCodes && code < rows.count) {
        rows.sums[rows.work.order[code]] = sum;
        rows.counts[rows.work.order[code]] = count;
    }
}

}  // namespace

size_t kmeans_assign_workspace(int64_t n, int count, int device) {
    return Workspace::bytes(Plan(n, count, device));
}

void kmeans_assign(const KmeansAssignCall& call, const Queue& queue) {
    const Plan plan(call.n, call.count, queue.device);
    const Workspace work(call.workspace, plan);
    const int64_t warps = static_cast<int64_t>(plan.blocks) * plan.warps;
    const Sort sort{call.count, call.centroids, work.boundaries, work.order};
    launch(queue, sort_kernel, dim3(1), kMaxCodes, 2 * kMaxCodes * sizeof(float), sort,
           "kmeans_assign: sorting ", call.count, " centroids");
    if (call.n > 0) {
        const int64_t past = reinterpret_cast<uintptr_t>(call.points) % sizeof(float4);
        const int64_t head =
            std::min<int64_t>(call.n, past ? (sizeof(float4) - past) / sizeof(float) : 0);
        const int64_t tiles = (call.n - head) / kTile;
        const bool wide = reinterpret_cast<uintptr_t>(call.codes + head) % sizeof(uint32_t) == 0;
        const Pass pass{call.n, call.count, plan.shared.buckets, call.points, call.codes,
                        head,   tiles,      tiles % warps,       wide,        work};
        launch(queue, assign_kernel, dim3(plan.blocks), plan.warps * kWarp, plan.shared_bytes(),
               pass, "kmeans_assign: n = ", call.n, ", count = ", call.count);
    }
    const Rows rows{call.count, warps, plan.blocks, work, call.sums, call.counts};
    launch(queue, add_rows_kernel, dim3((call.count + kRowCodes - 1) / kRowCodes),
           kRowCodes * kRowSlots, 2 * sizeof(double) * kRowCodes * kRowSlots, rows,
           "kmeans_assign: adding the sums of ", warps, " warps, count = ", call.count);
}

}  // namespace placekern::cuda
