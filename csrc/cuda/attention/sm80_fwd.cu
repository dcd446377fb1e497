// Chunk attention forward on mma.sync, for bfloat16 and float16, compute capability 8.0 and newer.
//
// A block owns one (query tile, head): BM consecutive tokens of one sequence. Rows of the tile attend to the chunk states
// j < c(t) of their head and to themselves; the self term starts the running softmax of softmax.cuh (m = s_tt, l = 1) and v~_t,
// which waits in y, joins in the epilogue. y is overwritten in place.
//
// Reads per token and head: q (D, through L2 for the heads of a group), v~ and out_gate (D each), s_tt; writes y (D) and lse.
// Chunk states are read once per tile, from L2. Work: 2 products of c(t) x D multiply-adds per token and head.
//
// Warps: 4, each with MT * 16 query rows; all of O and S in registers, P goes from accumulators straight into the second
// product as its A operand.
// Shared memory: the rotated Q tile [BM][DPAD], then a ring of three key/value tiles [BN][DPAD] that holds K(0), V(0), K(1),
// V(1), ... Step i works on tile i while tiles i+1 and i+2 are in flight. The one barrier at the start of step i says both
// that tile i has landed for all threads and that all are done with tile i-1, whose slot tile i+2 then takes.
//
// Where a value that some queries of the tile see and others do not is not finite, they are attended one by one (alone.cuh).
#include "../ptx/mma.cuh"
#include "../ptx/opaque.cuh"
#include "alone.cuh"
#include "families.h"
#include "plan.h"
#include "softmax.cuh"
#include "tiles.cuh"
#include "visible.cuh"

namespace rat::cuda {
namespace {

// PAGED: chunk states may lie in pages. D from 65 to 128 has kernels without pages, whose lookup takes
// registers there.
template <int DPAD, bool PAGED>
struct FwdTraits {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  // 16-row tiles of a warp: as many as registers allow, where looking up pages takes some.
  static constexpr int kRowTiles = DPAD <= (PAGED ? 64 : 128) ? 2 : 1;
  static constexpr int kQueries = 16 * kRowTiles * kWarps;
  static constexpr int kKeys = DPAD == 256 ? 32 : 64;
  static constexpr int kSlots = 3;
  static constexpr bool kQueriesInRegisters = DPAD <= 64;
  static constexpr int kQueryBytes = kQueries * DPAD * 2;
  static constexpr int kSlotBytes = kKeys * DPAD * 2;
  static constexpr int kSharedBytes = kQueryBytes + kSlots * kSlotBytes;
  static constexpr int kSumStride = DPAD + 8;  // floats of a row of sums at the end: see epilogue()
  static_assert(kQueries * kSumStride * 4 <= kSharedBytes);
  static_assert(kSharedBytes <= 99 * 1024, "must fit the chips with the least shared memory");
};

struct FwdKernelParams {
  Sizes size;
  Rows q, out_gate, y;
  const float* cos;
  const float* sin;
  float scale_log2;  // |scale| * log2(e), above zero
  float sign;        // of scale, folded into q
  ChunkStates chunks;
  const float* s_self;
  float* lse;
  TileOrder order;
};

// What a block needs rarely, or at its end: in shared memory, out of the main loop's registers.
struct TileFacts {
  int64_t batch, first_token, head;
  int64_t states;        // offset of the head's first chunk state; in a page where there are pages
  const int32_t* pages;  // of the sequence, or null
  int blocks;            // of keys that some row sees into
  int keys;              // that the last row sees; the others see a prefix of them
  int full_blocks;       // seen whole by every row
  int rows;
  VisibleKeys visible;
  RowAngles angles;
};

// A block at work. Members are this thread's registers; rows are g and g + 8 of each of its row tiles.
template <class T, int DPAD, bool PAGED>
struct QueryTile {
  using Traits = FwdTraits<DPAD, PAGED>;
  using Layout = SwizzledTile<DPAD>;
  static constexpr int MT = Traits::kRowTiles, NT = Traits::kKeys / 8, OT = DPAD / 8;

  const FwdKernelParams& p;
  const TileFacts& facts;
  unsigned char* memory;
  int thread, lane, warp_row;
  float maximum[MT][2], sum[MT][2];  // in powers of two; sums are this lane's share of the quad's
  float o[MT][OT][4];
  float s[MT][NT][4];
  uint32_t weights[MT][NT / 2][4];

