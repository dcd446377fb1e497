// The new tokens themselves: their running states, the chunk states that they close.
#pragma once

#include <type_traits>

#include "../device/e4m3.cuh"
#include "../ptx/cp_async.cuh"
#include "args.cuh"

namespace rat::cuda {

// ---- rotation ---------------------------------------------------------------------------------------------------------

// A row of the rotary tables for the eight elements of a lane.
struct Angle {
  float cosine[8], sine[8];
};

__device__ __forceinline__ Angle load_angle(const float* cosine, const float* sine, int head_dim, const Lane& lane) {
  Angle angle;
  const int half = head_dim / 2;
#pragma unroll
  for (int m = 0; m < 2; ++m) {  // D/2 is a multiple of 4: four elements at a time lie on one side
    const int d = static_cast<int>(lane.d) + 4 * m, i = d >= half ? d - half : d;
    const float4 c = *reinterpret_cast<const float4*>(cosine + i), s = *reinterpret_cast<const float4*>(sine + i);
    const float sign = d >= half ? 1.0f : -1.0f;
    angle.cosine[4 * m] = c.x, angle.cosine[4 * m + 1] = c.y, angle.cosine[4 * m + 2] = c.z,
                     angle.cosine[4 * m + 3] = c.w;
    angle.sine[4 * m] = sign * s.x, angle.sine[4 * m + 1] = sign * s.y;
    angle.sine[4 * m + 2] = sign * s.z, angle.sine[4 * m + 3] = sign * s.w;
  }
  return angle;
}

__device__ __forceinline__ Angle load_angle(const Rotary& r, uint32_t row, int head_dim, const Lane& lane) {
  const int64_t at = static_cast<int64_t>(row) * (head_dim / 2);
  return load_angle(static_cast<const float*>(r.cos) + at, static_cast<const float*>(r.sin) + at, head_dim, lane);
}

// x of a lane group, rotated. All lanes of the warp take part. See rotate() in device/rotary.cuh for who pairs with whom.
template <int W>
__device__ __forceinline__ void rotate(const Angle& angle, int head_dim, const Lane& lane, float (&x)[8]) {
  const int half = head_dim / 2;
  const bool straddles = half % 8 != 0;
  int source[2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const int d = static_cast<int>(lane.d) + 4 * m;
    source[m] = (d >= half ? d - half : d + half) / 8;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float y[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const float straight = __shfl_sync(kFullWarp, x[j + 4 * m], source[m], W);
      const float crossed = __shfl_sync(kFullWarp, x[j + 4 - 4 * m], source[m], W);
      y[m] =
          fmaf(x[j + 4 * m], angle.cosine[j + 4 * m], __fmul_rn(straddles ? crossed : straight, angle.sine[j + 4 * m]));
    }
    x[j] = y[0];
    x[j + 4] = y[1];
  }
}

// ---- the scan ---------------------------------------------------------------------------------------------------------

// The rows of an item's tokens in shared memory, as a lane sees them.
template <class K>
struct Tokens {
  typename K::T* at;
  float* angle;  // of the first token
  __device__ __forceinline__ typename K::T* row(int input, int i) const {
    return at + (input * K::N + i) * K::kColumns;
  }
  __device__ __forceinline__ Raw8<typename K::T> load(int input, int i) const { return load_raw(row(input, i)); }
};

// Brings them there, all at once: nothing waits for one row before it asks for the next.
template <class K>
__device__ __forceinline__ void fetch_tokens(const Decode& a, const Item& item, const Lane& lane,
                                             const Tokens<K>& tokens) {
  using T = typename K::T;
  const int group = static_cast<int>(threadIdx.x) % 32 / K::W;
#pragma unroll 1
  for (int token = group; token < a.tokens; token += 32 / K::W) {
#pragma unroll
    for (int input = 0; input < kInputs; ++input) {
      const Rows& rows = a.input[input];
      if (!rows.ptr || !lane.live) continue;
      const uint32_t of = static_cast<uint32_t>(item.head);
      const uint32_t head = input == kQuery || input == kKey ? of / a.input_share[input] : of;
      const T* const from = row_of<T>(rows, item.row, token, head, lane.d);
      T* const to = tokens.row(input, token);
#pragma unroll
      for (int part = 0; part < static_cast<int>(sizeof(T)) / 2; ++part) {
        cp_async16(shared_address(to) + 16 * part, reinterpret_cast<const char*>(from) + 16 * part, true);
      }
    }
  }
  if (!a.p.rotary.cos) return;
  const int half = static_cast<int>(a.p.head_dim) / 2;
  const int64_t row = static_cast<int64_t>(item.keys) * half;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) % 32; i < half / 2; i += 32) {
    const void* const table = i < half / 4 ? a.p.rotary.cos : a.p.rotary.sin;
    const int from = 4 * (i < half / 4 ? i : i - half / 4);
    float* const to = tokens.angle + (i < half / 4 ? 0 : K::kColumns / 2) + from;
    cp_async16(shared_address(to), static_cast<const float*>(table) + row + from, true);
  }
}

