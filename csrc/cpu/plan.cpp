#include "plan.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <string>
#include <utility>

#include "../arena.h"
#include "../wrong_value.h"

namespace rat::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }
size_t at(int64_t i) { return static_cast<size_t>(i); }

size_t acc_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// An arena whose pieces become plain pointers when the memory is there: the files of the instruction sets see those alone.
class Layout {
 public:
  template <class T>
  void take(T*& pointer, int64_t elements, size_t element) {
    void** const to = reinterpret_cast<void**>(&pointer);
    pieces_.emplace_back(arena_.take<char>(elements * static_cast<int64_t>(element)), to);
  }
  void commit(const Allocator& allocator) {
    arena_.commit(allocator);
    for (const auto& [piece, pointer] : pieces_) *pointer = piece;
  }

 private:
  Arena arena_;
  std::vector<std::pair<Piece<char>, void**>> pieces_;
};

void take_scratch(Workspace& w, Layout& layout, const Plan& plan, size_t acc) {
  const int64_t elements = (kRowBuffers + kColumnBuffers) * kTile * plan.padded_dim + kScoreBuffers * kKeys * kTile +
                           kKeyBuffers * kKeys * plan.padded_dim + kVectorBuffers * 256;
  w.workers = std::max(1, num_threads());
  w.scratch_bytes = (at(elements) * acc + 63) / 64 * 64;
  layout.take(w.scratch, w.workers, w.scratch_bytes);
}

void take_carries(Carries& c, Layout& layout, const Plan& plan, int64_t heads, bool values, bool product, size_t acc) {
  if (!plan.segmented) return;
  const int64_t elements = plan.all_tiles() * heads * plan.padded_dim;
  layout.take(c.k, elements, acc);
  if (values) layout.take(c.v, elements, acc);
  if (product) layout.take(c.product, elements, acc);
}

struct Job {
  std::atomic<int64_t> next{0};
  int64_t tasks;
  Task task;
  void* context;
};

}  // namespace

Plan::Plan(const Sizes& size, bool has_gate, const int32_t* entry)
    : sequences(size.sequences),
      chunk_size(size.chunk_size),
      reset(has_gate ? size.chunk_size : 1),
      segmented(has_gate && size.chunk_size > kTile),
      padded_dim(ceil_div(size.head_dim, kPad) * kPad),
      packed_(size.cu_seqlens != nullptr) {
  if (chunk_size > kTile) {
    segments_ = ceil_div(chunk_size, kTile);
    unit_ = ceil_div(chunk_size, segments_);  // segments of one length but for the last, which is never empty
  } else {
    unit_ = kTile / chunk_size * chunk_size;
  }
  const auto fail = [](const std::string& what, const std::string& expected, int64_t got) {
    throw WrongValue(what, expected, std::to_string(got));
  };
  const int32_t* cu = size.cu_seqlens;
  if (cu && cu[0] != 0) fail("cu_seqlens[0]", "0", cu[0]);
  begin_.resize(at(sequences));
  length_.resize(at(sequences));
  start_.resize(at(sequences));
  first_tile_.resize(at(sequences) + 1);
  key_row_.resize(at(sequences) + 1);
  for (int64_t n = 0; n < sequences; ++n) {
    const std::string index = "[" + std::to_string(n) + "]";
    if (cu && cu[n + 1] < cu[n]) {
      fail("cu_seqlens[" + std::to_string(n + 1) + "]", "at least cu_seqlens" + index + " = " + std::to_string(cu[n]),
           cu[n + 1]);
    }
    if (size.lengths && size.lengths[n] < 0) fail("lengths" + index, "0 or more", size.lengths[n]);
    begin_[at(n)] = cu ? cu[n] : 0;
    length_[at(n)] = entry && entry[n] < 0 ? 0 : cu ? cu[n + 1] - cu[n] : size.tokens;
    start_[at(n)] = size.lengths ? size.lengths[n] : 0;
    const int64_t total = start_[at(n)] + length_[at(n)];
    if (size.lengths && total > std::numeric_limits<int32_t>::max()) {
      fail("lengths" + index, "at most 2147483647 tokens after this call", total);
    }
    int64_t tiles = 0;
    if (length_[at(n)] > 0) tiles = tile_number(total - 1) - tile_number(start_[at(n)]) + 1;
    first_tile_[at(n) + 1] = first_tile_[at(n)] + tiles;
    key_row_[at(n) + 1] = key_row_[at(n)] + total / chunk_size;
  }
  if (cu && cu[sequences] != size.tokens) {
    fail("cu_seqlens[" + std::to_string(sequences) + "]", "the number of tokens, " + std::to_string(size.tokens),
         cu[sequences]);
  }
}

