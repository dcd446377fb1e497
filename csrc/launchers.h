// What csrc/ops hands to the CPU and CUDA launchers: plain structs of pointers, strides and sizes. No torch, no CUDA.
//
// Conventions, for every struct below:
// - All sizes and strides count elements, never bytes, and are int64_t.
// - "T" is the storage dtype of the op (Sizes::dtype); "acc" is float, or double where T is double.
// - N is the number of sequences. Dense: N = batch, sequence n is row n of the token tensors, tokens [0, tokens).
//   Packed (cu_seqlens given): batch = 1, and sequence n is tokens [cu_seqlens[n], cu_seqlens[n + 1]) of row 0.
// - A token has a position inside its sequence: position = (lengths ? lengths[n] : 0) + (t - first token of n).
//   Its chunk is c = position / chunk_size. Three facts follow from it and are kept apart in the code, as `reset`,
//   `key_every` and `rotate_every` of Sizes.
// - Contiguous arguments (tables, biases, states, lengths, lse: every plain pointer below) start at multiples of 16 bytes. So
//   do all Rows on a GPU, with strides that are multiples of 16 bytes: kernels read them in vectors. Those that
//   cuda::narrow_rows() names may be *narrow*: at multiples of 8 bytes. On a CPU they need not be at either.
// - Head h of H reads query group h / (H / q_groups) and key group h / (H / k_groups).
#pragma once

#include <cstddef>
#include <cstdint>

namespace rat {

struct Allocator;  // arena.h

enum class DType : int32_t { f64, f32, bf16, f16 };

// A (batch, token, head, D) tensor of T: row (b, t, h) starts at ptr + b*batch + t*token + h*head; its D elements are
// contiguous. Null when the argument is absent.
struct Rows {
  void* ptr = nullptr;
  int64_t batch = 0;
  int64_t token = 0;
  int64_t head = 0;
};

// Do all rows of a tensor on a GPU start at multiples of 16 bytes?
inline bool rows_are_wide(const Rows& r, int64_t element_bytes) {
  const int64_t steps = (r.batch | r.token | r.head) * element_bytes;
  return ((static_cast<uint64_t>(steps) | reinterpret_cast<uintptr_t>(r.ptr)) & 15) == 0;
}

// A copy of rows that kernels cannot read: some do not start at multiples of 16 bytes.
struct RowCopy {
  const void* source = nullptr;
  void* target = nullptr;  // contiguous, aligned to 16 bytes
  int64_t sizes[3] = {};   // those of the dimensions before the row, outermost first: (B, T, heads), or (B, T, 1)
  int64_t strides[3] = {};
  int64_t row = 0;            // elements of a row, which are contiguous: a multiple of 8
  int64_t element_bytes = 0;  // 2 or 4
};

struct Sizes {
  DType dtype = DType::f32;
  int64_t batch = 0;         // B
  int64_t tokens = 0;        // T, per row
  int64_t sequences = 0;     // N
  int64_t heads = 0;         // H
  int64_t q_groups = 0;      // groups of q; divides H
  int64_t k_groups = 0;      // groups of k; divides H. H itself where k holds per-head states (chunk_attention)
  int64_t head_dim = 0;      // D, a multiple of 8, 8 ... 256
  int64_t chunk_size = 0;    // L >= 1, may exceed T. Set together with the three below, by set_chunk_size()
  int64_t reset = 0;         // the recurrence starts anew where position % reset == 0
  int64_t key_every = 0;     // a query sees keys [0, position / key_every): key j is the state that closes stretch j
  int64_t rotate_every = 0;  // a position, and the key that it closes, rotate by position / rotate_every
  const int32_t* cu_seqlens = nullptr;  // (N + 1), or null when dense
  const int32_t* lengths = nullptr;     // (N) tokens that each sequence had before this call, or null: all 0

