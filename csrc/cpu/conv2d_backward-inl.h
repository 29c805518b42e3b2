// Both gradients of a convolution from one decoding of each window. A task owns one image and one
// group, hence a part of grad_x that no other task touches, and its own sums by code: nothing is
// atomic, and the result is the same for any number of threads. With many codebooks a task has
// several images, which bounds the memory of the sums.
//
// "Group" alone is one of the convolution's; a codebook's rows may lie in several of these.

template <class T>
struct Conv2dBackwardScratch {
    T* columns;       // [kWindow, kTilePixels], of x
    T* grad_columns;  // [kWindow, kTilePixels], of grad_x
    T* grad_y;        // [rows, kTilePixels]
    T* bins;  // [codebooks, 2^bits, lanes]: a vector a code, so that adding needs no horizontal sum
    int64_t* cursors;  // [rows]

    // `codes`: 2^bits of as many codebooks as a task's rows have at most.
    Conv2dBackwardScratch(Carver& carver, int64_t rows, int64_t codes)
        : columns(carver.take<T>(kWindow * kTilePixels<T> + kColumnSlack<T>)),
          grad_columns(carver.take<T>(kWindow * kTilePixels<T>)),
          grad_y(carver.take<T>(rows * kTilePixels<T>)),
          bins(carver.take<T>(codes * Vec<T>::lanes)),
          cursors(carver.take<int64_t>(rows)) {}
};

template <class T>
void gather_grad_y(const Conv2dBackwardArgs<T>& args, const PixelRuns& runs, int64_t m0,
                   int64_t rows, T* out) {
    constexpr int kTile = kTilePixels<T>;
    std::memset(out, 0, sizeof(T) * rows * kTile);
    for (int j = 0; j < runs.count; ++j) {
        const PixelRun& run = runs.runs[j];
        const T* in = args.grad_y.data + run.image * args.grad_y.stride_n +
                      m0 * args.grad_y.stride_c + run.out_y * args.grad_y.stride_h +
                      run.out_x * args.grad_y.stride_w;
        for (int64_t r = 0; r < rows; ++r) {
            for (int i = 0; i < run.length; ++i) {
                out[r * kTile + run.first + i] =
                    in[r * args.grad_y.stride_c + i * args.grad_y.stride_w];
            }
        }
    }
}

template <class T>
void add_entry_gradients(const Entries<T>& entries, const T* grad_y, const T* columns,
                         T* grad_columns, T* bins) {
    constexpr int kTile = kTilePixels<T>;
    constexpr int lanes = Vec<T>::lanes;
    Vec<T> g[4];
    for (int i = 0; i < 4; ++i) g[i] = Vec<T>::load(grad_y + i * lanes);
    if (grad_columns) {
        for (int e = 0; e < entries.count; ++e) {
            const Vec<T> value = Vec<T>::broadcast(entries.values[e]);
            T* row = grad_columns + entries.columns[e] * kTile;
            for (int i = 0; i < 4; ++i)
                fma(value, g[i], Vec<T>::load(row + i * lanes)).store(row + i * lanes);
        }
    }
    if (bins) {
        for (int e = 0; e < entries.count; ++e) {
            const T* row = columns + entries.columns[e] * kTile;
            T* bin = bins + entries.codes[e] * lanes;
            Vec<T> sum = Vec<T>::load(bin);
            for (int i = 0; i < 4; ++i) sum = fma(g[i], Vec<T>::load(row + i * lanes), sum);
            sum.store(bin);
        }
    }
}

