// Backward phase 3, the short and the long family: the reverse scan of elements of two bytes, in tiles of kTokens tokens that are kept
// in registers. reverse.cu has the other cases. The forward saved none of k~, v~: the kernel makes them again.
//
//   chunk_scan_short_bwd_kernel   chunks of at most kTokens tokens. It makes p_tt and ds_tt too
//   chunk_scan_long_bwd_kernel    longer ones. Phase 1 has left p_tt and ds_tt, and the states that each tile starts with
//
// Both leave dk, dv, dgate, dq, and partial sums of dgate_bias.
//
// A team of warps takes a run of tiles and the heads of one group. Tiles of the short kernel are whole chunks. The long one cuts a
// *span*, a chunk or a few, or a segment of a longer one (span_tokens()), into tiles, and takes them from the last to the
// first: what the states before a tile receive waits in shared memory, for each head, until the tile before it asks. A thread owns
// two neighbouring elements of D and takes the heads one after the other:
//
//   0. request_group, once per tile: q, k and attention's part of dq, into shared memory, each thread its own elements
//   1. scan_forward: k~ and v~ before each token stay in registers, in T; the dot products q.k~ and dO.v~ of a token are
//      summed over a warp by shuffles, four tokens at a time (short)
//   2. barrier: the parts of all warps are there. own_weights: each warp adds them up and makes p_tt and ds_tt, one lane per token.
//      The long kernel finds them made
//   3. walk_back: gradients of k~ and v~, then dv and dgate, which are stored, and what the head adds to dq and dk, in shared
//      memory. v, gate and dO of a token, once used, make room for those of the next head: the loads have the rest of the walk
//      and the next head's beginning to arrive
//   4. store_group, after the last head: dq and dk
//
// So nothing is read twice, and each thread has up to 48 loads in flight. All loops over tokens are unrolled, since registers
// cannot be indexed: 168 of them, 12 warps per SM, in a loop of 36 KB. The teams of a block meet at each head, so that their warps
// fetch the same instructions at about the same time: apart, a seventh of the time went into waiting for instructions. About 150
// SASS instructions per token and warp (64 elements). It reads v, gate, dO and writes dv, dgate: 10 H D bytes per token, and small
// change. What a query's own key adds to dq is made from k~ as it is kept, rounded to T.
//
// Tiles are of five kinds (Kind), each with a kernel: the more is known of them, the less is asked at each token.
#include <algorithm>
#include <cfloat>
#include <type_traits>

#include "../attention/dq_tiles.h"
#include "../ptx/cp_async.cuh"
#include "../ptx/memory.cuh"
#include "../ptx/opaque.cuh"
#include "../ptx/target.cuh"
#include "families.h"
#include "scan_launch.h"

namespace rat::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTokens = static_cast<int>(short_scan::kShortChunk);
static_assert(kTokens == 16, "a half-warp has a lane for each token");
static_assert(kTokens == kStateTile, "phase 1 leaves the states that tiles start with");
constexpr int kWarps = 12;  // on an SM, by registers; by shared memory too where it has 228 KB
constexpr int kLast = kTokens - 1;

// Before compute capability 9.0 the masked forms need one register more than kWarps warps leave them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kRoomy = true;
#else
constexpr bool kRoomy = false;
#endif
// Tiles of dq come from Hopper's attention alone.
#ifdef RAT_HOPPER_CODE
constexpr bool kReadsTiles = true;
#else
constexpr bool kReadsTiles = false;
#endif

// Rows that a thread walks: pointer to its elements and steps in bytes.
struct Walk {
  char* ptr;
  int64_t batch, token, head;
};

// What is known of a tile when the kernel is compiled. Short: chunks have at most kTokens tokens, else they are long.
enum Kind : int {
  kWhole,  // kTokens tokens of one chunk, all lanes have elements: nothing is masked. Short: the chunk, and no state enters
  kOneChunk,  // of one chunk, from kTokens tokens those of the call
  kFew,       // chunks begin and end at any token, and at most kStagedKeys end
  kAny,       // the same, but any number
  kHalves     // short: as kWhole, but of two whole chunks of 8 tokens or four of 4
};
constexpr bool is_whole(Kind kind) { return kind == kWhole || kind == kHalves; }
constexpr bool is_free(Kind kind) { return kind == kFew || kind == kAny || kind == kHalves; }  // chunks meet inside
constexpr bool is_staged(Kind kind) { return kind == kFew || kind == kHalves; }
constexpr int kStagedKeys = 4;

struct TiledScan {
  ScanInput in;         // q, k; v and gate are below
  Walk v, gate, dout;   // (B, T, H, D)
  Walk dv, dgate;       // outputs; dv may be dO's memory
  Rows dq, dk;          // outputs, (B, T, G, D)
  const float* dq_sum;  // (B, T, G, D): attention's part, or its tiles
  bool dq_in_tiles;
  // (B, H, T). Short: lse and Delta. Long: p_tt and ds_tt.
  const float* first_scalar;
  const float* second_scalar;
  ChunkGrads chunk;
  const float* drunning_k;  // (N, H, D) or null
  const float* drunning_v;
  float* dinitial_k;  // (N, H, D) or null
  float* dinitial_v;
  float* bias_partial;          // (runs, H, D) or null
  int group_heads;              // H / G
  bool all_live;                // all lanes have elements
  int64_t tiles_per_run, runs;  // long: spans of a run
  int keys;                     // ends of chunks in a tile of kFew or kHalves, at most; else 1
  // Long:
  const void* tile_states;     // as TileStates has them
  const float* incoming_grad;  // as ReverseInput has it: of spans that are segments, else null
  int64_t parts;               // tiles of a span
  uint32_t zero;               // 0, which the compiler does not know
};

// Of a chunk that ends in the tile.
struct KeyShared {
  float4 angle[32];    // two cosines and two sines of its angle
  float2 grad[3][32];  // the gradient of its state as ChunkGrad has it
};

// Shared memory of a team: what a warp has to itself, for each warp, and then, short: (2, warps, 32) dot products, by parity of the
// head; long: (warps, heads of a group, 32), what the state of a tile's last token receives, two elements for k~ and two for v~.
struct WarpShared {
  float4 sums[kTokens][32];  // two elements of dq, two of dk
  uint2 rows[kTokens][32];   // q and k
  float2 self[kTokens];      // p_tt, scale * ds_tt
  uint2 before[32];          // long: k~ and v~ before the tile's first token
  KeyShared keys[1];         // and more behind it: TiledScan::keys
};
__host__ __device__ constexpr size_t warp_bytes(int keys) {
  return sizeof(WarpShared) + (keys - 1) * sizeof(KeyShared);
}
__host__ __device__ constexpr size_t shared_bytes(int warps, int keys, int64_t group_heads, bool is_long) {
  return warps * (warp_bytes(keys) + (is_long ? group_heads * 32 * sizeof(float4) : 2 * 32 * sizeof(float)));
}

template <class T>
constexpr uint32_t kInfinities = std::is_same_v<T, bf16> ? 0x7f807f80u : 0x7c007c00u;

template <class T>
__device__ __forceinline__ void unpack_pair(uint32_t raw, float (&x)[2]) {
  const float2 pair = unpack2<T>(raw);
  x[0] = pair.x;
  x[1] = pair.y;
}

// Two gates, with a bias in units of the gates.
template <class T>
__device__ __forceinline__ void gates2(uint32_t raw, const float (&bias)[2], float (&f)[2], float (&g)[2]) {
  float x[2];
  unpack_pair<T>(raw, x);
#pragma unroll
  for (int j = 0; j < 2; ++j) gates<T>(fmaf(x[j], kLogitUnit<T>, bias[j]), f[j], g[j]);
}

// Global addresses as integers that move by steps. Opaque: else all tokens' multiples of all steps would be kept over the loop
// over heads, in registers that are not there.
__device__ __forceinline__ void move(uint64_t& at, int64_t bytes) { at = opaque(at + bytes); }

