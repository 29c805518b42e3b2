// Nearest centroid, sum and count of float32 points, in one pass over them. As on the CPU a code is
// the number of boundaries below the point, so that a tie goes down and NaN to code 0; a boundary
// is the midpoint of two neighbours among the sorted centroids, rounded down. Three kernels: one
// block sorts the centroids and fills the tables, all multiprocessors read the points, and a few
// blocks add their sums, in a fixed order.
//
// Budget of the pass. A point moves 5 bytes. A multiprocessor of an H100 moves 13 bytes a cycle at
// copy speed, so 32 points may take 12.4 cycles: 49 instructions over its four schedulers. They
// take 26 (disassembled for sm_90), and 12 to 14 turns at shared memory: two gathers with bank
// conflicts (3.5 turns each), the sums (2), the counts (2 to 4) and the points themselves (1.3).
#include "kmeans_assign.h"

#include <algorithm>

#include "instructions.cuh"
#include "kmeans_assign.cuh"

namespace placekern::cuda {
namespace {

using namespace kmeans;

constexpr int kLoads = 4;                // 16-byte loads of a lane in a tile
constexpr int kLanePoints = 4 * kLoads;  // points of a lane in a tile
constexpr int kTile = kWarp * kLanePoints;
constexpr int kWarpTiles = 4;   // tiles that are worth a warp with its tables
constexpr int kPrefetch = 2;    // tiles of a warp on their way to the L2 cache
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
        const int processors = attribute(cudaDevAttrMultiProcessorCount, device);
        const int64_t share = static_cast<int64_t>(kTile) * kWarpTiles * warps;
        blocks = static_cast<int>(std::min<int64_t>(processors, (n + share - 1) / share));
    }

    size_t shared_bytes() const {
        return static_cast<size_t>(shared.sums() + warps * shared.warp_sums());
    }
};

// What the kernels hand on to each other, one after the other in the workspace.
struct Workspace {
    uint4* made;            // the first bytes of shared memory, up to the counts
    double* warp_sums;      // [blocks * warps][count]
    int64_t* block_counts;  // [blocks][count]

    Workspace(void* start, const Plan& plan)
        : made(static_cast<uint4*>(start)),
          warp_sums(reinterpret_cast<double*>(made + plan.shared.counts() / sizeof(uint4))),
          block_counts(reinterpret_cast<int64_t*>(
              warp_sums + static_cast<int64_t>(plan.blocks) * plan.warps * plan.shared.count)) {}

    static size_t bytes(const Plan& plan) {
        return plan.shared.counts() +
               sizeof(double) * plan.shared.count * plan.blocks * (plan.warps + 1);
    }

    __device__ int order(int code) const {
        return reinterpret_cast<const uint8_t*>(made)[Shared::order() + code];
    }
};

// ---- the centroids ----

constexpr int kSortLanes = 4;  // that share a centroid
constexpr int kSortThreads = kSortLanes * kMaxCodes;

struct Sort {
    Shared shared;
    const float* centroids;
    uint4* made;
};

// Whole numbers in the order of the floats; as torch sorts, zeros are equal and NaN comes last.
__device__ uint32_t sort_key(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);  // 0.0 from -0.0
    return x != x ? ~0u : bits ^ (bits >> 31 != 0 ? ~0u : 1u << 31);
}

// Halfway between two neighbours, rounded down.
__device__ float boundary_between(float low, float high) {
    const double exact = (static_cast<double>(low) + high) / 2;
    float boundary = static_cast<float>(exact);
    if (boundary > exact) boundary = nextafterf(boundary, -INFINITY);
    return boundary != boundary ? INFINITY : boundary;  // no point is above either
}

