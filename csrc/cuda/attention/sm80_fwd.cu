// Chunk attention forward on mma.sync, for bfloat16 and float16, compute capability 8.0 and newer.
//
// A block owns one (query tile, head): BM consecutive tokens of one sequence. Rows of the tile attend to the chunk states
// j < c(t) of their head and to themselves; the self term starts the running softmax (m = s_tt, l = 1) and v~_t, which waits
// in y, joins in the epilogue. y is overwritten in place.
//
// Reads per token and head: q (D, through L2 for the heads of a group), v~ and out_gate (D each), s_tt; writes y (D) and lse.
// Chunk states are read once per tile, from L2. Work: 2 products of c(t) x D multiply-adds per token and head.
//
// Warps: 4, each with MT * 16 query rows; all of O and S in registers, P goes from accumulators straight into the second
// product as its A operand.
// Shared memory: the rotated Q tile [BM][DPAD], then a ring of three key/value tiles [BN][DPAD] that holds K(0), V(0), K(1),
// V(1), ... Step i works on tile i while tiles i+1 and i+2 are in flight. The one barrier at the start of step i says both
// that tile i has landed for all threads and that all are done with tile i-1, whose slot tile i+2 then takes.
#include "../ptx/mma.cuh"
#include "families.h"
#include "tiles.cuh"

namespace rat::cuda {
namespace {

template <int DPAD>
struct FwdTraits {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = DPAD <= 128 ? 2 : 1;  // 16-row tiles of a warp
  static constexpr int kQueries = 16 * kRowTiles * kWarps;
  static constexpr int kKeys = DPAD == 256 ? 32 : 64;
  static constexpr int kSlots = 3;
  static constexpr bool kQueriesInRegisters = DPAD <= 64;
  static constexpr int kQueryBytes = kQueries * DPAD * 2;
  static constexpr int kSlotBytes = kKeys * DPAD * 2;
  static constexpr int kSharedBytes = kQueryBytes + kSlots * kSlotBytes;
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

// The running maximum is only raised when a score exceeds it by this much (in powers of two): weights then stay below 2^8,
// and the accumulator is rescaled a few times per tile instead of at every key block. The result is the same softmax.
constexpr float kSlack = 8.0f;

template <class T, int DPAD>
__global__ void __launch_bounds__(FwdTraits<DPAD>::kThreads, 2)
    chunk_attention_fwd_sm80_kernel(const __grid_constant__ FwdKernelParams p) {
  using Traits = FwdTraits<DPAD>;
  constexpr int MT = Traits::kRowTiles, NT = Traits::kKeys / 8, OT = DPAD / 8;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ int64_t place[4];  // what is needed rarely or at the end, kept out of the main loop's registers
  __shared__ int counts[4];

  int64_t head;
  const WorkItem item = ordered_item(p.size, p.order, blockIdx.x, Traits::kQueries, &head);
  const Sequence& sequence = item.sequence;
  const int64_t first_token = sequence.begin + item.tile * Traits::kQueries;
  if (first_token >= sequence.end) return;
  const int rows = static_cast<int>(min(static_cast<int64_t>(Traits::kQueries), sequence.end - first_token));
  const int head_dim = static_cast<int>(p.size.head_dim);
  const TileChunks chunks(sequence.start + item.tile * Traits::kQueries, p.size.chunk_size);
  const int keys = chunks.of(rows - 1);  // keys that the last row sees; the others see a prefix of them
  const int blocks = (keys + Traits::kKeys - 1) / Traits::kKeys;
  const int full_blocks = chunks.first / Traits::kKeys;  // seen whole by every row

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const uint32_t query_tile = shared_address(shared);
  const uint32_t ring = query_tile + Traits::kQueryBytes;

  // Rows past the last key are zeros: stale memory may hold NaN, and a weight of 0 would not silence it.
  const auto load = [&](const void* states, int block, int slot) {
    if (block < counts[0]) {
      int again = thread;  // hidden from the compiler: row offsets are not worth registers between two loads
      asm volatile("" : "+r"(again));
      const int first = block * Traits::kKeys;
      load_tile<T, Traits::kKeys, DPAD, Traits::kThreads>(
          ring + slot * Traits::kSlotBytes,
          static_cast<const T*>(states) + place[3] + static_cast<int64_t>(first) * head_dim, head_dim,
          counts[1] - first, head_dim, again);
    }
    cp_async_commit();
  };

  if (thread == 0) {
    place[0] = sequence.batch;
    place[1] = first_token;
    place[2] = head;
    place[3] = chunk_offset(p.size, p.chunks, sequence.index, head);
    counts[0] = blocks;
    counts[1] = keys;
    counts[2] = full_blocks;
    counts[3] = rows;
  }
  __syncthreads();  // place and counts are written
  const int warp_row = warp * MT * 16;
  const int64_t scalar_base = (sequence.batch * p.size.heads + head) * p.size.tokens + first_token;
  // Of rows g and g + 8 of each row tile. The maximum is scaled by log2(e); the sum is this lane's share of the quad's.
  float maximum[MT][2], sum[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + m * 16 + r * 8 + lane / 4;
      maximum[m][r] = row < rows ? p.s_self[scalar_base + row] * kLog2e : 0.0f;
      sum[m][r] = lane % 4 == 0 ? 1.0f : 0.0f;
    }
  }
  float o[MT][OT][4];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < OT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o[m][n][i] = 0.0f;
    }
  }

