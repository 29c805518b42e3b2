// Fully connected layers. A window of weights is decoded into L1 and multiplied at once with every
// column of the batch, so the stream of weights, the only large operand, is read exactly once.

constexpr int kChunk = 16 * kWindow;  // columns looked up at a time by linear_row

template <class T>
struct RowBuffers {
    alignas(64) uint8_t codes[kChunk + 64];
    alignas(64) T values[kChunk + 64];
};

// Sums of one row times kN columns. Several chains a column hide the latency of fused
// multiply-adds.
template <class T, int kN>
struct RowSums {
    static constexpr int kChains = kN == 1 ? 4 : 2;
    Vec<T> vectors[kN][kChains];
    T scalars[kN][kChains];

    RowSums() {
        for (int n = 0; n < kN; ++n) {
            for (int c = 0; c < kChains; ++c) {
                vectors[n][c] = Vec<T>::zero();
                scalars[n][c] = T(0);
            }
        }
    }
    T total(int n) const {
        Vec<T> vector = vectors[n][0];
        T scalar = scalars[n][0];
        for (int c = 1; c < kChains; ++c) {
            vector = vector + vectors[n][c];
            scalar += scalars[n][c];
        }
        return vector.sum() + scalar;
    }
};

// One block of 64 columns: the values of its mask are spread to their columns in registers.
// Returns the values of the next block.
template <class T, int kN, bool kWhole>
inline __attribute__((always_inline)) const T* add_block(const LinearArgs<T>& args, int64_t k,
                                                         uint64_t mask, const T* values,
                                                         RowSums<T, kN>& sums) {
    constexpr int lanes = Vec<T>::lanes;
    const int64_t K = args.weight.K;
#pragma GCC unroll 8
    for (int i = 0; i < 64 / lanes; ++i) {
        const int64_t column = k + i * lanes;
        if (!kWhole && column >= K) break;
        const uint64_t part = mask >> (i * lanes) & ((uint64_t{1} << lanes) - 1);
        const Vec<T> weight = Vec<T>::expand(values, part);
        values += __builtin_popcountll(part);
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n) {
            const T* x = args.x + n * K + column;
            Vec<T>& sum = sums.vectors[n][i % RowSums<T, kN>::kChains];
            sum = fma(
                weight,
                kWhole ? Vec<T>::load(x) : Vec<T>::load_partial(x, static_cast<int>(K - column)),
                sum);
        }
    }
    return values;
}

// Mask layout, columns k0 .. k1. `values` was written a whole chunk before: a load that straddles
// two stores still in flight would wait for both.
template <class T, int kN>
void add_masked(const Decoder<T>& decoder, const LinearArgs<T>& args, int64_t m, int64_t k0,
                int64_t k1, const T* values, RowSums<T, kN>& sums) {
    RowSums<T, kN> local = sums;  // its address stays here, so that it can live in registers
    int64_t k = k0;
    const uint8_t* row = decoder.mask_row(m);
    for (; k + 64 <= k1; k += 64) {
        uint64_t mask;
        std::memcpy(&mask, row + k / 8, sizeof(mask));
        values = add_block<T, kN, true>(args, k, mask, values, local);
    }
    if (k < k1) add_block<T, kN, false>(args, k, decoder.mask(m, k), values, local);
    sums = local;
}

// Window layout: few enough entries to fetch their x one by one.
template <class T, int kN>
void add_listed(const Decoder<T>& decoder, const LinearArgs<T>& args, int64_t m, int64_t k0,
                int64_t k1, const uint8_t* places, const T* values, RowSums<T, kN>& sums) {
    for (int64_t k = k0; k < k1; k += kWindow) {
        const int count = decoder.count(m, k / kWindow);
        for (int e = 0; e < count; ++e) {
            for (int n = 0; n < kN; ++n) {
                sums.scalars[n][e % RowSums<T, kN>::kChains] +=
                    values[e] * args.x[n * args.weight.K + k + places[e]];
            }
        }
        places += count;
        values += count;
    }
}

// One row times kN columns: at batch 1 to 4 the row's stream should run on undisturbed.
template <class T, int kN>
void linear_row(const Decoder<T>& decoder, const LinearArgs<T>& args, int64_t m,
                RowBuffers<T>& buffers) {
    const Weight<T>& w = args.weight;
    RowSums<T, kN> sums;
    int64_t entry = w.row_start(m);
    for (int64_t k = 0; k < w.K; k += kChunk) {
        const int64_t end = smaller(w.K, k + kChunk);
        const int count = decoder.count_columns(m, k, end);
        decoder.prefetch(entry, count);
        decoder.values(m, entry, count, buffers.codes, buffers.values);
        if (w.layout == Layout::kMask) {
            add_masked(decoder, args, m, k, end, buffers.values, sums);
        } else {
            add_listed(decoder, args, m, k, end, decoder.places(entry), buffers.values, sums);
        }
        entry += count;
    }
    for (int n = 0; n < kN; ++n)
        args.y[n * w.M + m] = finish(sums.total(n), args.bias, m, args.relu);
}

