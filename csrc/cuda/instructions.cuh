// The instructions that CUDA C++ has no name for: tensor cores, in-register transposition,
// asynchronous copies. Compiled for the host, the same functions come from a software model of the
// machine (tests/cuda_emulation), so every kernel above this file is checked without a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#ifndef __CUDACC__
#include "emulated_instructions.h"
#else

namespace placekern::cuda {

// d += a b, one 16 x 8 x 16 product of a warp. Lane 4 g + q holds of a: rows g and g + 8, columns
// 2q, 2q + 1 (words 0, 1) and 2q + 8, 2q + 9 (words 2, 3); of b: the same columns as rows, in
// column g; of d: rows g (0, 1) and g + 8 (2, 3), columns 2q, 2q + 1. (PTX ISA, mma.m16n8k16.)
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    __nv_bfloat16) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();  // Turing has no bfloat16 product; the host never launches one there
#endif
}

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    __half) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // Turing has the half of it
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

// The 16 x 8 x 8 product in TF32. Lane 4 g + q holds of a: rows g and g + 8 of column q (words 0,
// 1) and of column q + 4 (words 2, 3); of b: rows q and q + 4 of column g; d as above.
// (PTX ISA, mma.m16n8k8.)
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    float) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}

// The nearest TF32 number (10 bits after the point), ties away from zero, as the bits of a float.
__device__ __forceinline__ uint32_t to_tf32(float value) {
    uint32_t bits = __float_as_uint(value);
#if __CUDA_ARCH__ >= 800
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#endif
    return bits;
}

// Transposes an 8 x 8 matrix of 16-bit elements held by a warp: lane 4 g + q gives row g, columns
// 2q and 2q + 1, and gets column g, rows 2q and 2q + 1. (PTX ISA, movmatrix.)
__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
    uint32_t result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// Loads four 8 x 8 matrices of 16-bit elements: lane 8 i + r gives where row r of matrix i is,
// eight elements on 16 bytes, and lane 4 g + q gets of matrix i row g, columns 2q and 2q + 1, as
// word i. (PTX ISA, ldmatrix.)
__device__ __forceinline__ void load_matrices(uint32_t (&word)[4], const void* row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(address)
                 : "memory");
}

// The same with each matrix transposed: lane 4 g + q gets of matrix i column g, rows 2q and 2q + 1.
__device__ __forceinline__ void load_transposed(uint32_t (&word)[4], const void* row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(address)
                 : "memory");
}

// Whether copy_async and copy_word_async only start a copy: Turing copies at once, and waits.
__device__ constexpr bool copies_wait() {
#if __CUDA_ARCH__ >= 800
    return true;
#else
    return false;
#endif
}

// Copies 16 bytes from global to shared memory, or writes zeros where `inside` is false; done when
// the thread has waited for it.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
#if __CUDA_ARCH__ >= 800
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = inside ? 16 : 0;  // what is not read is filled with zeros
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                 "r"(bytes)
                 : "memory");
#else
    *static_cast<uint4*>(shared) =
        inside ? __ldg(static_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0);
#endif
}

// Copies 4 bytes.
__device__ __forceinline__ void copy_word_async(uint32_t* shared, const uint32_t* global) {
#if __CUDA_ARCH__ >= 800
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global) : "memory");
#else
    *shared = __ldg(global);
#endif
}

// Waits for all copies of this thread.
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Makes a group of the copies that this thread has started since the last group; it may be empty.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups of this thread but the latest kLatest.
template <int kLatest>
__device__ __forceinline__ void wait_for_copies_before() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kLatest) : "memory");
#endif
}

// In a kernel launched early (launch.cuh): waits until the kernel before it on the stream has ended
// and its writes can be seen. Nothing before compute capability 9.0, where none is launched early.
// (PTX ISA, griddepcontrol.)
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets a kernel behind this one that is launched early take free places, once every block of this
// one has come here or ended.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Asks for `bytes` of global memory to be brought to the L2 cache: one instruction of one lane,
// which nothing waits for. Address and size are multiples of 16. Nothing before compute
// capability 9.0.
__device__ __forceinline__ void prefetch_to_l2(const void* global, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes));
#endif
}

}  // namespace placekern::cuda

#endif
