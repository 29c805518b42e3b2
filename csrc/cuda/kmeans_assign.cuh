// What a block of kmeans_assign keeps in shared memory: tables to find the code of a point, and the
// sums and counts of its points.
//
// The surprise: codes are exact though points find their boundaries by rounded arithmetic. Points
// and boundaries go through the same map to buckets, and rounding keeps their order: a boundary in
// an earlier bucket lies below the point, one in a later bucket does not, and only those in the
// point's own bucket are compared with it.
#pragma once

#include <cfloat>
#include <cmath>

#include "launch.cuh"

namespace placekern::cuda::kmeans {

constexpr int kMany = kMaxCodes;  // set in a table entry: the bucket holds several boundaries
constexpr int kCopies = 16;       // of a count: lanes l and l + 16 share one

// What all blocks must know about the boundaries.
struct __align__(16) Facts {
    float scale, offset;  // of Map
    float largest;        // of the outer boundaries, without their signs
    int moved;            // the centroids are in another order than codes
};

// Dynamic shared memory, in bytes from its start:
//   float [2][kMaxCodes]          boundaries, then infinity; twice, so that a table entry finds its
//                                 boundary with kMany set or not
//   uint8 [kMaxCodes]             which centroid a code stands for
//   Facts
//   uint16 [buckets]              how many boundaries lie in earlier buckets; perhaps with kMany
//   uint32 [count][kCopies]       counts of the block
//   float [warps][count][kWarp]   sums of each lane, in a bank of its own: neither atomics nor
//                                 conflicts
// What stands before the counts is made once, by one block, and copied by the others.
struct Shared {
    int count, buckets;

    __host__ __device__ static int order() { return 2 * kMaxCodes * sizeof(float); }
    __host__ __device__ static int facts() { return order() + kMaxCodes; }
    __host__ __device__ static int table() { return facts() + sizeof(Facts); }
    __host__ __device__ int counts() const { return table() + buckets * sizeof(uint16_t); }
    __host__ __device__ int sums() const { return counts() + count * kCopies * sizeof(uint32_t); }
    __host__ __device__ int warp_sums() const { return count * kWarp * sizeof(float); }
};

template <class T>
__device__ __forceinline__ T& shared_at(int byte) {
    return *reinterpret_cast<T*>(placekern_shared + byte);
}

// Hides from the compiler what a value was made of. It would take addresses apart, and put them
// together in three steps a point instead of one.
__device__ __forceinline__ int whole(int value) {
    asm("" : "+r"(value));
    return value;
}

// Points to buckets, never falling; NaN goes to bucket 0.
struct Map {
    float scale, offset, last;

    // A point's place, from 0 to 1, is multiplied by a last bucket so small that its bits are its
    // number: the product is a whole number of the smallest floats, and needs no conversion.
    __device__ Map(float scale, float offset, int buckets) : scale(scale), offset(offset) {
        last = __int_as_float(buckets - 1);
    }

    // By the boundaries in shared memory.
    __device__ static Map of(int count, int buckets) {
        const Map one_bucket(0.0f, 0.0f, buckets);
        if (count < 3) return one_bucket;
        const float low = fmaxf(shared_at<float>(0), -FLT_MAX);
        const float high = fminf(shared_at<float>((count - 2) * sizeof(float)), FLT_MAX);
        if (!(low < high)) return one_bucket;
        const float scale = fminf(0.5f / (0.5f * high - 0.5f * low), FLT_MAX);  // may overflow
        return {scale, fmaxf(fminf(-low * scale, FLT_MAX), -FLT_MAX), buckets};
    }

    __device__ __forceinline__ int bucket(float x) const {
        const float place = fminf(fmaxf(fmaf(x, scale, offset), 0.0f), 1.0f);  // one FFMA.SAT
        // Of -0.0 and a number, the larger may be -0.0, whose bits are no bucket; adding 0.0 makes
        // it 0.0.
        return __float_as_int(fmaf(place, last, 0.0f));
    }
};

// The code of a point by binary search among the boundaries of its bucket. A function of its own:
// sixteen copies of it in the loop over the tiles would fill the instruction cache.
__device__ __noinline__ inline int search_bucket(float x, int bucket, int buckets, int count) {
    const float* boundaries = &shared_at<float>(0);
    const uint16_t* table = &shared_at<uint16_t>(Shared::table());
    int low = table[bucket] % kMaxCodes;
    if (!(x > boundaries[low])) return low;  // most often, when a boundary is repeated
    int high = bucket + 1 < buckets ? table[bucket + 1] % kMaxCodes : count - 1;
    ++low;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (x > boundaries[middle])
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

class Search {
  public:
    // Copies what the sorting block made. The caller synchronises.
    __device__ Search(const uint4* made, const Shared& shared)
        : count_(shared.count),
          buckets_(shared.buckets),
          facts_(reinterpret_cast<const Facts*>(made)[Shared::facts() / sizeof(Facts)]),
          map_(facts_.scale, facts_.offset, shared.buckets) {
        constexpr int kHeld = 8;  // on their way at once: all, in a block of 192 threads
        const int vectors = shared.counts() / static_cast<int>(sizeof(uint4));
        for (int first = threadIdx.x; first < vectors; first += kHeld * blockDim.x) {
            uint4 held[kHeld];
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                const int at = first + i * static_cast<int>(blockDim.x);
                if (at < vectors) held[i] = made[at];
            }
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                const int at = first + i * static_cast<int>(blockDim.x);
                if (at < vectors) shared_at<uint4>(at * sizeof(uint4)) = held[i];
            }
        }
    }