// Tile `item`; long: tile item % parts of span item / parts. kAllWhole: all tiles of the call are whole.
template <bool kAllWhole, bool kLong>
__device__ __forceinline__ ScanTile scan_tile_of(const TiledScan& p, int64_t item) {
  if constexpr (kAllWhole) {
    const Sizes& s = p.in.size;
    const int64_t per_row = s.tokens / kTokens;
    ScanTile t;
    t.item = item;
    t.sequence.index = t.sequence.batch = quotient(item, per_row);
    t.sequence.begin = t.sequence.start = 0;
    t.sequence.end = s.tokens;
    t.token = t.position = (item - t.sequence.batch * per_row) * kTokens;
    t.count = kTokens;
    t.first = t.token == 0;
    t.last = t.token == s.tokens - kTokens;
    return t;
  } else if constexpr (kLong) {
    ScanTile t = tile_of(p.in.size, quotient(item, p.parts), p.in.tile);
    // Positions are below 2^31, and so is the first tile behind them.
    const uint32_t low = static_cast<uint32_t>(t.position), high = low + static_cast<uint32_t>(t.count);
    const uint32_t span = static_cast<uint32_t>(p.in.tile), part = static_cast<uint32_t>(modulo(item, p.parts));
    const uint32_t begin = low / span * span + part * kTokens, end = min(begin + kTokens, high), from = max(begin, low);
    t.item = item;
    t.count = end > from ? static_cast<int>(end - from) : 0;
    t.token += from - low;
    t.position = from;
    t.first &= from == low;  // `last` stays the span's: nobody asks for the tile's
    return t;
  } else {
    return tile_of(p.in.size, item, p.in.tile);
  }
}

// ---- gradients of chunk states ----------------------------------------------------------------------------------------

// Two cosines and two sines of an angle, signed as they rotate a gradient back.
__device__ __forceinline__ float4 angle_at(const TiledScan& p, int angle, int d) {
  if (!p.in.rotary.cos) return make_float4(1.0f, 1.0f, 0.0f, 0.0f);
  const int half = static_cast<int>(p.in.size.head_dim) / 2, i = d < half ? d : d - half;
  const float* cosine = static_cast<const float*>(p.in.rotary.cos) + int64_t{angle} * half + i;
  const float* sine = static_cast<const float*>(p.in.rotary.sin) + int64_t{angle} * half + i;
  const float sign = d < half ? 1.0f : -1.0f;
  return make_float4(cosine[0], cosine[1], sign * sine[0], sign * sine[1]);
}

// Gradient of a chunk state, two elements of it, before it is rotated back. But for kAny it is asked for long before it is added, and
// not touched in between: a use would wait.
struct ChunkGrad {
  float2 v, k, pair;  // pair: the elements that rotation mixes with k

  static __device__ __forceinline__ int64_t pair_of(const TiledScan& p, int d) {
    const int half = static_cast<int>(p.in.size.head_dim) / 2;
    return d < half ? d + half : d - half;
  }
  __device__ __forceinline__ void request(const TiledScan& p, int64_t state, int d) {
    v = k = pair = make_float2(0.0f, 0.0f);
    load_float2_if(v, p.chunk.attention_v + (state + d), true);
    load_float2_if(k, p.chunk.attention_k + (state + d), true);
    load_float2_if(pair, p.chunk.attention_k + (state + pair_of(p, d)), p.in.rotary.cos != nullptr);
  }
  // Through shared memory: the compiler would move loads to registers down to where they are used.
  static __device__ __forceinline__ void request(const TiledScan& p, int64_t state, int d, bool valid, KeyShared& key,
                                                 int lane) {
    cp_async8(shared_address(&key.grad[0][lane]), p.chunk.attention_v + (state + d), valid);
    cp_async8(shared_address(&key.grad[1][lane]), p.chunk.attention_k + (state + d), valid);
    const bool rotary = valid && p.in.rotary.cos != nullptr;  // else there is no pair: zeros
    cp_async8(shared_address(&key.grad[2][lane]), p.chunk.attention_k + (state + pair_of(p, d)), rotary);
  }
  // When it has come.
  __device__ __forceinline__ void take(const KeyShared& key, int lane) {
    v = key.grad[0][lane];
    k = key.grad[1][lane];
    pair = key.grad[2][lane];
  }
  template <class T>
  static __device__ __forceinline__ void add_returned(const void* returned, int64_t at, float2& x) {
    const T* from = static_cast<const T*>(returned) + at;
    x.x += to_float(from[0]);
    x.y += to_float(from[1]);
  }
  // Adds it to the gradients that the state receives from the token after it.
  template <class T>
  __device__ __forceinline__ void add(const TiledScan& p, const float4& angle, int64_t state, int d, float (&gk)[2],
                                      float (&gv)[2]) {
    if (p.chunk.returned_v) add_returned<T>(p.chunk.returned_v, state + d, v);
    if (p.chunk.returned_k) {
      add_returned<T>(p.chunk.returned_k, state + d, k);
      if (p.in.rotary.cos) add_returned<T>(p.chunk.returned_k, state + pair_of(p, d), pair);
    }
    gv[0] += v.x;
    gv[1] += v.y;
    gk[0] += fmaf(k.x, angle.x, pair.x * angle.z);
    gk[1] += fmaf(k.y, angle.y, pair.y * angle.w);
  }
};

// ---- steps ------------------------------------------------------------------------------------------------------------

// What a thread knows of its team and of its elements.
template <Kind kKind, bool kLong>
struct Place {
  int lane, warp, warps;
  int d;      // first of its two elements, 0 where it has none
  bool live;  // has elements
  WarpShared* shared;
  float* behind;  // what lies behind the warps' own

  __device__ __forceinline__ Place(const TiledScan& p, unsigned char* memory) {
    const Sizes& s = p.in.size;
    const int tid = static_cast<int>(threadIdx.x);
    lane = tid % 32;
    warp = tid / 32;
    warps = static_cast<int>(blockDim.x) / 32;
    live = is_whole(kKind) || 2 * tid < s.head_dim;
    d = live ? 2 * tid : 0;
    const int bytes = static_cast<int>(warp_bytes(is_staged(kKind) ? p.keys : 1));
    shared = reinterpret_cast<WarpShared*>(memory + warp * bytes);
    behind = reinterpret_cast<float*>(memory + warps * bytes);
  }
  // Dots of a warp for a head: (2, kTokens), q.k~ and dO.v~.
  __device__ __forceinline__ float* dots_of(int h, int w) const { return behind + (h % 2 * warps + w) * 32; }
  // Long: what this thread hands to the tile before, for a head of the group.
  __device__ __forceinline__ float4* handed(int group_heads, int member) const {
    return reinterpret_cast<float4*>(behind) + (warp * group_heads + member) * 32 + lane;
  }
};