  __device__ __forceinline__ QueryTile(const FwdKernelParams& p_, const TileFacts& facts_, unsigned char* memory_)
      : p(p_), facts(facts_), memory(memory_), thread(threadIdx.x), lane(threadIdx.x % 32) {
    warp_row = thread / 32 * MT * 16;
  }
  __device__ __forceinline__ int row(int m, int r) const { return warp_row + m * 16 + r * 8 + lane / 4; }
  __device__ __forceinline__ uint32_t slot(int index) const {
    return shared_address(memory) + Traits::kQueryBytes + index * Traits::kSlotBytes;
  }
  static __device__ __forceinline__ int next(int index) { return index == Traits::kSlots - 1 ? 0 : index + 1; }

  // The softmax starts from the self term. `self` is s_self of row 0.
  __device__ __forceinline__ void begin(const float* self, int rows) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float own = row(m, r) < rows ? self[row(m, r)] * kLog2e : 0.0f;
        maximum[m][r] = first_maximum(own);
        sum[m][r] = lane % 4 == 0 ? first_sum(own) : 0.0f;
      }
#pragma unroll
      for (int n = 0; n < OT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[m][n][i] = 0.0f;
      }
    }
  }

  // Where the state of a key begins, from facts.states on.
  __device__ __forceinline__ int64_t state_offset(int key) const {
    if (!PAGED || facts.pages == nullptr) return key * p.size.head_dim;
    const int shift = p.chunks.page_shift;
    return facts.pages[key >> shift] * p.chunks.sequence + (key & ((1 << shift) - 1)) * p.size.head_dim;
  }

  // A block of keys or values into a slot; a group of cp.async, empty past the last block. Rows past the last key are zeros:
  // stale memory may hold NaN, and a weight of 0 would not silence it.
  __device__ __forceinline__ void load(const void* states, int block, int index) const {
    if (block < facts.blocks) {
      const int head_dim = static_cast<int>(p.size.head_dim), first = block * Traits::kKeys;
      const T* const base = static_cast<const T*>(states);
      if (PAGED && facts.pages != nullptr) {
        const auto row_at = [&](int row) { return base + facts.states + state_offset(first + row); };
        load_scattered_tile<T, Traits::kKeys, DPAD, Traits::kThreads>(slot(index), base, row_at, facts.keys - first,
                                                                      head_dim, opaque(thread));
      } else {
        load_tile<T, Traits::kKeys, DPAD, Traits::kThreads>(
            slot(index), base + facts.states + static_cast<int64_t>(first) * head_dim, head_dim, facts.keys - first,
            head_dim, opaque(thread));
      }
    }
    cp_async_commit();
  }

  // Rotates q into shared memory, four columns of each half at a time, so that halves need not be multiples of 8. `q` is row 0.
  __device__ __forceinline__ void load_queries(const T* q, const RowAngles& angles, int rows) const {
    constexpr int kPieces = DPAD / 8;
    const int head_dim = static_cast<int>(p.size.head_dim), half = head_dim / 2;
#pragma unroll 4
    for (int index = thread; index < Traits::kQueries * kPieces; index += Traits::kThreads) {
      const int row = index / kPieces, piece = index % kPieces;
      FourOf<T> a, b;
      float low[4] = {0.0f, 0.0f, 0.0f, 0.0f}, high[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      const bool inside = 4 * piece < half;
      if (inside && row < rows) {
        const T* from = q + row * p.q.token + 4 * piece;
        load4(from, low);
        load4(from + half, high);
        rotate4(low, high, p.cos, p.sin, angles.of(row), half, piece, 1.0f);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        a.value[j] = from_float<T>(low[j] * p.sign);
        b.value[j] = from_float<T>(high[j] * p.sign);
      }
      // Pieces past D / 2 clear the columns from D on: there are as many of them as pieces of 8 columns beyond D.
      const int low_column = inside ? 4 * piece : head_dim + (piece - head_dim / 8) * 8;
      const int high_column = inside ? 4 * piece + half : low_column + 4;
      *reinterpret_cast<FourOf<T>*>(memory + Layout::offset(row, low_column / 8) + low_column % 8 * 2) = a;
      *reinterpret_cast<FourOf<T>*>(memory + Layout::offset(row, high_column / 8) + high_column % 8 * 2) = b;
    }
  }

  __device__ __forceinline__ void mask(int block) {
    const int lane_ = opaque(lane);  // row indices are not worth registers for the few blocks that are not seen whole
    const VisibleKeys visible = facts.visible;
    const int column = block * Traits::kKeys + lane_ % 4 * 2;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        mask_row(s[m], r, visible.end(warp_row + m * 16 + r * 8 + lane_ / 4) - column, -INFINITY);
      }
    }
  }

  // Scores into rounded weights relative to 2^maximum, which is raised where it has to be.
  __device__ __forceinline__ void softmax() {
    float shrink[MT][2];
    bool raised = false;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float top = fmaxf(s[m][0][2 * r], s[m][0][2 * r + 1]);
#pragma unroll
        for (int n = 1; n < NT; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
        shrink[m][r] = raise_maximum(maximum[m][r], quad_maximum(top) * p.scale_log2);
        raised |= shrink[m][r] != 1.0f;
      }
    }
    if (__any_sync(0xffffffffu, raised)) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          sum[m][r] *= shrink[m][r];
