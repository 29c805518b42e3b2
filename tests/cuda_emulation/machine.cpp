// Runs a grid: one block after the other, each thread of a block on a fiber that runs until it
// waits. PLACEKERN_EMULATED_ORDER is the order of threads and blocks: ascending (or not set),
// descending, or a number, the seed of a random one. So a block must not wait for a later one.
#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "fiber.h"
#include "schedule.h"
#include "shared_memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulated {
namespace {

constexpr int kWarps = kMaxThreads / kLanes;
constexpr int kCopies = 128;  // in flight, of one thread
constexpr int kAtomics = 8;   // the latest of one thread, which its next fence is about

#ifdef EMULATED_THREAD_SANITIZER
// A fiber that runs a thread of two blocks would order the two. With two sets, half of the pairs of
// blocks have no order between them, among them all pairs whose numbers differ in one bit.
constexpr int kSets = 2;
#else
constexpr int kSets = 1;
#endif

struct Thread {
    Fiber fiber;
    uint3 index;
    const char* waits_at;
    Site site;
    bool left;
    bool told;        // of, in the report of a deadlock
    unsigned launch;  // the last one that it ran in
    Copy copies[kCopies];
    int first_copy, last_copy;  // counted on; the place is the remainder
    int groups;                 // of copies, that were committed
    bool fenced;
    const void* atomics[kAtomics];
    int atomic_count;  // counted on, as above
};

// Threads that meet: a block or a warp.
struct Meeting {
    const char* name;
    Site site;
    int arrived;
    int phase;  // of two, so that those who run ahead do not overwrite what others still read
};

struct Warp {
    Meeting meeting;
    uint64_t values[2][kLanes];
};

// Addresses that stand for an order, for ThreadSanitizer; one for each phase.
struct Tokens {
    long block[2], warp[kWarps][2];
};

Thread all_threads[kSets][kMaxThreads];
Tokens all_tokens[kSets];
Thread* threads;  // of the block that runs
Tokens* tokens;
Warp warps[kWarps];
Meeting block_meeting;
int count;         // threads of the block
int running = -1;  // one of them; none outside of a launch
int left;          // threads that have left the kernel
Schedule schedule;
Outcome outcome;
Fiber host;
unsigned launch_number;
long host_token;  // what the host did before the launch
long grid_token;  // what the threads of a launch did
void (*run_thread)(void*);
void* run_arguments;

const char* file_name(const char* path) {
    const char* slash = std::strrchr(path, '/');
    return slash == nullptr ? path : slash + 1;
}

// No thread can go on: says who waits where.
[[noreturn]] void fail_deadlock() {
    char text[400] = "";
    size_t used = 0;
    for (int i = 0; i < count; ++i) threads[i].told = threads[i].left;
    for (int i = 0; i < count && used < sizeof(text); ++i) {
        if (threads[i].told) continue;
        const Thread& first = threads[i];
        int waiting = 0;
        for (int j = i; j < count; ++j) {
            Thread& other = threads[j];
            if (other.told || other.site.line != first.site.line ||
                std::strcmp(other.waits_at, first.waits_at) != 0)
                continue;
            other.told = true;
            ++waiting;
        }
        used +=
            std::snprintf(text + used, sizeof(text) - used, "%s%d of %d threads wait at %s (%s:%d)",
                          used == 0 ? "" : ", ", waiting, count, first.waits_at,
                          file_name(first.site.file), first.site.line);
    }
    fail(kLaunchFailure, "deadlock in block (%u, %u, %u): %s, %d have left the kernel", blockIdx.x,
         blockIdx.y, blockIdx.z, text, left);
}

// Runs another thread that is ready, or goes on where it is this one.
void go_on() {
    const int next = schedule.pick();
    if (next < 0) fail_deadlock();
    if (next == running) return;
    Fiber& from = threads[running].fiber;
    running = next;
    threadIdx = threads[next].index;
    from.switch_to(threads[next].fiber);
}

void wait() {
    schedule.block(running);
    go_on();
}

[[noreturn]] void leave_to_host() {
    Fiber& from = threads[running].fiber;
    running = -1;
    from.switch_to(host);
    std::abort();  // nobody switches back
}

// Notes that the running thread has come to a meeting; refuses where others came to another one.
void arrive(Meeting& meeting, const char* name, Site site, const char* whom) {
    if (meeting.arrived == 0) {
        meeting.name = name;
        meeting.site = site;
    } else if (meeting.site.line != site.line || std::strcmp(meeting.name, name) != 0) {
        fail(kLaunchFailure,
             "threads of a %s wait at different places in block (%u, %u, %u): %d at %s (%s:%d), "
             "thread %d at %s (%s:%d)",
             whom, blockIdx.x, blockIdx.y, blockIdx.z, meeting.arrived, meeting.name,
             file_name(meeting.site.file), meeting.site.line, running, name, file_name(site.file),
             site.line);
    }
    threads[running].waits_at = name;
    threads[running].site = site;
    ++meeting.arrived;
}

void check_running(const char* name) {
    if (running < 0) throw std::logic_error(std::string(name) + " was called outside of a kernel");
}

void thread_entry() {
    Fiber::entered();
    Thread& self = threads[running];
    if (self.launch != launch_number) {
        self.launch = launch_number;
        Fiber::acquire_running(&host_token);
    }
    run_thread(run_arguments);
    if (self.first_copy != self.last_copy)
        fail(kLaunchFailure,
             "thread %d of block (%u, %u, %u) leaves with %d asynchronous copies that it never "
             "waited for",
             running, blockIdx.x, blockIdx.y, blockIdx.z, self.last_copy - self.first_copy);
    self.left = true;
    if (++left == count) leave_to_host();
    wait();
    std::abort();  // nobody wakes it
}

void run_block(unsigned number) {
    const int set = kSets == 1 ? 0 : __builtin_parity(number);
    threads = all_threads[set];
    tokens = &all_tokens[set];
    left = 0;
    block_meeting.arrived = 0;
    for (int i = 0; i * kLanes < count; ++i) warps[i].meeting.arrived = 0;
    for (int i = 0; i < count; ++i) {
        Thread& thread = threads[i];
        const unsigned row = i / blockDim.x;
        thread.index = {i % blockDim.x, row % blockDim.y, row / blockDim.y};
        thread.left = thread.fenced = false;
        thread.first_copy = thread.last_copy = thread.groups = thread.atomic_count = 0;
        thread.fiber.restart(thread_entry, i);
    }
    schedule.start(count);
    schedule.wake(0, count);
    running = schedule.pick();
    threadIdx = threads[running].index;
    host.switch_to(threads[running].fiber);
    if (outcome.status != 0)
        for (int i = 0; i < count; ++i) threads[i].fiber.abandon();
}

}  // namespace