  // No position reaches 2^32 - 1: from there on all sizes are alike, and kernels divide by them in 32 bits.
  void set_chunk_size(int64_t size) {
    chunk_size = size;
    reset = key_every = rotate_every = size < INT64_C(0xffffffff) ? size : INT64_C(0xffffffff);
  }
};

// Where chunk states live. State c of head h of sequence n is the D contiguous elements of T at
//   base + n*sequence + h*head + (first_row(n) + c)*D
// first_row(n) = cu_seqlens[n] / chunk_size + n if compact, else 0. Rows [0, closed chunks of n) are valid, the rest is
// uninitialised and must not be read into a result. A compact layout (packed, no state in or out) has sequence == 0.
//
// Those of a pool: sequence n of the call has the states of sequence entry[n] of the pool in n's place above; where entry[n] is
// below 0, n is skipped: its y is zeros, and it has no states. In pages, state c of pool sequence e is state c % page_rows of page
// page_table[e*columns + c / page_rows] in e's place; page_rows is 1 << page_shift, `sequence` and `head` are strides in a page.
struct ChunkStates {
  void* k = nullptr;  // rotated by c, T
  void* v = nullptr;  // T
  int64_t sequence = 0;
  int64_t head = 0;
  int64_t rows = 0;  // rows for each head: capacity of a sequence, or of the whole packed row if compact
  bool compact = false;
  const int32_t* entry = nullptr;       // (N), or null: each its own
  int64_t blocks = 0;                   // of a pool: pages, or sequences where there are no pages
  const int32_t* page_table = nullptr;  // (P, columns), or null: no pages
  int64_t columns = 0;
  int32_t page_shift = 0;
};

// State that a sequence brings along, or leaves behind, beside its length. Chunk states are (N, H, rows, D) of T,
// contiguous, with rows [0, length / L) valid; running states are (N, H, D) of acc, contiguous: k~ and v~ of the last token.
struct CarriedState {
  void* k = nullptr;
  void* v = nullptr;
  int64_t rows = 0;
  void* running_k = nullptr;
  void* running_v = nullptr;
};

// Rotation by chunk index, rotate-half: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 = x[:D/2], x2 = x[D/2:].
struct Rotary {
  const void* cos = nullptr;  // (rows, D / 2) of acc, contiguous, or null: no rotation
  const void* sin = nullptr;
  int64_t rows = 0;
};

// ---- rat_attention and chunk_attention ------------------------------------------------------------------------------

// Forward. gate.ptr == null means chunk_attention: k and v already are per-token states k~, v~ (k_groups == H then), which
// is the same as f = 0 everywhere. The caller has checked shapes; device-resident facts (cu_seqlens, lengths, capacity,
// rotary rows) are checked by the launcher: CPU throws WrongValue, CUDA prints the argument and traps.
struct AttentionFwdParams {
  Sizes size;
  Rows q;                           // (B, T, q_groups, D)
  Rows k;                           // (B, T, k_groups, D)
  Rows v, gate, out_gate;           // (B, T, H, D); gate and out_gate are logits; out_gate may be null
  const void* gate_bias = nullptr;  // (H, D) acc, contiguous, or null
  Rotary rotary;
  double scale = 1.0;
  CarriedState initial;  // all pointers null when every sequence starts fresh
  // outputs
  Rows y;                     // (B, T, H, D). On CUDA it holds v~ between the two kernels
  void* lse = nullptr;        // (B, H, T) acc, contiguous: logsumexp over earlier chunks and self
  ChunkStates chunks;         // closed chunks of every sequence, those of `initial` copied to the front
  void* running_k = nullptr;  // (N, H, D) acc, or null when no state is returned; an empty sequence keeps its initial
  void* running_v = nullptr;  // state (zeros if none)
  int32_t* lengths_out = nullptr;  // (N), or null
};

// Backward of the same. All input fields as in the forward (y, lse and chunks are inputs now).
struct AttentionBwdParams {
  AttentionFwdParams fwd;
  bool deterministic = true;  // false: sums may be taken in any order, where that is faster
  Rows dy;                    // (B, T, H, D) of T
  // Gradients of the returned state, or null (zero): chunk states as (N, H, chunks.rows, D) of T contiguous (never with a
  // compact layout; rows that are not valid are to be ignored), running states (N, H, D) acc.
  const void* dchunk_k = nullptr;
  const void* dchunk_v = nullptr;
  const void* drunning_k = nullptr;
  const void* drunning_v = nullptr;
  // outputs
  Rows dq, dk, dv, dgate, dout_gate;  // shapes of their inputs, own strides; dgate/dout_gate null with their inputs.
                                      // Every element is written (tokens outside every packed sequence do not exist).
  void* dgate_bias = nullptr;         // (H, D) acc, or null
  CarriedState dinitial;  // gradients of fwd.initial, same shapes and dtypes (k, v: every row is written, zeros where
                          // not valid), or null pointers when not wanted
};

// ---- chunk_recurrence -----------------------------------------------------------------------------------------------

// y_t = f_t y_{t-1} + (1 - f_t) x_t inside each chunk.
struct RecurrenceFwdParams {
  Sizes size;                       // q_groups unused; k_groups = groups of x
  Rows x;                           // (B, T, k_groups, D)
  Rows gate;                        // (B, T, H, D) logits
  const void* gate_bias = nullptr;  // (H, D) acc or null
  const void* initial = nullptr;    // (N, H, D) acc: y of the token before, or null. Used where lengths[n] % L != 0
  Rows y;                           // (B, T, H, D) output
  void* final_state = nullptr;      // (N, H, D) acc: y of the last token (or the initial state), or null
};

struct RecurrenceBwdParams {
  RecurrenceFwdParams fwd;       // y is an input; it is not used to recover states where that would lose precision
  Rows dy;                       // (B, T, H, D)
  const void* dfinal = nullptr;  // (N, H, D) acc or null
  Rows dx, dgate;                // outputs
  void* dgate_bias = nullptr;    // (H, D) acc or null
  void* dinitial = nullptr;      // (N, H, D) acc or null
};

// ---- a pool of cached sequences -------------------------------------------------------------------------------------

// A pool of P sequences that is updated in place. State of one sequence: the chunk states of its closed chunks, rows
// [0, lengths / L); its running states; its length. All tensors are contiguous.
//
// Running states are a ring of R places: the state after the token at position t lives at place t % R, so that a call that
// goes on from length n reads place (n - 1) % R. Taking up to R - 1 tokens back is writing a smaller length. A call of T
// tokens stores the last min(T, R) states.
//
// Rows are in pages of `page_rows`: row c of head h of sequence s is row c % page_rows of
// chunk[page_table[s * rows / page_rows + c / page_rows]][h]; without a table a sequence is one page, its own. Pages may
// be shared: no row is written but that of the chunk that closes.
struct Pool {
  int64_t sequences = 0;    // P
  void* chunk_k = nullptr;  // (pages, H, page_rows, D) of T, or of e4m3 where there are scales; rotated
  void* chunk_v = nullptr;
  float* scale_k = nullptr;  // (pages, H, page_rows): a state is its e4m3 elements times its scale; or null
  float* scale_v = nullptr;
  int64_t rows = 0;                     // chunk rows that a sequence can have
  int64_t page_rows = 0;                // rows where not paged; else a power of two
  int64_t pages = 0;                    // physical pages; P where not paged
  const int32_t* page_table = nullptr;  // (P, rows / page_rows), -1 where there is no page; or null
  void* running_k = nullptr;            // (P, R, H, D) acc, not rotated
  void* running_v = nullptr;
  int64_t ring = 1;            // R
  int32_t* lengths = nullptr;  // (P)
  int32_t* error = nullptr;    // (4): code, row, slot, detail of the first row that was skipped since it was zeroed
};

// Codes of Pool::error. On a GPU a row with an error is skipped: its y is zeros, its state is untouched, the other rows are
// right. The CPU throws before anything is written.
enum class PoolError : int32_t {
  none = 0,
  slot = 1,        // outside the pool
  full = 2,        // no row, or no page, for the tokens; detail: the length
  duplicate = 3,   // named by an earlier row of the call
  rotary = 4,      // the tables have too few rows; detail: their rows
  length = 5,      // negative, or more than the pool has rows for; detail: the length
  cu_seqlens = 6,  // malformed: the whole call is skipped
};

// ---- decode ---------------------------------------------------------------------------------------------------------

// A few new tokens for each row of the batch, against a pool that is updated in place. Row b uses sequence slots[b] (or b when
// slots is null; then P >= batch was checked); slots[b] < 0 skips the row: its y is zeros and nothing else is touched. Steps
// over disjoint sequences may run at once, on streams of their own.
//
// n tokens have the bits of n steps of one: a row's results depend on its own length and tokens alone.
struct DecodeParams {
  DType dtype = DType::f32;
  int64_t batch = 0, tokens = 1, heads = 0, q_groups = 0, k_groups = 0, head_dim = 0, chunk_size = 0;
  Rows q, k, v, gate, out_gate;     // (B, n, groups or H, D). out_gate may be null
  const void* gate_bias = nullptr;  // (H, D) acc or null
  Rotary rotary;
  double scale = 1.0;
  const int64_t* slots = nullptr;  // (B) or null
  Pool pool;
  Rows y;  // (B, n, H, D) output
  // decode_workspace bytes, CUDA only: zeroed once when the cache is made, left zeroed by each step
  void* workspace = nullptr;
};

// Forward of rows of any number of new tokens, none too, each of which continues its sequence of a pool in place: what
// attention_fwd makes of the whole sequence, bit for bit, however it is cut, where chunks are no longer than kExactChunk. Longer
// ones are exact where cuts lie between chunks, else up to rounding. Row n goes on with sequence slots[n], or n where slots is
// null; a negative slot skips it: its y is zeros and nothing else is touched.
constexpr int64_t kExactChunk = 128;  // 64 on the CPU

struct AttentionCachedParams {
  AttentionFwdParams fwd;          // size without lengths, inputs, y; what it says of states is unused
  const int64_t* slots = nullptr;  // (N) or null
  Pool pool;
};

// Inputs of a forward, of two-byte elements, whose rows the kernels that serve it read from multiples of 8 bytes, too. Never q: it has
// few heads, and in pieces of 8 bytes it costs attention more than its copy (bench/notes/chunk_attention.md).
struct NarrowRows {
  bool k = false, v = false, gate = false, out_gate = false;
};

namespace cpu {
void attention_fwd(const AttentionFwdParams&, const Allocator&);
void attention_bwd(const AttentionBwdParams&, const Allocator&);
void recurrence_fwd(const RecurrenceFwdParams&, const Allocator&);
void recurrence_bwd(const RecurrenceBwdParams&, const Allocator&);
void decode_step(const DecodeParams&, const Allocator&);
void attention_cached(const AttentionCachedParams&, const Allocator&);

// Instruction set in use: "baseline", "avx2" or "avx512". Chosen once; RAT_EXT_CPU_ISA forces one.
const char* isa();

// Runs body(begin, end) over [0, n) on the host's thread pool. csrc/ops supplies torch's; the kernels know only this.
using ParallelBody = void (*)(void* context, int64_t begin, int64_t end);
void parallel_for(int64_t n, int64_t grain, ParallelBody body, void* context);
int num_threads();
}  // namespace cpu

namespace cuda {
// Throws std::runtime_error where the kernels cannot run on this GPU. Asks the driver once for each device.
void check_device(int32_t device);

// `stream` is a cudaStream_t. The caller has made the tensors' device current. Launchers throw std::runtime_error when a
// launch fails; they never synchronise. Scratch is planned on the host from sizes alone (arena.h).
size_t decode_workspace(const DecodeParams&);  // depends on the pool and heads, not on batch
NarrowRows narrow_rows(const AttentionFwdParams&);
NarrowRows narrow_rows(const AttentionCachedParams&);
void align_rows(const RowCopy* copies, size_t count, void* stream);
void attention_fwd(const AttentionFwdParams&, const Allocator&, void* stream);
void attention_bwd(const AttentionBwdParams&, const Allocator&, void* stream);
void recurrence_fwd(const RecurrenceFwdParams&, const Allocator&, void* stream);
void recurrence_bwd(const RecurrenceBwdParams&, const Allocator&, void* stream);
void decode_step(const DecodeParams&, const Allocator&, void* stream);
void attention_cached(const AttentionCachedParams&, const Allocator&, void* stream);
}  // namespace cuda

}  // namespace rat