// Step 0: rows of the group, and zeros for dk. Where attention's part of dq lies in its tiles, sums[t] of the first eight tokens
// has that of token t and of token t + 8, as they do.
template <class T, Kind kKind, bool kLong, class Valid>
__device__ __forceinline__ void request_group(const TiledScan& p, const Place<kKind, kLong>& place,
                                              const ScanTile& tile, int64_t group, Valid&& valid) {
  const Sizes& s = p.in.size;
  const int64_t row = tile.sequence.batch, token = tile.token, sums_row = s.q_groups * s.head_dim;
  const T* q_at = row_of<T>(p.in.q, row, token, group, place.d);
  const T* k_at = row_of<T>(p.in.k, row, token, group, place.d);
  const float* dq_at = p.dq_sum + (row * s.tokens + token) * sums_row + group * s.head_dim + place.d;
  WarpShared& shared = *place.shared;
  const bool tiles = kReadsTiles && kKind == kWhole && p.dq_in_tiles;
  if (tiles) {
    const int head_dim = static_cast<int>(s.head_dim);
    const int queries_log2 = head_dim == 128 ? 6 : 7;
    const int64_t tokens = row * s.tokens + token, number = (tokens >> queries_log2) * s.q_groups + group;
    dq_at = p.dq_sum + number * kDqTileFloats +
            dq_tile_offset(head_dim, static_cast<int>(tokens) & ((1 << queries_log2) - 1), place.d);
    // Attention leaves nothing where no query of its tile sees a key.
    const int64_t behind = ((token >> queries_log2) + 1) << queries_log2;
    const bool seen = !kLong || behind > s.key_every;
#pragma unroll
    for (int t = 0; t < kTokens / 2; ++t) {
      cp_async16(shared_address(&shared.sums[t][place.lane]), dq_at + dq_tile_offset(64, t, 0), seen);
    }
  }
#pragma unroll 4
  for (int t = 0; t < kTokens; ++t) {
    cp_async4(shared_address(&shared.rows[t][place.lane].x), q_at, valid(t));
    cp_async4(shared_address(&shared.rows[t][place.lane].y), k_at, valid(t));
    if (!tiles) {
      cp_async8(shared_address(&shared.sums[t][place.lane]), dq_at, valid(t));
      reinterpret_cast<float2*>(&shared.sums[t][place.lane])[1] = make_float2(0.0f, 0.0f);
    }
    if (is_whole(kKind) || t + 1 < tile.count) {  // addresses of rows that do not exist are not even formed
      q_at += p.in.q.token;
      k_at += p.in.k.token;
      dq_at += sums_row;
    }
  }
  cp_async_commit();
}

// Step 0, the rest, where attention's part of dq came in tiles: scaled, and rotated back by the angle of the tile's chunk. The
// elements that rotation mixes are another thread's.
template <class T, bool kLong>
__device__ __forceinline__ void rotate_group(const TiledScan& p, const Place<kWhole, kLong>& place) {
  const int pair = static_cast<int>(ChunkGrad::pair_of(p, place.d)), lane = place.lane;
  const WarpShared& other = place.shared[pair / 64 - place.warp];
  const bool rotary = p.in.rotary.cos != nullptr;  // else a NaN of the other thread would come along
  const float4 angle = place.shared->keys[0].angle[lane];
  const float scale = p.in.scale;
  float4 turned[kTokens / 2];
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kTokens / 2; ++t) {
    const float4 own = place.shared->sums[t][lane];
    const float4 mixed = rotary ? other.sums[t][pair % 64 / 2] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    turned[t].x = fmaf(scale * own.x, angle.x, scale * mixed.x * angle.z);
    turned[t].y = fmaf(scale * own.y, angle.y, scale * mixed.y * angle.w);
    turned[t].z = fmaf(scale * own.z, angle.x, scale * mixed.z * angle.z);
    turned[t].w = fmaf(scale * own.w, angle.y, scale * mixed.w * angle.w);
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kTokens / 2; ++t) {
    place.shared->sums[t][lane] = make_float4(turned[t].x, turned[t].y, 0.0f, 0.0f);
    place.shared->sums[t + kTokens / 2][lane] = make_float4(turned[t].z, turned[t].w, 0.0f, 0.0f);
  }
}

// Step 4. The sums over the heads.
template <class T, Kind kKind, bool kLong, class Valid>
__device__ __forceinline__ void store_group(const TiledScan& p, const Place<kKind, kLong>& place, const ScanTile& tile,
                                            int64_t group, Valid&& valid) {
  T* dq_at = out_row_of<T>(p.dq, tile.sequence.batch, tile.token, group, place.d);
  T* dk_at = out_row_of<T>(p.dk, tile.sequence.batch, tile.token, group, place.d);
#pragma unroll 4
  for (int t = 0; t < kTokens; ++t) {
    if (!valid(t)) break;
    const float4 sum = place.shared->sums[t][place.lane];
    *reinterpret_cast<uint32_t*>(take(dq_at, p.dq.token)) = pack2<T>(sum.x, sum.y);
    *reinterpret_cast<uint32_t*>(take(dk_at, p.dk.token)) = pack2<T>(sum.z, sum.w);
  }
}

// Which tokens of a tile reset the recurrence, and which leave a key: a bit each.
struct Edges {
  uint32_t bits = 0;  // resets, keys << 16

  __device__ __forceinline__ void find(const Sizes& s, const ScanTile& tile, int first_chunk) {
    const int length = static_cast<int>(s.reset);
    int offset = static_cast<int>(tile.position) - first_chunk * length;
    for (int t = 0; t < tile.count; ++t) {
      bits |= (offset == 0) << t | static_cast<uint32_t>(offset == length - 1) << (16 + t);
      offset = offset == length - 1 ? 0 : offset + 1;
    }
  }
  // The same of a tile that lies whole in one chunk.
  __device__ __forceinline__ void find_ends(const Sizes& s, const ScanTile& tile, int first_chunk) {
    const int length = static_cast<int>(s.reset), offset = static_cast<int>(tile.position) - first_chunk * length;
    bits = (offset == 0) | static_cast<uint32_t>(offset == length - kTokens) << (16 + kLast);
  }
  // Of kHalves half of the answers are known before the call, and nearly all others are no: `bits` is 1 where chunks have 4 tokens.
  template <Kind kKind>
  __device__ __forceinline__ bool resets(int t) const {
    if constexpr (kKind == kHalves) return t % 8 == 0 || (t % 4 == 0 && bits);
    return bits >> t & 1;
  }
  template <Kind kKind>
  __device__ __forceinline__ bool leaves_key(int t) const {
    if constexpr (kKind == kHalves) return t % 8 == 7 || (t % 4 == 3 && bits);
    return bits >> (16 + t) & 1;
  }
  template <Kind kKind>
  __device__ __forceinline__ int keys_before(int t) const {
    if constexpr (kKind == kHalves) return bits ? t / 4 : t / 8;
    return __popc(bits >> 16 & ((1u << t) - 1));
  }
  template <Kind kKind>
  __device__ __forceinline__ int keys() const {
    if constexpr (kKind == kHalves) return bits ? 4 : 2;
    return __popc(bits >> 16);
  }
};

// v, gate and dO of all tokens of a head, in registers; where they are, and where dv and dgate go. The inputs are asked for at the
// first token, and again where they were used; the outputs are stored from the last on.
template <class T>
struct HeadRows {
  uint64_t v_at, gate_at, dout_at, dv_at, dgate_at;
  uint32_t v[kTokens], gate[kTokens], dout[kTokens];