Outcome run_grid(dim3 grid, dim3 block, size_t shared, void (*run)(void*), void* arguments) {
    outcome = Outcome();
    const char* wanted = std::getenv("PLACEKERN_EMULATED_ORDER");
    if (!schedule.set_order(wanted)) {
        outcome.status = kInvalidValue;
        std::snprintf(outcome.text, sizeof(outcome.text),
                      "PLACEKERN_EMULATED_ORDER is %s, expected ascending, descending or a seed",
                      wanted);
        return outcome;
    }
    adopt(host);
    Fiber::release_running(&host_token);
    blockDim = block;
    gridDim = grid;
    count = static_cast<int>(block.x * block.y * block.z);
    run_thread = run;
    run_arguments = arguments;
    ++launch_number;
    open_shared_memory(shared);
    for (const unsigned number : schedule.blocks(static_cast<size_t>(grid.x) * grid.y * grid.z)) {
        blockIdx = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
        clear_shared_memory(shared);
        run_block(number);
        if (outcome.status != 0) break;
    }
    for (auto& set : all_threads)
        for (Thread& thread : set)
            if (thread.launch == launch_number) thread.fiber.release(&grid_token);
    Fiber::acquire_running(&grid_token);
    return outcome;
}

void fail(int status, const char* format, ...) {
    outcome.status = status;
    va_list words;
    va_start(words, format);
    std::vsnprintf(outcome.text, sizeof(outcome.text), format, words);
    va_end(words);
    check_running(outcome.text);
    leave_to_host();
}

