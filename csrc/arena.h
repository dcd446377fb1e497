// Scratch memory of one call. A launcher plans first: each phase takes the pieces that it needs, and learns their addresses
// when the arena is committed, in one allocation. So the size of a workspace and its layout are said once, in one place.
//
//   Arena arena;
//   const Piece<float> sums = arena.take<float>(rows * columns);
//   arena.commit(allocator);
//   kernel<<<...>>>(sums);
//
// Phases whose lives do not overlap share memory: mark(), the first phase's pieces, rewind(mark), the second's.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace rat {

// Where the memory comes from: the torch side of a call (csrc/ops). It is aligned to 256 bytes, uninitialised, and lives
// until the launcher has returned; on a GPU until the work that the launcher queued on its stream is done.
struct Allocator {
  void* (*allocate)(void* context, size_t bytes);
  void* context;
};

class Arena;

// Elements inside an arena. Copies of it stand for the same memory. A default one is null.
template <class T>
class Piece {
 public:
  Piece() = default;
  Piece(const Arena* arena, size_t offset) : arena_(arena), offset_(offset) {}
  bool taken() const { return arena_ != nullptr; }
  T* get() const;
  operator T*() const { return get(); }  // NOLINT: kernels take plain pointers

 private:
  const Arena* arena_ = nullptr;
  size_t offset_ = 0;
};

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // `count` elements, 256-byte aligned. A piece of none is legal and has an address.
  template <class T>
  Piece<T> take(int64_t count) {
    const size_t offset = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    most_ = std::max({most_, used_, kAlignment});
    return Piece<T>(this, offset);
  }

  // Bytes that commit() will ask for.
  size_t bytes() const { return most_; }

  size_t mark() const { return used_; }
  void rewind(size_t mark) { used_ = mark; }

  // Allocates everything that was taken. Nothing is allocated where nothing was.
  void commit(const Allocator& allocator) {
    if (most_ > 0) base_ = static_cast<char*>(allocator.allocate(allocator.context, most_));
  }

  void* address(size_t offset) const {
    if (base_ == nullptr)
      throw std::logic_error("rat_ext: a piece of scratch memory is used before its arena is committed");
    return base_ + offset;
  }

 private:
  static constexpr size_t kAlignment = 256;
  char* base_ = nullptr;
  size_t used_ = 0;
  size_t most_ = 0;
};

template <class T>
T* Piece<T>::get() const {
  return arena_ ? static_cast<T*>(arena_->address(offset_)) : nullptr;
}

}  // namespace rat
