// Both gradients of a fully connected layer from one decoding of each window. A thread owns whole
// windows of columns, hence a part of grad_x that no other touches; the sums by code are added
// window by window, or with many codebooks over some windows side by side.

constexpr int kBackwardColumns = 256;  // columns of the batch handled at a time; bounds the scratch

template <class T>
struct LinearBackwardScratch {
    int64_t* cursors;  // [M]
    T* x;              // [columns, kWindow], zeros past K
    T* grad_x;         // [columns, kWindow]
    T* grad_weight;  // [kWindow], of one row: never more than a window of the dense gradient exists

    LinearBackwardScratch(Carver& carver, const LinearBackwardArgs<T>& args, int columns)
        : cursors(carver.take<int64_t>(args.weight.M)),
          x(carver.take<T>(static_cast<size_t>(columns) * kWindow)),
          grad_x(carver.take<T>(static_cast<size_t>(columns) * kWindow)),
          grad_weight(carver.take<T>(kWindow)) {}
};

// `sums` [codebooks, 2^bits] receives the window's part of the gradient of the codebooks.
template <class T>
void linear_backward_window(const Decoder<T>& decoder, const LinearBackwardArgs<T>& args,
                            const T* grad_y_t, int64_t window, const LinearBackwardScratch<T>& s,
                            Entries<T>& entries, T* dense, double* sums) {
    const Weight<T>& w = args.weight;
    const int64_t k = window * kWindow;
    const int64_t width = smaller(w.K - k, int64_t{kWindow});
    for (int64_t n0 = 0; n0 < args.N; n0 += kBackwardColumns) {
        const int columns = static_cast<int>(smaller(args.N - n0, int64_t{kBackwardColumns}));
        const bool last = n0 + columns == args.N;
        std::memset(s.x, 0, sizeof(T) * columns * kWindow);
        std::memset(s.grad_x, 0, sizeof(T) * columns * kWindow);
        for (int n = 0; n < columns; ++n) {
            std::memcpy(s.x + n * kWindow, args.x + (n0 + n) * w.K + k, sizeof(T) * width);
        }
        int64_t first_bin = 0, group_end = w.group_size;
        for (int64_t m = 0; m < w.M; ++m) {
            if (m == group_end) {
                first_bin += 1 << w.bits;
                group_end += w.group_size;
            }
            const T* grad_y = grad_y_t + m * args.N + n0;
            decoder.entries_with_codes(m, window, s.cursors[m], entries);
            if (last) s.cursors[m] += entries.count;
            if (entries.count == 0) continue;
            if (args.grad_x) {
                std::memset(dense, 0, sizeof(T) * kWindow);
                for (int e = 0; e < entries.count; ++e)
                    dense[entries.columns[e]] = entries.values[e];
                for (int n = 0; n < columns; ++n) {
                    const Vec<T> g = Vec<T>::broadcast(grad_y[n]);
                    T* row = s.grad_x + n * kWindow;
                    for (int i = 0; i < kWindow; i += Vec<T>::lanes) {
                        fma(g, Vec<T>::load(dense + i), Vec<T>::load(row + i)).store(row + i);
                    }
                }
            }
            if (args.grad_codebook) {
                Vec<T> of_row[kWindow / Vec<T>::lanes];
                for (auto& sum : of_row) sum = Vec<T>::zero();
                for (int n = 0; n < columns; ++n) {
                    const Vec<T> g = Vec<T>::broadcast(grad_y[n]);
                    const T* row = s.x + n * kWindow;
                    for (int i = 0; i < kWindow / Vec<T>::lanes; ++i) {
                        of_row[i] = fma(g, Vec<T>::load(row + i * Vec<T>::lanes), of_row[i]);
                    }
                }
                for (int i = 0; i < kWindow / Vec<T>::lanes; ++i)
                    of_row[i].store(s.grad_weight + i * Vec<T>::lanes);
                double* bins = sums + first_bin;
                for (int e = 0; e < entries.count; ++e)
                    bins[entries.codes[e]] += s.grad_weight[entries.columns[e]];
            }
        }
        if (args.grad_x) {
            for (int n = 0; n < columns; ++n) {
                std::memcpy(args.grad_x + (n0 + n) * w.K + k, s.grad_x + n * kWindow,
                            sizeof(T) * width);
            }
        }
    }
}

template <class T>
void linear_backward_impl(const LinearBackwardArgs<T>& args) {
    const Weight<T>& w = args.weight;
    const int64_t entries_of_all = w.codebooks() << w.bits;
    const int64_t windows = w.windows();
    if (args.grad_codebook) std::memset(args.grad_codebook, 0, entries_of_all * sizeof(double));
    if (args.N == 0 || windows == 0) return;

    const int columns = static_cast<int>(smaller(args.N, int64_t{kBackwardColumns}));
    Carver measure(nullptr);
    LinearBackwardScratch<T>(measure, args, columns);
    const Scratch scratch(args.threads, measure.used());
    // A row of grad_y is needed per row of the weight; as given, its entries lie M apart.
    const Scratch transposed(1, sizeof(T) * args.N * w.M);
    const int64_t slots = args.grad_codebook ? partial_sums(w, windows, w.codebooks()) : windows;
    const Scratch partials(1, args.grad_codebook ? sizeof(double) * slots * entries_of_all : 0);
    T* grad_y_t = static_cast<T*>(transposed.of(0));
    double* partial = static_cast<double*>(partials.of(0));
    const Decoder<T> decoder(w, args.threads);
#pragma omp parallel num_threads(args.threads)
    {
        Carver carver(scratch.of(omp_get_thread_num()));
        const LinearBackwardScratch<T> s(carver, args, columns);
        Entries<T> entries;
        alignas(64) T dense[kWindow];
#pragma omp for schedule(static)
        for (int64_t m = 0; m < w.M; ++m) {
            for (int64_t n = 0; n < args.N; ++n)
                grad_y_t[m * args.N + n] = args.grad_y[n * w.M + m];
        }
        // Neighbouring windows go to one thread, which then moves its cursors on instead of
        // counting again. The windows of a slot add up in one place.
        const int64_t first = slots * omp_get_thread_num() / omp_get_num_threads();
        const int64_t end = slots * (omp_get_thread_num() + 1) / omp_get_num_threads();
        if (first < end) {
            for (int64_t m = 0; m < w.M; ++m)
                s.cursors[m] = decoder.cursor(m, windows * first / slots);
        }
        for (int64_t slot = first; slot < end; ++slot) {
            double* sums = args.grad_codebook ? partial + slot * entries_of_all : nullptr;
            if (sums) std::memset(sums, 0, entries_of_all * sizeof(double));
            const int64_t past = windows * (slot + 1) / slots;
            for (int64_t window = windows * slot / slots; window < past; ++window)
                linear_backward_window(decoder, args, grad_y_t, window, s, entries, dense, sums);
        }
    }
    // In the order of the slots, whoever computed them: the same sum for any number of threads.
    for (int64_t slot = 0; slot < slots && args.grad_codebook; ++slot) {
        for (int64_t i = 0; i < entries_of_all; ++i)
            args.grad_codebook[i] += partial[slot * entries_of_all + i];
    }
}