int64_t Plan::begin(int64_t n) const { return begin_[at(n)]; }
int64_t Plan::length(int64_t n) const { return length_[at(n)]; }
int64_t Plan::start(int64_t n) const { return start_[at(n)]; }
int64_t Plan::closed_chunks(int64_t n) const { return (start(n) + length(n)) / chunk_size; }
int64_t Plan::key_row(int64_t n) const { return key_row_[at(n)]; }
int64_t Plan::tiles(int64_t n) const { return first_tile_[at(n) + 1] - first_tile_[at(n)]; }
int64_t Plan::all_tiles() const { return first_tile_[at(sequences)]; }

int64_t Plan::tile_begin(int64_t number) const {
  if (segments_ == 1) return number * unit_;
  return number / segments_ * chunk_size + number % segments_ * unit_;
}

int64_t Plan::tile_number(int64_t position) const {
  if (segments_ == 1) return position / unit_;
  return position / chunk_size * segments_ + position % chunk_size / unit_;
}

Tile Plan::tile(int64_t n, int64_t index) const {
  const int64_t number = tile_number(start(n)) + index;
  const int64_t end = start(n) + length(n);
  Tile t;
  t.sequence = n;
  t.index = index;
  t.id = first_tile_[at(n)] + index;
  t.batch = packed_ ? 0 : n;
  t.position = std::max(start(n), tile_begin(number));
  t.rows = std::min(end, tile_begin(number + 1)) - t.position;
  t.token = begin(n) + t.position - start(n);
  t.first = index == 0;
  t.last = index == tiles(n) - 1;
  return t;
}

Tile Plan::tile_by_id(int64_t id) const {
  const auto after = std::upper_bound(first_tile_.begin(), first_tile_.end(), id);
  const int64_t n = after - first_tile_.begin() - 1;
  return tile(n, id - first_tile_[at(n)]);
}

Tile Plan::tile_by_task(int64_t task, int64_t lanes, int64_t* lane) const {
  const auto after = std::upper_bound(first_tile_.begin(), first_tile_.end(), task / lanes);
  const int64_t n = after - first_tile_.begin() - 1;
  const int64_t local = task - first_tile_[at(n)] * lanes;
  *lane = local % lanes;
  return tile(n, tiles(n) - 1 - local / lanes);
}

void run_tasks(int64_t tasks, int workers, Task task, void* context) {
  if (tasks <= 0) return;
  Job job;
  job.tasks = tasks;
  job.task = task;
  job.context = context;
  parallel_for(
      std::min<int64_t>(workers, tasks), 1,
      [](void* pointer, int64_t begin, int64_t end) {
        Job& j = *static_cast<Job*>(pointer);
        for (int64_t worker = begin; worker < end; ++worker) {
          for (int64_t id; (id = j.next.fetch_add(1, std::memory_order_relaxed)) < j.tasks;) {
            j.task(j.context, id, static_cast<int>(worker));
          }
        }
      },
      &job);
}

Workspace attention_fwd_workspace(const AttentionFwdParams& p, const Plan& plan, const Pool* pool,
                                  const Allocator& allocator) {
  const Sizes& s = p.size;
  const size_t acc = acc_bytes(s.dtype);
  Layout layout;
  Workspace w;
  w.pool = pool;
  take_carries(w.forward, layout, plan, s.heads, true, false, acc);
  if (pool) {
    layout.take(w.initial_k, s.sequences * s.heads * s.head_dim, acc);
    layout.take(w.initial_v, s.sequences * s.heads * s.head_dim, acc);
    layout.take(w.lse, s.batch * s.heads * s.tokens, acc);
  }
  take_scratch(w, layout, plan, acc);
  layout.commit(allocator);
  return w;
}

