// Zeroed memory from the system, and scratch buffers that grow.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <utility>

namespace tokenswift {

// A memory mapping of its own. It is zero until written, and taken from the system page by page, in large pages where
// possible. The destructor gives it back. The constructor throws std::bad_alloc.
class Mapping {
 public:
  Mapping() = default;
  explicit Mapping(size_t bytes);
  Mapping(Mapping&& other) noexcept { swap(other); }
  Mapping& operator=(Mapping&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Mapping();

  char* data() const { return data_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  void swap(Mapping& other) {
    std::swap(data_, other.data_);
    std::swap(base_, other.base_);
    std::swap(mapped_, other.mapped_);
  }

  char* data_ = nullptr;
  char* base_ = nullptr;
  size_t mapped_ = 0;
};

// A scratch buffer of at least `count` elements, aligned for vectors. Growing loses its content.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t count) { reserve(count); }
  Buffer(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  ~Buffer() { std::free(data_); }

  T* reserve(size_t count) {
    if (count > count_) {
      std::free(data_);
      count_ = 0;
      const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      if (!data_) throw std::bad_alloc();
      count_ = count;
    }
    return data_;
  }

  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

}  // namespace tokenswift