#pragma unroll
          for (int n = 0; n < OT; ++n) {
            o[m][n][2 * r] *= shrink[m][r];
            o[m][n][2 * r + 1] *= shrink[m][r];
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[m][n][i] = exp2_fast(fmaf(s[m][n][i], p.scale_log2, -maximum[m][i / 2]));
          sum[m][i / 2] += s[m][n][i];
        }
      }
      pack_left<T>(weights[m], s[m]);
    }
  }

  // Of the warp's rows. A sum is NaN where a value that its row does not see is not finite, for 0 times it is NaN.
  __device__ __forceinline__ bool all_finite() const {
    float zero = 0.0f;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int n = 0; n < OT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) zero = fmaf(o[m][n][i], 0.0f, zero);
      }
    }
    return !__any_sync(0xffffffffu, zero != 0.0f);
  }

  // In place of the epilogue: the warp's rows one by one.
  __device__ __forceinline__ void attend_one_by_one() const {
    const int64_t batch = facts.batch, head = facts.head;
    const int half = static_cast<int>(p.size.head_dim) / 2;
#pragma unroll 1
    for (int row = warp_row; row < min(warp_row + MT * 16, facts.rows); ++row) {
      const int64_t token = facts.first_token + row, angle = static_cast<int64_t>(facts.angles.of(row)) * half;
      const int64_t scalar = (batch * p.size.heads + head) * p.size.tokens + token;
      LoneQuery<T> query;
      query.q = row_pointer<T>(p.q, batch, token, group_of(p.size, head, p.size.q_groups));
      query.cos = p.cos ? p.cos + angle : nullptr;
      query.sin = p.sin + angle;
      query.out_gate = p.out_gate.ptr ? row_pointer<T>(p.out_gate, batch, token, head) : nullptr;
      query.y = const_cast<T*>(row_pointer<T>(p.y, batch, token, head));
      query.lse = p.lse + scalar;
      query.own = p.s_self[scalar] * kLog2e;
      query.scale_log2 = p.scale_log2;
      query.sign = p.sign;
      query.keys = facts.visible.end(row);
      query.head_dim = 2 * half;
      attend_alone<DPAD>(query, static_cast<const T*>(p.chunks.k) + facts.states,
                         static_cast<const T*>(p.chunks.v) + facts.states, [&](int key) { return state_offset(key); });
    }
  }

  // v~ joins; y and lse. The sums of the warp's rows pass through shared memory, which the keys have left, so that a lane has eight
  // columns of a row; behind a row's columns lie the weight of v~ and 1 / sum.
  __device__ __forceinline__ void epilogue() const {
    const int head_dim = static_cast<int>(p.size.head_dim);
    const int64_t batch = facts.batch, first_token = facts.first_token, head = facts.head;
    const int64_t scalars = (batch * p.size.heads + head) * p.size.tokens + first_token;
    float* const sums = reinterpret_cast<float*>(memory) + warp_row * Traits::kSumStride;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float total = quad_sum(sum[m][r]);
        const int row = this->row(m, r);
        float* const to = sums + (m * 16 + r * 8 + lane / 4) * Traits::kSumStride;
        if (lane % 4 == 0) {
          const float self = row < facts.rows ? p.s_self[scalars + row] * kLog2e : 0.0f;
          *reinterpret_cast<float2*>(to + DPAD) = make_float2(exp2_fast(self - maximum[m][r]), 1.0f / total);
          if (row < facts.rows) p.lse[scalars + row] = (maximum[m][r] + log2f(total)) * kLn2;
        }
#pragma unroll
        for (int n = 0; n < OT; ++n) {
          *reinterpret_cast<float2*>(to + n * 8 + lane % 4 * 2) = make_float2(o[m][n][2 * r], o[m][n][2 * r + 1]);
        }
      }
    }
    __syncwarp();
    const int pieces = head_dim / 8, rows = min(facts.rows - warp_row, MT * 16);
