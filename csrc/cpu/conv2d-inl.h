// Sparse-quantized convolution over tiles of a few pixels, whose im2col slice (128 rows k) stays in
// L1 while a block of output channels passes over it. A block is decoded once for several tiles,
// and then
//
//   direct: one multiply-add per non-zero and pixel; costs time with the density;
//   decode: the block is spread to dense values in L1 and multiplied as a small dense matrix,
//   several
//           rows per loaded column; costs the same at any density.
//
// The order of the additions depends on the shape only, never on how tiles are dealt to threads.

constexpr int kMostTileRows = 512;  // output channels whose sums one task keeps
constexpr int kTaskTiles = 4;       // tiles that share one decoding, at most
constexpr int kBlockRows = 32;  // output channels decoded at a time; their entries fit in L1 too

template <class T>
void add_entries(const Entries<T>& entries, const T* columns, T* sums) {
    constexpr int kTile = kTilePixels<T>;
    constexpr int lanes = Vec<T>::lanes;
    // Two sets of four sums: a fused multiply-add takes longer than four of them take to issue.
    Vec<T> even[4], odd[4];
    for (int i = 0; i < 4; ++i) {
        even[i] = Vec<T>::load(sums + i * lanes);
        odd[i] = Vec<T>::zero();
    }
    int e = 0;
    for (; e + 1 < entries.count; e += 2) {
        const Vec<T> first = Vec<T>::broadcast(entries.values[e]);
        const Vec<T> second = Vec<T>::broadcast(entries.values[e + 1]);
        const T* first_row = columns + entries.columns[e] * kTile;
        const T* second_row = columns + entries.columns[e + 1] * kTile;
        for (int i = 0; i < 4; ++i)
            even[i] = fma(first, Vec<T>::load(first_row + i * lanes), even[i]);
        for (int i = 0; i < 4; ++i)
            odd[i] = fma(second, Vec<T>::load(second_row + i * lanes), odd[i]);
    }
    if (e < entries.count) {
        const Vec<T> first = Vec<T>::broadcast(entries.values[e]);
        const T* first_row = columns + entries.columns[e] * kTile;
        for (int i = 0; i < 4; ++i)
            even[i] = fma(first, Vec<T>::load(first_row + i * lanes), even[i]);
    }
    for (int i = 0; i < 4; ++i) (even[i] + odd[i]).store(sums + i * lanes);
}

// kRows rows of dense values times a slice of `count` columns k, added to their sums.
template <class T, int kRows>
void add_dense(const T* dense, const T* columns, int count, T* sums) {
    constexpr int kTile = kTilePixels<T>;
    constexpr int kVecs = kDenseVecs;
    constexpr int lanes = Vec<T>::lanes;
    for (int v0 = 0; v0 < 4; v0 += kVecs) {
        Vec<T> acc[kRows][kVecs];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) {
                acc[r][v] = Vec<T>::load(sums + r * kTile + (v0 + v) * lanes);
            }
        }
        for (int k = 0; k < count; ++k) {
            Vec<T> x[kVecs];
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) {
                x[v] = Vec<T>::load(columns + k * kTile + (v0 + v) * lanes);
            }
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const Vec<T> value = Vec<T>::broadcast(dense[r * kWindow + k]);
#pragma GCC unroll 4
                for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(value, x[v], acc[r][v]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) {
                acc[r][v].store(sums + r * kTile + (v0 + v) * lanes);
            }
        }
    }
}

template <class T>
void add_dense_rows(const T* dense, int rows, const T* columns, int count, T* sums) {
    constexpr int kHalf = kDenseRows / 2;
    constexpr int kTile = kTilePixels<T>;
    int r = 0;
    for (; r + kDenseRows <= rows; r += kDenseRows) {
        add_dense<T, kDenseRows>(dense + r * kWindow, columns, count, sums + r * kTile);
    }
    for (; r + kHalf <= rows; r += kHalf) {
        add_dense<T, kHalf>(dense + r * kWindow, columns, count, sums + r * kTile);
    }
    for (; r < rows; ++r) {
        add_dense<T, 1>(dense + r * kWindow, columns, count, sums + r * kTile);
    }
}

// Measured crossover (benchmarks/bench_conv2d.py): below it the multiply-adds saved outweigh the
// loads that a dense block shares between its rows.
template <class T>
bool wants_decode(const Conv2dArgs<T>& args) {
    if (args.way != Way::kAuto) return args.way == Way::kDecode;
    const Weight<T>& w = args.weight;
    return static_cast<double>(w.row_start(w.M)) > kDecodeDensity * w.M * w.K;
}

// Bias, ReLU and the way into y, for rows m0 .. m0 + rows of one tile.
template <class T>
void store_tile(const Conv2dArgs<T>& args, const PixelRuns& runs, int64_t m0, int64_t rows,
                T* sums) {
    constexpr int kTile = kTilePixels<T>;
    for (int64_t r = 0; r < rows; ++r) {
        for (int i = 0; i < kTile; ++i) {
            sums[r * kTile + i] = finish(sums[r * kTile + i], args.bias, m0 + r, args.relu);
        }
    }
    for (int j = 0; j < runs.count; ++j) {
        const PixelRun& run = runs.runs[j];
        T* y = args.y.data + run.image * args.y.stride_n + m0 * args.y.stride_c +
               run.out_y * args.y.stride_h + run.out_x * args.y.stride_w;
        if (args.y.stride_c == 1) {
            for (int i = 0; i < run.length; ++i) {
                for (int64_t r = 0; r < rows; ++r)
                    y[i * args.y.stride_w + r] = sums[r * kTile + run.first + i];
            }
        } else {
            for (int64_t r = 0; r < rows; ++r) {
                for (int i = 0; i < run.length; ++i) {
                    y[r * args.y.stride_c + i * args.y.stride_w] = sums[r * kTile + run.first + i];
                }
            }
        }
    }
}

