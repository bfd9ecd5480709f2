#include "engine/memory.h"

#include <sys/mman.h>

#include <cstdint>

namespace tokenswift {

constexpr size_t large_page = size_t(2) << 20;

Mapping::Mapping(size_t bytes) {
  const bool large = bytes >= large_page;
  mapped_ = bytes + (large ? large_page : 0);
  void* base = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  base_ = data_ = static_cast<char*>(base);
  if (large) {
    data_ += (large_page - reinterpret_cast<uintptr_t>(base_) % large_page) % large_page;
#ifdef MADV_HUGEPAGE
    madvise(data_, bytes / large_page * large_page, MADV_HUGEPAGE);
#endif
  }
}

Mapping::~Mapping() {
  if (base_) munmap(base_, mapped_);
}

}  // namespace tokenswift