// Two numbers as two words of pairs, high and low parts.
template <class T>
__device__ __forceinline__ void split(float x, float y, uint32_t& high, uint32_t& low) {
  high = pack2<T>(x, y);
  const float2 rounded = unpack2<T>(high);
  low = pack2<T>(__fadd_rn(x, -rounded.x), __fadd_rn(y, -rounded.y));
}

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((127 + exponent) << 23); }

// A query for tensor cores: high parts of its elements, and behind them low parts. Half-precision ones are taken in units of a
// power of two that brings the largest element to 2^12: none overflows, and low parts count. By all lanes of the warp.
template <class K>
__device__ __forceinline__ void prepare_query(const Lane& lane, bool stores, const float (&x)[8], float* query,
                                              float* unit) {
  using T = typename K::T;
  float inverse = 1.0f;
  if constexpr (std::is_same_v<T, f16>) {
    float top = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) top = fmaxf(top, fabsf(x[j]));
#pragma unroll
    for (int step = 1; step < K::W; step *= 2) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, step));
    const int exponent = min(max((__float_as_int(top) >> 23) - 127, -100), 100) - 12;
    inverse = power_of_two(-exponent);
    if (stores && lane.index == 0) *unit = power_of_two(exponent);
  }
  if (!stores) return;
  uint4 high, low;
  split<T>(__fmul_rn(x[0], inverse), __fmul_rn(x[1], inverse), high.x, low.x);
  split<T>(__fmul_rn(x[2], inverse), __fmul_rn(x[3], inverse), high.y, low.y);
  split<T>(__fmul_rn(x[4], inverse), __fmul_rn(x[5], inverse), high.z, low.z);
  split<T>(__fmul_rn(x[6], inverse), __fmul_rn(x[7], inverse), high.w, low.w);
  T* const to = reinterpret_cast<T*>(query) + lane.d;
  *reinterpret_cast<uint4*>(to) = high;
  *reinterpret_cast<uint4*>(to + K::kColumns) = low;
}

// The tokens' queries, scaled and rotated.
template <class K>
__device__ __forceinline__ void prepare_queries(const Decode& a, const Item& item, const Lane& lane,
                                                const Tokens<K>& tokens, bool stores, float* query, float* query_unit) {
  const int D = static_cast<int>(a.p.head_dim);
  uint32_t keys = item.keys, offset = item.offset;
#pragma unroll 1
  for (int i = 0; i < a.tokens; ++i) {
    float x[8];
    unpack(tokens.load(kQuery, i), x);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = __fmul_rn(x[j], a.scale);
    if (a.p.rotary.cos) {
      const bool first = keys == item.keys;
      rotate<K::W>(first ? load_angle(tokens.angle, tokens.angle + K::kColumns / 2, D, lane)
                         : load_angle(a.p.rotary, keys, D, lane),
                   D, lane, x);
    }
    if constexpr (K::kMatrix) {
      prepare_query<K>(lane, stores, x, query + i * K::kColumns, query_unit + i);
    } else if (stores) {
      store_scratch(query + i * K::kColumns + lane.d, x);
    }
    if (++offset == a.chunk_size) {
      offset = 0;
      ++keys;
    }
  }
}

