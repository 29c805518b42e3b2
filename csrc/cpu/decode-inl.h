// Turns a window of 128 positions of one row into entries (column, code, value) or into dense
// values. Included inside an ISA's namespace, after Vec, unpack_codes, Codebook and
// columns_of_mask; it therefore includes nothing itself.

// Entries of one window. The arrays are longer than a window because vector stores write whole
// vectors.
template <class T>
struct Entries {
    alignas(64) uint8_t columns[kWindow + 64];  // place in the window
    alignas(64) uint8_t codes[kWindow + 64];
    alignas(64) T values[kWindow + 64];
    int count;
};

template <class T>
class Decoder {
  public:
    // Every codebook is prepared for lookups once, before the threads that share it start.
    Decoder(const Weight<T>& weight, int threads)
        : w_(weight),
          first_(weight.codebook, weight.bits),
          memory_(1, weight.codebooks() == 1 ? 0 : sizeof(Codebook<T>) * weight.codebooks()),
          several_(static_cast<Codebook<T>*>(memory_.of(0))) {
        if (several_) prepare(threads);
    }

    // Index of the first entry of `window` in row m: what the row pointer says plus the entries
    // before it.
    int64_t cursor(int64_t m, int64_t window) const {
        int64_t entry = w_.row_start(m);
        for (int64_t i = 0; i < window; ++i) entry += count(m, i);
        return entry;
    }

    int count(int64_t m, int64_t window) const {
        if (w_.layout == Layout::kWindow) return w_.positions[m * w_.windows() + window];
        const int64_t k = window * kWindow;
        return __builtin_popcountll(mask(m, k)) + __builtin_popcountll(mask(m, k + 64));
    }

    // Entries in columns k0 .. k1 of row m; k0 starts a window.
    int count_columns(int64_t m, int64_t k0, int64_t k1) const {
        int total = 0;
        int64_t k = k0;
        if (w_.layout == Layout::kMask) {
            for (const uint8_t* row = mask_row(m); k + kWindow <= k1; k += kWindow) {
                uint64_t words[2];
                std::memcpy(words, row + k / 8, sizeof(words));
                total += __builtin_popcountll(words[0]) + __builtin_popcountll(words[1]);
            }
        }
        for (; k < k1; k += kWindow) total += count(m, k / kWindow);
        return total;
    }

    // Fills columns, codes and values; `entry` is the window's cursor.
    void entries(int64_t m, int64_t window, int64_t entry, Entries<T>& out) const {
        if (w_.layout == Layout::kWindow) {
            out.count = count(m, window);
            std::memcpy(out.columns, places(entry), out.count);
        } else {
            const int64_t k = window * kWindow;
            const int low = columns_of_mask(mask(m, k), 0, out.columns);
            out.count = low + columns_of_mask(mask(m, k + 64), 64, out.columns + low);
        }
        values(m, entry, out.count, out.codes, out.values);
    }

    // As `entries`, for callers that read out.codes: 8-bit codes are looked up in place otherwise.
    void entries_with_codes(int64_t m, int64_t window, int64_t entry, Entries<T>& out) const {
        entries(m, window, entry, out);
        if (w_.bits == 8) std::memcpy(out.codes, w_.codes + entry, out.count);
    }

    // Values of `count` entries of row m, from a cursor on. Both buffers are longer by 64 than the
    // count.
    void values(int64_t m, int64_t entry, int count, uint8_t* codes, T* values) const {
        const Codebook<T>& book = several_ ? several_[m / w_.group_size] : first_;
        if (w_.bits == 8) {
            book.lookup(w_.codes + entry, count, values);
        } else {
            unpack_codes(w_.codes, entry * w_.bits, w_.bits, count, codes);
            book.lookup(codes, count, values);
        }
    }

    // Fetches codes that come some chunks after these: the hardware stops at every page.
    void prefetch(int64_t entry, int count) const {
        constexpr int64_t kAhead = 8192;
        const uint8_t* next = w_.codes + entry * w_.bits / 8 + kAhead;
        for (int64_t i = 0; i < int64_t{count} * w_.bits / 8; i += 64) __builtin_prefetch(next + i);
    }

    // Writes kWindow values, zeros between the entries; returns the number of entries.
    int dense(int64_t m, int64_t window, int64_t entry, Entries<T>& buffer, T* dense) const {
        constexpr int lanes = Vec<T>::lanes;
        if (w_.layout == Layout::kWindow) {
            entries(m, window, entry, buffer);
            std::memset(dense, 0, kWindow * sizeof(T));
            for (int e = 0; e < buffer.count; ++e) dense[buffer.columns[e]] = buffer.values[e];
            return buffer.count;
        }
        buffer.count = count(m, window);
        values(m, entry, buffer.count, buffer.codes, buffer.values);
        const T* next = buffer.values;
        for (int k = 0; k < kWindow; k += 64) {
            const uint64_t word = mask(m, window * kWindow + k);
            for (int i = 0; i < 64; i += lanes) {
                const uint64_t part = word >> i & ((uint64_t{1} << lanes) - 1);
                Vec<T>::expand(next, part).store(dense + k + i);
                next += __builtin_popcountll(part);
            }
        }
        return buffer.count;
    }

    // Mask bits of columns k .. k + 63, k a multiple of 64; bits past the row's end belong to the
    // next row and are cleared.
    uint64_t mask(int64_t m, int64_t k) const {
        const int64_t left = w_.K - k;
        if (left <= 0) return 0;
        uint64_t word;
        std::memcpy(&word, mask_row(m) + k / 8, sizeof(word));
        return left >= 64 ? word : word & ((uint64_t{1} << left) - 1);
    }

    const uint8_t* mask_row(int64_t m) const { return w_.positions + m * w_.mask_row_bytes(); }

    // Window layout: the place in its window of entry `entry` and those after it.
    const uint8_t* places(int64_t entry) const {
        return w_.positions + w_.M * w_.windows() + entry;
    }

  private:
    void prepare(int threads) {
        const int64_t count = w_.codebooks();
#pragma omp parallel for num_threads(threads) if (count > 64)
        for (int64_t g = 0; g < count; ++g)
            new (several_ + g) Codebook<T>(w_.codebook + (g << w_.bits), w_.bits);
    }

    const Weight<T>& w_;
    Codebook<T> first_;  // at hand: the only one costs neither memory nor a division
    Scratch memory_;
    Codebook<T>* several_;  // [codebooks], null when there is one
};

// How many partial sums of a gradient [codebooks, 2^bits] are kept, out of `most` pieces of work,
// for `copies` of it each. The number follows from the sizes alone, and so do the sums: they are
// the same for any number of threads. One codebook has a sum for every piece; with many, memory
// is bounded, and past 8 MB of sums two threads work at a time.
template <class T>
int64_t partial_sums(const Weight<T>& weight, int64_t most, int64_t copies) {
    constexpr int64_t kLeast = 2, kBytes = 16 << 20;
    if (weight.codebooks() == 1) return most;
    const int64_t bytes = copies * static_cast<int64_t>(sizeof(double)) << weight.bits;
    return smaller(most, larger(kLeast, kBytes / larger(bytes, int64_t{1})));
}
