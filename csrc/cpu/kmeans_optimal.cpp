// Exact 1-D k-means by dynamic programming, for some thousands of weighted points: where a fit
// starts.
//
// best[c][j], the least error of the first j points in c clusters, is the minimum over i of
// best[c - 1][i] + error(i, j), and the minimiser never falls as j grows. So each layer is solved
// by divide and conquer in O(n log n) evaluations (Wang and Song, The R Journal 3(2), 2011, give
// the programme; the monotone minimiser is Wu's, Journal of Algorithms 12, 1991).
#include "kmeans_optimal.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace placekern {
namespace {

struct Moments {
    std::vector<double> weight, sum, square;  // of the first i points

    Moments(int64_t n, const double* points, const double* weights)
        : weight(n + 1), sum(n + 1), square(n + 1) {
        double total = 0, mass = 0;
        for (int64_t i = 0; i < n; ++i) {
            total += weights[i] * points[i];
            mass += weights[i];
        }
        const double centre = mass > 0 ? total / mass : 0;  // fewer digits cancel around the mean
        for (int64_t i = 0; i < n; ++i) {
            const double x = points[i] - centre;
            weight[i + 1] = weight[i] + weights[i];
            sum[i + 1] = sum[i] + weights[i] * x;
            square[i + 1] = square[i] + weights[i] * x * x;
        }
    }

    double error(int64_t i, int64_t j) const {
        const double w = weight[j] - weight[i];
        if (w <= 0) return 0;
        const double s = sum[j] - sum[i];
        return std::max(0.0, square[j] - square[i] - s * s / w);
    }
};

struct Layer {
    const Moments& moments;
    const std::vector<double>& previous;
    std::vector<double>& current;
    int32_t* split;  // [n + 1]: where the last cluster begins

    void solve(int64_t low, int64_t high, int64_t first, int64_t last) const {
        if (low > high) return;
        const int64_t j = (low + high) / 2;
        double best = std::numeric_limits<double>::infinity();
        int64_t at = first;
        for (int64_t i = first; i <= std::min(j, last); ++i) {
            const double error = previous[i] + moments.error(i, j);
            if (error < best) {
                best = error;
                at = i;
            }
        }
        current[j] = best;
        split[j] = static_cast<int32_t>(at);
        solve(low, j - 1, first, at);
        solve(j + 1, high, at, last);
    }
};

}  // namespace

void kmeans_optimal(int64_t n, int clusters, const double* points, const double* weights,
                    int64_t* starts) {
    const Moments moments(n, points, weights);
    std::vector<double> previous(n + 1), current(n + 1);
    for (int64_t j = 0; j <= n; ++j) previous[j] = moments.error(0, j);
    std::vector<int32_t> splits(static_cast<size_t>(clusters) * (n + 1), 0);
    for (int c = 1; c < clusters; ++c) {
        Layer{moments, previous, current, splits.data() + c * (n + 1)}.solve(0, n, 0, n);
        std::swap(previous, current);
    }
    int64_t end = n;
    for (int c = clusters - 1; c >= 0; --c) {
        starts[c] = c == 0 ? 0 : splits[c * (n + 1) + end];
        end = starts[c];
    }
}

}  // namespace placekern
