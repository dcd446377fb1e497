// The phases of the CUDA ops, one launcher each, and the scratch that passes between them. rat_attention.cpp strings them
// together; each kernel family implements its own. Host code, torch-free.
#pragma once

#include <cuda_runtime.h>

#include <functional>

#include "../arena.h"
#include "../launchers.h"

namespace rat::cuda {

// What a phase does once its scratch is there. It holds references to the params, which live as long as the call.
using Launch = std::function<void(cudaStream_t)>;

// Float32 scratch of one forward, all contiguous.
struct FwdScratch {
  Piece<float> s_self;  // (B, H, T): s_tt = scale * q_t . k~_t
};

// Scratch of one backward. dchunk_{k,v} use the element offsets of ChunkStates.
struct BwdScratch {
  Piece<float> p_self;          // (B, H, T): p_tt; null where short_chunks()
  Piece<float> ds_self;         // (B, H, T): ds_tt, scale not included; null where short_chunks()
  Piece<float> delta;           // (B, H, T): Delta_t
  Piece<uint16_t> tile_states;  // as TileStates of recurrence/scan.cuh has them; null where tile_states_elements() is 0
  // (B, T, q_groups, D): the attention part of dq, rotated back, scale included, summed over a group. With dq_in_tiles it lies as
  // attention's tiles do (attention/dq_tiles.h), neither rotated back nor scaled.
  Piece<float> dq;
  bool dq_tiles_welcome;  // phase 3 reads such tiles
  bool dq_in_tiles;       // phase 2 leaves them
  Piece<float> dchunk_k;  // gradient of the rotated chunk keys from attention alone, scale included
  Piece<float> dchunk_v;  // gradient of the chunk values from attention alone
  Rows dout;  // dO_t = sigmoid(out_gate_t) * dy_t in T: stored in dv's memory until the reverse scan overwrites it
              // with dv, or dy itself when there is no out_gate
};

// Phase 0, only when cu_seqlens or lengths are given: one block checks them, the cache rows and the rotary rows, prints the
// argument and traps on a bad value. Writes lengths_out where wanted (also for dense calls).
void check_sequences(const Sizes&, int64_t chunk_rows, int64_t rotary_rows, int64_t initial_rows, int32_t* lengths_out,
                     cudaStream_t);

// Forward phase 1 (recurrence/forward.cu): scans k and v; writes v~ into y, s_self, closed chunk states (rotated), running
// states; copies the initial chunk states to the front.
// `pool`: rows of a pool, in place; it lives as long as the params. null: no pool.
struct PoolStates;  // recurrence/scan.cuh
Launch chunk_prepare_fwd(const AttentionFwdParams&, const FwdScratch&, const PoolStates* pool, Arena&);

// Do the kernels of phase 1 read rows of k, v and gate, and those of phase 2 rows of out_gate, that are narrow (launchers.h)?
bool recurrence_reads_narrow_rows(const AttentionFwdParams&);
bool attention_reads_narrow_rows(const AttentionFwdParams&);

// Forward phase 2 (attention/*_fwd.cu, f32.cu): softmax over earlier chunks and self; overwrites v~ in y by y, writes lse.
Launch chunk_attention_fwd(const AttentionFwdParams&, const FwdScratch&, Arena&);

// Do phases 1 and 3 come from the family for short chunks (recurrence/choose.cpp)? Phase 3 then makes p_tt and ds_tt itself.
bool short_chunks(const AttentionBwdParams&);

// Elements of the tile states that phase 1 leaves for phase 3; 0 where that does not ask for them.
int64_t tile_states_elements(const AttentionBwdParams&);

// Does phase 3 take the tiles of dq as attention has them? It spares a pass over them.
bool scan_reads_dq_tiles(const AttentionBwdParams&);

// Backward phase 1 (recurrence/prepare.cu): dO, dout_gate, Delta; p_self, ds_self unless short_chunks(); tile_states where taken.
Launch chunk_prepare_bwd(const AttentionBwdParams&, const BwdScratch&, Arena&);

// Backward phase 2 (attention/*_bwd.cu, f32.cu): scratch.dq, scratch.dchunk_k, scratch.dchunk_v; every element of dq and
// every valid chunk row is written (zeros where nothing attends). dq's memory may hold R q from here to phase 3.
// Sets scratch.dq_in_tiles, which phase 3 looks at.
Launch chunk_attention_bwd(const AttentionBwdParams&, BwdScratch&, Arena&);

// Backward phase 3 (recurrence/reverse.cu, reverse_tiles.cu): reverse scan; dq, dk, dv, dgate, dgate_bias, dinitial.
Launch chunk_scan_bwd(const AttentionBwdParams&, const BwdScratch&, Arena&);

// A kernel as build_info() lists it. Each family registers its kernels (all instantiations that it may launch).
struct KernelEntry {
  const char* name;      // "chunk_attention_fwd_sm80<bf16, 128>"
  const void* function;  // for cudaFuncGetAttributes
};
struct KernelList {
  const KernelEntry* entries;
  int count;
};
KernelList align_rows_kernels();
KernelList chunk_recurrence_kernels();
KernelList chunk_attention_fwd_sm80_kernels();
KernelList chunk_attention_bwd_sm80_kernels();
KernelList chunk_attention_f32_kernels();
KernelList chunk_attention_rotate_reduce_kernels();
KernelList decode_kernels();
KernelList rat_attention_cached_kernels();
KernelList chunk_attention_fwd_sm90_kernels();
KernelList chunk_attention_bwd_sm90_kernels();
KernelList chunk_attention_bwd_wide_sm90_kernels();

}  // namespace rat::cuda
