// What the kernels share that depends on no instruction set: the tiling of sequences, workspace layouts, the task
// runner and the table of kernels that each instruction set fills.
//
// The kernels are compiled once per instruction set (kernels_*.cpp). A function with external linkage that is inline
// here could be emitted by the AVX-512 file and picked by the linker for everybody, so everything below is either plain
// data or defined in a .cpp file that is compiled for the baseline.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../launchers.h"

namespace rat::cpu {

// A tile is the unit of work: at most this many consecutive tokens of one sequence. It either holds whole chunks (cut
// only by the ends of the sequence) or lies inside one chunk.
constexpr int64_t kTile = 64;
// Chunk states are attended to in blocks of this many keys.
constexpr int64_t kKeys = 64;
// Rows of scratch are padded to a multiple of this many elements: the widest vector of floats.
constexpr int64_t kPad = 16;

struct Tile {
  int64_t sequence;  // n
  int64_t index;     // among the tiles of the sequence
  int64_t id;        // among all tiles
  int64_t batch;     // row of the token tensors
  int64_t token;     // first token
  int64_t position;  // its position in the sequence
  int64_t rows;      // tokens, 1 ... kTile
  bool first, last;  // of the sequence
};

// How the sequences of a call are cut into tiles. Reads cu_seqlens and lengths, and throws WrongValue if
// they are not what launchers.h says.
class Plan {
 public:
  // has_gate = false: the states are given for each token, the recurrence resets at each token. `entry`, of a pool: sequences
  // whose entry is below 0 have no tokens.
  Plan(const Sizes& size, bool has_gate, const int32_t* entry = nullptr);

  int64_t tiles(int64_t n) const;  // of sequence n
  int64_t all_tiles() const;       // of all sequences
  Tile tile(int64_t n, int64_t index) const;
  Tile tile_by_id(int64_t id) const;
  // Task `task` of all_tiles() * lanes: those of one tile follow each other, lanes (heads, say) inside, so that they
  // share pages and cache lines; the last tile of a sequence, which has the most keys, comes first.
  Tile tile_by_task(int64_t task, int64_t lanes, int64_t* lane) const;

  int64_t begin(int64_t n) const;          // first token
  int64_t length(int64_t n) const;         // tokens in this call
  int64_t start(int64_t n) const;          // tokens before this call
  int64_t closed_chunks(int64_t n) const;  // at the end of this call
  int64_t key_row(int64_t n) const;        // closed chunks of the sequences before n

  int64_t sequences = 0;
  int64_t chunk_size = 1;
  int64_t reset = 1;       // the recurrence starts anew where position % reset == 0
  bool segmented = false;  // chunks are longer than tiles and have a recurrence: states are carried between tiles
  int64_t padded_dim = 0;  // D rounded up to kPad

 private:
  int64_t tile_begin(int64_t number) const;  // position where tile `number` of an infinite sequence begins
  int64_t tile_number(int64_t position) const;