    // The code of a point, or a number with kMany set when its bucket holds several boundaries.
    __device__ __forceinline__ int guess(float x) const {
        const int code = (&shared_at<uint16_t>(Shared::table()))[map_.bucket(x)];
        return x > boundary(code) ? code + 1 : code;
    }

    __device__ __forceinline__ int finish(int guess, float x) const {
        return guess & kMany ? search_bucket(x, map_.bucket(x), buckets_, count_) : guess;
    }

    // Whether the centroids are in another order than codes; the same in all threads.
    __device__ bool moved() const { return facts_.moved != 0; }
    __device__ __forceinline__ int centroid(int code) const {
        return shared_at<uint8_t>(Shared::order() + code);
    }

    __device__ float largest() const { return facts_.largest; }

  private:
    __device__ __forceinline__ static float boundary(int i) { return (&shared_at<float>(0))[i]; }

    int count_, buckets_;
    Facts facts_;
    Map map_;
};

// Sums and counts of the points of a warp. The float32 sums move to float64 every `flush_tiles()`
// tiles of 16 points a lane, so that none is of more than 4,096 points; two lanes' sums are still
// added in float32. When all points are equal, the worst case, they are added in fours, and one
// part in 50,000 is lost. A flush reads `count` sums a lane: at most a sixteenth of a read per
// point.
class Bins {
  public:
    // `largest`: a size that points have. Waits for the block, and for all it wrote before.
    __device__ Bins(const Shared& shared, float largest)
        : count_(shared.count),
          // Room for twice 4,096 of the largest floats; else every bit down to the smallest.
          unit_(largest >= 0x1p64f ? 0x1p-14f : 1.0f),
          flushed_(false) {
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
        sums_ = &shared_at<float>(
            whole(shared.sums() + warp * shared.warp_sums() + lane * sizeof(float)));
        counts_ = &shared_at<uint32_t>(whole(shared.counts() + lane % kCopies * sizeof(uint32_t)));
        for (int c = 0; c < count_; ++c) sums_[c * kWarp] = 0.0f;
        for (int i = threadIdx.x; i < count_ * kCopies; i += blockDim.x)
            (&shared_at<uint32_t>(shared.counts()))[i] = 0;
        __syncthreads();
    }

    __device__ int flush_tiles() const { return count_ > 16 ? count_ : 16; }

    __device__ __forceinline__ void add(int code, float x) {
        sums_[code * kWarp] += x * unit_;
        atomicAdd(counts_ + code * kCopies, 1u);
    }

    // Four points with one wait for shared memory. Points of equal codes are added up first, while
    // the bins are on their way; the last of them takes them all along, and its store comes last.
    __device__ __forceinline__ void add(const int (&c)[4], const float (&x)[4]) {
        float sums[4], together[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = sums_[c[i] * kWarp];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float before = 0.0f;
#pragma unroll
            for (int j = 0; j < i; ++j) before = c[j] == c[i] ? together[j] : before;
            together[i] = before + x[i] * unit_;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sums_[c[i] * kWarp] = sums[i] + together[i];
            atomicAdd(counts_ + c[i] * kCopies, 1u);
        }
    }

    // Adds the sums of a warp's lanes to its row and clears them.
    __device__ void flush(double* row) {
        const int lane = threadIdx.x % kWarp;
        float* sums = sums_ - lane;
        __syncwarp();
        for (int c = lane; c < count_; c += kWarp) {
            constexpr int kHeld = 8;  // read before they are cleared: one wait for them all
            double total = 0.0;
#pragma unroll 1
            for (int first = lane; first < kWarp + lane; first += kHeld) {
                float held[kHeld];
#pragma unroll
                for (int i = 0; i < kHeld; ++i)  // 32 lanes in 32 banks
                    held[i] = sums[c * kWarp + (first + i) % kWarp];
#pragma unroll
                for (int i = 0; i < kHeld; ++i) sums[c * kWarp + (first + i) % kWarp] = 0.0f;
#pragma unroll
                for (int i = 0; i < kHeld; i += 2) total += held[i] + held[i + 1];
            }
            total *= unit_ < 1.0f ? 0x1p14 : 1.0;
            row[c] = flushed_ ? row[c] + total : total;
        }
        flushed_ = true;
        __syncwarp();
    }

    // Writes the counts of the block to its row.
    __device__ void write_counts(int64_t* row) const {
        const int lane = threadIdx.x % kWarp;
        const uint32_t* counts = counts_ - lane % kCopies;
        __syncthreads();
        for (int c = threadIdx.x; c < count_; c += blockDim.x) {
            int64_t total = 0;
            for (int i = 0; i < kCopies; ++i) total += counts[c * kCopies + (i + lane) % kCopies];
            row[c] = total;
        }
    }

  private:
    int count_;
    float unit_;
    bool flushed_;
    float* sums_;       // of the lane, kWarp apart
    uint32_t* counts_;  // of the lane, kCopies apart
};

}  // namespace placekern::cuda::kmeans