  __device__ __forceinline__ HeadRows(const TiledScan& p, const ScanTile& tile, int head, int d) {
    const auto start = [&](const Walk& w, int t) {
      const char* at =
          w.ptr + tile.sequence.batch * w.batch + (tile.token + t) * w.token + head * w.head + d * int{sizeof(T)};
      return static_cast<uint64_t>(__cvta_generic_to_global(at));
    };
    v_at = start(p.v, 0), gate_at = start(p.gate, 0), dout_at = start(p.dout, 0);
    dv_at = start(p.dv, kLast), dgate_at = start(p.dgate, kLast);
  }
  __device__ __forceinline__ void request(int t, bool in) {
    load_pair_if(v[t], v_at, in);
    load_pair_if(gate[t], gate_at, in);
    load_pair_if(dout[t], dout_at, in);
  }
  template <class Valid>
  __device__ __forceinline__ void request_all(const TiledScan& p, Valid&& valid) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      // A token that does not exist has f = 1, and all else zero: states and gradients pass it unchanged.
      gate[t] = kInfinities<T>;
      v[t] = dout[t] = 0;
      request(t, valid(t));
      if (t < kLast) {
        move(v_at, p.v.token);
        move(gate_at, p.gate.token);
        move(dout_at, p.dout.token);
      }
    }
  }
  // The compiler is kept from keeping gates and unpacked rows of the forward walk: there are no registers for them. Where no branch
  // lies between the walks, ptxas sees that they are the same: then zero, which it does not know, is a reason for them to change.
  __device__ __forceinline__ void forget_unpacked(uint32_t zero) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) forget(v[t], gate[t], dout[t]);
    if (zero == 0) return;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      v[t] ^= zero;
      gate[t] ^= zero;
      dout[t] ^= zero;
    }
  }
  __device__ __forceinline__ void inputs_to_next_head(const TiledScan& p) {
    v_at += p.v.head;
    gate_at += p.gate.head;
    dout_at += p.dout.head;
  }
  // Rows of the head that the addresses are at, of its first kTokens tokens, to L2: 128 bytes of a token for a warp. `here`: the
  // token that the addresses are at. Where all lanes have elements.
  __device__ __forceinline__ void prefetch(const TiledScan& p, int lane, int here) const {
    const int t = lane % kTokens - here;
    const auto line = [&](uint64_t at, const Walk& w) {
      prefetch_l2(reinterpret_cast<const void*>(at + t * w.token - lane * 2 * int{sizeof(T)}));
    };
    lane < kTokens ? line(v_at, p.v) : line(gate_at, p.gate);
    if (lane < kTokens) line(dout_at, p.dout);
  }
  __device__ __forceinline__ void back(const TiledScan& p) {
    move(v_at, -p.v.token);
    move(gate_at, -p.gate.token);
    move(dout_at, -p.dout.token);
    move(dv_at, -p.dv.token);
    move(dgate_at, -p.dgate.token);
  }
  __device__ __forceinline__ void to_ends(const TiledScan& p) {  // after kLast steps back
    v_at += kLast * p.v.token;
    gate_at += kLast * p.gate.token;
    dout_at += kLast * p.dout.token;
    dv_at += kLast * p.dv.token + p.dv.head;
    dgate_at += kLast * p.dgate.token + p.dgate.head;
  }
};

// Sums over the warp of eight values per lane: each step halves the values that a lane has, it gives away half and takes what the
// other lane has of its own half. Lane l ends with the sum of value l / 4.
__device__ __forceinline__ float sum_eight(float (&part)[8], int lane) {
#pragma unroll
  for (int step = 4; step > 0; step /= 2) {
    const bool upper = lane & 4 * step;
#pragma unroll
    for (int i = 0; i < step; ++i) {
      const float give = upper ? part[i] : part[i + step], own = upper ? part[i + step] : part[i];
      part[i] = own + __shfl_xor_sync(kFullWarp, give, 4 * step);
    }
  }
  part[0] += __shfl_xor_sync(kFullWarp, part[0], 2);
  part[0] += __shfl_xor_sync(kFullWarp, part[0], 1);
  return part[0];
}

// Step 1. The states before each token, in T, and, short, this warp's part of the dots.
template <class T, Kind kKind, bool kLong>
__device__ __forceinline__ void scan_forward(const Place<kKind, kLong>& place, const HeadRows<T>& rows,
                                             const Edges& edges, const float (&bias)[2], int h, float (&k_state)[2],
                                             float (&v_state)[2], uint32_t (&k_before)[kTokens],
                                             uint32_t (&v_before)[kTokens]) {
  const int lane = place.lane;
  float part[8];  // of q.k~ of four tokens and of dO.v~
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    // k~ as the token before left it, also where this one starts anew: walk_back takes it for that token's own.
    if (is_free(kKind)) k_before[t] = pack2<T>(k_state[0], k_state[1]);
    if (is_free(kKind) ? edges.template resets<kKind>(t)
                       : t == 0 && ((kKind == kWhole && !kLong) || edges.template resets<kKind>(0))) {
      k_state[0] = k_state[1] = v_state[0] = v_state[1] = 0.0f;
    }
    if (!is_free(kKind)) k_before[t] = pack2<T>(k_state[0], k_state[1]);
    v_before[t] = pack2<T>(v_state[0], v_state[1]);
    const uint2 raw = place.shared->rows[t][lane];
    float f[2], g[2], q[2], k[2], v[2], dout[2];
    gates2<T>(rows.gate[t], bias, f, g);
    unpack_pair<T>(raw.y, k);
    unpack_pair<T>(rows.v[t], v);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      k_state[j] = fmaf(f[j], k_state[j], g[j] * k[j]);
      v_state[j] = fmaf(f[j], v_state[j], g[j] * v[j]);
    }
    if constexpr (kLong) continue;
    unpack_pair<T>(raw.x, q);
    unpack_pair<T>(rows.dout[t], dout);
    part[t % 4] = fmaf(q[1], k_state[1], q[0] * k_state[0]);
    part[4 + t % 4] = fmaf(dout[1], v_state[1], dout[0] * v_state[0]);
    if (t % 4 < 3) continue;
    const float sum = sum_eight(part, lane);
    if (lane % 4 == 0) place.dots_of(h, place.warp)[lane / 16 * 16 + t / 4 * 4 + lane / 4 % 4] = sum;
  }
}

// In its first chunk a token attends to itself alone: its weight is 1 and its score has no gradient, whatever Delta lost when y was
// rounded.
enum SelfKind : int { kNone, kAlone, kAttends };

// Step 2. p_tt and scale * ds_tt, one lane per token. `scalar`: the first scalar of the token of lanes 0 ... 15, the second of that of
// lanes 16 ... 31.
template <Kind kKind, bool kLong>
__device__ __forceinline__ void own_weights(const TiledScan& p, const Place<kKind, kLong>& place, int h, int self_kind,
                                            float scalar) {
  const int lane = place.lane;
  if constexpr (kLong) {
    const float ds = __shfl_xor_sync(kFullWarp, scalar, 16);
    if (lane < kTokens) place.shared->self[lane] = make_float2(scalar, p.in.scale * ds);
    __syncwarp();
    return;
  }
  float dot = 0.0f;
  for (int w = 0; w < place.warps; ++w) dot += place.dots_of(h, w)[lane];
  const float dp = __shfl_xor_sync(kFullWarp, dot, 16), delta = __shfl_xor_sync(kFullWarp, scalar, 16);
  if (lane < kTokens) {
    float2 self = make_float2(self_kind == kAlone ? 1.0f : 0.0f, 0.0f);
    if (self_kind == kAttends) {
      self.x = expf(fmaf(p.in.scale, dot, -scalar));
      self.y = p.in.scale * self.x * (dp - delta);
    }
    place.shared->self[lane] = self;
  }
  __syncwarp();
}

