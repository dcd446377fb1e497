// What the decode kernel is given, how a block's shared memory is laid out, and what its warps tell each other.
#pragma once

#include "../device/e4m3.cuh"
#include "../device/rotary.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/opaque.cuh"

namespace rat::cuda {

constexpr int kConsumers = 256;  // threads that attend; behind them warps that fetch, scan and, in some kernels, join
constexpr int kConsumerWarps = kConsumers / 32;
// Keys of a slice. A slice has its own softmax, and slices are joined in order: which block took it does not show.
constexpr int kSlice = 256;
constexpr int kWarpKeys = 32;  // of a slice, that a warp takes on tensor cores
static_assert(kConsumerWarps * kWarpKeys == kSlice);
constexpr int kMostTokens = 4;   // of a launch
constexpr int kItems = 4;        // that the fetching warp may be ahead
constexpr int kPrepared = 2;     // that the scanning warps may be ahead
constexpr int kParts = 2;        // slices whose softmaxes may wait for those that join them
constexpr int kMostStages = 16;  // of the ring
constexpr int kMostFills = 32;   // of Kind::kFills
constexpr int kKnownRows =
    128;  // up to so many rows a warp knows all slots; more are admitted by a kernel of their own

// Instantiations: T of the tokens, S of the chunk states, W lanes for a row, room for N tokens.
template <class T_, class S_, int W_, int N_>
struct Kind {
  using T = T_;
  using S = S_;
  static constexpr int W = W_, N = N_;
  static constexpr bool kScaled = sizeof(S) == 1;
  static constexpr int kGroups = kConsumers / W;
  static constexpr int kKeys = sizeof(S) == 4 ? 2 : 4;  // that a lane group takes at a time
  static constexpr int kStageKeys = kGroups * kKeys;    // of a stage of the ring
  static constexpr int kColumns = W * 8;                // D rounded up
  static constexpr bool kMatrix = false;
  static constexpr int kJoiners = 0;               // warps that join slices; where there are none, those that attend do
  static constexpr int kReaders = kConsumerWarps;  // warps that read a stage
  // Warps that scan, in turn: one does not keep up with drafts.
  static constexpr int kScanners = N > 1 && sizeof(T) == 2 ? kPrepared : 1;
  static constexpr int kThreads = kConsumers + 32 + 32 * kScanners;
  static constexpr int kJoinThreads = kConsumers;
  static constexpr int kFills = kMostStages;  // that have barriers of their own: see RingPlace
  // That a multiprocessor holds at once: registers and shared memory are planned for them.
  static constexpr int kBlocks = N > 1 || sizeof(T) == 4 ? 1 : 2;
  static_assert(kSlice % kStageKeys == 0);
};

// The same on tensor cores, D of exactly W * 8: see matrix.cuh. MANY: for calls that give a block more than one pair.
template <class T_, int W_, int N_, bool MANY = (N_ > 1)>
struct MatrixKind : Kind<T_, T_, W_, N_> {
  static constexpr bool kMatrix = true;
  // Where there are several pairs, a warp that attends goes on to the next and waits for no other's products.
  static constexpr int kJoiners = MANY ? 4 : 0;
  using OnePair = MatrixKind<T_, W_, N_, false>;
  static constexpr int kJoinThreads = kJoiners > 0 ? 32 * kJoiners : kConsumers;
  static constexpr int kFills = kJoiners > 0 ? kMostFills : kMostStages;
  static constexpr int kThreads = Kind<T_, T_, W_, N_>::kThreads + 32 * kJoiners;
  // A stage is what one warp takes, or two: 16 KB. Nobody else waits for it, and it is given back soon.
  static constexpr int kStageKeys = 512 / W_;
  static constexpr int kReaders = kStageKeys / kWarpKeys;
};
// Drafts of float32, which registers hardly hold, go token by token; so do those of D over 128 with scaled states, which are rare.
template <class T, class S, int W>
constexpr bool kHasDrafts = sizeof(T) == 2 && (sizeof(S) == 2 || W <= 16);
template <class T, class S, int W>
constexpr bool kHasMatrix = sizeof(T) == 2 && sizeof(S) == 2 && W <= 16;
// Kernels without tensor cores: 8 lanes for a row only where D = 64 needs them, else 16; 32 where tokens are float32. Half of them
// idle there, or more.
template <class T, class S, int W>
constexpr bool kHasLanes = sizeof(T) == 4 ? W == 32 : W > 8 || sizeof(S) == 1;

// The tokens' inputs, in the order of Decode::input.
enum Input : int { kQuery, kKey, kValue, kGate, kOutGate, kInputs };

struct Decode {
  DecodeParams p;
  const int64_t* named;  // the caller's slots; p.slots may be those that were admitted
  Rows input[kInputs];
  uint32_t input_share[kInputs];  // heads that a row serves: one, or those of a group
  uint32_t chunk_size;            // at most 2^31: no length reaches more
  uint32_t heads;
  uint32_t pairs;       // (row, head)
  uint32_t candidates;  // pairs * ways
  int ways;             // blocks that may share a pair
  int tokens;           // of this launch
  int reserve;          // tokens that a row must have room for
  int page_shift;       // log2(page_rows) where paged
  int stages;           // of the ring
  int stage_bytes;
  bool admitted;    // p.slots are distinct, and have their pages
  bool bulk;        // stages are filled by bulk copies
  float scale;      // in units of log2
  int64_t entries;  // of partial results for each (pair, token): the own state, then slices
  float* partial;   // (pairs, tokens, entries, D + 8): values, then maximum and sum; null where no blocks share a pair
  unsigned* arrived;   // (P, H): ways that have stored their slices
  unsigned* read;      // (P, H): ways that have read the length
  unsigned* heads_in;  // (P): heads of which all ways have
};

// ---- shared memory ----------------------------------------------------------------------------------------------------

enum class ItemKind : int { end, zeros, run };

// What the fetching warp tells the others of a way of a (row, head).
struct Item {
  ItemKind kind;
  int row, head, entry;
  uint32_t length;        // of the sequence, without the new tokens
  uint32_t keys, offset;  // its closed chunks, and its tokens since
  int way, ways, slices;  // of the pair: which part this is, parts, slices
  bool tail;              // has the last slice, and with it the new tokens
};

// The fixed part, at the start of dynamic shared memory.
struct SharedHead {
  RingBarriers<kItems> items;
  RingBarriers<kPrepared> queries;                // of an item; left after its last products
  RingBarriers<kPrepared> scanned;                // output gates and all of the new tokens; left after its last join
  RingBarriers<kParts> parts;                     // the warps' softmaxes of a slice, where others join them
  uint64_t full[kMostFills], empty[kMostStages];  // see RingPlace
  Item item[kItems];
  int slot[kKnownRows];  // the fetching warp's own: of all rows, where it looks for earlier ones of the same slot
  float own_score[kPrepared][kMostTokens];
  float query_unit[kPrepared][kMostTokens];  // on tensor cores: see prepare_query()
  float fresh_scale[kPrepared][2][kMostTokens];
  alignas(16) float maximum[2][kMostTokens][kConsumerWarps];  // as SharedLayout::values
  float sum[2][kMostTokens][kConsumerWarps];
  int last;
  int through;  // 1 where the kernels before this one are through
};

// Behind it, in this order.
struct SharedLayout {
  int values;    // (1 or, on tensor cores, 2 in turn; N, warps, columns) floats: of a slice, warp by warp
  int prepared;  // (kPrepared, 3, N, columns) floats: queries, scaled and rotated; output gates; own values v~. On tensor
                 // cores, a query is twice as many numbers of T
  int tokens;    // (kScanners, kInputs, N, columns) of T: each scanning warp's own
  int angle;     // (kScanners, 2, columns / 2) floats: rows of the rotary tables, cosine and sine
  int fresh;     // (kPrepared, 2, N, D) of S: keys, then values of the chunks that the tokens close; N > 1 only
  int ring;      // stages: keys, values, and where scaled their scales
};

template <class K>
__host__ __device__ __forceinline__ SharedLayout shared_layout(int head_dim) {
  SharedLayout l;
  l.values = (static_cast<int>(sizeof(SharedHead)) + 127) / 128 * 128;
  l.prepared = l.values + (K::kMatrix ? 2 : 1) * K::N * kConsumerWarps * K::kColumns * 4;
  l.tokens = l.prepared + kPrepared * 3 * K::N * K::kColumns * 4;
  l.angle = l.tokens + K::kScanners * kInputs * K::N * K::kColumns * static_cast<int>(sizeof(typename K::T));
  l.fresh = l.angle + K::kScanners * K::kColumns * 4;
  const int fresh = K::N > 1 ? 2 * kPrepared * K::N * head_dim * static_cast<int>(sizeof(typename K::S)) : 0;
  l.ring = (l.fresh + fresh + 127) / 128 * 128;
  return l;
}

template <class K>
__host__ __device__ __forceinline__ int stage_bytes(int head_dim) {
  const int rows = 2 * K::kStageKeys * head_dim * static_cast<int>(sizeof(typename K::S));
  return (rows + (K::kScaled ? 2 * K::kStageKeys * 4 : 0) + 127) / 128 * 128;
}

// ---- where rows are ---------------------------------------------------------------------------------------------------

// Row of chunk state `key` among all rows of the pool.
__device__ __forceinline__ int64_t state_row(const Decode& a, int entry, int head, uint32_t key) {
  const Pool& pool = a.p.pool;
  if (!pool.page_table)
    return static_cast<int64_t>(static_cast<uint32_t>(entry) * static_cast<uint64_t>(a.heads) + head) * pool.rows + key;
  const int64_t columns = pool.rows >> a.page_shift;
  const int64_t page = pool.page_table[entry * columns + (key >> a.page_shift)];
  return ((page * a.heads + head) << a.page_shift) + (key & static_cast<uint32_t>(pool.page_rows - 1));
}

// How many chunks are closed before token i of the new ones.
template <class K>
__device__ __forceinline__ uint32_t keys_of(const Decode& a, const Item& item, int i) {
  uint32_t keys = item.keys;
  if constexpr (K::N > 1) {
    uint32_t offset = item.offset;
#pragma unroll 1
    for (; i > 0; --i) {
      if (++offset == a.chunk_size) {
        offset = 0;
        ++keys;
      }
    }
  }
  return keys;
}

// The thread's number, hidden: what follows from it would be kept in registers from item to item, and they are short.
__device__ __forceinline__ int fresh_thread() { return opaque(static_cast<int>(threadIdx.x)); }

// ---- arithmetic -------------------------------------------------------------------------------------------------------

// Every product and sum is spelled out: with other numbers of tokens, and on other chips, the compiler would join them in other
// ways, and results would differ in their last bit.

// 2^x of a score relative to the maximum.
template <class T>
__device__ __forceinline__ float weight_of(float x) {
  return sizeof(T) == 4 ? exp2f(x) : exp2_fast(x);
}

// The maximum of a softmax over no keys: below no finite score, and finite, so that 2^(-inf - maximum) is 0.
constexpr float kNoScore = -3.402823466e+38f;

}  // namespace rat::cuda
