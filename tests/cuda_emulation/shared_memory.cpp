#include "shared_memory.h"

#include <cstdint>
#include <cstring>

#include "machine.h"

#ifdef EMULATED_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#endif
#ifdef EMULATED_THREAD_SANITIZER
#include <sys/mman.h>
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

// The array that kernels declare as extern, behind a guard and with room for another, on pages of
// its own (of at most 64 KiB). In assembly, because only that puts the guard right before it.
asm(R"(
.pushsection .bss.emulated_shared, "aw", %nobits
.balign 65536
.hidden emulated_guard
.globl emulated_guard
emulated_guard:
.zero 65536
.hidden placekern_shared
.globl placekern_shared
.type placekern_shared, %object
placekern_shared:
.zero 262144
.size placekern_shared, 262144
.popsection
)");

extern __attribute__((visibility("hidden"))) unsigned char emulated_guard[], placekern_shared[];

namespace emulated {
namespace {

constexpr size_t kGuard = 65536;
constexpr size_t kArray = 262144;
static_assert(kArray >= kMaxShared);

size_t opened;

}  // namespace

void open_shared_memory(size_t bytes) {
    opened = bytes;
#ifdef EMULATED_ADDRESS_SANITIZER
    __asan_poison_memory_region(emulated_guard, kGuard);
    __asan_unpoison_memory_region(placekern_shared, bytes);
    __asan_poison_memory_region(placekern_shared + bytes, kArray - bytes);
#endif
}

void clear_shared_memory(size_t bytes) {
    if (bytes == 0) return;
#ifdef EMULATED_THREAD_SANITIZER
    // The memory is new for this block, and not ordered after the block before: its history goes
    // when it is mapped anew, and the writes that fill it are no thread's.
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    mmap(placekern_shared, kArray, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
         -1, 0);
#endif
    std::memset(placekern_shared, 0xff, bytes);
#ifdef EMULATED_THREAD_SANITIZER
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
#endif
}

bool in_shared_memory(const void* address, size_t bytes) {
    const auto offset =
        reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(placekern_shared);
    return offset <= opened && bytes <= opened - offset;
}

}  // namespace emulated