#pragma unroll 1
    for (int index = lane; index < rows * pieces; index += 32) {
      const int row = index / pieces, column = index % pieces * 8;
      const float* const from = sums + row * Traits::kSumStride;
      const float2 factors = *reinterpret_cast<const float2*>(from + DPAD);
      T* y = const_cast<T*>(row_pointer<T>(p.y, batch, first_token + warp_row + row, head)) + column;
      float out[8], own[8];
      load_scratch(from + column, out);
      load_row(y, own);
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = fmaf(factors.x, own[i], out[i]) * factors.y;
      if (p.out_gate.ptr != nullptr) {
        float logit[8];
        load_row(row_pointer<T>(p.out_gate, batch, first_token + warp_row + row, head) + column, logit);
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] *= sigmoid(logit[i]);
      }
      store_row(y, out);
    }
  }
};

template <class T, int DPAD, bool PAGED>
__global__ void __launch_bounds__(FwdTraits<DPAD, PAGED>::kThreads, 2)
    chunk_attention_fwd_sm80_kernel(const __grid_constant__ FwdKernelParams p) {
  using Traits = FwdTraits<DPAD, PAGED>;
  using Layout = SwizzledTile<DPAD>;
  constexpr int MT = Traits::kRowTiles, NT = Traits::kKeys / 8;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ TileFacts facts;

  int64_t head;
  const WorkItem item = ordered_item(p.size, p.order, blockIdx.x, Traits::kQueries, &head);
  const Sequence& sequence = item.sequence;
  const int64_t first_token = sequence.begin + item.tile * Traits::kQueries;
  const int64_t owner = states_owner(p.chunks, sequence.index);
  if (first_token >= sequence.end || owner < 0) return;
  const int rows = static_cast<int>(min(static_cast<int64_t>(Traits::kQueries), sequence.end - first_token));
  const int64_t position = sequence.start + item.tile * Traits::kQueries;
  const VisibleKeys visible(p.size, position);
  const int blocks = visible.blocks(rows, Traits::kKeys);

  if (threadIdx.x == 0) {
    facts.batch = sequence.batch;
    facts.first_token = first_token;
    facts.head = head;
    const bool paged = PAGED && p.chunks.page_table != nullptr;
    facts.states = chunk_offset(p.size, p.chunks, paged ? 0 : owner, head);
    facts.pages = paged ? p.chunks.page_table + owner * p.chunks.columns : nullptr;
    facts.blocks = blocks;
    facts.keys = visible.to_any(rows);
    facts.full_blocks = visible.first_masked_block(Traits::kKeys);
    facts.rows = rows;
    facts.visible = visible;
    facts.angles = RowAngles(p.size, position);
  }
  __syncthreads();  // the facts are written

  QueryTile<T, DPAD, PAGED> tile(p, facts, shared);
  tile.begin(p.s_self + (sequence.batch * p.size.heads + head) * p.size.tokens + first_token, rows);
  if (blocks > 0) {
    tile.load(p.chunks.k, 0, 0);
    tile.load(p.chunks.v, 0, 1);
    tile.load_queries(row_pointer<T>(p.q, sequence.batch, first_token, group_of(p.size, head, p.size.q_groups)),
                      RowAngles(p.size, position), rows);
    __syncthreads();  // the Q tile is whole
    LeftOperand<DPAD, MT, Traits::kQueriesInRegisters> query;
    query.bind(shared_address(shared) + tile.warp_row * Layout::kRowBytes, tile.lane);

    int slot = 0;
#pragma unroll 1
    for (int block = 0; block < facts.blocks; ++block) {
      cp_async_wait<1>();
      __syncthreads();  // K(block) has landed; V(block - 1) is used up
      tile.load(p.chunks.k, block + 1, tile.next(tile.next(slot)));
      product_over_d<T, DPAD>(tile.s, query, Layout::lane_columns(tile.slot(slot), tile.lane));
      slot = tile.next(slot);
      if (block >= facts.full_blocks) tile.mask(block);
      tile.softmax();

      cp_async_wait<1>();
      __syncthreads();  // V(block) has landed; K(block) is used up
      tile.load(p.chunks.v, block + 1, tile.next(tile.next(slot)));
      product_over_rows<T, DPAD, MT, NT / 2, 1>(tile.o, tile.weights, Layout::lane_rows(tile.slot(slot), tile.lane));
      slot = tile.next(slot);
    }
    cp_async_wait<0>();
    __syncthreads();  // keys and queries are used up: sums go there
  }
  tile.all_finite() ? tile.epilogue() : tile.attend_one_by_one();
}

