// rat_attention and chunk_attention: scratch, and the phases of phases.h in order.
#include "host/launch.h"
#include "phases.h"

namespace rat::cuda {
namespace {

void check_call(const AttentionFwdParams& a, int32_t* lengths_out, cudaStream_t stream) {
  const Sizes& s = a.size;
  if (!(s.cu_seqlens || s.lengths || lengths_out)) return;
  check_sequences(s, a.chunks.compact ? -1 : a.chunks.rows, a.rotary.cos ? a.rotary.rows : -1,
                  a.initial.k ? a.initial.rows : -1, lengths_out, stream);
}

BwdScratch take_scratch(const AttentionBwdParams& a, Arena& arena) {
  const Sizes& s = a.fwd.size;
  const ChunkStates& c = a.fwd.chunks;
  const int64_t scalars = s.batch * s.heads * s.tokens;
  const int64_t states = (c.compact ? 1 : s.sequences) * s.heads * c.rows * s.head_dim;
  BwdScratch scratch{};
  if (!short_chunks(a)) {
    scratch.p_self = arena.take<float>(scalars);
    scratch.ds_self = arena.take<float>(scalars);
  }
  if (const int64_t elements = tile_states_elements(a)) scratch.tile_states = arena.take<uint16_t>(elements);
  scratch.delta = arena.take<float>(scalars);
  scratch.dq = arena.take<float>(s.batch * s.tokens * s.q_groups * s.head_dim);
  scratch.dq_tiles_welcome = scan_reads_dq_tiles(a);
  scratch.dchunk_k = arena.take<float>(states);
  scratch.dchunk_v = arena.take<float>(states);
  scratch.dout = a.fwd.out_gate.ptr ? a.dv : a.dy;
  return scratch;
}

}  // namespace

NarrowRows narrow_rows(const AttentionFwdParams& a) {
  const bool scan = recurrence_reads_narrow_rows(a);
  return {scan, scan, scan, attention_reads_narrow_rows(a)};
}

// The phases' own scratch shares memory: one phase's is dead when the next begins.

void attention_fwd(const AttentionFwdParams& a, const Allocator& allocator, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const bool tokens = a.size.batch * a.size.tokens > 0;
  Arena arena;
  FwdScratch scratch{};
  scratch.s_self = arena.take<float>(a.size.batch * a.size.heads * a.size.tokens);
  const size_t mark = arena.mark();
  const Launch prepare = chunk_prepare_fwd(a, scratch, nullptr, arena);
  arena.rewind(mark);
  const Launch attend = tokens ? chunk_attention_fwd(a, scratch, arena) : Launch();
  arena.commit(allocator);

  check_call(a, a.lengths_out, stream);
  prepare(stream);
  if (tokens) attend(stream);
}

void attention_bwd(const AttentionBwdParams& a, const Allocator& allocator, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const bool tokens = a.fwd.size.batch * a.fwd.size.tokens > 0;
  Arena arena;
  BwdScratch scratch = take_scratch(a, arena);
  const size_t mark = arena.mark();
  const Launch prepare = tokens ? chunk_prepare_bwd(a, scratch, arena) : Launch();
  arena.rewind(mark);
  const Launch attend = tokens ? chunk_attention_bwd(a, scratch, arena) : Launch();
  arena.rewind(mark);
  const Launch scan = chunk_scan_bwd(a, scratch, arena);
  arena.commit(allocator);

  check_call(a.fwd, nullptr, stream);
  if (tokens) {
    prepare(stream);
    attend(stream);
  }
  scan(stream);
}

}  // namespace rat::cuda