  int64_t segments_ = 1;  // tiles per chunk, where chunks are longer than tiles
  int64_t unit_ = 1;      // tokens of a whole tile
  std::vector<int64_t> begin_, length_, start_, first_tile_, key_row_;
  bool packed_ = false;
};

// Runs task(context, id, worker) for every id in [0, tasks). Workers take the next id when they are free, so tasks may
// differ in length; worker is in [0, workers) and no two tasks run at once with the same one.
using Task = void (*)(void* context, int64_t id, int worker);
void run_tasks(int64_t tasks, int workers, Task task, void* context);

// Workspaces: plain pointers into one arena. "acc" elements: 8 bytes for f64, else 4.

// Carries between the tiles of a chunk, (tiles, H, padded_dim) acc each; null unless the plan is segmented. Before they
// are combined, a tile's entry holds the state that it ends with when it starts from zero; after, the one it starts
// with.
struct Carries {
  void* k = nullptr;
  void* v = nullptr;        // null in chunk_recurrence
  void* product = nullptr;  // product of the forget gates of the tile
};

struct Workspace {
  Carries forward;
  Carries reverse;          // of the gradient, from the last tile to the first. product is unused
  void* p_self = nullptr;   // (B, H, T) acc
  void* ds_self = nullptr;  // (B, H, T) acc, scale not included
  void* dkeys = nullptr;    // (parts, H, closed chunks, padded_dim) acc: gradients of the rotated chunk keys
  void* dvalues = nullptr;
  int64_t parts = 1;           // of the queries of a sequence and group; each sums its own dkeys and dvalues
  int64_t key_rows = 0;        // closed chunks of all sequences
  void* dbias = nullptr;       // (tiles, H, padded_dim) acc: sums of dgate over a tile
  const Pool* pool = nullptr;  // of rows of a pool: the forward's chunks are those of the pool,
  void* initial_k = nullptr;   // (N, H, D) acc: what rows start from,
  void* initial_v = nullptr;
  void* lse = nullptr;       // (B, H, T) acc: wanted by nobody
  char* scratch = nullptr;   // a slab for each worker
  size_t scratch_bytes = 0;  // of one slab
  int workers = 1;
};

// Elements of acc that one worker's slab holds, see Scratch in tile.inl.
constexpr int64_t kRowBuffers = 11;     // (kTile, padded_dim)
constexpr int64_t kColumnBuffers = 3;   // (padded_dim, kTile)
constexpr int64_t kScoreBuffers = 2;    // (kKeys, kTile)
constexpr int64_t kKeyBuffers = 2;      // (kKeys, padded_dim)
constexpr int64_t kVectorBuffers = 16;  // 256 each

Workspace attention_fwd_workspace(const AttentionFwdParams&, const Plan&, const Pool*, const Allocator&);
Workspace attention_bwd_workspace(const AttentionBwdParams&, const Plan&, const Allocator&);
Workspace recurrence_fwd_workspace(const RecurrenceFwdParams&, const Plan&, const Allocator&);
Workspace recurrence_bwd_workspace(const RecurrenceBwdParams&, const Plan&, const Allocator&);

// A decode step attends to chunk states in slices of this many keys, from the first one on.
constexpr int64_t kSlice = 256;

// Of one decode step. The keys of a (row, head), an item, are cut into slices, a task each; the task that is the last of its
// item joins them.
struct DecodeWorkspace {
  int64_t slices = 1;      // of the longest sequence
  int64_t padded_dim = 0;  // D rounded up to kPad
  int workers = 1;
  void* state = nullptr;    // (items, padded_dim) acc: v~ of the new token
  void* self = nullptr;     // (items) acc: s_tt
  void* sum = nullptr;      // (items, slices, padded_dim) acc: sum of e^(s - maximum) V
  void* maximum = nullptr;  // (items, slices) acc
  void* weight = nullptr;   // (items, slices) acc: sum of e^(s - maximum)
  int64_t* done = nullptr;  // (items): tasks that are done
};
// For the row's next token.
int64_t decode_slices(const DecodeParams&, int64_t slot);
DecodeWorkspace decode_workspace(const DecodeParams&, const Allocator&);

// What one instruction set offers.
struct Kernels {
  const char* name;
  void (*attention_fwd)(const AttentionFwdParams&, const Plan&, const Workspace&);
  void (*attention_on_pool)(const AttentionFwdParams&, const Plan&, const Workspace&);
  void (*attention_bwd)(const AttentionBwdParams&, const Plan&, const Workspace&);
  void (*recurrence_fwd)(const RecurrenceFwdParams&, const Plan&, const Workspace&);
  void (*recurrence_bwd)(const RecurrenceBwdParams&, const Plan&, const Workspace&);
  void (*decode_step)(const DecodeParams&, const DecodeWorkspace&, int64_t token);
};

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__) && defined(__GNUC__)
#define RAT_CPU_X86 1
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace rat::cpu