// Step 3. k_grad and v_grad: what the state of the last token receives from the tokens after it; in the end what the state before the
// first does. `more`: another head of the group follows, whose rows are asked for; what else it needs, by ask_next().
template <class T, Kind kKind, bool kLong, class Valid, class AskNext>
__device__ __forceinline__ void walk_back(const TiledScan& p, const Place<kKind, kLong>& place, const Edges& edges,
                                          int64_t state_at, int first_chunk, const float (&bias)[2],
                                          const uint32_t (&k_before)[kTokens], const uint32_t (&v_before)[kTokens],
                                          bool more, Valid&& valid, HeadRows<T>& rows, float (&k_grad)[2],
                                          float (&v_grad)[2], float (&dbias)[2], const float (&k_last)[2],
                                          AskNext&& ask_next) {
  WarpShared& shared = *place.shared;
  const int lane = place.lane;
  uint2 raw = shared.rows[kLast][lane];
  float2 own = shared.self[kLast];
  float k_now[2] = {k_last[0], k_last[1]};  // k~ of the token
#pragma unroll
  for (int t = kLast; t >= 0; --t) {
    float f[2], g[2], q[2], k[2], v[2], dout[2], k_past[2], v_past[2], dk[2], dv[2], dgate[2];
    float4 sum = shared.sums[t][lane];
    unpack_pair<T>(raw.x, q);
    unpack_pair<T>(raw.y, k);
    unpack_pair<T>(rows.v[t], v);
    unpack_pair<T>(rows.dout[t], dout);
    unpack_pair<T>(k_before[t], k_past);
    unpack_pair<T>(v_before[t], v_past);
    gates2<T>(rows.gate[t], bias, f, g);
    sum.x = fmaf(own.y, k_now[0], sum.x);
    sum.y = fmaf(own.y, k_now[1], sum.y);
    k_now[0] = k_past[0];
    k_now[1] = k_past[1];
    if (is_free(kKind) && edges.template resets<kKind>(t)) k_past[0] = k_past[1] = 0.0f;
    const float probability = own.x, ds = own.y;
    if (t > 0) {
      raw = shared.rows[t - 1][lane];
      own = shared.self[t - 1];
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      v_grad[j] = fmaf(probability, dout[j], v_grad[j]);
      k_grad[j] = fmaf(ds, q[j], k_grad[j]);
    }
    if (is_free(kKind) && edges.template leaves_key<kKind>(t)) {
      const int before = edges.template keys_before<kKind>(t);
      if constexpr (is_staged(kKind)) {  // a few instructions, so that no branch parts the tokens
        const KeyShared& key = shared.keys[before];
        k_grad[0] += key.grad[0][lane].x;
        k_grad[1] += key.grad[0][lane].y;
        v_grad[0] += key.grad[1][lane].x;
        v_grad[1] += key.grad[1][lane].y;
      } else {
        const int64_t state = state_at + before * static_cast<int>(p.in.size.head_dim);
        ChunkGrad grad;
        grad.request(p, state, place.d);
        grad.add<T>(p, angle_at(p, first_chunk + before, place.d), state, place.d, k_grad, v_grad);
      }
    }
    // They are a_t and b_t now.
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      dk[j] = g[j] * k_grad[j];
      dv[j] = g[j] * v_grad[j];
      dgate[j] = f[j] * fmaf(dv[j], v_past[j] - v[j], dk[j] * (k_past[j] - k[j]));
      dbias[j] += dgate[j];
      k_grad[j] *= f[j];
      v_grad[j] *= f[j];
    }
    sum.z += dk[0];
    sum.w += dk[1];
    shared.sums[t][lane] = sum;
    if (is_free(kKind) && edges.template resets<kKind>(t)) k_grad[0] = k_grad[1] = v_grad[0] = v_grad[1] = 0.0f;
    store_pair_if(rows.dv_at, pack2<T>(dv[0], dv[1]), valid(t));
    store_pair_if(rows.dgate_at, pack2<T>(dgate[0], dgate[1]), valid(t));
    rows.request(t, more && valid(t));
    // No earlier than this, when states that are done with have left registers. The masked form of f16 would spill all the same.
    constexpr bool kPrefetch = is_whole(kKind) || (kKind == kOneChunk && std::is_same_v<T, bf16>);
    if (kPrefetch && t == kTokens * 3 / 4 && more && (is_whole(kKind) || (p.all_live && valid(kLast)))) {
      rows.prefetch(p, lane, t);
    }
    if (t == kTokens / 4) ask_next();
    if (t > 0) rows.back(p);
  }
  rows.to_ends(p);
  constexpr bool kMayReset = kKind == kOneChunk || (kKind == kWhole && kLong);
  if (kMayReset && edges.template resets<kKind>(0)) k_grad[0] = k_grad[1] = v_grad[0] = v_grad[1] = 0.0f;
}

// ---- what a head and a sequence bring along -----------------------------------------------------------------------------

// A bias as it lies in memory, to units of the gates. A token that does not exist has a gate of +inf, which a bias of -inf would
// make NaN: the largest float shuts gates as well.
template <class T>
__device__ __forceinline__ void scale_bias(const float (&raw)[2], float (&bias)[2]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    bias[j] = kLogitUnit<T> * raw[j];
    if (bias[j] > FLT_MAX) bias[j] = FLT_MAX;
  }
}

// Offset of (sequence, head, d) in a running state. `tile_again` makes the tile anew where it is rarely needed: kept, it costs
// registers.
__device__ __forceinline__ int64_t running_at(const Sizes& s, const ScanTile& tile, int h, int d) {
  return (tile.sequence.index * s.heads + h) * s.head_dim + d;
}

// The states before the first token of the tile, but for chunks that start in it. Long: from shared memory, where there are zeros if
// phase 1 has left none.
template <class T, Kind kKind, bool kLong, class TileAgain>
__device__ __forceinline__ void states_before(const TiledScan& p, const Place<kKind, kLong>& place,
                                              TileAgain&& tile_again, int h, int d, float (&k_state)[2],
                                              float (&v_state)[2]) {
  k_state[0] = k_state[1] = v_state[0] = v_state[1] = 0.0f;
  if constexpr (kLong) {
    const uint2 raw = place.shared->before[place.lane];
    unpack_pair<T>(raw.x, k_state);
    unpack_pair<T>(raw.y, v_state);
  }
  if (is_whole(kKind) || !p.in.initial_k) return;
  if (const ScanTile again = tile_again(); again.first) {
    const int64_t at = running_at(p.in.size, again, h, d);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      k_state[j] = p.in.initial_k[at + j];
      v_state[j] = p.in.initial_v[at + j];
    }
  }
}

// What the state of the last token of the tile receives from the tokens after it: f_{t+1} a_{t+1} and f_{t+1} b_{t+1}.
template <class TileAgain>
__device__ __forceinline__ void gradients_after(const TiledScan& p, TileAgain&& tile_again, int h, int d,
                                                float (&k_grad)[2], float (&v_grad)[2]) {
  k_grad[0] = k_grad[1] = v_grad[0] = v_grad[1] = 0.0f;
  if (!p.drunning_k && !p.drunning_v) return;
  if (const ScanTile again = tile_again(); again.last) {
    const int64_t at = running_at(p.in.size, again, h, d);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (p.drunning_k) k_grad[j] = p.drunning_k[at + j];
      if (p.drunning_v) v_grad[j] = p.drunning_v[at + j];
    }
  }
}

template <Kind kKind, class TileAgain>
__device__ __forceinline__ void store_initial(const TiledScan& p, TileAgain&& tile_again, int h, int d, bool live,
                                              const float (&k_grad)[2], const float (&v_grad)[2]) {
  if (is_whole(kKind) || !p.dinitial_k) return;
  if (const ScanTile again = tile_again(); again.first && live) {
    const int64_t at = running_at(p.in.size, again, h, d);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      p.dinitial_k[at + j] = k_grad[j];
      p.dinitial_v[at + j] = v_grad[j];
    }
  }
}

// ---- the kernel -------------------------------------------------------------------------------------------------------

// The number of this thread's team among all of the call. Made at each use. All lanes of a warp come here together.
__device__ __forceinline__ unsigned this_team() {
  return blockIdx.x * blockDim.y + warp_uniform(static_cast<int>(threadIdx.y));
}

