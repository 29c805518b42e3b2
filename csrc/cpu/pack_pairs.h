// The pairs layout of GPU memory, written on the CPU.
#pragma once

#include "../args.h"

namespace placekern {

// Fills run_chunks [M, ceil(K / 248)]: how many chunks the entries of a row in a window take.
// Columns rise in each row.
void count_chunks(int64_t M, int64_t K, const int64_t* row_ptr, const int32_t* col_ind,
                  uint8_t* run_chunks, int threads);

// Fills the chunks of every run; what of them no entry takes has a place from 248 on and code 0.
void pack_pairs(const PackPairsArgs& args);

}  // namespace placekern
