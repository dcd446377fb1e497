// Copies rows that do not start at multiples of 16 bytes, which kernels could not read in vectors, into contiguous memory. All
// rows of a call that need it go in one launch.
//
// Bytes: each element is read and written once. Arithmetic is on bytes, so that one kernel serves elements of two and of four.
//
// A thread makes pieces of 16 bytes of the target. The 16 bytes of a piece lie in one or two aligned blocks of 16 bytes of the
// source. It loads those, the second out of the first-level cache as a rule, since the next thread loads it as well, and shifts
// the piece out of their eight words. So source addresses of any alignment take the same loads. Blocks hold bytes beside the
// row's own too. They may be read where they lie between the first and the last byte of the view, hence in the caller's memory.
// The pieces at its two ends are read two bytes at a time.
//
// Where a piece lies is counted in four digits: the piece of the row, and the indices of the row, innermost first. A thread
// divides for its first piece alone, and adds the digits of its stride from there on.
#include <algorithm>
#include <cstddef>

#include "host/kernel_table.h"
#include "host/launch.h"
#include "phases.h"

namespace rat::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kFlight = 4;  // pieces of a thread whose loads are under way at once: up to 128 bytes
constexpr int kRounds = 2;  // so often
constexpr uint32_t kBlockPieces = kThreads * kFlight * kRounds;
constexpr int kMostCopies = 8;                     // of a launch; a backward has up to seven tensors of rows
constexpr int64_t kMostMerged = int64_t{1} << 30;  // two digits of such a size add up in 32 bits

// A number of pieces in the digits of a copy.
struct Digits {
  uint32_t column;  // piece of the row
  uint32_t inner, middle;
  int64_t outer;
};

// Sizes and strides after the dimensions that can be merged were: often a row is a whole token, or more.
struct Copy {
  const char* source;
  const char* source_end;
  char* target;
  int64_t pieces;                                  // of the target
  uint32_t row_pieces, inner, middle;              // sizes; the outermost dimension needs no limit
  int64_t inner_bytes, middle_bytes, outer_bytes;  // strides
  Digits step;                                     // kThreads pieces
  uint32_t first_block;
};

struct Copies {
  Copy copy[kMostCopies];
  int count;
};

__host__ __device__ __forceinline__ Digits digits_of(const Copy& p, uint64_t pieces) {
  const uint64_t row = pieces / p.row_pieces, middle_row = row / p.inner, outer = middle_row / p.middle;
  return {static_cast<uint32_t>(pieces - row * p.row_pieces), static_cast<uint32_t>(row - middle_row * p.inner),
          static_cast<uint32_t>(middle_row - outer * p.middle), static_cast<int64_t>(outer)};
}

__device__ __forceinline__ void add_step(Digits& at, const Copy& p) {
  at.column += p.step.column;
  const bool next_row = at.column >= p.row_pieces;
  at.column -= next_row ? p.row_pieces : 0;
  at.inner += p.step.inner + (next_row ? 1 : 0);
  const bool next_middle = at.inner >= p.inner;
  at.inner -= next_middle ? p.inner : 0;
  at.middle += p.step.middle + (next_middle ? 1 : 0);
  const bool next_outer = at.middle >= p.middle;
  at.middle -= next_outer ? p.middle : 0;
  at.outer += p.step.outer + (next_outer ? 1 : 0);
}

__device__ __forceinline__ uint64_t address_of(const Digits& at, const Copy& p) {
  return reinterpret_cast<uint64_t>(p.source) + at.outer * p.outer_bytes + at.middle * p.middle_bytes +
         at.inner * p.inner_bytes + uint64_t{at.column} * 16;
}

__device__ __forceinline__ void load_block(uint32_t (&word)[8], int first, uint64_t at) {
  const uint4 x = __ldg(reinterpret_cast<const uint4*>(at));
  word[first] = x.x;
  word[first + 1] = x.y;
  word[first + 2] = x.z;
  word[first + 3] = x.w;
}

// Loads what the piece at `at` lies in, and returns how many bytes after the first of `word` it begins: an even number below 16.
__device__ __forceinline__ uint32_t load_piece(uint32_t (&word)[8], uint64_t at, const Copy& p) {
  const uint32_t shift = static_cast<uint32_t>(at) & 15;
  const uint64_t block = at - shift;
  if (block < reinterpret_cast<uint64_t>(p.source) || block + 32 > reinterpret_cast<uint64_t>(p.source_end)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned short* half = reinterpret_cast<const unsigned short*>(at) + 2 * i;
      word[i] = __ldg(half) | static_cast<uint32_t>(__ldg(half + 1)) << 16;
    }
    return 0;
  }
  load_block(word, 0, block);
  if (shift != 0) load_block(word, 4, block + 16);
  return shift;
}

