// Fibers: stacks of their own within one OS thread, and the switch between them. Both sanitizers
// are told of each switch; ThreadSanitizer takes a fiber for a thread that is ordered with no
// other.
#pragma once

#include <cstddef>

namespace emulated {

class Fiber {
  public:
    Fiber() = default;
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // What the fiber does at the next switch to it: `entry`, on an empty stack. It must never
    // return. Whatever the fiber did before is dropped. The number is its name in reports.
    void restart(void (*entry)(), int number);

    // To be called before a restart where the last run did not come to its end.
    void abandon();

    // Goes on with `next`; returns when another fiber switches to this one.
    void switch_to(Fiber& next);

    // Must be the first call of an entry.
    static void entered();

    // For ThreadSanitizer: what a fiber did before it released a token is visible to a fiber that
    // has acquired the token since.
    void release(void* token);
    static void release_running(void* token);
    static void acquire_running(void* token);

  private:
    void* context_ = nullptr;         // the saved stack pointer
    unsigned char* stack_ = nullptr;  // its lowest byte; null for the OS thread's own until known
    size_t bytes_ = 0;
    void* thread_ = nullptr;      // ThreadSanitizer's
    void* fake_stack_ = nullptr;  // AddressSanitizer's

    friend void adopt(Fiber& fiber);
};

// Makes `fiber` stand for the OS thread that calls, so that others can switch back to it.
void adopt(Fiber& fiber);

}  // namespace emulated