// Their output gates.
template <class K>
__device__ __forceinline__ void prepare_gates(const Decode& a, const Lane& lane, const Tokens<K>& tokens, bool stores,
                                              float* out_gate) {
  using T = typename K::T;
#pragma unroll 1
  for (int i = 0; i < a.tokens; ++i) {
    float y[8];
    if (a.input[kOutGate].ptr) {
      unpack(tokens.load(kOutGate, i), y);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float open, shut;
        gates<T>(__fmul_rn(kLogitUnit<T>, y[j]), open, shut);
        y[j] = open;
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) y[j] = 1.0f;
    }
    if (stores) store_scratch(out_gate + i * K::kColumns + lane.d, y);
  }
}

// What a walk over the tokens starts from.
struct ScanStart {
  float bias[8], state[8];
};

__device__ __forceinline__ ScanStart start_scan(const Decode& a, const Item& item, const Lane& lane, bool is_value) {
  const DecodeParams& p = a.p;
  ScanStart s;
  zero(s.bias);
  zero(s.state);
  const int64_t at = static_cast<int64_t>(item.head) * p.head_dim + lane.d;
  if (p.gate_bias) load_scratch(static_cast<const float*>(p.gate_bias) + at, s.bias);
  if (item.offset != 0) {
    const uint32_t ring = static_cast<uint32_t>(p.pool.ring), turn = ring == 1 ? 0 : (item.length - 1) % ring;
    const int64_t place = (static_cast<int64_t>(item.entry) * ring + turn) * a.heads * p.head_dim;
    load_scratch(static_cast<const float*>(is_value ? p.pool.running_v : p.pool.running_k) + place + at, s.state);
  }
  return s;
}

// Advances the running keys or values of a (row, head) over the new tokens, and stores the last states and the chunk states that
// close. To the block, in shared memory: each token's own score and value, and, where there may be several tokens, the chunk
// states that close. By a warp: where rows have fewer lanes, one lane group walks the keys and another the values.
template <class K>
__device__ __forceinline__ void scan_tokens(const Decode& a, const Item& item, const Lane& lane,
                                            const Tokens<K>& tokens, const ScanStart& start, bool is_value, bool stores,
                                            float* own_score, float* own_value, typename K::S* fresh,
                                            float (*fresh_scale)[kMostTokens]) {
  using T = typename K::T;
  using S = typename K::S;
  constexpr int W = K::W, N = K::N;
  const DecodeParams& p = a.p;
  const int D = static_cast<int>(p.head_dim);
  float state[8], bias[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    state[j] = start.state[j];
    bias[j] = __fmul_rn(start.bias[j], kLogitUnit<T>);
  }
  float* const running = static_cast<float*>(is_value ? p.pool.running_v : p.pool.running_k) + item.head * D + lane.d;
  const int64_t place = static_cast<int64_t>(a.heads) * D;  // of the ring
  const uint32_t ring = static_cast<uint32_t>(p.pool.ring);
  const int64_t places = static_cast<int64_t>(item.entry) * ring;
  uint32_t chunk = item.keys, offset = item.offset, turn = ring == 1 ? 0 : item.length % ring;
#pragma unroll 1
  for (int i = 0; i < a.tokens; ++i) {
    if (offset == 0) zero(state);
    float f[8], g[8], x[8];
    gates_of(tokens.load(kGate, i), bias, true, f, g);
    unpack(tokens.load(is_value ? kValue : kKey, i), x);
#pragma unroll
    for (int j = 0; j < 8; ++j) state[j] = fmaf(f[j], state[j], __fmul_rn(g[j], x[j]));
    unpack(tokens.load(kQuery, i), x);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = lane.live ? __fmul_rn(x[j], a.scale) : 0.0f;
    const float score = group_sum<W>(lane.live ? dot(x, state) : 0.0f);
    __syncwarp();  // the state has been read
    if (stores) {
      if (is_value) {
        store_scratch(own_value + i * K::kColumns + lane.d, state);
      } else if (lane.index == 0) {
        own_score[i] = score;
      }
      if (static_cast<uint32_t>(a.tokens - i) <= ring) store_scratch(running + (places + turn) * place, state);
    }
    if (offset == a.chunk_size - 1) {  // the chunk closes
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = state[j];
      if (p.rotary.cos) {
        rotate<W>(load_angle(p.rotary, chunk, D, lane), D, lane, x);
        if (is_value) {
#pragma unroll
          for (int j = 0; j < 8; ++j) x[j] = state[j];
        }
      }
      const int64_t row = state_row(a, item.entry, item.head, chunk);
      S* const target = static_cast<S*>(is_value ? p.pool.chunk_v : p.pool.chunk_k) + row * D + lane.d;
      S* const kept = fresh + ((is_value ? N : 0) + static_cast<int>(chunk - item.keys)) * D + lane.d;
      if constexpr (K::kScaled) {
        const float scale = scale_of_group<W>(x, lane);
        StateRaw<S> raw;
        pack_state(x, scale, raw);
        if (stores) {
          *reinterpret_cast<StateRaw<S>*>(target) = raw;
          if (lane.index == 0) (is_value ? p.pool.scale_v : p.pool.scale_k)[row] = scale;
          if constexpr (N > 1) {
            *reinterpret_cast<StateRaw<S>*>(kept) = raw;
            if (lane.index == 0) fresh_scale[is_value][chunk - item.keys] = scale;
          }
        }
      } else {
        Raw8<S> raw;
        pack(x, raw);
        if (stores) {
          store_raw(target, raw);
          if constexpr (N > 1) store_raw(kept, raw);
        }
      }
    }
    if (++offset == a.chunk_size) {
      offset = 0;
      ++chunk;
    }
    if (++turn == ring) turn = 0;
  }
}