template <class T, Kind kKind, bool kLong>
__device__ __forceinline__ void scan_tile(const TiledScan& p, const Place<kKind, kLong>& place, unsigned run,
                                          int64_t item, const ScanTile& tile, bool first_tile) {
  const Sizes& s = p.in.size;
  const int lane = place.lane, d = place.d, count = tile.count;
  const bool live = place.live;
  // Made anew where they are needed: kept, they cost a spill.
  const auto groups_again = [&] { return opaque(static_cast<unsigned>(s.q_groups)); };
  const auto group_again = [&]() -> int64_t { return this_team() % groups_again(); };
  const auto tile_again = [&] { return scan_tile_of<is_whole(kKind), kLong>(p, opaque(item)); };
  const int first_head = static_cast<int>(group_again()) * p.group_heads;
  const auto bias_partial = [&](int h) {
    // Of some kinds made anew. Lanes without elements are not here, so this is no place for this_team(): whichever lanes come agree.
    constexpr bool kAgain = (kKind == kOneChunk || is_staged(kKind)) && !kLong;
    const auto team_of_active = [] { return blockIdx.x * blockDim.y + __reduce_max_sync(__activemask(), threadIdx.y); };
    const unsigned run_again = kAgain ? team_of_active() / groups_again() : run;
    return reinterpret_cast<float2*>(p.bias_partial + (static_cast<int64_t>(run_again) * s.heads + h) * s.head_dim + d);
  };
  const int own_count = live ? count : 0;
  const auto valid = [&](int t) { return is_whole(kKind) || t < own_count; };

  Edges edges;
  const int first_chunk = static_cast<int>(quotient(tile.position, s.key_every));
  if constexpr (kKind == kHalves) {
    edges.bits = s.reset == 4;
  } else if constexpr (kKind != kWhole) {
    edges.find(s, tile, first_chunk);
  } else if constexpr (kLong) {
    edges.find_ends(s, tile, first_chunk);
  }
  // Does the chunk of a tile of one chunk end in it?
  bool closes = kKind == kWhole;
  if (kKind == kOneChunk) closes = count > 0 && edges.template leaves_key<kKind>(count - 1);
  if (kKind == kWhole && kLong) closes = edges.template leaves_key<kKind>(kLast);
  // Long: the states that phase 1 has left. It has none of a chunk's first token; a sequence's first is brought along, if at all.
  [[maybe_unused]] uint32_t states_place = 0;
  if constexpr (kLong && kKind != kWhole) {
    if (own_count > 0 && !tile.first && !edges.template resets<kKind>(0)) {
      states_place = static_cast<uint32_t>(state_place(s, tile.sequence, tile.token)) + 1;
    }
  }
  const auto request_before = [&](int h) {
    const bool left = kKind == kWhole ? !edges.template resets<kKind>(0) : states_place > 0;
    const int64_t state = kKind == kWhole ? item : int64_t{states_place} - left;
    const T* const from = static_cast<const T*>(p.tile_states) + (state * s.heads + h) * 2 * s.head_dim + d;
    cp_async4(shared_address(&place.shared->before[lane].x), from, left);
    cp_async4(shared_address(&place.shared->before[lane].y), from + s.head_dim, left);
  };
  if constexpr (kLong) request_before(first_head);
  request_group<T>(p, place, tile, group_again(), valid);
  int64_t state_at = chunk_offset(s, p.chunk.layout, tile.sequence.index, first_head) + first_chunk * s.head_dim;

  HeadRows<T> rows(p, tile, first_head, d);
  int64_t scalar_at = (tile.sequence.batch * s.heads + first_head) * s.tokens + tile.token + lane % 16;
  const int self_kind = lane % 16 >= count ? kNone : tile.position + lane % 16 < s.key_every ? kAlone : kAttends;
  const auto load_scalar = [&]() {
    return is_whole(kKind) || self_kind != kNone ? (lane < 16 ? p.first_scalar : p.second_scalar)[scalar_at] : 0.0f;
  };
  rows.request_all(p, valid);
  float scalar = load_scalar();
  // rotate_group() wants it of every tile.
  if (kKind == kWhole || (kKind == kOneChunk && closes))
    place.shared->keys[0].angle[lane] = angle_at(p, first_chunk, d);
  if constexpr (is_staged(kKind)) {
#pragma unroll 1
    for (int i = 0; i < edges.template keys<kKind>(); ++i)
      place.shared->keys[i].angle[lane] = angle_at(p, first_chunk + i, d);
  }
  const auto bias_at = [&](int h) { return p.in.gate_bias + (opaque(h) * static_cast<int>(s.head_dim) + d); };
  float raw_bias[2] = {0.0f, 0.0f};
  load_float_if(raw_bias[0], bias_at(first_head), p.in.gate_bias != nullptr);
  load_float_if(raw_bias[1], bias_at(first_head) + 1, p.in.gate_bias != nullptr);

#pragma unroll 1
  for (int h = first_head; h < first_head + p.group_heads; ++h) {
    const bool more = h + 1 < first_head + p.group_heads;
    float bias[2], dbias[2] = {0.0f, 0.0f}, k_state[2], v_state[2];
    cp_async_wait<0>();  // here, not before the loop: there it would be moved before the loads of v, gate and dO
    scale_bias<T>(raw_bias, bias);
    if constexpr (kReadsTiles && kKind == kWhole) {
      if (p.dq_in_tiles && h == first_head) rotate_group<T>(p, place);
    }
    states_before<T>(p, place, tile_again, h, d, k_state, v_state);
    uint32_t k_before[kTokens], v_before[kTokens];
    if constexpr (is_staged(kKind)) {
#pragma unroll 1
      for (int i = 0; i < edges.template keys<kKind>(); ++i) {
        ChunkGrad::request(p, state_at + i * static_cast<int>(s.head_dim), d, true, place.shared->keys[i], lane);
      }
    } else if constexpr (kKind != kAny) {
      ChunkGrad::request(p, state_at, d, closes, place.shared->keys[0], lane);
    }
    cp_async_commit();
    scan_forward(place, rows, edges, bias, h, k_state, v_state, k_before, v_before);

    float k_grad[2], v_grad[2];
    if constexpr (kLong) {
      const float4 after = *place.handed(p.group_heads, h - first_head);
      k_grad[0] = after.x, k_grad[1] = after.y, v_grad[0] = after.z, v_grad[1] = after.w;
    } else {
      gradients_after(p, tile_again, h, d, k_grad, v_grad);
    }
    // Short: the dots of all warps are there. The next head's go to the other half: who is two heads ahead has passed the barrier
    // of the head between, before which all have read these. Long: for the teams' step alone.
    __syncthreads();
    own_weights(p, place, h, self_kind, scalar);
    cp_async_wait<0>();
    if constexpr (!is_free(kKind)) {
      ChunkGrad chunk_grad;
      chunk_grad.take(place.shared->keys[0], lane);
      if (closes) chunk_grad.add<T>(p, place.shared->keys[0].angle[lane], state_at, d, k_grad, v_grad);
    } else if constexpr (is_staged(kKind)) {
      // Rotated back, in its place: the gradients that walk_back() adds.
#pragma unroll 1
      for (int i = 0; i < edges.template keys<kKind>(); ++i) {
        KeyShared& key = place.shared->keys[i];
        float k_sum[2] = {0.0f, 0.0f}, v_sum[2] = {0.0f, 0.0f};
        ChunkGrad chunk_grad;
        chunk_grad.take(key, lane);
        chunk_grad.add<T>(p, key.angle[lane], state_at + i * static_cast<int>(s.head_dim), d, k_sum, v_sum);
        key.grad[0][lane] = make_float2(k_sum[0], k_sum[1]);
        key.grad[1][lane] = make_float2(v_sum[0], v_sum[1]);
      }
    }
    rows.forget_unpacked(kLong ? p.zero : 0);
    scalar_at += s.tokens;
    if (more) {
      rows.inputs_to_next_head(p);
      scalar = load_scalar();
    }
    const auto ask_next = [&] {
      const float* const at = bias_at(h + 1);
      load_float_if(raw_bias[0], at, more && p.in.gate_bias);
      load_float_if(raw_bias[1], at + 1, more && p.in.gate_bias);
      if (kLong && more) {
        request_before(h + 1);
        cp_async_commit();
      }
    };
    walk_back(p, place, edges, state_at, first_chunk, bias, k_before, v_before, more, valid, rows, k_grad, v_grad,
              dbias, k_state, ask_next);
    state_at += p.chunk.layout.head;
    if constexpr (kLong) {
      *place.handed(p.group_heads, h - first_head) = make_float4(k_grad[0], k_grad[1], v_grad[0], v_grad[1]);
    }

    const bool has_tokens = is_whole(kKind) || own_count > 0;
    store_initial<kKind>(p, tile_again, h, d, has_tokens, k_grad, v_grad);
    if (p.bias_partial && has_tokens) {  // summed over the tiles of the run
      // Nobody else adds to these, and nothing waits for the sum.
      float2* const at = bias_partial(h);
      if (first_tile) {
        *at = make_float2(dbias[0], dbias[1]);
      } else {
        add_global(&at->x, dbias[0]);
        add_global(&at->y, dbias[1]);
      }
    }
  }
  store_group<T>(p, place, tile_again(), group_again(), valid);
  if constexpr (!kLong) __syncthreads();  // all have read the last head's dots: the next tile's may take their place
}