Workspace attention_bwd_workspace(const AttentionBwdParams& p, const Plan& plan, const Allocator& allocator) {
  const Sizes& s = p.fwd.size;
  const size_t acc = acc_bytes(s.dtype);
  Layout layout;
  Workspace w;
  take_carries(w.forward, layout, plan, s.heads, true, true, acc);
  take_carries(w.reverse, layout, plan, s.heads, true, false, acc);
  layout.take(w.p_self, s.batch * s.heads * s.tokens, acc);
  layout.take(w.ds_self, s.batch * s.heads * s.tokens, acc);
  // Each part needs its own sums over queries, 2 / L of a (B, T, H, D) tensor. The number must not depend on the
  // threads, or the result would.
  const int64_t streams = std::max<int64_t>(1, s.sequences * s.q_groups);
  w.parts = std::min(ceil_div(32, streams), std::min<int64_t>(8, std::max<int64_t>(2, s.chunk_size / 2)));
  w.key_rows = plan.key_row(plan.sequences);
  layout.take(w.dkeys, w.parts * s.heads * w.key_rows * plan.padded_dim, acc);
  layout.take(w.dvalues, w.parts * s.heads * w.key_rows * plan.padded_dim, acc);
  if (p.dgate_bias) layout.take(w.dbias, plan.all_tiles() * s.heads * plan.padded_dim, acc);
  take_scratch(w, layout, plan, acc);
  layout.commit(allocator);
  return w;
}

Workspace recurrence_fwd_workspace(const RecurrenceFwdParams& p, const Plan& plan, const Allocator& allocator) {
  const size_t acc = acc_bytes(p.size.dtype);
  Layout layout;
  Workspace w;
  take_carries(w.forward, layout, plan, p.size.heads, false, true, acc);
  take_scratch(w, layout, plan, acc);
  layout.commit(allocator);
  return w;
}

Workspace recurrence_bwd_workspace(const RecurrenceBwdParams& p, const Plan& plan, const Allocator& allocator) {
  const Sizes& s = p.fwd.size;
  const size_t acc = acc_bytes(s.dtype);
  Layout layout;
  Workspace w;
  take_carries(w.forward, layout, plan, s.heads, false, true, acc);
  take_carries(w.reverse, layout, plan, s.heads, false, false, acc);
  if (p.dgate_bias) layout.take(w.dbias, plan.all_tiles() * s.heads * plan.padded_dim, acc);
  take_scratch(w, layout, plan, acc);
  layout.commit(allocator);
  return w;
}

int64_t decode_slices(const DecodeParams& p, int64_t slot) {
  return std::max<int64_t>(1, ceil_div(p.pool.lengths[slot] / p.chunk_size, kSlice));
}

DecodeWorkspace decode_workspace(const DecodeParams& p, const Allocator& allocator) {
  const size_t acc = acc_bytes(p.dtype);
  const int64_t items = p.batch * p.heads;
  Layout layout;
  DecodeWorkspace w;
  int64_t keys = 0;  // of the last token of the longest sequence
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t slot = p.slots ? p.slots[b] : b;
    if (slot >= 0) keys = std::max(keys, (p.pool.lengths[slot] + p.tokens - 1) / p.chunk_size);
  }
  w.slices = std::max<int64_t>(1, ceil_div(keys, kSlice));
  w.padded_dim = ceil_div(p.head_dim, kPad) * kPad;
  layout.take(w.state, items * w.padded_dim, acc);
  layout.take(w.self, items, acc);
  layout.take(w.sum, items * w.slices * w.padded_dim, acc);
  layout.take(w.maximum, items * w.slices, acc);
  layout.take(w.weight, items * w.slices, acc);
  layout.take(w.done, items, sizeof(int64_t));
  layout.commit(allocator);
  return w;
}

}  // namespace rat::cpu
