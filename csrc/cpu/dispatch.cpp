// Entry points: choose the instruction set once, check the facts that live in tensors, lay out the workspace, launch.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "../arena.h"
#include "plan.h"

namespace rat::cpu {
namespace {

[[noreturn]] void fail(const std::string& what, const std::string& expected, const std::string& got) {
  throw std::invalid_argument("rat_ext: " + what + ": expected " + expected + ", got " + got);
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
  if (wanted == "avx2" || wanted == "avx512") {
    fail("RAT_EXT_CPU_ISA", "an instruction set that this CPU has", "'" + wanted + "'");
  }
  fail("RAT_EXT_CPU_ISA", "baseline, avx2 or avx512", "'" + wanted + "'");
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

// Runs a layout twice: to measure, and to place.
template <class Params>
Workspace lay_out(Workspace (*layout)(const Params&, const Plan&, void*), const Params& p, const Plan& plan,
                  const Allocator& allocator) {
  const size_t bytes = layout(p, plan, nullptr).bytes;
  return layout(p, plan, allocator.allocate(allocator.context, bytes));
}

void check_decode(const DecodeParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t slot = p.slots ? p.slots[b] : b;
    if (slot < 0) continue;
    if (slot >= p.pool) {
      fail(entry("slots", b), "less than the cache's " + std::to_string(p.pool) + " entries", std::to_string(slot));
    }
    const int64_t length = p.lengths[slot];
    if (length < 0) fail(entry("lengths", slot), "0 or more", std::to_string(length));
    if ((length + 1) / p.chunk_size > p.rows || length == std::numeric_limits<int32_t>::max()) {
      // The chunk that comes after the last row may fill up but for its last token.
      fail(entry("lengths", slot),
           "room for one more token (cache full: " + std::to_string(p.rows) + " chunks of " +
               std::to_string(p.chunk_size) + ", capacity " + std::to_string(p.rows * p.chunk_size + p.chunk_size - 1) +
               " tokens)",
           std::to_string(length) + " tokens");
    }
    if (p.rotary.cos && length / p.chunk_size >= p.rotary.rows) {
      fail("rotary_cos", "at least " + std::to_string(length / p.chunk_size + 1) + " rows, one for each chunk",
           std::to_string(p.rotary.rows));
    }
  }
}

}  // namespace

const char* isa() { return kernels().name; }

void attention_fwd(const AttentionFwdParams& p, const Allocator& allocator) {
  const Plan plan = attention_plan(p);
  kernels().attention_fwd(p, plan, lay_out(attention_fwd_layout, p, plan, allocator));
  for (int64_t n = 0; p.lengths_out && n < plan.sequences; ++n) {
    p.lengths_out[n] = static_cast<int32_t>(plan.start(n) + plan.length(n));
  }
}

void attention_bwd(const AttentionBwdParams& p, const Allocator& allocator) {
  const Plan plan = attention_plan(p.fwd);
  kernels().attention_bwd(p, plan, lay_out(attention_bwd_layout, p, plan, allocator));
}

void recurrence_fwd(const RecurrenceFwdParams& p, const Allocator& allocator) {
  const Plan plan(p.size, true);
  kernels().recurrence_fwd(p, plan, lay_out(recurrence_fwd_layout, p, plan, allocator));
}

void recurrence_bwd(const RecurrenceBwdParams& p, const Allocator& allocator) {
  const Plan plan(p.fwd.size, true);
  kernels().recurrence_bwd(p, plan, lay_out(recurrence_bwd_layout, p, plan, allocator));
}

void decode_step(const DecodeParams& p) {
  check_decode(p);
  // Few rows and heads: several workers share the chunk states of one, each a run of them. Scratch: for each (row,
  // head, split) an output and two scalars, then the rotated query and the own state of each (row, head).
  const int64_t items = p.batch * p.heads;
  if (items == 0) return;
  const int64_t splits = std::max<int64_t>(1, std::min<int64_t>((p.rows + 255) / 256, 32 / items));
  const int64_t padded = (p.head_dim + kPad - 1) / kPad * kPad;
  const size_t bytes = static_cast<size_t>(items * (splits * (padded + kPad) + 2 * padded + kPad)) * sizeof(double);
  const std::unique_ptr<char[]> scratch(new char[bytes + 64]);
  void* aligned = scratch.get() + (64 - reinterpret_cast<uintptr_t>(scratch.get()) % 64);
  kernels().decode_step(p, aligned, splits);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t slot = p.slots ? p.slots[b] : b;
    if (slot >= 0) ++p.lengths[slot];
  }
}

}  // namespace rat::cpu