template <class T>
struct Conv2dScratch {
    T* columns;           // [kTaskTiles, kWindow, kTilePixels]
    T* sums;              // [kTaskTiles, rows, kTilePixels]
    int64_t* cursors;     // [rows]
    Entries<T>* entries;  // [kBlockRows]
    T* dense;             // [kBlockRows, kWindow]

    Conv2dScratch(Carver& carver, int64_t rows)
        : columns(carver.take<T>(kTaskTiles * kWindow * kTilePixels<T> + kColumnSlack<T>)),
          sums(carver.take<T>(kTaskTiles * rows * kTilePixels<T>)),
          cursors(carver.take<int64_t>(rows)),
          entries(carver.take<Entries<T>>(kBlockRows)),
          dense(carver.take<T>(kBlockRows * kWindow)) {}
};

// Rows m0 .. m0 + rows of one group, over up to `task_tiles` tiles from `pixel` on.
template <class T>
void conv2d_task(const Decoder<T>& decoder, const Conv2dArgs<T>& args, int64_t group, int64_t m0,
                 int64_t rows, int64_t pixel, int task_tiles, bool decode,
                 const Conv2dScratch<T>& s) {
    constexpr int kTile = kTilePixels<T>;
    const Weight<T>& w = args.weight;
    const int64_t left = args.shape.pixels() - pixel;
    const int tiles = static_cast<int>(smaller((left + kTile - 1) / kTile, int64_t{task_tiles}));
    PixelRuns runs[kTaskTiles];
    for (int t = 0; t < tiles; ++t) {
        const int64_t length = smaller(left - t * kTile, int64_t{kTile});
        runs[t] = PixelRuns(args.shape, pixel + t * kTile, static_cast<int>(length));
    }
    for (int64_t r = 0; r < rows; ++r) s.cursors[r] = w.row_start(m0 + r);
    std::memset(s.sums, 0, sizeof(T) * tiles * rows * kTile);
    for (int64_t window = 0; window < w.windows(); ++window) {
        const int64_t k0 = window * kWindow;
        const int width = static_cast<int>(smaller(w.K - k0, int64_t{kWindow}));
        for (int t = 0; t < tiles; ++t) {
            gather_columns(args.shape, args.x, runs[t], group, k0, width,
                           s.columns + t * kWindow * kTile);
        }
        for (int64_t block = 0; block < rows; block += kBlockRows) {
            const int count = static_cast<int>(smaller(rows - block, int64_t{kBlockRows}));
            for (int r = 0; r < count; ++r) {
                int64_t& cursor = s.cursors[block + r];
                if (decode) {
                    cursor += decoder.dense(m0 + block + r, window, cursor, s.entries[r],
                                            s.dense + r * kWindow);
                } else {
                    decoder.entries(m0 + block + r, window, cursor, s.entries[r]);
                    cursor += s.entries[r].count;
                }
            }
            for (int t = 0; t < tiles; ++t) {
                const T* columns = s.columns + t * kWindow * kTile;
                T* sums = s.sums + (t * rows + block) * kTile;
                if (decode) {
                    add_dense_rows(s.dense, count, columns, width, sums);
                } else {
                    for (int r = 0; r < count; ++r) {
                        add_entries(s.entries[r], columns, sums + r * kTile);
                    }
                }
            }
        }
    }
    for (int t = 0; t < tiles; ++t) store_tile(args, runs[t], m0, rows, s.sums + t * rows * kTile);
}

template <class T>
void conv2d_impl(const Conv2dArgs<T>& given) {
    Conv2dArgs<T> args = given;
    args.shape = flattened(given.shape, given.x, given.y);
    constexpr int kTile = kTilePixels<T>;
    const Weight<T>& w = args.weight;
    const int64_t groups = args.shape.groups;
    const int64_t group_rows = w.M / groups;
    const int64_t tiles = (args.shape.pixels() + kTile - 1) / kTile;
    if (tiles == 0 || group_rows == 0) return;

    // Every thread should have work. Fewer tiles a task cost decoding again, fewer rows a task cost
    // gathering again, which is dearer: so rows are cut only when tiles run out.
    const int64_t wanted = args.threads == 1 ? 1 : 2 * args.threads;
    const int64_t fair = (tiles * groups + wanted - 1) / wanted;
    const int task_tiles = static_cast<int>(smaller(fair, int64_t{kTaskTiles}));
    const int64_t tasks = (tiles + task_tiles - 1) / task_tiles;
    int64_t rows = smaller(group_rows, int64_t{kMostTileRows});
    while (rows > kBlockRows && tasks * groups * ((group_rows + rows - 1) / rows) < args.threads) {
        rows = (rows + 1) / 2;
    }
    const int64_t row_blocks = (group_rows + rows - 1) / rows;
    const bool decode = wants_decode(args);

    Carver measure(nullptr);
    Conv2dScratch<T>(measure, rows);
    const Scratch scratch(args.threads, measure.used());
    const Decoder<T> decoder(w, args.threads);
#pragma omp parallel num_threads(args.threads)
    {
        Carver carver(scratch.of(omp_get_thread_num()));
        const Conv2dScratch<T> s(carver, rows);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks * groups * row_blocks; ++task) {
            const int64_t group = task / row_blocks % groups;
            const int64_t block = task % row_blocks * rows;
            const int64_t pixel = task / row_blocks / groups * task_tiles * kTile;
            conv2d_task(decoder, args, group, group * group_rows + block,
                        smaller(rows, group_rows - block), pixel, task_tiles, decode, s);
        }
    }
}