// One block of kSortThreads threads sorts the centroids and fills the tables, for all blocks of the
// next kernel. Behind the tables are its notes: a key of each centroid, later the bucket of each
// boundary; and the sorted centroids.
__global__ void __launch_bounds__(kSortThreads) sort_kernel(const Sort sort) {
    const int count = sort.shared.count, buckets = sort.shared.buckets;
    uint32_t* const keys = &shared_at<uint32_t>(sort.shared.counts());
    float* const sorted = reinterpret_cast<float*>(keys + kMaxCodes);
    float* const boundaries = &shared_at<float>(0);
    const int thread = threadIdx.x, lane = threadIdx.x % kWarp;

    const int c = thread / kSortLanes;
    const float mine = c < count ? sort.centroids[c] : 0.0f;
    const uint32_t key = c < count ? sort_key(mine) : ~0u;
    if (thread % kSortLanes == 0) keys[c] = key;
    __syncthreads();
    int code = 0;
#pragma unroll 4
    for (int i = thread % kSortLanes * 4; i < kMaxCodes; i += kSortLanes * 4) {
        const uint4 other = *reinterpret_cast<const uint4*>(keys + i);
        code += other.x < key || (other.x == key && i < c) ? 1 : 0;
        code += other.y < key || (other.y == key && i + 1 < c) ? 1 : 0;
        code += other.z < key || (other.z == key && i + 2 < c) ? 1 : 0;
        code += other.w < key || (other.w == key && i + 3 < c) ? 1 : 0;
    }
#pragma unroll
    for (int step = kSortLanes / 2; step > 0; step /= 2)
        code += __shfl_xor_sync(kFullWarp, code, step);
    if (thread % kSortLanes == 0) {  // behind the centroids are codes of none, in their order
        sorted[code] = mine;
        shared_at<uint8_t>(Shared::order() + code) = static_cast<uint8_t>(c);
    }
    __syncthreads();
    if (thread < kMaxCodes) {
        const bool real = thread < count - 1;
        boundaries[thread] = real ? boundary_between(sorted[thread], sorted[thread + 1]) : INFINITY;
        boundaries[kMaxCodes + thread] = boundaries[thread];
    }
    __syncthreads();
    const Map map = Map::of(count, buckets);
    uint32_t* const bucket_of = keys;
    if (thread < kMaxCodes) bucket_of[thread] = map.bucket(boundaries[thread]);
    if (thread < kWarp) {
        bool moved = false;
        for (int i = lane; i < kMaxCodes; i += kWarp)
            moved |= shared_at<uint8_t>(Shared::order() + i) != i;
        moved = __any_sync(kFullWarp, moved);
        const float largest =
            count < 2 ? 0.0f : fmaxf(fabsf(boundaries[0]), fabsf(boundaries[count - 2]));
        if (lane == 0) shared_at<Facts>(Shared::facts()) = {map.scale, map.offset, largest, moved};
    }
    __syncthreads();
    uint16_t* const table = &shared_at<uint16_t>(Shared::table());
    for (int i = thread / kWarp; i < count; i += kSortThreads / kWarp) {
        // Boundary i is the first not yet passed in the buckets behind boundary i - 1's.
        const int first = i == 0 ? 0 : bucket_of[i - 1] + 1;
        const int last = i < count - 1 ? bucket_of[i] : buckets - 1;
        const bool many = i < count - 2 && bucket_of[i + 1] == last;
        for (int bucket = first + lane; bucket <= last; bucket += kWarp)
            table[bucket] = static_cast<uint16_t>(many && bucket == last ? i + kMany : i);
    }
    __syncthreads();
    for (int i = thread; i < sort.shared.counts() / 16; i += kSortThreads)
        sort.made[i] = shared_at<uint4>(16 * i);
}

// ---- the points ----

struct Pass {
    int64_t n;
    Shared shared;
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

// Asks for a tile, if there is such a one, long before it is loaded.
__device__ __forceinline__ void prefetch_tile(const float4* points, int64_t tile, int64_t tiles) {
    if (tile < tiles && threadIdx.x % kWarp == 0)
        prefetch_to_l2(points + tile * (kTile / 4), kTile * sizeof(float));
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
    for (int i = 1; i <= kPrefetch; ++i) prefetch_tile(body, warp + i * warps, pass.tiles);
    const Search search(pass.work.made, pass.shared);
    Bins bins(pass.shared, search.largest());
    double* row = pass.work.warp_sums + warp * pass.shared.count;

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
        prefetch_tile(body, tile + (1 + kPrefetch) * warps, pass.tiles);
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
    bins.write_counts(pass.work.block_counts +
                      static_cast<int64_t>(blockIdx.x) * pass.shared.count);
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
        rows.sums[rows.work.order(code)] = sum;
        rows.counts[rows.work.order(code)] = count;
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
    const Sort sort{plan.shared, call.centroids, work.made};
    launch(queue, sort_kernel,
           {dim3(1), kSortThreads, plan.shared.counts() + 2 * kMaxCodes * sizeof(float)}, sort,
           "kmeans_assign: sorting ", call.count, " centroids");
    if (call.n > 0) {
        const int64_t past = reinterpret_cast<uintptr_t>(call.points) % sizeof(float4);
        const int64_t head =
            std::min<int64_t>(call.n, past ? (sizeof(float4) - past) / sizeof(float) : 0);
        const int64_t tiles = (call.n - head) / kTile;
        const bool wide = reinterpret_cast<uintptr_t>(call.codes + head) % sizeof(uint32_t) == 0;
        const Pass pass{call.n, plan.shared,   call.points, call.codes, head,
                        tiles,  tiles % warps, wide,        work};
        launch(queue, assign_kernel, {dim3(plan.blocks), plan.warps * kWarp, plan.shared_bytes()},
               pass, "kmeans_assign: n = ", call.n, ", count = ", call.count);
    }
    const Rows rows{call.count, warps, plan.blocks, work, call.sums, call.counts};
    launch(queue, add_rows_kernel,
           {dim3((call.count + kRowCodes - 1) / kRowCodes), kRowCodes * kRowSlots,
            2 * sizeof(double) * kRowCodes * kRowSlots},
           rows, "kmeans_assign: adding the sums of ", warps, " warps, count = ", call.count);
}

}  // namespace placekern::cuda