// Long: what the state of a span's last token receives, for all heads of the group, to where its last tile asks for it.
template <Kind kKind>
__device__ __forceinline__ void receive(const TiledScan& p, const Place<kKind, true>& place, const ScanTile& span,
                                        int first_head) {
  const Sizes& s = p.in.size;
  for (int m = 0; m < p.group_heads; ++m) {
    const int h = first_head + m;
    float k_grad[2] = {0.0f, 0.0f}, v_grad[2] = {0.0f, 0.0f};
    if (p.incoming_grad && span.count > 0) {
      const float* const at = p.incoming_grad + segment_at(s, span.item, h, 3, 0) + place.d;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        k_grad[j] = at[j];
        v_grad[j] = at[s.head_dim + j];
      }
    } else if (span.count > 0) {
      gradients_after(p, [&] { return span; }, h, place.d, k_grad, v_grad);
    }
    *place.handed(p.group_heads, m) = make_float4(k_grad[0], k_grad[1], v_grad[0], v_grad[1]);
  }
}

// The tiles of a team's run, all of one kind. A team: threadIdx.y and the threads of that.
template <class T, Kind kKind, bool kLong>
__device__ __forceinline__ void scan_run(const TiledScan& p) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const Sizes& s = p.in.size;
  const int keys = is_staged(kKind) ? p.keys : 1;
  unsigned char* const memory =
      shared_memory + threadIdx.y * shared_bytes(static_cast<int>(blockDim.x / 32), keys, p.group_heads, kLong);
  const unsigned groups = static_cast<unsigned>(s.q_groups), run = this_team() / groups;
  bool first_tile = true;

  const int parts = kLong ? static_cast<int>(p.parts) : 1;
  int left = static_cast<int>(p.tiles_per_run) * parts;
  int64_t item = static_cast<int64_t>(run) * left;
  if (kLong) item += left - 1;  // they go from the last tile to the first
  constexpr int kStep = kLong ? -1 : 1;
  const auto first_head = [&] { return static_cast<int>(this_team() % groups) * p.group_heads; };
#pragma unroll 1
  for (; left > 0; --left, item += kStep) {
    // A team that has no tokens goes the same way, for the barriers, with nothing to load and to store. Where all tiles are whole
    // every team has all of its tiles.
    const int64_t items = p.in.items * parts;
    const bool exists = is_whole(kKind) || item < items;
    ScanTile tile = scan_tile_of<is_whole(kKind), kLong>(p, exists ? item : items - 1);
    if (!exists) tile.count = 0;
    if constexpr (kLong) {
      if (left % parts == 0 && exists) {
        ScanTile span = tile;
        span.item = quotient(item, parts);
        if (kKind != kWhole) span = tile_of(s, span.item, p.in.tile);
        receive(p, Place<kKind, true>(p, memory), span, first_head());
      }
    }
    if (!is_whole(kKind) && !__syncthreads_or(tile.count)) continue;
    scan_tile<T>(p, Place<kKind, kLong>(p, memory), run, tile.item, tile, first_tile);
    if (tile.count) first_tile = false;
  }
  if constexpr (!is_whole(kKind)) {
    const Place<kKind, kLong> place(p, memory);
    const int64_t row = static_cast<int64_t>(run) * s.heads + first_head();
    if (p.bias_partial && place.live && first_tile && run < p.runs) {  // a run without tokens
      for (int m = 0; m < p.group_heads; ++m) {
        *reinterpret_cast<float2*>(p.bias_partial + (row + m) * s.head_dim + place.d) = make_float2(0.0f, 0.0f);
      }
    }
  }
}

// The bound limits registers, so that kWarps warps fit: with 144 or 128 of them spills cost more than the added warps bring.
template <Kind kKind>
constexpr int kBlocks = kRoomy && !is_whole(kKind) ? 2 : kWarps / (kThreads / 32);

template <class T, Kind kKind>
__global__ void __launch_bounds__(kThreads, kBlocks<kKind>)
    chunk_scan_short_bwd_kernel(const __grid_constant__ TiledScan p) {
  scan_run<T, kKind, false>(p);
}

template <class T, Kind kKind>
__global__ void __launch_bounds__(kThreads, kBlocks<kKind>)
    chunk_scan_long_bwd_kernel(const __grid_constant__ TiledScan p) {
  scan_run<T, kKind, true>(p);
}

// ---- launches ---------------------------------------------------------------------------------------------------------

bool is_long(const Sizes& s) { return s.reset > kTokens; }

// Whole tiles alone, in spans of one length.
bool whole_spans(const AttentionBwdParams& a, int64_t span) {
  const Sizes& s = a.fwd.size;
  return s.head_dim % 64 == 0 && !s.cu_seqlens && !s.lengths && s.tokens % span == 0 && !a.dinitial.running_k;
}

bool all_whole(const AttentionBwdParams& a) {
  const Sizes& s = a.fwd.size;
  return s.reset % kTokens == 0 && whole_spans(a, is_long(s) ? span_tokens(s) : kTokens);
}

// The kind of all tiles of a call.
Kind kind_of(const AttentionBwdParams& a) {
  const Sizes& s = a.fwd.size;
  if (all_whole(a)) return kWhole;
  if (s.reset % kTokens == 0) return kOneChunk;
  if ((s.reset == 4 || s.reset == 8) && whole_spans(a, kTokens)) return kHalves;
  return s.reset * kStagedKeys >= kTokens ? kFew : kAny;
}

// `tile`: tokens of a tile, long: of a span, which has `parts` tiles. A run has tiles_per_run of them.
struct Deal {
  int64_t tile, parts, items, tiles_per_run, runs;
};

// A run of one tile is fastest; but with a bias each leaves partial sums, so about 8,192 of them where there is so much work.
Deal deal(const AttentionBwdParams& a) {
  const Sizes& s = a.fwd.size;
  Deal d;
  d.tile = is_long(s) ? span_tokens(s) : tile_size(s, true, kTokens, kTokens);
  d.parts = is_long(s) ? ceil_div(d.tile, kTokens) : 1;
  d.items = work_items(s, d.tile);
  if (d.items * d.parts > INT64_C(0xffffffff)) {
    throw std::runtime_error("rat_ext: the reverse scan needs " + std::to_string(d.items * d.parts) +
                             " tiles, more than it can number (4294967295)");
  }
  d.tiles_per_run = a.dgate_bias ? std::min<int64_t>(64, std::max<int64_t>(1, d.items * s.q_groups / 8192)) : 1;
  if (is_whole(kind_of(a))) {  // runs of equal length
    while (d.items % d.tiles_per_run != 0) --d.tiles_per_run;
  }
  d.runs = ceil_div(d.items, d.tiles_per_run);
  return d;
}

// A team's warps, and its shared memory.
int team_threads(const Sizes& s) { return static_cast<int>(round_up(s.head_dim / 2, 32)); }

// Chunks whose ends are staged, at most, in a tile of kind kFew or kHalves.
int staged_keys(const Sizes& s) {
  return is_long(s) || s.reset * kStagedKeys < kTokens ? 1 : static_cast<int>(kTokens / s.reset);
}

int64_t team_bytes(const Sizes& s) {
  return static_cast<int64_t>(shared_bytes(team_threads(s) / 32, staged_keys(s), s.heads / s.q_groups, is_long(s)));
}

Walk walk(const Rows& r) { return {static_cast<char*>(r.ptr), r.batch * 2, r.token * 2, r.head * 2}; }

struct Workspace {
  Piece<float> bias_partial;   // (runs, H, D)
  Piece<float> incoming_grad;  // of segments
};

