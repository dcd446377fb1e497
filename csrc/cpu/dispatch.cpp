// Entry points: choose the instruction set once, check the facts that live in tensors, lay out the workspace, launch.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../wrong_value.h"
#include "plan.h"

namespace rat::cpu {
namespace {

[[noreturn]] void fail(const std::string& argument, const std::string& expected, const std::string& got) {
  throw WrongValue(argument, expected, got);
}

std::string entry(const char* name, int64_t n) { return std::string(name) + "[" + std::to_string(n) + "]"; }

#ifdef RAT_CPU_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

// RAT_EXT_CPU_ISA=baseline|avx2|avx512 forces one; without it the best that this CPU runs.
const Kernels& choose() {
  const char* variable = std::getenv("RAT_EXT_CPU_ISA");
  const std::string wanted = variable ? variable : "";
#ifdef RAT_CPU_X86
  const bool avx2_runs = has_avx2(), avx512_runs = has_avx512();
  if (wanted.empty()) return avx512_runs ? avx512::kernels : avx2_runs ? avx2::kernels : baseline::kernels;
  if (wanted == "avx512" && avx512_runs) return avx512::kernels;
  if (wanted == "avx2" && avx2_runs) return avx2::kernels;
#endif
  if (wanted.empty() || wanted == "baseline") return baseline::kernels;
  const bool known = wanted == "avx2" || wanted == "avx512";
  throw std::invalid_argument("rat_ext: RAT_EXT_CPU_ISA: expected " +
                              std::string(known ? "an instruction set that this CPU has" : "baseline, avx2 or avx512") +
                              ", got '" + wanted + "'");
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

void check_attention(const AttentionFwdParams& p, const Plan& plan) {
  for (int64_t n = 0; n < plan.sequences; ++n) {
    const int64_t total = plan.start(n) + plan.length(n);
    const int64_t before = plan.start(n) / plan.chunk_size;
    const int64_t initial_rows = p.initial.k ? p.initial.rows : 0;
    if (before > initial_rows) {
      fail(entry("lengths", n),
           "at most " + std::to_string(initial_rows) + " closed chunks, the rows of the initial state",
           std::to_string(plan.start(n)) + " tokens, " + std::to_string(before) + " chunks");
    }
    if (!p.chunks.compact && total / plan.chunk_size > p.chunks.rows) {
      fail(entry("lengths", n),
           "at most " + std::to_string(p.chunks.rows) + " closed chunks of " + std::to_string(plan.chunk_size) +
               " tokens after this call (cache full)",
           std::to_string(total) + " tokens");
    }
    if (p.rotary.cos && plan.length(n) > 0 && (total - 1) / plan.chunk_size >= p.rotary.rows) {
      fail("rotary_cos",
           "at least " + std::to_string((total - 1) / plan.chunk_size + 1) + " rows, one for each chunk of sequence " +
               std::to_string(n),
           std::to_string(p.rotary.rows));
    }
  }
}

Plan attention_plan(const AttentionFwdParams& p) {
  Plan plan(p.size, p.gate.ptr != nullptr);
  check_attention(p, plan);
  return plan;
}

// Rows of a call on a pool: row b brings tokens(b) new tokens for sequence slots[b].
template <class Tokens>
void check_rows(const Pool& pool, const int64_t* slots, int64_t rows, int64_t chunk_size, const Rotary& rotary,
                const Tokens& tokens_of) {
  std::vector<int64_t> named;  // (P): the row that names it, + 1
  if (slots) named.resize(static_cast<size_t>(pool.sequences));
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t slot = slots ? slots[b] : b, tokens = tokens_of(b);
    if (slot < 0) continue;
    if (slot >= pool.sequences) {
      fail(entry("slots", b), "less than the cache's " + std::to_string(pool.sequences) + " entries",
           std::to_string(slot));
    }
    if (slots) {
      int64_t& row = named[static_cast<size_t>(slot)];
      if (row != 0) fail(entry("slots", b), "an entry that no other row names", std::to_string(slot));
      row = b + 1;
    }
    if (tokens == 0) continue;
    const int64_t length = pool.lengths[slot], after = length + tokens;
    if (length < 0) fail(entry("lengths", slot), "0 or more", std::to_string(length));
    if (after / chunk_size > pool.rows || after > std::numeric_limits<int32_t>::max()) {
      // The chunk that comes after the last row may fill up but for its last token.
      fail(entry("lengths", slot),
           "room for " + (tokens == 1 ? "one more token" : std::to_string(tokens) + " more tokens") +
               " (cache full: " + std::to_string(pool.rows) + " chunks of " + std::to_string(chunk_size) +
               ", capacity " + std::to_string(pool.rows * chunk_size + chunk_size - 1) + " tokens)",
           std::to_string(length) + " tokens");
    }
    for (int64_t page = 0; pool.page_table && page * pool.page_rows < after / chunk_size; ++page) {
      const int64_t at = pool.page_table[slot * (pool.rows / pool.page_rows) + page];
      if (at < 0 || at >= pool.pages) {
        fail("page_table[" + std::to_string(slot) + ", " + std::to_string(page) + "]",
             "one of the cache's " + std::to_string(pool.pages) + " pages (cache full)", std::to_string(at));
      }
    }
    if (rotary.cos && (after - 1) / chunk_size >= rotary.rows) {
      fail("rotary_cos", "at least " + std::to_string((after - 1) / chunk_size + 1) + " rows, one for each chunk",
           std::to_string(rotary.rows));
    }
  }
}

// Bytes of the chunk states that a step attends to, which its time follows; the token itself takes as long as a few keys.
int64_t bytes_of(const DecodeParams& p) {
  constexpr int64_t kToken = 16;
  const int64_t element = p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2;
  int64_t keys = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t slot = p.slots ? p.slots[b] : b;
    if (slot >= 0) keys += p.pool.lengths[slot] / p.chunk_size + kToken;
  }
  return 2 * keys * p.heads * p.head_dim * element;
}

// Whether a decode step runs on the calling thread alone. Threads that wait for work spin (libgomp's do so for
// milliseconds); where another process wants their core, the scheduler then takes it from them for milliseconds, and a
// step of 0.2 ms waits for the last of them. So a short step takes no threads; and when one with threads took longer than
// one thread would have, the next ones take none, more of them each time it happens again.
class Alone {
 public:
  explicit Alone(int64_t bytes) : limit_(kRegion + static_cast<double>(bytes) / kBytesPerSecond) {
    if (bytes < kFewBytes) return;
    int64_t left = pause.load(std::memory_order_relaxed);
    while (left > 0 && !pause.compare_exchange_weak(left, left - 1, std::memory_order_relaxed)) {
    }
    alone_ = left > 0;
    begin_ = std::chrono::steady_clock::now();
  }
  operator bool() const { return alone_; }
  // After the step.
  void done() const {
    if (alone_) return;
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin_;
    if (took.count() < limit_) {
      next_pause.store(kFirstPause, std::memory_order_relaxed);
      return;
    }
    const int64_t steps = next_pause.load(std::memory_order_relaxed);
    pause.store(steps, std::memory_order_relaxed);
    next_pause.store(std::min(2 * steps, kLongestPause), std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kFewBytes = 1 << 18;   // one thread reads them in some 25 us: more would not pay
  static constexpr double kRegion = 50e-6;        // seconds: to start and join threads that are not disturbed
  static constexpr double kBytesPerSecond = 3e9;  // less than one thread reads
  static constexpr int64_t kFirstPause = 16, kLongestPause = 1024;  // steps
  static inline std::atomic<int64_t> pause{0}, next_pause{kFirstPause};

  double limit_;
  bool alone_ = true;
  std::chrono::steady_clock::time_point begin_;
};

}  // namespace

const char* isa() { return kernels().name; }

void attention_fwd(const AttentionFwdParams& p, const Allocator& allocator) {
  const Plan plan = attention_plan(p);
  kernels().attention_fwd(p, plan, attention_fwd_workspace(p, plan, nullptr, allocator));
  for (int64_t n = 0; p.lengths_out && n < plan.sequences; ++n) {
    p.lengths_out[n] = static_cast<int32_t>(plan.start(n) + plan.length(n));
  }
}

void attention_bwd(const AttentionBwdParams& p, const Allocator& allocator) {
  const Plan plan = attention_plan(p.fwd);
  kernels().attention_bwd(p, plan, attention_bwd_workspace(p, plan, allocator));
}

void attention_cached(const AttentionCachedParams& c, const Allocator& allocator) {
  AttentionFwdParams p = c.fwd;
  Sizes& s = p.size;
  const Pool& pool = c.pool;
  const Plan lengths_of(s, true);  // checks cu_seqlens
  check_rows(pool, c.slots, s.sequences, s.chunk_size, p.rotary, [&](int64_t n) { return lengths_of.length(n); });
  std::vector<int32_t> owner(static_cast<size_t>(s.sequences)), start(owner.size());
  for (int64_t n = 0; n < s.sequences; ++n) {
    const int64_t slot = c.slots ? c.slots[n] : n;
    owner[static_cast<size_t>(n)] = slot < 0 ? -1 : static_cast<int32_t>(slot);
    start[static_cast<size_t>(n)] = slot < 0 || lengths_of.length(n) == 0 ? 0 : pool.lengths[slot];
  }
  s.lengths = start.data();
  ChunkStates& chunks = p.chunks;
  chunks.k = pool.chunk_k;
  chunks.v = pool.chunk_v;
  chunks.head = pool.page_rows * s.head_dim;
  chunks.sequence = s.heads * chunks.head;
  chunks.rows = pool.rows;
  chunks.entry = owner.data();
  chunks.page_table = pool.page_table;
  if (pool.page_table) {
    chunks.columns = pool.rows / pool.page_rows;
    while ((int64_t{1} << chunks.page_shift) < pool.page_rows) ++chunks.page_shift;
  }
  const Plan plan(s, true, owner.data());
  const Workspace w = attention_fwd_workspace(p, plan, &pool, allocator);
  p.initial.running_k = w.initial_k;
  p.initial.running_v = w.initial_v;
  p.lse = w.lse;
  kernels().attention_on_pool(p, plan, w);
  for (int64_t n = 0; n < s.sequences; ++n) {
    const int64_t length = plan.length(n);
    if (length > 0) pool.lengths[owner[static_cast<size_t>(n)]] += static_cast<int32_t>(length);
  }
}

void recurrence_fwd(const RecurrenceFwdParams& p, const Allocator& allocator) {
  const Plan plan(p.size, true);
  kernels().recurrence_fwd(p, plan, recurrence_fwd_workspace(p, plan, allocator));
}

void recurrence_bwd(const RecurrenceBwdParams& p, const Allocator& allocator) {
  const Plan plan(p.fwd.size, true);
  kernels().recurrence_bwd(p, plan, recurrence_bwd_workspace(p, plan, allocator));
}

void decode_step(const DecodeParams& p, const Allocator& allocator) {
  check_rows(p.pool, p.slots, p.batch, p.chunk_size, p.rotary, [&](int64_t) { return p.tokens; });
  if (p.batch == 0 || p.heads == 0) return;
  DecodeWorkspace w = decode_workspace(p, allocator);
  const Alone alone(bytes_of(p) * p.tokens);
  w.workers = alone ? 1 : std::max(1, num_threads());
  for (int64_t token = 0; token < p.tokens; ++token) {
    std::fill(w.done, w.done + p.batch * p.heads, 0);
    kernels().decode_step(p, w, token);
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t slot = p.slots ? p.slots[b] : b;
      if (slot >= 0) ++p.pool.lengths[slot];
    }
  }
  alone.done();
}

}  // namespace rat::cpu
