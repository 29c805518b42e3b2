// The one dynamic array of shared memory.
#pragma once

#include <cstddef>

namespace emulated {

// Lets a launch use the first `bytes`; AddressSanitizer reports what goes beyond.
void open_shared_memory(size_t bytes);

// New memory for a block: every byte 0xFF, a NaN where a kernel reads what it never wrote.
void clear_shared_memory(size_t bytes);

}  // namespace emulated
