// Moves between an image and a tile of its im2col matrix: a window of rows k = (channel, ky, kx) by
// a few output pixels. Only a tile ever exists. A tile is cut into runs of pixels that share an
// image and an output row, so that borders are found once per run and not per pixel. Included
// inside an ISA's namespace, after Vec.

template <class T>
constexpr int kTilePixels = 4 * Vec<T>::lanes;

struct PixelRun {
    int64_t image;
    int64_t out_y, out_x;  // of the first pixel
    int first, length;     // place in the tile
};

struct PixelRuns {
    PixelRun runs[64];  // a tile has at most 64 pixels
    int count = 0;

    PixelRuns() = default;
    PixelRuns(const ConvShape& shape, int64_t pixel, int length) {
        const int64_t plane = shape.out_height * shape.out_width;
        int done = 0;
        while (done < length) {
            const int64_t p = pixel + done;
            PixelRun& run = runs[count++];
            run.image = p / plane;
            run.out_y = p % plane / shape.out_width;
            run.out_x = p % shape.out_width;
            run.first = done;
            run.length =
                static_cast<int>(smaller(shape.out_width - run.out_x, int64_t{length - done}));
            done += run.length;
        }
    }
};

// Where the pixels of a run read one k: `begin` .. `end` of its pixels fall inside the image row.
struct RunSource {
    int64_t offset;  // element of the run's first pixel, may lie outside
    int begin, end;

    RunSource(const ConvShape& s, const PixelRun& run, int64_t channel, int64_t ky, int64_t kx,
              int64_t stride_n, int64_t stride_c, int64_t stride_h, int64_t stride_w) {
        const int64_t y = run.out_y * s.stride_h - s.padding_top + ky * s.dilation_h;
        const int64_t x = run.out_x * s.stride_w - s.padding_left + kx * s.dilation_w;
        offset = run.image * stride_n + channel * stride_c + y * stride_h + x * stride_w;
        begin = end = 0;
        if (y < 0 || y >= s.height) return;
        const int64_t first = x >= 0 ? 0 : (-x + s.stride_w - 1) / s.stride_w;
        const int64_t past = x >= s.width ? 0 : (s.width - x + s.stride_w - 1) / s.stride_w;
        begin = static_cast<int>(smaller(first, int64_t{run.length}));
        end = static_cast<int>(larger(smaller(past, int64_t{run.length}), int64_t{begin}));
    }
};

// Visits k0 .. k0 + count with (k - k0, channel, ky, kx), channels counted over all groups.
template <class Visit>
void for_each_k(const ConvShape& s, int64_t group, int64_t k0, int64_t count, Visit visit) {
    int64_t kx = k0 % s.kernel_w;
    int64_t ky = k0 / s.kernel_w % s.kernel_h;
    int64_t channel = group * s.channels + k0 / (s.kernel_w * s.kernel_h);
    for (int64_t k = 0; k < count; ++k) {
        visit(k, channel, ky, kx);
        if (++kx < s.kernel_w) continue;
        kx = 0;
        if (++ky < s.kernel_h) continue;
        ky = 0;
        ++channel;
    }
}

// out[i] = in[i * step] for the pixels inside. A last vector may run over by up to a vector's
// length: what it overwrites is written later, except behind the last row, where kColumnSlack is
// left for it.
template <class T>
void copy_run(const T* in, int64_t step, const RunSource& source, T* out) {
    if (step == 1) {
        for (int i = source.begin; i < source.end; i += Vec<T>::lanes) {
            Vec<T>::load_partial(in + i, source.end - i).store(out + i);
        }
    } else {
        for (int i = source.begin; i < source.end; ++i) out[i] = in[i * step];
    }
}

template <class T>
constexpr int kColumnSlack = Vec<T>::lanes;

// columns[k][pixel] = x at (channel, ky, kx) of the pixel, zero in the padding and past the runs.
template <class T>
void gather_columns(const ConvShape& shape, const Image<const T>& x, const PixelRuns& runs,
                    int64_t group, int64_t k0, int64_t count, T* columns) {
    const PixelRun& last = runs.runs[runs.count - 1];
    const int length = last.first + last.length;
    for_each_k(shape, group, k0, count, [&](int64_t k, int64_t channel, int64_t ky, int64_t kx) {
        T* row = columns + k * kTilePixels<T>;
        for (int r = 0; r < runs.count; ++r) {
            const PixelRun& run = runs.runs[r];
            const RunSource source(shape, run, channel, ky, kx, x.stride_n, x.stride_c, x.stride_h,
                                   x.stride_w);
            T* out = row + run.first;
            for (int i = 0; i < source.begin; ++i) out[i] = T(0);
            copy_run(x.data + source.offset, shape.stride_w * x.stride_w, source, out);
            for (int i = source.end; i < run.length; ++i) out[i] = T(0);
        }
        for (int i = length; i < kTilePixels<T>; ++i) row[i] = T(0);
    });
}

// A 1x1 convolution without stride or padding takes pixels as they lie: one long row, few runs.
template <class T, class U>
ConvShape flattened(const ConvShape& shape, const Image<T>& x, const Image<U>& y) {
    const bool pointwise = shape.kernel_h == 1 && shape.kernel_w == 1 && shape.stride_h == 1 &&
                           shape.stride_w == 1 && shape.out_height == shape.height &&
                           shape.out_width == shape.width;
    if (!pointwise || x.stride_h != x.stride_w * shape.width ||
        y.stride_h != y.stride_w * shape.width) {
        return shape;
    }
    ConvShape flat = shape;
    flat.height = flat.out_height = 1;
    flat.width = flat.out_width = shape.height * shape.width;
    return flat;
}

// The transpose of gather_columns: adds each element to where it was read.
template <class T>
void scatter_columns(const ConvShape& shape, const T* columns, const PixelRuns& runs, int64_t group,
                     int64_t k0, int64_t count, const Image<T>& x) {
    for_each_k(shape, group, k0, count, [&](int64_t k, int64_t channel, int64_t ky, int64_t kx) {
        for (int r = 0; r < runs.count; ++r) {
            const PixelRun& run = runs.runs[r];
            const RunSource source(shape, run, channel, ky, kx, x.stride_n, x.stride_c, x.stride_h,
                                   x.stride_w);
            const T* in = columns + k * kTilePixels<T> + run.first;
            const int64_t step = shape.stride_w * x.stride_w;
            for (int i = source.begin; i < source.end; ++i)
                x.data[source.offset + i * step] += in[i];
        }
    });
}