void launch_scan(const AttentionBwdParams& a, const BwdScratch& scratch, const Deal& d, const Workspace& w,
                 cudaStream_t stream) {
  const Sizes& s = a.fwd.size;
  TiledScan p{};
  p.in = scan_input(a.fwd);
  p.in.tile = d.tile;
  p.in.items = d.items;
  p.v = walk(a.fwd.v);
  p.gate = walk(a.fwd.gate);
  p.dout = walk(scratch.dout);
  p.dv = walk(a.dv);
  p.dgate = walk(a.dgate);
  p.dq = a.dq;
  p.dk = a.dk;
  p.dq_sum = scratch.dq;
  p.dq_in_tiles = scratch.dq_in_tiles;
  p.first_scalar = is_long(s) ? scratch.p_self : static_cast<const float*>(a.fwd.lse);
  p.second_scalar = is_long(s) ? scratch.ds_self : scratch.delta;
  p.chunk = chunk_grads(a, scratch);
  p.drunning_k = static_cast<const float*>(a.drunning_k);
  p.drunning_v = static_cast<const float*>(a.drunning_v);
  p.dinitial_k = static_cast<float*>(a.dinitial.running_k);
  p.dinitial_v = static_cast<float*>(a.dinitial.running_v);
  p.group_heads = static_cast<int>(s.heads / s.q_groups);
  p.tiles_per_run = d.tiles_per_run;
  p.runs = d.runs;
  p.bias_partial = w.bias_partial;
  p.parts = d.parts;
  p.keys = staged_keys(s);
  p.tile_states = scratch.tile_states.get();
  if (w.incoming_grad.taken()) {
    ReverseInput r{};
    r.in = scan_input(a.fwd);
    r.dout = scratch.dout;
    r.p_self = scratch.p_self;
    r.ds_self = scratch.ds_self;
    r.chunk = p.chunk;
    r.drunning_k = p.drunning_k;
    r.drunning_v = p.drunning_v;
    r.incoming_grad = w.incoming_grad;
    reverse_segments(r, true, stream);
    p.incoming_grad = w.incoming_grad;
  }

  const int64_t teams = d.runs * s.q_groups;
  if (teams > 0) {
    p.all_live = s.head_dim % 64 == 0;
    const bool all = is_whole(kind_of(a));
    const int threads = team_threads(s), bytes = static_cast<int>(team_bytes(s));
    // Several teams where shared memory holds kWarps warps all the same.
    const int needed = bytes / (threads / 32) * kWarps + kWarps / (kThreads / 32) * 1024;
    const bool roomy = device_attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>() >= needed;
    int in_block = roomy ? std::max(1, kThreads / threads) : 1;
    while (all && teams % in_block != 0) --in_block;
    const auto launch = [&](auto* kernel, const char* name) {
      const int shared = in_block * bytes;
      allow_shared_memory(kernel, shared, "chunk_scan_bwd shared memory");
      kernel<<<grid_x(ceil_div(teams, in_block), name), dim3(threads, in_block), shared, stream>>>(p);
      check_launch(name);
    };
    const auto launch_kind = [&](auto* long_kernel, auto* short_kernel) {
      is_long(s) ? launch(long_kernel, "chunk_scan_long_bwd") : launch(short_kernel, "chunk_scan_short_bwd");
    };
    const auto launch_type = [&](auto element) {
      using T = decltype(element);
      switch (kind_of(a)) {
        case kWhole: return launch_kind(chunk_scan_long_bwd_kernel<T, kWhole>, chunk_scan_short_bwd_kernel<T, kWhole>);
        case kOneChunk:
          return launch_kind(chunk_scan_long_bwd_kernel<T, kOneChunk>, chunk_scan_short_bwd_kernel<T, kOneChunk>);
        case kFew: return launch_kind(chunk_scan_long_bwd_kernel<T, kFew>, chunk_scan_short_bwd_kernel<T, kFew>);
        case kHalves: return launch(chunk_scan_short_bwd_kernel<T, kHalves>, "chunk_scan_short_bwd");
        case kAny: return launch(chunk_scan_short_bwd_kernel<T, kAny>, "chunk_scan_short_bwd");
      }
    };
    s.dtype == DType::bf16 ? launch_type(bf16()) : launch_type(f16());
  }
  if (a.dgate_bias) {
    reduce_gate_bias(p.bias_partial, d.runs, s.heads * s.head_dim, static_cast<float*>(a.dgate_bias), stream);
  }
}

// What both families ask of a call.
const char* refuses_call(const AttentionBwdParams& a) {
  const Sizes& s = a.fwd.size;
  if (s.dtype != DType::bf16 && s.dtype != DType::f16) return "elements are not of two bytes";
  if (a.fwd.gate.ptr == nullptr) return "the states are given";
  if (s.k_groups != s.q_groups) return "k has other groups than q";
  return nullptr;
}

Launch plan_scan(const AttentionBwdParams& a, const BwdScratch& scratch, Arena& arena) {
  const Sizes& s = a.fwd.size;
  const Deal d = deal(a);
  Workspace w;
  if (a.dgate_bias) w.bias_partial = arena.take<float>(d.runs * s.heads * s.head_dim);
  w.incoming_grad = take_segments(s, true, kMaxChunkBwd, 3, arena);
  return [&a, scratch, d, w](cudaStream_t stream) { launch_scan(a, scratch, d, w, stream); };
}

}  // namespace

const char* short_scan::refuses(const AttentionBwdParams& a) {
  if (const char* why = refuses_call(a)) return why;
  return is_long(a.fwd.size) ? "chunks are longer than 16 tokens" : nullptr;
}

bool short_scan::all_whole(const AttentionBwdParams& a) { return cuda::all_whole(a); }

Launch short_scan::reverse(const AttentionBwdParams& a, const BwdScratch& scratch, Arena& arena) {
  return plan_scan(a, scratch, arena);
}

const char* long_scan::refuses(const AttentionBwdParams& a) {
  if (const char* why = refuses_call(a)) return why;
  if (!is_long(a.fwd.size)) return "chunks are of at most 16 tokens";
  if (team_bytes(a.fwd.size) > device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>()) {
    return "the heads of a group are too many for its shared memory";
  }
  return nullptr;
}

bool long_scan::all_whole(const AttentionBwdParams& a) { return cuda::all_whole(a); }

int64_t long_scan::tile_states(const AttentionBwdParams& a) {
  const Sizes& s = a.fwd.size;
  return state_places(s) * s.heads * 2 * s.head_dim;
}

Launch long_scan::reverse(const AttentionBwdParams& a, const BwdScratch& scratch, Arena& arena) {
  return plan_scan(a, scratch, arena);
}

KernelList reverse_tiles_kernels() {
  static const KernelTable table = [] {
    KernelTable t;
    const auto add = [&](auto element, const char* type) {
      using T = decltype(element);
      const auto add_kind = [&](const char* form, auto* kernel) {
        t.add(reinterpret_cast<const void*>(kernel), form, type);
      };
      add_kind("chunk_scan_short_bwd<%s, whole>", chunk_scan_short_bwd_kernel<T, kWhole>);
      add_kind("chunk_scan_short_bwd<%s, one chunk>", chunk_scan_short_bwd_kernel<T, kOneChunk>);
      add_kind("chunk_scan_short_bwd<%s, few>", chunk_scan_short_bwd_kernel<T, kFew>);
      add_kind("chunk_scan_short_bwd<%s, any>", chunk_scan_short_bwd_kernel<T, kAny>);
      add_kind("chunk_scan_short_bwd<%s, halves>", chunk_scan_short_bwd_kernel<T, kHalves>);
      add_kind("chunk_scan_long_bwd<%s, whole>", chunk_scan_long_bwd_kernel<T, kWhole>);
      add_kind("chunk_scan_long_bwd<%s, one chunk>", chunk_scan_long_bwd_kernel<T, kOneChunk>);
      add_kind("chunk_scan_long_bwd<%s, few>", chunk_scan_long_bwd_kernel<T, kFew>);
    };
    add(bf16(), "bf16");
    add(f16(), "f16");
    return t;
  }();
  return table.list();
}

}  // namespace rat::cuda