template <class T>
void linear_small_batch(const LinearArgs<T>& args) {
    using RowFunction = void (*)(const Decoder<T>&, const LinearArgs<T>&, int64_t, RowBuffers<T>&);
    constexpr RowFunction kRow[] = {linear_row<T, 1>, linear_row<T, 2>, linear_row<T, 3>,
                                    linear_row<T, 4>};
    const RowFunction row = kRow[args.N - 1];
    const Decoder<T> decoder(args.weight, args.threads);
#pragma omp parallel num_threads(args.threads)
    {
        RowBuffers<T> buffers;
#pragma omp for schedule(dynamic, 32)
        for (int64_t m = 0; m < args.weight.M; ++m) row(decoder, args, m, buffers);
    }
}

constexpr int kBatchRows = 8;      // rows that share a slice of x while it is in L1
constexpr int kBatchColumns = 64;  // columns whose sums stay in L1

// kBatchRows rows times up to kBatchColumns columns, window by window.
template <class T>
void linear_tile(const Decoder<T>& decoder, const LinearArgs<T>& args, int64_t m0, int rows,
                 int64_t n0, int columns, Vec<T>* sums, T* dense, Entries<T>& buffer) {
    const Weight<T>& w = args.weight;
    int64_t cursors[kBatchRows];
    for (int r = 0; r < rows; ++r) cursors[r] = w.row_start(m0 + r);
    for (int i = 0; i < rows * columns; ++i) sums[i] = Vec<T>::zero();
    for (int64_t window = 0; window < w.windows(); ++window) {
        const int64_t k = window * kWindow;
        const int64_t left = w.K - k;
        for (int r = 0; r < rows; ++r) {
            cursors[r] += decoder.dense(m0 + r, window, cursors[r], buffer, dense);
            for (int n = 0; n < columns; ++n) {
                const T* x = args.x + (n0 + n) * w.K + k;
                Vec<T> sum = sums[r * columns + n];
                if (left >= kWindow) {
                    for (int i = 0; i < kWindow; i += Vec<T>::lanes) {
                        sum = fma(Vec<T>::load(dense + i), Vec<T>::load(x + i), sum);
                    }
                } else {
                    for (int64_t i = 0; i < left; i += Vec<T>::lanes) {
                        sum = fma(Vec<T>::load(dense + i),
                                  Vec<T>::load_partial(x + i, static_cast<int>(left - i)), sum);
                    }
                }
                sums[r * columns + n] = sum;
            }
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < columns; ++n) {
            args.y[(n0 + n) * w.M + m0 + r] =
                finish(sums[r * columns + n].sum(), args.bias, m0 + r, args.relu);
        }
    }
}

template <class T>
void linear_large_batch(const LinearArgs<T>& args) {
    const Decoder<T> decoder(args.weight, args.threads);
    const int64_t row_blocks = (args.weight.M + kBatchRows - 1) / kBatchRows;
    const int64_t column_blocks = (args.N + kBatchColumns - 1) / kBatchColumns;
    const Scratch scratch(args.threads, sizeof(Vec<T>) * kBatchRows * kBatchColumns);
#pragma omp parallel num_threads(args.threads)
    {
        Vec<T>* sums = static_cast<Vec<T>*>(scratch.of(omp_get_thread_num()));
        Entries<T> buffer;
        alignas(64) T dense[kWindow];
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t i = 0; i < row_blocks; ++i) {
            for (int64_t j = 0; j < column_blocks; ++j) {
                const int64_t m0 = i * kBatchRows, n0 = j * kBatchColumns;
                const int rows = static_cast<int>(smaller(args.weight.M - m0, int64_t{kBatchRows}));
                const int columns = static_cast<int>(smaller(args.N - n0, int64_t{kBatchColumns}));
                linear_tile(decoder, args, m0, rows, n0, columns, sums, dense, buffer);
            }
        }
    }
}

template <class T>
void linear_impl(const LinearArgs<T>& args) {
    if (args.N == 0 || args.weight.M == 0) return;
    if (args.N <= 4) {
        linear_small_batch(args);
    } else {
        linear_large_batch(args);
    }
}