  if (blocks > 0) {
    load(p.chunks.k, 0, 0);
    load(p.chunks.v, 0, 1);

    // Rotates q into shared memory, four columns of each half at a time, so that halves need not be multiples of 8.
    {
      constexpr int kPieces = DPAD / 8;
      const int half = head_dim / 2;
      const int64_t group = head / (p.size.heads / p.size.q_groups);
      const T* q = row_pointer<T>(p.q, sequence.batch, first_token, group);
#pragma unroll 4
      for (int index = thread; index < Traits::kQueries * kPieces; index += Traits::kThreads) {
        const int row = index / kPieces, piece = index % kPieces;
        FourOf<T> a, b;
        float low[4] = {0.0f, 0.0f, 0.0f, 0.0f}, high[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        const bool inside = 4 * piece < half;
        if (inside && row < rows) {
          const T* from = q + row * p.q.token + 4 * piece;
          load4(from, low, p.size.aligned16);
          load4(from + half, high, p.size.aligned16);
          rotate4(low, high, p.cos, p.sin, chunks.of(row), half, piece, 1.0f);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          a.value[j] = from_float<T>(low[j] * p.sign);
          b.value[j] = from_float<T>(high[j] * p.sign);
        }
        // Pieces past D / 2 clear the columns from D on: there are as many of them as pieces of 8 columns beyond D.
        const int low_column = inside ? 4 * piece : head_dim + (piece - head_dim / 8) * 8;
        const int high_column = inside ? 4 * piece + half : low_column + 4;
        *reinterpret_cast<FourOf<T>*>(shared + Tile<DPAD>::offset(row, low_column / 8) + low_column % 8 * 2) = a;
        *reinterpret_cast<FourOf<T>*>(shared + Tile<DPAD>::offset(row, high_column / 8) + high_column % 8 * 2) = b;
      }
    }
    __syncthreads();  // the Q tile is whole

    LeftOperand<DPAD, MT, Traits::kQueriesInRegisters> query;
    query.bind(query_tile + warp_row * Tile<DPAD>::kRowBytes, lane);

    int slot = 0;
    const auto next = [](int s) { return s == Traits::kSlots - 1 ? 0 : s + 1; };
#pragma unroll 1
    for (int block = 0; block < counts[0]; ++block) {
      cp_async_wait<1>();
      __syncthreads();  // K(block) has landed; V(block - 1) is used up
      load(p.chunks.k, block + 1, next(next(slot)));

      float s[MT][NT][4];
      product_over_d<T, DPAD>(s, query, Tile<DPAD>::lane_columns(ring + slot * Traits::kSlotBytes, lane));
      slot = next(slot);

      if (block >= counts[2]) {
        int again = lane;  // hidden from the compiler, which would otherwise keep row indices in registers for the few
        asm volatile("" : "+r"(again));  // blocks that are not seen whole
        const int column = block * Traits::kKeys + again % 4 * 2;
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int visible = chunks.of(warp_row + m * 16 + r * 8 + again / 4) - column;
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              if (n * 8 >= visible) s[m][n][2 * r] = -INFINITY;
              if (n * 8 + 1 >= visible) s[m][n][2 * r + 1] = -INFINITY;
            }
          }
        }
      }

      uint32_t weights[MT][NT / 2][4];
      bool raised = false;
      float factor[MT][2];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float top = fmaxf(s[m][0][2 * r], s[m][0][2 * r + 1]);
#pragma unroll
          for (int n = 1; n < NT; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
          top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
          top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2)) * p.scale_log2;
          const bool raise = top > maximum[m][r] + kSlack;
          factor[m][r] = raise ? exp2_fast(maximum[m][r] - top) : 1.0f;
          maximum[m][r] = raise ? top : maximum[m][r];
          raised |= raise;
        }
      }
      if (__any_sync(0xffffffffu, raised)) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            sum[m][r] *= factor[m][r];
