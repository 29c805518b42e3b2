// Functions of a thread: barriers, collectives of a warp, atomics, bits and conversions. A
// collective takes the full mask only and remembers the line that it was called from.
#pragma once

#include <type_traits>

#include "machine.h"

namespace emulated {

template <class T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <class T>
T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

template <class To, class From>
To reinterpret(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

// The value of the lane that `source` names, given one's own lane.
template <class T, class Source>
T shuffle(const char* name, unsigned mask, T value, int width, Site site, Source source) {
    if (width != kLanes)
        fail(kLaunchFailure, "%s of width %d at %s:%d: 32 is the only width here", name, width,
             site.file, site.line);
    const uint64_t* values = gather(name, mask, to_bits(value), site);
    return from_bits<T>(values[source(lane())]);
}

}  // namespace emulated

inline void __syncthreads(emulated::Site site = emulated::here()) {
    emulated::synchronize_block(site);
}
inline void __syncwarp(unsigned mask = emulated::kFullMask,
                       emulated::Site site = emulated::here()) {
    emulated::synchronize_warp(mask, site);
}
inline void __threadfence() { emulated::fence(); }
inline void __threadfence_block() {}
inline void __trap(emulated::Site site = emulated::here()) {
    emulated::fail(emulated::kLaunchFailure, "__trap() at %s:%d", site.file, site.line);
}

// ---- collectives ----

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32,
              emulated::Site site = emulated::here()) {
    return emulated::shuffle("__shfl_sync", mask, value, width, site,
                             [=](int) { return from & 31; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flips, int width = 32,
                  emulated::Site site = emulated::here()) {
    return emulated::shuffle("__shfl_xor_sync", mask, value, width, site,
                             [=](int lane) { return lane ^ (flips & 31); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                   emulated::Site site = emulated::here()) {
    return emulated::shuffle("__shfl_down_sync", mask, value, width, site, [=](int lane) {
        const int from = lane + static_cast<int>(by & 31);
        return from < 32 ? from : lane;
    });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32,
                 emulated::Site site = emulated::here()) {
    return emulated::shuffle("__shfl_up_sync", mask, value, width, site, [=](int lane) {
        const int from = lane - static_cast<int>(by & 31);
        return from >= 0 ? from : lane;
    });
}

namespace emulated {

inline unsigned ballot(const char* name, unsigned mask, bool vote, Site site) {
    const uint64_t* votes = gather(name, mask, vote, site);
    unsigned result = 0;
    for (int i = 0; i < kLanes; ++i) result |= static_cast<unsigned>(votes[i]) << i;
    return result;
}

}  // namespace emulated

inline unsigned __ballot_sync(unsigned mask, int vote, emulated::Site site = emulated::here()) {
    return emulated::ballot("__ballot_sync", mask, vote != 0, site);
}
inline int __any_sync(unsigned mask, int vote, emulated::Site site = emulated::here()) {
    return emulated::ballot("__any_sync", mask, vote != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int vote, emulated::Site site = emulated::here()) {
    return emulated::ballot("__all_sync", mask, vote != 0, site) == emulated::kFullMask;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, emulated::Site site = emulated::here()) {
    const uint64_t own = emulated::to_bits(value);
    const uint64_t* values = emulated::gather("__match_any_sync", mask, own, site);
    unsigned same = 0;
    for (int i = 0; i < emulated::kLanes; ++i) same |= static_cast<unsigned>(values[i] == own) << i;
    return same;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value,
                                  emulated::Site site = emulated::here()) {
    const uint64_t* values = emulated::gather("__reduce_add_sync", mask, value, site);
    unsigned sum = 0;
    for (int i = 0; i < emulated::kLanes; ++i) sum += static_cast<unsigned>(values[i]);
    return sum;
}
inline int __reduce_add_sync(unsigned mask, int value, emulated::Site site = emulated::here()) {
    return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(value), site));
}

// ---- atomics: relaxed, and atomic to a sanitizer too ----

namespace emulated {

// The old value; nothing runs between the load and the store, since fibers switch at barriers only.
template <class Bits, class T, class Update>
T atomic_update(T* address, Update update) {
    Bits* bits = reinterpret_cast<Bits*>(address);
    before_atomic(address);
    const T old = reinterpret<T>(__atomic_load_n(bits, __ATOMIC_RELAXED));
    __atomic_store_n(bits, reinterpret<Bits>(static_cast<T>(update(old))), __ATOMIC_RELAXED);
    after_atomic(address);
    return old;
}

}  // namespace emulated

inline unsigned atomicAdd(unsigned* address, unsigned value) {
    return emulated::atomic_update<unsigned>(address, [=](unsigned old) { return old + value; });
}
inline int atomicAdd(int* address, int value) {  // wraps around
    return static_cast<int>(
        atomicAdd(reinterpret_cast<unsigned*>(address), static_cast<unsigned>(value)));
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
    return emulated::atomic_update<unsigned long long>(
        address, [=](unsigned long long old) { return old + value; });
}
inline float atomicAdd(float* address, float value) {
    return emulated::atomic_update<unsigned>(address, [=](float old) { return old + value; });
}
inline int atomicMax(int* address, int value) {
    return emulated::atomic_update<int>(address,
                                        [=](int old) { return old > value ? old : value; });
}
inline int atomicMin(int* address, int value) {
    return emulated::atomic_update<int>(address,
                                        [=](int old) { return old < value ? old : value; });
}

// ---- loads and stores with a cache hint ----

template <class T>
T __ldg(const T* address) {
    return *address;
}
template <class T>
T __ldcs(const T* address) {
    return *address;
}
template <class T>
T __ldca(const T* address) {
    return *address;
}
template <class T>
T __ldcg(const T* address) {
    return *address;
}
template <class T>
void __stcs(T* address, T value) {
    *address = value;
}
template <class T>
void __stcg(T* address, T value) {
    *address = value;
}

// ---- bits ----

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
    return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline unsigned __brev(unsigned x) {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) result |= (x >> i & 1) << (31 - i);
    return result;
}
// As prmt: bit 3 of a selector asks for eight copies of the sign of its byte.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selectors) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned selector = selectors >> (4 * i);
        unsigned byte = static_cast<unsigned>(bytes >> (8 * (selector & 7))) & 0xff;
        if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    return static_cast<unsigned>(both << (by & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    return static_cast<unsigned>(both >> (by & 31));
}

// ---- numbers ----

inline unsigned __float_as_uint(float x) { return emulated::reinterpret<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulated::reinterpret<float>(x); }
inline int __float_as_int(float x) { return emulated::reinterpret<int>(x); }
inline float __int_as_float(int x) { return emulated::reinterpret<float>(x); }

namespace emulated {

// A conversion on the device saturates, and gives 0 for a NaN.
inline int saturated(float x) {
    if (!(x == x)) return 0;
    if (x >= 2147483648.0f) return 2147483647;
    if (x < -2147483648.0f) return -2147483647 - 1;
    return static_cast<int>(x);
}

}  // namespace emulated

inline int __float2int_rn(float x) { return emulated::saturated(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return emulated::saturated(std::floor(x)); }
inline int __float2int_ru(float x) { return emulated::saturated(std::ceil(x)); }
inline int __float2int_rz(float x) { return emulated::saturated(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

#define EMULATED_ORDER(type)                                  \
    inline type min(type x, type y) { return y < x ? y : x; } \
    inline type max(type x, type y) { return x < y ? y : x; }

EMULATED_ORDER(int)
EMULATED_ORDER(unsigned)
EMULATED_ORDER(long)
EMULATED_ORDER(unsigned long)
EMULATED_ORDER(long long)
EMULATED_ORDER(unsigned long long)

#undef EMULATED_ORDER

// Of a number and a NaN, the number.
inline float min(float x, float y) { return std::fmin(x, y); }
inline float max(float x, float y) { return std::fmax(x, y); }
inline double min(double x, double y) { return std::fmin(x, y); }
inline double max(double x, double y) { return std::fmax(x, y); }
