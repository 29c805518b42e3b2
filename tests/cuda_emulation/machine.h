// What the headers ask of the machine (machine.cpp): run a grid, meet at a barrier, give up.
// Everything here is defined in files that no sanitizer instruments, so that the machine's own
// memory traffic is never mistaken for the kernel's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vector_types.h"

// Of the thread that runs; set at every switch of fibers.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulated {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared = 228 * 1024;
constexpr unsigned kFullMask = 0xffffffffu;

// Where in the source a thread waits. As a default argument, `here()` is the line of the caller.
struct Site {
    const char* file;
    int line;
};
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
}

// Values of cudaError_t.
constexpr int kInvalidValue = 1;
constexpr int kMisaligned = 716;
constexpr int kLaunchFailure = 719;

struct Outcome {
    int status = 0;  // a cudaError_t
    char text[640] = {};
};

// `run(arguments)` in every thread of a grid whose sizes are known to be within the limits.
Outcome run_grid(dim3 grid, dim3 block, size_t shared, void (*run)(void*), void* arguments);

// Ends the launch from within a kernel, with this outcome.
[[noreturn]] void fail(int status, const char* format, ...) __attribute__((format(printf, 2, 3)));

int lane();
// Of a thread, in a launch that may run before the one before it has ended: once.
void wait_for_previous_kernel();

int capability();  // of the device of the launch that runs, 90 for 9.0

// __syncthreads() and __syncwarp(): these order memory.
void synchronize_block(Site site);
void synchronize_warp(unsigned mask, Site site);

// Waits until every lane of the warp has called it, then returns the 32 values; they stay until
// the lane's next collective. The last lane to come runs `complete` on them first. Does not order
// memory.
using Complete = void (*)(const uint64_t* values);
const uint64_t* gather(const char* name, unsigned mask, uint64_t value, Site site,
                       Complete complete = nullptr);

// Asynchronous copies of 16 or 4 bytes of the running thread, oldest first.
struct Copy {
    void* shared;
    const void* global;  // null: zeros
    int bytes;
    int group;  // set when it begins
};
constexpr int kNoGroup = -1;  // next_copy: of all copies
void begin_copy(const Copy& copy);
void commit_copies();
// The oldest copy that is not of the latest so many groups, nor in none yet; false where there is
// none.
bool next_copy(Copy* copy, int latest = kNoGroup);
bool in_shared_memory(const void* address, size_t bytes);

// What orders memory between blocks: an atomic after a fence publishes what came before the fence,
// and a fence after an atomic sees what was published there.
void fence();
void before_atomic(const void* address);
void after_atomic(const void* address);

// Products of a warp; each value is the address of a lane's Operands (emulated_instructions.h).
void multiply_bfloat16(const uint64_t* values);
void multiply_half(const uint64_t* values);
void multiply_tf32(const uint64_t* values);

}  // namespace emulated
