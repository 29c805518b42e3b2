// Scratch memory for a parallel region, taken before it starts: an allocation that fails inside
// an OpenMP region could not be thrown to the caller. For no bytes nothing is taken, and `of` is
// null.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace placekern {

class Scratch {
  public:
    Scratch(int threads, size_t bytes_per_thread)
        : stride_((bytes_per_thread + kAlignment - 1) / kAlignment * kAlignment),
          data_(stride_ == 0 ? nullptr
                             : std::aligned_alloc(kAlignment, stride_ * threads + kAlignment)) {
        if (data_ == nullptr && stride_ != 0) throw std::bad_alloc();
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    void* of(int thread) const { return static_cast<char*>(data_) + stride_ * thread; }

  private:
    static constexpr size_t kAlignment =
        4096;  // a page: no two threads share a cache line or a prefetch pair
    size_t stride_;
    void* data_;
};

// Cuts one thread's scratch into arrays; called twice with the same requests, first with null to
// learn the size.
class Carver {
  public:
    explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

    template <class U>
    U* take(size_t count) {
        U* array = base_ == nullptr ? nullptr : reinterpret_cast<U*>(base_ + used_);
        used_ += (count * sizeof(U) + 63) / 64 * 64;
        return array;
    }
    size_t used() const { return used_; }

  private:
    char* base_;
    size_t used_ = 0;
};

}  // namespace placekern