// One image and one group. The sums by code, in float64, are added to `partial` [codebooks,
// 2^bits], where the first codebook is that of the group's first row.
template <class T>
void conv2d_backward_task(const Decoder<T>& decoder, const Conv2dBackwardArgs<T>& args,
                          int64_t image, int64_t group, const Conv2dBackwardScratch<T>& s,
                          Entries<T>& entries, double* partial) {
    constexpr int kTile = kTilePixels<T>;
    constexpr int lanes = Vec<T>::lanes;
    const Weight<T>& w = args.weight;
    const int64_t rows = w.M / args.shape.groups;
    const int64_t m0 = group * rows;
    const int64_t plane = args.shape.out_height * args.shape.out_width;
    const int64_t codebook0 = m0 / w.group_size;
    const int64_t codes = ((m0 + rows - 1) / w.group_size - codebook0 + 1) << w.bits;
    for (int64_t pixel = 0; pixel < plane; pixel += kTile) {
        const PixelRuns runs(args.shape, image * plane + pixel,
                             static_cast<int>(smaller(plane - pixel, int64_t{kTile})));
        gather_grad_y(args, runs, m0, rows, s.grad_y);
        for (int64_t r = 0; r < rows; ++r) s.cursors[r] = w.row_start(m0 + r);
        if (partial) std::memset(s.bins, 0, sizeof(T) * codes * lanes);
        for (int64_t window = 0; window < w.windows(); ++window) {
            const int64_t k0 = window * kWindow;
            const int64_t width = smaller(w.K - k0, int64_t{kWindow});
            if (partial) gather_columns(args.shape, args.x, runs, group, k0, width, s.columns);
            if (args.grad_x.data) std::memset(s.grad_columns, 0, sizeof(T) * kWindow * kTile);
            T* bins = s.bins;
            int64_t group_end = (codebook0 + 1) * w.group_size - m0;
            for (int64_t r = 0; r < rows; ++r) {
                if (r == group_end) {
                    bins += lanes << w.bits;
                    group_end += w.group_size;
                }
                decoder.entries_with_codes(m0 + r, window, s.cursors[r], entries);
                s.cursors[r] += entries.count;
                add_entry_gradients(entries, s.grad_y + r * kTile, s.columns,
                                    args.grad_x.data ? s.grad_columns : nullptr,
                                    partial ? bins : nullptr);
            }
            if (args.grad_x.data) {
                scatter_columns(args.shape, s.grad_columns, runs, group, k0, width, args.grad_x);
            }
        }
        for (int64_t i = 0; partial && i < codes * lanes; ++i) partial[i / lanes] += s.bins[i];
    }
}

template <class T>
void conv2d_backward_impl(const Conv2dBackwardArgs<T>& args) {
    const Weight<T>& w = args.weight;
    const int64_t groups = args.shape.groups;
    const int64_t rows = w.M / groups;
    if (args.grad_codebook)
        std::memset(args.grad_codebook, 0, sizeof(double) * (w.codebooks() << w.bits));
    if (args.shape.batch == 0 || rows == 0 || args.shape.pixels() == 0) return;

    // The codebooks of so many rows in a row, wherever the first of them stands.
    const int64_t codebooks = smaller(w.codebooks(), (rows + w.group_size - 2) / w.group_size + 1);
    const int64_t codes = codebooks << w.bits;
    const int64_t slots = args.grad_codebook ? partial_sums(w, args.shape.batch, groups * codebooks)
                                             : args.shape.batch;
    const int64_t tasks = slots * groups;
    Carver measure(nullptr);
    Conv2dBackwardScratch<T>(measure, rows, codes);
    const Scratch scratch(args.threads, measure.used());
    const Scratch partials(1, args.grad_codebook ? sizeof(double) * tasks * codes : 0);
    double* partial = args.grad_codebook ? static_cast<double*>(partials.of(0)) : nullptr;
    if (partial) std::memset(partial, 0, sizeof(double) * tasks * codes);
    const Decoder<T> decoder(w, args.threads);
#pragma omp parallel num_threads(args.threads)
    {
        Carver carver(scratch.of(omp_get_thread_num()));
        const Conv2dBackwardScratch<T> s(carver, rows, codes);
        Entries<T> entries;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t slot = task / groups, past = args.shape.batch * (slot + 1) / slots;
            for (int64_t image = args.shape.batch * slot / slots; image < past; ++image) {
                conv2d_backward_task(decoder, args, image, task % groups, s, entries,
                                     partial ? partial + task * codes : nullptr);
            }
        }
    }
    for (int64_t task = 0; partial && task < tasks; ++task) {
        const int64_t m0 = task % groups * rows;
        const int64_t first = m0 / w.group_size, last = (m0 + rows - 1) / w.group_size;
        double* sums = args.grad_codebook + (first << w.bits);
        for (int64_t i = 0; i < (last - first + 1) << w.bits; ++i)
            sums[i] += partial[task * codes + i];
    }
}