template <class T, int DPAD, bool PAGED>
void launch(const AttentionFwdParams& p, const FwdScratch& scratch, cudaStream_t stream) {
  using Traits = FwdTraits<DPAD, PAGED>;
  FwdKernelParams k;
  k.size = p.size;
  k.q = p.q;
  k.out_gate = p.out_gate;
  k.y = p.y;
  k.cos = static_cast<const float*>(p.rotary.cos);
  k.sin = static_cast<const float*>(p.rotary.sin);
  k.scale_log2 = mask_safe(static_cast<float>(std::fabs(p.scale)) * kLog2e);
  k.sign = p.scale < 0 ? -1.0f : 1.0f;
  k.chunks = p.chunks;
  k.s_self = scratch.s_self;
  k.lse = static_cast<float*>(p.lse);
  k.order = tile_order(p.size, p.chunks, p.size.heads, sizeof(T));
  const int64_t blocks = tile_blocks(p.size, Traits::kQueries, k.order);
  if (blocks == 0) return;
  const char* name = "chunk_attention_fwd_sm80_kernel";
  allow_shared_memory(chunk_attention_fwd_sm80_kernel<T, DPAD, PAGED>, Traits::kSharedBytes, name);
  chunk_attention_fwd_sm80_kernel<T, DPAD, PAGED>
      <<<grid_x(blocks, name), Traits::kThreads, Traits::kSharedBytes, stream>>>(k);
  check_launch(name);
}

// With pages, D up to 96 is padded to 128: its key tiles have as many keys, so that results have the same bits.
template <class T>
void launch_for_head_dim(const AttentionFwdParams& p, const FwdScratch& scratch, cudaStream_t stream) {
  static_assert(FwdTraits<96, false>::kKeys == FwdTraits<128, true>::kKeys);
  const int64_t d = p.size.head_dim;
  const bool paged = p.chunks.page_table != nullptr;
  if (d <= 64) return launch<T, 64, true>(p, scratch, stream);
  if (d <= 96 && !paged) return launch<T, 96, false>(p, scratch, stream);
  if (d <= 128 && !paged) return launch<T, 128, false>(p, scratch, stream);
  if (d <= 128) return launch<T, 128, true>(p, scratch, stream);
  if (d <= 192) return launch<T, 192, true>(p, scratch, stream);
  return launch<T, 256, true>(p, scratch, stream);
}

}  // namespace

namespace sm80 {

const char* fwd_refuses(const AttentionFwdParams& p) {
  if (p.size.dtype != DType::bf16 && p.size.dtype != DType::f16) return "the dtype is not bfloat16 or float16";
  return nullptr;
}

Launch fwd(const AttentionFwdParams& p, const FwdScratch& scratch, Arena&) {
  return [&p, scratch](cudaStream_t stream) {
    if (p.size.dtype == DType::bf16) {
      launch_for_head_dim<bf16>(p, scratch, stream);
    } else {
      launch_for_head_dim<f16>(p, scratch, stream);
    }
  };
}

}  // namespace sm80

KernelList chunk_attention_fwd_sm80_kernels() {
#define RAT_ENTRY(T, DPAD, PAGED, NAME)                                                                                \
  {                                                                                                                    \
    "chunk_attention_fwd_sm80<" #T ", " NAME ">",                                                                      \
        reinterpret_cast<const void*>(&chunk_attention_fwd_sm80_kernel<T, DPAD, PAGED>)                                \
  }
  static const KernelEntry entries[] = {
      RAT_ENTRY(bf16, 64, true, "64"),          RAT_ENTRY(bf16, 96, false, "96"),  RAT_ENTRY(bf16, 128, false, "128"),
      RAT_ENTRY(bf16, 128, true, "128, pages"), RAT_ENTRY(bf16, 192, true, "192"), RAT_ENTRY(bf16, 256, true, "256"),
      RAT_ENTRY(f16, 64, true, "64"),           RAT_ENTRY(f16, 96, false, "96"),   RAT_ENTRY(f16, 128, false, "128"),
      RAT_ENTRY(f16, 128, true, "128, pages"),  RAT_ENTRY(f16, 192, true, "192"),  RAT_ENTRY(f16, 256, true, "256"),
  };
#undef RAT_ENTRY
  return {entries, static_cast<int>(sizeof(entries) / sizeof(entries[0]))};
}

}  // namespace rat::cuda
