// Which thread runs next, of those that are ready, and in which order blocks run. The order is
// deterministic, so that what it brings to light can be brought to light again.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

#include "machine.h"

namespace emulated {

class Schedule {
  public:
    // "ascending" (or null), "descending", or a seed of a random order; false where it is none.
    bool set_order(const char* text) {
        order_ = kAscending;
        if (text == nullptr || std::strcmp(text, "ascending") == 0) return true;
        order_ = kDescending;
        if (std::strcmp(text, "descending") == 0) return true;
        order_ = kRandom;
        char* end = nullptr;
        state_ = std::strtoull(text, &end, 10) * 2 + 1;  // never 0
        for (int i = 0; i < 8; ++i) random();            // until small seeds differ in all bits
        return *text >= '0' && *text <= '9' && *end == '\0';
    }

    std::vector<unsigned> blocks(size_t count) {
        std::vector<unsigned> numbers(count);
        std::iota(numbers.begin(), numbers.end(), 0u);
        if (order_ == kDescending) std::reverse(numbers.begin(), numbers.end());
        if (order_ == kRandom)
            for (size_t i = count; i > 1; --i) std::swap(numbers[i - 1], numbers[random() % i]);
        return numbers;
    }

    // No thread is ready, of so many.
    void start(int threads) {
        threads_ = threads;
        for (uint64_t& word : ready_) word = 0;
    }

    void wake(int begin, int end) {
        for (int i = begin; i < end; ++i) ready_[i / 64] |= uint64_t{1} << (i % 64);
        cursor_ = order_ == kDescending ? end - 1 : begin;
    }

    void block(int thread) { ready_[thread / 64] &= ~(uint64_t{1} << (thread % 64)); }

    // The next ready thread, or -1.
    int pick() {
        int next;
        if (order_ == kDescending) {
            next = last_until(cursor_);
            if (next < 0) next = last_until(kMaxThreads - 1);
            cursor_ = next > 0 ? next - 1 : kMaxThreads - 1;
        } else {
            if (order_ == kRandom) cursor_ = static_cast<int>(random() % threads_);
            next = first_from(cursor_);
            if (next < 0) next = first_from(0);
            cursor_ = next + 1 < kMaxThreads ? next + 1 : 0;
        }
        return next;
    }

  private:
    uint64_t random() {  // xorshift64*
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return state_ * 2685821657736338717u >> 32;
    }

    int first_from(int from) const {
        for (int word = from / 64; word < kMaxThreads / 64; ++word) {
            uint64_t bits = ready_[word];
            if (word == from / 64) bits &= ~uint64_t{0} << (from % 64);
            if (bits != 0) return word * 64 + __builtin_ctzll(bits);
        }
        return -1;
    }

    int last_until(int from) const {
        for (int word = from / 64; word >= 0; --word) {
            uint64_t bits = ready_[word];
            if (word == from / 64) bits &= ~uint64_t{0} >> (63 - from % 64);
            if (bits != 0) return word * 64 + 63 - __builtin_clzll(bits);
        }
        return -1;
    }

    enum { kAscending, kDescending, kRandom } order_ = kAscending;
    uint64_t state_ = 1;
    uint64_t ready_[kMaxThreads / 64] = {};
    int threads_ = 0;
    int cursor_ = 0;  // where the search goes on
};

}  // namespace emulated
