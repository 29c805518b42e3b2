#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>

#ifdef EMULATED_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMULATED_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(EMULATED_UCONTEXT)
#define EMULATED_UCONTEXT
#endif
#ifdef EMULATED_UCONTEXT
#include <ucontext.h>
#endif

// void emulated_switch(void** save, void* load): pushes what a call must preserve, exchanges the
// stack pointers, pops. swapcontext does the same with a system call for the signal mask.
#if defined(EMULATED_UCONTEXT)
#elif defined(__x86_64__)
asm(R"(
.pushsection .text
.hidden emulated_switch
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulated_switch, . - emulated_switch
.popsection
)");
#elif defined(__aarch64__)
asm(R"(
.pushsection .text
.hidden emulated_switch
.globl emulated_switch
.type emulated_switch, %function
emulated_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emulated_switch, . - emulated_switch
.popsection
)");
#endif
#ifndef EMULATED_UCONTEXT
extern "C" void emulated_switch(void** save, void* load);
#endif

namespace emulated {
namespace {

constexpr size_t kStack = 256 * 1024;  // a sanitizer's report is written on it too

Fiber* switched_from = nullptr;

// Lowest byte of a new stack. Below it lies a page that nothing may touch.
unsigned char* new_stack() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, page + kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) throw std::bad_alloc();
    return static_cast<unsigned char*>(memory) + page;
}

}  // namespace

void adopt([[maybe_unused]] Fiber& fiber) {
#ifdef EMULATED_UCONTEXT
    if (fiber.context_ == nullptr) fiber.context_ = new ucontext_t;
#endif
#ifdef EMULATED_THREAD_SANITIZER
    fiber.thread_ = __tsan_get_current_fiber();
#endif
}

void Fiber::restart(void (*entry)(), [[maybe_unused]] int number) {
    if (stack_ == nullptr) {
        // Tops at different distances from a page: the stacks share the sets of the caches.
        static size_t stacks = 0;
        stack_ = new_stack();
        bytes_ = kStack - stacks++ % 32 * 128;
#ifdef EMULATED_THREAD_SANITIZER
        char name[32];
        std::snprintf(name, sizeof(name), "thread %d of a block", number);
        thread_ = __tsan_create_fiber(0);
        __tsan_set_fiber_name(thread_, name);
#endif
    }
    fake_stack_ = nullptr;
#if defined(EMULATED_UCONTEXT)
    if (context_ == nullptr) context_ = new ucontext_t;
    auto* context = static_cast<ucontext_t*>(context_);
    getcontext(context);
    context->uc_stack.ss_sp = stack_;
    context->uc_stack.ss_size = bytes_;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
#elif defined(__x86_64__)
    // Six registers, the address to return to, and a word that aligns the stack as a call would.
    auto* words = reinterpret_cast<uintptr_t*>(stack_ + bytes_) - 8;
    for (int i = 0; i < 8; ++i) words[i] = 0;
    words[6] = reinterpret_cast<uintptr_t>(entry);
    context_ = words;
#else
    auto* words = reinterpret_cast<uintptr_t*>(stack_ + bytes_) - 20;
    for (int i = 0; i < 20; ++i) words[i] = 0;
    words[11] = reinterpret_cast<uintptr_t>(entry);  // x30
    context_ = words;
#endif
}

void Fiber::abandon() {
#ifdef EMULATED_ADDRESS_SANITIZER
    // The frames that were never left still guard their arrays.
    if (stack_ != nullptr) __asan_unpoison_memory_region(stack_, bytes_);
#endif
}

void Fiber::entered() {
#ifdef EMULATED_ADDRESS_SANITIZER
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    // The OS thread's stack is learned when the first fiber comes from there.
    switched_from->stack_ = static_cast<unsigned char*>(const_cast<void*>(bottom));
    switched_from->bytes_ = bytes;
#endif
}

void Fiber::switch_to(Fiber& next) {
    switched_from = this;
#ifdef EMULATED_ADDRESS_SANITIZER
    __sanitizer_start_switch_fiber(&fake_stack_, next.stack_, next.bytes_);
#endif
#ifdef EMULATED_THREAD_SANITIZER
    __tsan_switch_to_fiber(next.thread_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EMULATED_UCONTEXT
    swapcontext(static_cast<ucontext_t*>(context_), static_cast<ucontext_t*>(next.context_));
#else
    emulated_switch(&context_, next.context_);
#endif
#ifdef EMULATED_ADDRESS_SANITIZER
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::release([[maybe_unused]] void* token) {
#ifdef EMULATED_THREAD_SANITIZER
    void* running = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(thread_, __tsan_switch_to_fiber_no_sync);
    __tsan_release(token);
    __tsan_switch_to_fiber(running, __tsan_switch_to_fiber_no_sync);
#endif
}

void Fiber::release_running([[maybe_unused]] void* token) {
#ifdef EMULATED_THREAD_SANITIZER
    __tsan_release(token);
#endif
}

void Fiber::acquire_running([[maybe_unused]] void* token) {
#ifdef EMULATED_THREAD_SANITIZER
    __tsan_acquire(token);
#endif
}

}  // namespace emulated