int lane() { return running % kLanes; }

// PLACEKERN_EMULATED_WITHOUT=direct.cu:167 makes the barrier of that line order no memory, as if it
// were not there: ThreadSanitizer must then report what it guarded (tests/test_cuda_barriers.py).
static bool is_without(Site site) {
    static const char* const wanted = std::getenv("PLACEKERN_EMULATED_WITHOUT");
    if (wanted == nullptr) return false;
    const char* const slash = std::strrchr(site.file, '/');
    char here[256];
    std::snprintf(here, sizeof(here), "%s:%d", slash ? slash + 1 : site.file, site.line);
    return std::strcmp(here, wanted) == 0;
}

void synchronize_block(Site site) {
    check_running("__syncthreads");
    arrive(block_meeting, "__syncthreads", site, "block");
    long* token = &tokens->block[block_meeting.phase];
    const bool orders = !is_without(site);
    if (orders) Fiber::release_running(token);
    if (block_meeting.arrived == count) {
        block_meeting.arrived = 0;
        block_meeting.phase ^= 1;
        schedule.wake(0, count);
        go_on();
    } else {
        wait();
    }
    if (orders) Fiber::acquire_running(token);
}

void synchronize_warp(unsigned mask, Site site) {
    check_running("__syncwarp");
    const int warp = running / kLanes;
    long* token = &tokens->warp[warp][warps[warp].meeting.phase];
    const bool orders = !is_without(site);
    if (orders) Fiber::release_running(token);
    gather("__syncwarp", mask, 0, site);
    if (orders) Fiber::acquire_running(token);
}

const uint64_t* gather(const char* name, unsigned mask, uint64_t value, Site site,
                       Complete complete) {
    check_running(name);
    const int first = running / kLanes * kLanes;
    if (mask != kFullMask || first + kLanes > count)
        fail(kLaunchFailure,
             "%s (%s:%d) with mask 0x%08x in a warp of %d threads: only whole warps with the mask "
             "0xffffffff are emulated",
             name, file_name(site.file), site.line, mask,
             first + kLanes > count ? count - first : kLanes);
    Warp& warp = warps[running / kLanes];
    arrive(warp.meeting, name, site, "warp");
    uint64_t* values = warp.values[warp.meeting.phase];
    values[running % kLanes] = value;
    if (warp.meeting.arrived == kLanes) {
        warp.meeting.arrived = 0;
        warp.meeting.phase ^= 1;
        if (complete != nullptr) complete(values);
        schedule.wake(first, first + kLanes);
        go_on();
    } else {
        wait();
    }
    return values;
}

void begin_copy(const Copy& copy) {
    check_running("copy_async");
    Thread& self = threads[running];
    if (self.last_copy - self.first_copy == kCopies)
        fail(kLaunchFailure,
             "thread %d has %d asynchronous copies in flight, the most that are emulated", running,
             kCopies);
    Copy& begun = self.copies[self.last_copy++ % kCopies];
    begun = copy;
    begun.group = self.groups;
}

void commit_copies() {
    check_running("commit_copies");
    ++threads[running].groups;
}

bool next_copy(Copy* copy, int latest) {
    check_running("wait_for_copies");
    Thread& self = threads[running];
    if (self.first_copy == self.last_copy) return false;
    const Copy& oldest = self.copies[self.first_copy % kCopies];
    if (latest != kNoGroup && oldest.group >= self.groups - latest) return false;
    *copy = oldest;
    ++self.first_copy;
    return true;
}

void fence() {
    check_running("__threadfence");
    Thread& self = threads[running];
    self.fenced = true;
    for (int i = 0; i < std::min(self.atomic_count, kAtomics); ++i)
        Fiber::acquire_running(const_cast<void*>(self.atomics[i]));
    self.atomic_count = 0;
}

void before_atomic(const void* address) {
    if (running >= 0 && threads[running].fenced) Fiber::release_running(const_cast<void*>(address));
}

void after_atomic(const void* address) {
    if (running < 0) return;
    Thread& self = threads[running];
    self.atomics[self.atomic_count++ % kAtomics] = address;
}

}  // namespace emulated
