// Nearest centroid, sum and count in one pass over the points. Boundaries are compared, not
// distances: with sorted centroids the nearest one is the number of midpoints below the point.

constexpr int64_t kPointBlock =
    65536;                         // points a partial sum covers, whatever the number of threads
constexpr int kPointChunk = 2048;  // points that stay in L1 between the search and the sums
constexpr int kPointTables =
    4;  // neighbouring points add to different tables: no waiting on one sum

struct PointSums {
    double sums[kPointTables][kMaxCodes];
    int64_t counts[kPointTables][kMaxCodes];
};

// `find(points, n, codes)` writes the code of each point.
template <class Find>
void kmeans_assign_impl(const KmeansAssignArgs& args, const Find& find) {
    const int64_t blocks = (args.n + kPointBlock - 1) / kPointBlock;
    const Scratch scratch(args.threads, sizeof(PointSums));
    const Scratch partials(1, (sizeof(double) + sizeof(int64_t)) * blocks * args.count);
    double* sums = static_cast<double*>(partials.of(0));
    int64_t* counts = reinterpret_cast<int64_t*>(sums + blocks * args.count);
#pragma omp parallel num_threads(args.threads)
    {
        PointSums& tables = *static_cast<PointSums*>(scratch.of(omp_get_thread_num()));
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < blocks; ++block) {
            std::memset(&tables, 0, sizeof(tables));
            const int64_t end = smaller(args.n, (block + 1) * kPointBlock);
            for (int64_t i = block * kPointBlock; i < end; i += kPointChunk) {
                const int length = static_cast<int>(smaller(end - i, int64_t{kPointChunk}));
                find(args.points + i, length, args.codes + i);
                for (int j = 0; j < length; ++j) {
                    const uint8_t code = args.codes[i + j];
                    tables.sums[j % kPointTables][code] += args.points[i + j];
                    tables.counts[j % kPointTables][code] += 1;
                }
            }
            for (int c = 0; c < args.count; ++c) {
                double sum = 0;
                int64_t count = 0;
                for (int t = 0; t < kPointTables; ++t) {
                    sum += tables.sums[t][c];
                    count += tables.counts[t][c];
                }
                sums[block * args.count + c] = sum;
                counts[block * args.count + c] = count;
            }
        }
    }
    for (int c = 0; c < args.count; ++c) {
        args.sums[c] = 0;
        args.counts[c] = 0;
        for (int64_t block = 0; block < blocks; ++block) {
            args.sums[c] += sums[block * args.count + c];
            args.counts[c] += counts[block * args.count + c];
        }
    }
}

// Search without branches: each step halves what is left of the sorted boundaries.
struct BinarySearch {
    int first_step;  // half of the smallest power of two that is >= count
    alignas(64) float boundaries[kMaxCodes];

    BinarySearch(const float* given, int count) : first_step(0) {
        int size = 1;
        while (size < count) size *= 2;
        first_step = size / 2;
        for (int i = 0; i < kMaxCodes; ++i) boundaries[i] = i < count - 1 ? given[i] : INFINITY;
    }

    void operator()(const float* points, int n, uint8_t* codes) const {
        for (int i = 0; i < n; ++i) {
            int code = 0;
            for (int step = first_step; step > 0; step /= 2)
                code += points[i] > boundaries[code + step - 1] ? step : 0;
            codes[i] = static_cast<uint8_t>(code);
        }
    }
};