// A scanning warp: every kScanners-th item is its own.
template <class K>
__device__ __forceinline__ void scan(const Decode& a, char* memory, const SharedLayout& layout, uint32_t scanner) {
  using S = typename K::S;
  SharedHead& head = *reinterpret_cast<SharedHead*>(memory);
  const int D = static_cast<int>(a.p.head_dim), thread = static_cast<int>(threadIdx.x) % 32;
  const int group = thread / K::W;
  Ring<kItems> items(head.items);
  Ring<kPrepared> queries(head.queries), scanned(head.scanned);
#pragma unroll 1
  for (;;) {
    items.wait_full();
    const Item item = head.item[items.slot()];
    __syncwarp();
    if (thread == 0) mbarrier_arrive(items.empty());
    items.next();
    if (item.kind == ItemKind::end) return;
    if (item.kind == ItemKind::zeros) continue;
    if (K::kScanners > 1 && scanned.count % K::kScanners != scanner) {
      queries.next();
      scanned.next();
      continue;
    }
    const Lane lane = lane_of<K::W>(item.head, a.heads, D);
    const int place = static_cast<int>(scanned.slot());
    float* const rows = reinterpret_cast<float*>(memory + layout.prepared) + place * 3 * K::N * K::kColumns;
    S* const fresh = reinterpret_cast<S*>(memory + layout.fresh) + place * 2 * K::N * D;
    const Tokens<K> tokens{
        reinterpret_cast<typename K::T*>(memory + layout.tokens) + scanner * kInputs * K::N * K::kColumns + lane.d,
        reinterpret_cast<float*>(memory + layout.angle) + scanner * K::kColumns};
    __syncwarp();  // the last item's have been read
    fetch_tokens<K>(a, item, lane, tokens);
    cp_async_commit();
    ScanStart start = start_scan(a, item, lane, K::W < 32 && group % 2 == 1);
    queries.wait_empty();
    cp_async_wait<0>();
    __syncwarp();
    prepare_queries<K>(a, item, lane, tokens, group == 0 && lane.live, rows, head.query_unit[place]);
    __syncwarp();
    if (thread == 0) mbarrier_arrive(queries.full());
    queries.next();
    scanned.wait_empty();
    prepare_gates<K>(a, lane, tokens, group == 0 && lane.live, rows + K::N * K::kColumns);
    if (item.tail) {
#pragma unroll 1
      for (int role = 0; role < (K::W == 32 ? 2 : 1); ++role) {
        const bool is_value = K::W == 32 ? role == 1 : group % 2 == 1;
        if (role == 1) start = start_scan(a, item, lane, true);
        scan_tokens<K>(a, item, lane, tokens, start, is_value, group < 2 && lane.live, head.own_score[place],
                       rows + 2 * K::N * K::kColumns, fresh, head.fresh_scale[place]);
      }
    }
    __syncwarp();
    if (thread == 0) mbarrier_arrive(scanned.full());
    scanned.next();
  }
}

}  // namespace rat::cuda