__device__ __forceinline__ uint4 shifted(const uint32_t (&word)[8], uint32_t shift) {
  uint32_t x[6], y[5];
#pragma unroll
  for (int i = 0; i < 6; ++i) x[i] = shift & 8 ? word[i + 2] : word[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) y[i] = shift & 4 ? x[i + 1] : x[i];
  const uint32_t bits = (shift & 2) * 8;
  return make_uint4(__funnelshift_r(y[0], y[1], bits), __funnelshift_r(y[1], y[2], bits),
                    __funnelshift_r(y[2], y[3], bits), __funnelshift_r(y[3], y[4], bits));
}

__global__ void __launch_bounds__(kThreads) align_rows_kernel(const __grid_constant__ Copies copies) {
  int which = 0;
  while (which + 1 < copies.count && blockIdx.x >= copies.copy[which + 1].first_block) ++which;
  const Copy& p = copies.copy[which];
  const int64_t first = static_cast<int64_t>(blockIdx.x - p.first_block) * kBlockPieces;
  const int64_t left = p.pieces - first;
  const uint32_t count = left < kBlockPieces ? static_cast<uint32_t>(left) : kBlockPieces;
  uint4* const target = reinterpret_cast<uint4*>(p.target) + first;
  Digits at = digits_of(p, first + threadIdx.x);

#pragma unroll 1
  for (uint32_t from = threadIdx.x; from < count; from += kThreads * kFlight) {
    uint32_t word[kFlight][8] = {};
    uint32_t shift[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      if (from + i * kThreads < count) shift[i] = load_piece(word[i], address_of(at, p), p);
      add_step(at, p);
    }
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const uint32_t piece = from + i * kThreads;
      if (piece < count) target[piece] = shifted(word[i], shift[i]);
    }
  }
}

// The blocks of a copy begin at `first_block`.
Copy plan(const RowCopy& x, uint32_t first_block) {
  struct Dimension {
    int64_t size, stride;
  };
  Dimension kept[3];
  int count = 0;
  int64_t row = x.row, last = 0;
  // From the innermost one outwards. One of a single index adds nothing; one that goes on where the last one ends is part of it.
  for (int d = 2; d >= 0; --d) {
    if (x.sizes[d] == 1) continue;
    last += (x.sizes[d] - 1) * x.strides[d];
    int64_t& size = count == 0 ? row : kept[count - 1].size;
    const int64_t stride = count == 0 ? 1 : kept[count - 1].stride;
    if (x.strides[d] == size * stride && size <= kMostMerged / x.sizes[d]) {
      size *= x.sizes[d];
    } else {
      kept[count++] = {x.sizes[d], x.strides[d]};
    }
  }
  // The outermost one that is left is the one without a limit.
  const Dimension one = {1, 0};
  const Dimension outer = count > 0 ? kept[count - 1] : one, inner = count > 1 ? kept[0] : one;
  const Dimension middle = count > 2 ? kept[1] : one;
  const int64_t bytes = x.element_bytes;
  Copy c{};
  c.source = static_cast<const char*>(x.source);
  c.source_end = c.source + (last + x.row) * bytes;
  c.target = static_cast<char*>(x.target);
  c.row_pieces = static_cast<uint32_t>(row * bytes / 16);
  c.middle = static_cast<uint32_t>(middle.size);
  c.inner = static_cast<uint32_t>(inner.size);
  c.pieces = outer.size * middle.size * inner.size * c.row_pieces;
  c.inner_bytes = inner.stride * bytes;
  c.middle_bytes = middle.stride * bytes;
  c.outer_bytes = outer.stride * bytes;
  c.step = digits_of(c, kThreads);
  c.first_block = first_block;
  return c;
}

}  // namespace

void align_rows(const RowCopy* copies, size_t count, void* stream) {
  for (size_t from = 0; from < count; from += kMostCopies) {
    Copies p{};
    p.count = static_cast<int>(std::min<size_t>(kMostCopies, count - from));
    int64_t blocks = 0;
    for (int i = 0; i < p.count; ++i) {
      p.copy[i] = plan(copies[from + i], grid_x(blocks, "align_rows"));
      blocks += ceil_div(p.copy[i].pieces, kBlockPieces);
    }
    align_rows_kernel<<<grid_x(blocks, "align_rows"), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    check_launch("align_rows");
  }
}

KernelList align_rows_kernels() {
  static const KernelTable table = [] {
    KernelTable t;
    t.add("align_rows", align_rows_kernel);
    return t;
  }();
  return table.list();
}

}  // namespace rat::cuda