#pragma unroll
            for (int n = 0; n < OT; ++n) {
              o[m][n][2 * r] *= factor[m][r];
              o[m][n][2 * r + 1] *= factor[m][r];
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

      cp_async_wait<1>();
      __syncthreads();  // V(block) has landed; K(block) is used up
      load(p.chunks.v, block + 1, next(next(slot)));
      product_over_rows<T, DPAD, MT, NT / 2, 1>(o, weights,
                                                Tile<DPAD>::lane_rows(ring + slot * Traits::kSlotBytes, lane));
      slot = next(slot);
    }
    cp_async_wait<0>();
  }

  const int64_t batch_again = place[0], token_again = place[1], head_again = place[2];
  const int64_t scalar_again = (batch_again * p.size.heads + head_again) * p.size.tokens + token_again;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[m][r];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const int row = warp_row + m * 16 + r * 8 + lane / 4;
      const float self = row < counts[3] ? p.s_self[scalar_again + row] * kLog2e : 0.0f;
      const float self_weight = exp2_fast(self - maximum[m][r]);
      const float inverse = 1.0f / total;
      const int64_t token = token_again + row;
      if (row < counts[3] && lane % 4 == 0) p.lse[scalar_again + row] = (maximum[m][r] + log2f(total)) * kLn2;
      T* y = const_cast<T*>(row_pointer<T>(p.y, batch_again, token, head_again));
      const T* gate = row_pointer<T>(p.out_gate, batch_again, token, head_again);  // read only where it is given
#pragma unroll
      for (int n = 0; n < OT; n += 4) {
        float out[8];
        gather_quad(out, o[m], n, r, lane);
        const int column = n * 8 + lane % 4 * 8;
        if (row < counts[3] && column < head_dim) {
          float own[8];
          load8(y + column, own, p.size.aligned16);
#pragma unroll
          for (int i = 0; i < 8; ++i) out[i] = fmaf(self_weight, own[i], out[i]) * inverse;
          if (p.out_gate.ptr != nullptr) {
            float logit[8];
            load8(gate + column, logit, p.size.aligned16);
#pragma unroll
            for (int i = 0; i < 8; ++i) out[i] *= sigmoid(logit[i]);
          }
          store8(y + column, out, p.size.aligned16);
        }
      }
    }
  }
}

template <class T, int DPAD>
void launch(const AttentionFwdParams& p, const FwdScratch& scratch, cudaStream_t stream) {
  using Traits = FwdTraits<DPAD>;
  FwdKernelParams k;
  k.size = p.size;
  k.q = p.q;
  k.out_gate = p.out_gate;
  k.y = p.y;
  k.cos = static_cast<const float*>(p.rotary.cos);
  k.sin = static_cast<const float*>(p.rotary.sin);
  // Masked scores are -inf, which times zero would be NaN.
  k.scale_log2 = fmaxf(static_cast<float>(fabs(p.scale)) * kLog2e, 1e-30f);
  k.sign = p.scale < 0 ? -1.0f : 1.0f;
  k.chunks = p.chunks;
  k.s_self = scratch.s_self;
  k.lse = static_cast<float*>(p.lse);
  k.order = tile_order(p.size, p.chunks, p.size.heads, sizeof(T));
  const int64_t blocks = tile_blocks(p.size, Traits::kQueries, k.order);
  if (blocks == 0) return;
  const char* name = "chunk_attention_fwd_sm80_kernel";
  allow_shared_memory(chunk_attention_fwd_sm80_kernel<T, DPAD>, Traits::kSharedBytes, name);
  chunk_attention_fwd_sm80_kernel<T, DPAD><<<grid_x(blocks, name), Traits::kThreads, Traits::kSharedBytes, stream>>>(k);
  check_launch(name);
}

template <class T>
void launch_for_head_dim(const AttentionFwdParams& p, const FwdScratch& scratch, cudaStream_t stream) {
  const int64_t d = p.size.head_dim;
  if (d <= 32) return launch<T, 32>(p, scratch, stream);
  if (d <= 64) return launch<T, 64>(p, scratch, stream);
  if (d <= 96) return launch<T, 96>(p, scratch, stream);
  if (d <= 128) return launch<T, 128>(p, scratch, stream);
  if (d <= 192) return launch<T, 192>(p, scratch, stream);
  return launch<T, 256>(p, scratch, stream);
}

}  // namespace

namespace sm80 {

const char* fwd_refuses(const AttentionFwdParams& p) {
  return p.size.dtype == DType::bf16 || p.size.dtype == DType::f16 ? nullptr : "the dtype is not bfloat16 or float16";
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
#define RAT_ENTRY(T, DPAD)                                                                                             \
  {                                                                                                                    \
    "chunk_attention_fwd_sm80<" #T ", " #DPAD ">",                                                                     \
        reinterpret_cast<const void*>(&chunk_attention_fwd_sm80_kernel<T, DPAD>)                                       \
  }
  static const KernelEntry entries[] = {
      RAT_ENTRY(bf16, 32),  RAT_ENTRY(bf16, 64),  RAT_ENTRY(bf16, 96), RAT_ENTRY(bf16, 128),
      RAT_ENTRY(bf16, 192), RAT_ENTRY(bf16, 256), RAT_ENTRY(f16, 32),  RAT_ENTRY(f16, 64),
      RAT_ENTRY(f16, 96),   RAT_ENTRY(f16, 128),  RAT_ENTRY(f16, 192), RAT_ENTRY(f16, 256),
  };
#undef RAT_ENTRY
  return {entries, static_cast<int>(sizeof(entries) / sizeof(entries[0]))};
}

}  // namespace rat::cuda
