// Exact 1-D k-means of weighted points.
#pragma once

#include <cstdint>

namespace placekern {

// Splits sorted `points` [n] with `weights` [n] into `clusters` runs of the least squared error.
// starts [clusters]: the first point of each run; a run may be empty. n < 2^31.
void kmeans_optimal(int64_t n, int clusters, const double* points, const double* weights,
                    int64_t* starts);

}  // namespace placekern
