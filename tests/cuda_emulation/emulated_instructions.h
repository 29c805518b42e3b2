// The functions of csrc/cuda/instructions.cuh in software, with the layouts that are commented
// there. One surprise: a copy happens when it is waited for, and no sooner, so that a kernel which
// waits for too few reads what was there before. On a Turing it happens at once, as on the real
// one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace emulated {

// What a lane gives to a product; `d` is read and written.
struct Operands {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
};

inline void multiply(const char* name, float* d, const uint32_t* a, const uint32_t* b, Site site,
                     Complete complete) {
    const Operands operands{d, a, b};
    gather(name, kFullMask, reinterpret_cast<uint64_t>(&operands), site, complete);
}

inline void need_ampere(const char* what, Site site) {
    if (capability() < 80)
        fail(kLaunchFailure, "%s at %s:%d: devices before Ampere have none", what, site.file,
             site.line);
}

inline void finish_copy(const Copy& copy) {
    if (copy.bytes == 4)
        *static_cast<uint32_t*>(copy.shared) = *static_cast<const uint32_t*>(copy.global);
    else
        *static_cast<uint4*>(copy.shared) =
            copy.global != nullptr ? *static_cast<const uint4*>(copy.global) : uint4{};
}

// Refuses addresses that are not on so many bytes, or not of shared memory.
inline void check_shared(const char* name, const void* shared, const void* global, int bytes,
                         Site site) {
    const auto off = [bytes](const void* address) {
        return reinterpret_cast<uintptr_t>(address) % bytes != 0;
    };
    if (off(shared) || off(global))
        fail(kMisaligned, "%s at %s:%d: %s address %p is not on %d bytes", name, site.file,
             site.line, off(shared) ? "shared" : "global", off(shared) ? shared : global, bytes);
    if (!in_shared_memory(shared, bytes))
        fail(kLaunchFailure, "%s at %s:%d: %p is outside of the launch's shared memory", name,
             site.file, site.line, shared);
}

inline void start_copy(const char* name, void* shared, const void* global, bool inside, int bytes,
                       Site site) {
    check_shared(name, shared, global, bytes, site);
    const Copy copy{shared, inside ? global : nullptr, bytes, 0};
    if (capability() < 80)
        finish_copy(copy);
    else
        begin_copy(copy);
}

}  // namespace emulated

namespace placekern::cuda {

inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16,
                emulated::Site site = emulated::here()) {
    emulated::need_ampere("a product of bfloat16", site);
    emulated::multiply("mma", d, a, b, site, emulated::multiply_bfloat16);
}

inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half,
                emulated::Site site = emulated::here()) {
    emulated::multiply("mma", d, a, b, site, emulated::multiply_half);
}

inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float,
                emulated::Site site = emulated::here()) {
    emulated::need_ampere("a product of TF32", site);
    emulated::multiply("mma", d, a, b, site, emulated::multiply_tf32);
}

inline uint32_t to_tf32(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (emulated::capability() < 80) return bits;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffffffu;  // the device's NaN
    if (magnitude == 0x7f800000u) return bits;
    return (bits + 0x1000u) & ~0x1fffu;
}

inline uint32_t transpose(uint32_t pair, emulated::Site site = emulated::here()) {
    const uint64_t* pairs = emulated::gather("transpose", emulated::kFullMask, pair, site);
    const int column = emulated::lane() / 4, row = emulated::lane() % 4 * 2;
    const auto element = [&](int r) {
        return static_cast<uint32_t>(pairs[4 * r + column / 2] >> (16 * (column % 2))) & 0xffffu;
    };
    return element(row) | element(row + 1) << 16;
}

// Word i is what `pick` makes of the rows of matrix i: eight words of 64 bits, of which rows have
// two, the first or the second as `half` says.
template <class F>
void load_rows(const char* name, uint32_t (&word)[4], const void* row, int half,
               emulated::Site site, F pick) {
    emulated::check_shared(name, row, nullptr, 16, site);
    uint64_t halves[2];
    const uint4 own = *static_cast<const uint4*>(row);
    std::memcpy(halves, &own, sizeof(halves));
    for (int i = 0; i < 2; ++i) {
        const uint64_t* rows = emulated::gather(name, emulated::kFullMask, halves[i], site);
        if (i != half) continue;
        for (int matrix = 0; matrix < 4; ++matrix) word[matrix] = pick(rows + 8 * matrix);
    }
}

inline void load_matrices(uint32_t (&word)[4], const void* row,
                          emulated::Site site = emulated::here()) {
    const int g = emulated::lane() / 4, q = emulated::lane() % 4;
    load_rows("load_matrices", word, row, q / 2, site,
              [&](const uint64_t* rows) { return static_cast<uint32_t>(rows[g] >> 32 * (q % 2)); });
}

inline void load_transposed(uint32_t (&word)[4], const void* row,
                            emulated::Site site = emulated::here()) {
    const int g = emulated::lane() / 4, q = emulated::lane() % 4;
    load_rows("load_transposed", word, row, g / 4, site, [&](const uint64_t* rows) {
        const auto element = [&](int r) {
            return static_cast<uint32_t>(rows[r] >> 16 * (g % 4)) & 0xffffu;
        };
        return element(2 * q) | element(2 * q + 1) << 16;
    });
}

inline bool copies_wait() { return emulated::capability() >= 80; }

inline void copy_async(void* shared, const void* global, bool inside,
                       emulated::Site site = emulated::here()) {
    emulated::start_copy("copy_async", shared, global, inside, 16, site);
}

inline void copy_word_async(uint32_t* shared, const uint32_t* global,
                            emulated::Site site = emulated::here()) {
    emulated::start_copy("copy_word_async", shared, global, true, 4, site);
}

inline void wait_for_copies() {
    emulated::Copy copy;
    while (emulated::next_copy(&copy)) emulated::finish_copy(copy);
}

inline void commit_copies() { emulated::commit_copies(); }

template <int kLatest>
void wait_for_copies_before() {
    emulated::Copy copy;
    while (emulated::next_copy(&copy, kLatest)) emulated::finish_copy(copy);
}

// Launches come one after the other; what is seen is whether threads wait at all.
inline void wait_for_previous_kernel() { emulated::wait_for_previous_kernel(); }
inline void let_next_kernel_start() {}

// Reads what it asks for, so that a sanitizer sees where that is not memory.
inline void prefetch_to_l2(const void* global, uint32_t bytes,
                           emulated::Site site = emulated::here()) {
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0)
        emulated::fail(emulated::kMisaligned, "prefetch_to_l2 at %s:%d: %u bytes at %p, not on 16",
                       site.file, site.line, bytes, global);
    for (uint32_t i = 0; i < bytes; ++i)
        static_cast<void>(static_cast<const volatile unsigned char*>(global)[i]);
}

}  // namespace placekern::cuda
