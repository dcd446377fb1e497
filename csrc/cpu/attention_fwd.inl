// Forward of rat_attention and chunk_attention.
//
// Phase 1, a task for each (head, tile): scans keys and values, writes the states of the chunks that close. Where
// chunks are longer than tiles, the task of a chunk's first tile walks all of its tiles, and leaves what each starts
// with. So a token's bits depend on its own sequence alone, however that is cut into calls.
// Phase 2, a task for each (head, tile): scans again, so that per-token states never leave the cache, and attends.
// Scores and sums are kept with a column for each query: softmax is then vertical, keys and values are read as they
// lie, and one microkernel serves both products. The running softmax starts from the self term (m = s_tt, l = 1), whose
// value joins at the end.
//
// What is not finite becomes what the definition makes of it: a score of -inf weighs 0, also where a block has no other;
// one of +inf or NaN, or nothing but -inf, makes y NaN; and the weight of each key that a query sees multiplies its
// value, 0 * inf = NaN, but no value that it does not see.

// States before and of a tile: gates, state_k, state_v in scratch; the states before it in before_k and before_v.
template <class T>
void scan_tile(const AttentionFwdParams& p, const Plan& plan, const Carries* carries, const Tile& t, int64_t head,
               Scratch<Acc<T>>& s, Acc<T>* before_k, Acc<T>* before_v) {
  using A = Acc<T>;
  const Sizes& z = p.size;
  const int64_t D = z.head_dim, ld = plan.padded_dim;
  A* const state = s.vector[kVectorBuffers - 2];
  prefetch_rows<T>(p.gate, t, head, D);
  prefetch_rows<T>(p.k, t, head / (z.heads / z.k_groups), D);
  prefetch_rows<T>(p.v, t, head, D);
  load_gates<T>(p.gate, p.gate_bias, t, head, D, ld, s);

  load_rows<T>(p.k, t, head / (z.heads / z.k_groups), D, ld, s.input);
  if (carries)
    state_before<A>(plan, t, z, head, carries->k, p.initial.running_k, before_k);
  else
    zero(before_k, ld);
  __builtin_memcpy(state, before_k, static_cast<size_t>(ld) * sizeof(A));
  scan(plan, t, ld, s, s.input, state, s.state_k);

  load_rows<T>(p.v, t, head, D, ld, s.input);
  if (carries)
    state_before<A>(plan, t, z, head, carries->v, p.initial.running_v, before_v);
  else
    zero(before_v, ld);
  __builtin_memcpy(state, before_v, static_cast<size_t>(ld) * sizeof(A));
  scan(plan, t, ld, s, s.input, state, s.state_v);
}

// First element of state 0 of (n, head), where states follow each other: not in pages.
template <class T>
RAT_INLINE T* chunk_row(const Sizes& z, const Plan& plan, const ChunkStates& c, void* base, int64_t n, int64_t head) {
  const int64_t first = c.compact ? plan.begin(n) / z.chunk_size + n : 0, owner = c.entry ? c.entry[n] : n;
  return static_cast<T*>(base) + owner * c.sequence + head * c.head + first * z.head_dim;
}

// Offset of a state of (n, head) in a pool.
RAT_INLINE int64_t pool_offset(const ChunkStates& c, int64_t dim, int64_t n, int64_t head, int64_t chunk) {
  const int64_t owner = c.entry[n];
  if (!c.page_table) return owner * c.sequence + head * c.head + chunk * dim;
  const int64_t page = c.page_table[owner * c.columns + (chunk >> c.page_shift)];
  return page * c.sequence + head * c.head + (chunk & ((int64_t{1} << c.page_shift) - 1)) * dim;
}

// Stores the state of chunk `chunk`; rotates `key` in place.
template <class T>
void store_chunk(const AttentionFwdParams& p, const Plan& plan, const Pool* pool, int64_t n, int64_t head,
                 int64_t chunk, Acc<T>* key, const Acc<T>* value) {
  const ChunkStates& c = p.chunks;
  const int64_t D = p.size.head_dim;
  rotate_row<Acc<T>>(p.rotary, chunk, D, 1, key);
  if (!pool) {
    store_row(key, D, chunk_row<T>(p.size, plan, c, c.k, n, head) + chunk * D);
    store_row(value, D, chunk_row<T>(p.size, plan, c, c.v, n, head) + chunk * D);
    return;
  }
  const int64_t at = pool_offset(c, D, n, head, chunk);
  if (pool->scale_k) {
    store_state(key, D, static_cast<e4m3*>(c.k) + at, pool->scale_k + at / D);
    store_state(value, D, static_cast<e4m3*>(c.v) + at, pool->scale_v + at / D);
  } else {
    store_row(key, D, static_cast<T*>(c.k) + at);
    store_row(value, D, static_cast<T*>(c.v) + at);
  }
}

template <class A>
void store_running(const AttentionFwdParams& p, int64_t n, int64_t head, const A* key, const A* value) {
  if (!p.running_k) return;
  const int64_t D = p.size.head_dim, row = (n * p.size.heads + head) * D;
  __builtin_memcpy(static_cast<A*>(p.running_k) + row, key, static_cast<size_t>(D) * sizeof(A));
  __builtin_memcpy(static_cast<A*>(p.running_v) + row, value, static_cast<size_t>(D) * sizeof(A));
}

// Chunks of a tile that holds them whole.
template <class T>
void states_task(const AttentionFwdParams& p, const Plan& plan, const Workspace& w, int64_t task, int worker) {
  using A = Acc<T>;
  const int64_t ld = plan.padded_dim, L = plan.chunk_size;
  Scratch<A> s(w, worker, ld);
  int64_t head;
  const Tile t = plan.tile_by_task(task, p.size.heads, &head);
  const Carries none;
  scan_tile<T>(p, plan, &none, t, head, s, s.vector[0], s.vector[1]);
  const int64_t end = (t.rows - 1) * ld;
  if (t.last) store_running(p, t.sequence, head, s.state_k + end, s.state_v + end);  // before keys are rotated
  for (int64_t i = L - 1 - t.position % L; i < t.rows; i += L) {
    store_chunk<T>(p, plan, w.pool, t.sequence, head, (t.position + i) / L, s.state_k + i * ld, s.state_v + i * ld);
  }
}

// The tiles of one chunk, in their order: what each starts with, the product of its gates where that is wanted, and, if
// `states`, the states that the chunk and the sequence leave. One task for each tile, of which the chunk's first works.
template <class T>
void long_chunk_task(const AttentionFwdParams& p, const Plan& plan, const Workspace& w, int64_t task, int worker,
                     bool states) {
  using A = Acc<T>;
  const Sizes& z = p.size;
  const int64_t ld = plan.padded_dim, L = plan.chunk_size;
  const size_t bytes = static_cast<size_t>(ld) * sizeof(A);
  Scratch<A> s(w, worker, ld);
  int64_t head;
  Tile t = plan.tile_by_task(task, z.heads, &head);
  if (!t.first && t.position % L != 0) return;
  const auto carry = [&](void* carries) { return static_cast<A*>(carries) + (t.id * z.heads + head) * ld; };
  state_before<A>(plan, t, z, head, nullptr, p.initial.running_k, carry(w.forward.k));
  state_before<A>(plan, t, z, head, nullptr, p.initial.running_v, carry(w.forward.v));
  for (;;) {
    scan_tile<T>(p, plan, &w.forward, t, head, s, s.vector[0], s.vector[1]);
    if (w.forward.product) gate_product(t.rows, ld, s.f, carry(w.forward.product));
    A *const k = s.state_k + (t.rows - 1) * ld, *const v = s.state_v + (t.rows - 1) * ld;
    const int64_t end = t.position + t.rows;
    if (states && t.last) store_running(p, t.sequence, head, k, v);
    if (states && end % L == 0) store_chunk<T>(p, plan, w.pool, t.sequence, head, end / L - 1, k, v);
    if (t.last || end % L == 0) return;
    t = plan.tile(t.sequence, t.index + 1);
    __builtin_memcpy(carry(w.forward.k), k, bytes);
    __builtin_memcpy(carry(w.forward.v), v, bytes);
  }
}

// Sequence and head, once: copies what the initial state holds.
template <class T>
void sequence_task(const AttentionFwdParams& p, const Plan& plan, const Workspace& w, int64_t task, int worker) {
  using A = Acc<T>;
  const Sizes& z = p.size;
  const int64_t n = task / z.heads, head = task % z.heads, D = z.head_dim, L = plan.chunk_size;
  Scratch<A> s(w, worker, plan.padded_dim);
  if (p.initial.k) {
    const size_t bytes = static_cast<size_t>(plan.start(n) / L * D) * sizeof(T);
    const int64_t from = (n * z.heads + head) * p.initial.rows * D;
    T* const k = chunk_row<T>(z, plan, p.chunks, p.chunks.k, n, head);
    T* const v = chunk_row<T>(z, plan, p.chunks, p.chunks.v, n, head);
    if (bytes) {
      __builtin_memmove(k, static_cast<const T*>(p.initial.k) + from, bytes);
      __builtin_memmove(v, static_cast<const T*>(p.initial.v) + from, bytes);
    }
  }
  if (plan.length(n) > 0) return;
  A *const k = s.vector[0], *const v = s.vector[1];
  zero(k, D);
  zero(v, D);
  const size_t bytes = static_cast<size_t>(D) * sizeof(A);
  const int64_t from = (n * z.heads + head) * D;
  if (p.initial.running_k) __builtin_memcpy(k, static_cast<const A*>(p.initial.running_k) + from, bytes);
  if (p.initial.running_v) __builtin_memcpy(v, static_cast<const A*>(p.initial.running_v) + from, bytes);
  store_running(p, n, head, k, v);
}

// Chunk states [first, first + count) as acc: where they lie, or converted into scratch.
template <class A>
RAT_INLINE const A* key_block(const A* states, int64_t first, int64_t, int64_t dim, int64_t, A*, int64_t* stride) {
  *stride = dim;
  return states + first * dim;
}

template <class T, class A>
const A* key_block(const T* states, int64_t first, int64_t count, int64_t dim, int64_t ld, A* scratch,
                   int64_t* stride) {
  for (int64_t j = 0; j < count; ++j) load_row(states + (first + j) * dim, dim, ld, scratch + j * ld);
  *stride = ld;
  return scratch;
}

// The same of (n, head) wherever they are.
template <class T>
const Acc<T>* key_block_of(const AttentionFwdParams& p, const Plan& plan, void* base, const float* scales, int64_t n,
                           int64_t head, int64_t first, int64_t count, Acc<T>* scratch, int64_t* stride) {
  using A = Acc<T>;
  const int64_t D = p.size.head_dim, ld = plan.padded_dim;
  if (!p.chunks.page_table && !scales) {
    return key_block(chunk_row<T>(p.size, plan, p.chunks, base, n, head), first, count, D, ld, scratch, stride);
  }
  for (int64_t j = 0; j < count; ++j) {
    const int64_t at = pool_offset(p.chunks, D, n, head, first + j);
    A* const row = scratch + j * ld;
    if (scales) {
      load_row(static_cast<const e4m3*>(base) + at, D, ld, row);
      scale_rows(row, ld, static_cast<A>(scales[at / D]));
    } else {
      load_row(static_cast<const T*>(base) + at, D, ld, row);
    }
  }
  *stride = ld;
  return scratch;
}

// Which keys the queries of a tile see: query i those of chunks before its own.
template <class A>
struct Visible {
  int64_t all;  // keys that every query sees
  int64_t any;  // keys that some query sees
  A* extra;     // (kTile): beyond `all`, how many query i sees

  Visible(const Tile& t, int64_t chunk_size, A* storage)
      : all(t.position / chunk_size), any((t.position + t.rows - 1) / chunk_size), extra(storage) {
    zero(extra, kTile);
    for (int64_t i = 0; i < t.rows; ++i) extra[i] = static_cast<A>((t.position + i) / chunk_size - all);
  }
};

// Scores of `count` keys, the first of them key `first`, become weights e^(s - m); m and l are updated, and `factor` is
// what sums made with the old m are to be multiplied by. True if any factor is not 1.
template <class A>
bool softmax_block(int64_t first, int64_t count, int64_t columns, const Visible<A>& visible, A* score, A* m, A* l,
                   A* factor) {
  constexpr int64_t W = Simd<A>::width;
  const int64_t open = minimum(count, maximum(0, visible.all - first));  // rows that need no mask
  bool changed = false;
  for (int64_t q = 0; q < columns; q += W) {
    const Vec<A> before = load(m + q), extra = load(visible.extra + q);
    Vec<A> top = before;
    for (int64_t j = 0; j < open; ++j) {
      const Vec<A> x = load(score + j * kTile + q);
      top = x > top ? x : top;
    }
    for (int64_t j = open; j < count; ++j) {
      const Vec<A> index = broadcast(static_cast<A>(first + j - visible.all));
      const Vec<A> x = index < extra ? load(score + j * kTile + q) : broadcast(-static_cast<A>(__builtin_inf()));
      store(score + j * kTile + q, x);
      top = x > top ? x : top;
    }
    const Vec<A> decay = exp(before - top);
    Vec<A> sum = {};
    for (int64_t j = 0; j < count; ++j) {
      const Vec<A> e = exp(load(score + j * kTile + q) - top);
      store(score + j * kTile + q, e);
      sum = sum + e;
    }
    store(m + q, top);
    store(l + q, load(l + q) * decay + sum);
    store(factor + q, decay);
    for (int64_t i = 0; i < W; ++i) changed |= !(decay[i] == A(1));
  }
  return changed;
}

// Are rows of dim elements, `stride` apart, all finite?
template <class A>
bool all_finite(const A* rows, int64_t count, int64_t dim, int64_t stride) {
  using V = typename Quad<A>::Vector;
  V sum = {};
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t d = 0; d < dim; d += 4) {
      V x;
      __builtin_memcpy(&x, rows + j * stride + d, sizeof x);
      sum = sum + x * 0;  // NaN from then on if x is not finite
    }
  }
  return sum[0] + sum[1] + sum[2] + sum[3] == 0;
}

// sums (dim, kTile) = or += values of a block of keys, weighted.
template <class A>
void add_values(int64_t first, int64_t count, int64_t columns, int64_t dim, const Visible<A>& visible, const A* values,
                int64_t stride, const A* weight, A* sums, bool add) {
  const int64_t open = minimum(count, maximum(0, visible.all - first));  // keys that all queries see
  const bool finite = all_finite(values + open * stride, count - open, dim, stride);
  multiply<A, false>(dim, columns, finite ? count : open, values, stride, weight, kTile, sums, kTile, add);
  if (finite) return;
  // The weight 0 of a key that a query does not see must not meet a value that is not finite.
  for (int64_t j = open; j < count; ++j) {
    for (int64_t q = 0; q < columns; ++q) {
      if (static_cast<A>(first + j - visible.all) >= visible.extra[q]) continue;
      for (int64_t d = 0; d < dim; ++d) sums[d * kTile + q] += values[j * stride + d] * weight[j * kTile + q];
    }
  }
}

// The keys that the queries of a tile see, if any: updates the running softmax m, l and its sums of values, s.sum_t.
template <class T>
void attend_keys(const AttentionFwdParams& p, const Plan& plan, const Pool* pool, const Tile& t, int64_t head,
                 const Visible<Acc<T>>& visible, Scratch<Acc<T>>& s, Acc<T>* m, Acc<T>* l, Acc<T>* factor) {
  using A = Acc<T>;
  constexpr int64_t W = Simd<A>::width;
  const int64_t D = p.size.head_dim, ld = plan.padded_dim, columns = (t.rows + W - 1) / W * W;
  rotate_rows<A>(p.rotary, t, plan.chunk_size, D, ld, 1, s.query);
  transpose_in(s.query, t.rows, ld, s.query_t);
  for (int64_t first = 0; first < visible.any; first += kKeys) {
    const int64_t count = minimum(kKeys, visible.any - first);
    int64_t stride;
    const A* const k = key_block_of<T>(p, plan, p.chunks.k, pool ? pool->scale_k : nullptr, t.sequence, head, first,
                                       count, s.keys, &stride);
    multiply<A, true>(count, columns, D, k, stride, s.query_t, kTile, s.score, kTile, false);
    const bool rescale = softmax_block(first, count, columns, visible, s.score, m, l, factor);
    if (rescale && first > 0) scale_columns(s.sum_t, D, columns, factor);
    const A* const v = key_block_of<T>(p, plan, p.chunks.v, pool ? pool->scale_v : nullptr, t.sequence, head, first,
                                       count, s.values, &stride);
    add_values(first, count, columns, D, visible, v, stride, s.score, s.sum_t, first > 0);
  }
}

// The running states of the tile's tokens that stay in a pool.
template <class A>
void store_ring(const AttentionFwdParams& p, const Pool& pool, const Plan& plan, const Tile& t, int64_t head,
                const Scratch<A>& s) {
  const int64_t D = p.size.head_dim, ld = plan.padded_dim;
  const int64_t stop = plan.start(t.sequence) + plan.length(t.sequence);
  for (int64_t i = maximum(0, stop - pool.ring - t.position); i < t.rows; ++i) {
    const int64_t place = p.chunks.entry[t.sequence] * pool.ring + (t.position + i) % pool.ring;
    const int64_t to = (place * p.size.heads + head) * D;
    __builtin_memcpy(static_cast<A*>(pool.running_k) + to, s.state_k + i * ld, static_cast<size_t>(D) * sizeof(A));
    __builtin_memcpy(static_cast<A*>(pool.running_v) + to, s.state_v + i * ld, static_cast<size_t>(D) * sizeof(A));
  }
}

template <class T>
void attend_task(const AttentionFwdParams& p, const Plan& plan, const Workspace& w, int64_t task, int worker) {
  using A = Acc<T>;
  constexpr int64_t W = Simd<A>::width;
  const Sizes& z = p.size;
  const int64_t D = z.head_dim, ld = plan.padded_dim;
  Scratch<A> s(w, worker, ld);
  int64_t head;
  const Tile t = plan.tile_by_task(task, z.heads, &head);
  const int64_t columns = (t.rows + W - 1) / W * W;
  prefetch_rows<T>(p.q, t, head / (z.heads / z.q_groups), D);
  scan_tile<T>(p, plan, &w.forward, t, head, s, s.vector[0], s.vector[1]);

  prefetch_rows<T>(p.out_gate, t, head, D);
  if (w.pool) store_ring(p, *w.pool, plan, t, head, s);
  A *const self = s.vector[2], *const m = s.vector[3], *const l = s.vector[4], *const factor = s.vector[5];
  load_rows<T>(p.q, t, head / (z.heads / z.q_groups), D, ld, s.query);
  scale_rows(s.query, t.rows * ld, static_cast<A>(p.scale));
  zero(self, kTile);
  dot_rows(s.query, s.state_k, t.rows, ld, self);
  for (int64_t i = 0; i < kTile; ++i) {
    const bool none = self[i] < no_score<A>();  // -inf
    m[i] = none ? no_score<A>() : self[i];
    l[i] = none ? 0 : 1;
  }

  const Visible<A> visible(t, plan.chunk_size, s.vector[6]);
  if (visible.any > 0) attend_keys<T>(p, plan, w.pool, t, head, visible, s, m, l, factor);
  for (int64_t q = 0; q < columns; q += W) {
    store(factor + q, A(1) / load(l + q));
    store(self + q, exp(load(self + q) - load(m + q)) * load(factor + q));
  }
  if (visible.any > 0) {
    scale_columns(s.sum_t, D, columns, factor);
    transpose_out(s.sum_t, t.rows, D, ld, s.row0);
    add_scaled_rows(s.row0, s.state_v, self, t.rows, ld);
  } else {
    for (int64_t i = 0; i < t.rows; ++i) {
      for (int64_t d = 0; d < ld; d += W) store(s.row0 + i * ld + d, self[i] * load(s.state_v + i * ld + d));
    }
  }
  A* const lse = static_cast<A*>(p.lse) + (t.batch * z.heads + head) * z.tokens + t.token;
  for (int64_t i = 0; i < t.rows; ++i) lse[i] = m[i] + std::log(l[i]);
  if (p.out_gate.ptr) {
    load_rows<T>(p.out_gate, t, head, D, ld, s.input);
    for (int64_t i = 0; i < t.rows * ld; i += W) {
      store(s.row0 + i, load(s.row0 + i) * sigmoid_pair<A>(load(s.input + i)).plus);
    }
  }
  store_rows<T>(p.y, t, head, D, ld, s.row0);
}

template <class T>
void attention_forward(const AttentionFwdParams& p, const Plan& plan, const Workspace& w) {
  const int64_t tile_tasks = plan.all_tiles() * p.size.heads;
  for_each_task(tile_tasks, w.workers, [&](int64_t id, int worker) {
    plan.segmented ? long_chunk_task<T>(p, plan, w, id, worker, true) : states_task<T>(p, plan, w, id, worker);
  });
  if (!w.pool) {
    for_each_task(plan.sequences * p.size.heads, w.workers,
                  [&](int64_t id, int worker) { sequence_task<T>(p, plan, w, id, worker); });
  }
  for_each_task(tile_tasks, w.workers, [&](int64_t id, int worker) { attend_task<T>(p, plan, w, id, worker); });
}

// Rows of a pool, in place. What they start from is in p.initial, apart from the pool: tiles of a row read it while others
// write.
template <class T>
void attention_on_pool(const AttentionFwdParams& p, const Plan& plan, const Workspace& w) {
  using A = Acc<T>;
  const Sizes& z = p.size;
  const Pool& pool = *w.pool;
  for (int64_t n = 0; n < plan.sequences; ++n) {
    const int64_t count = z.heads * z.head_dim, owner = p.chunks.entry[n];
    if (owner < 0) {
      const int64_t begin = z.cu_seqlens ? z.cu_seqlens[n] : 0, end = z.cu_seqlens ? z.cu_seqlens[n + 1] : z.tokens;
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t head = 0; head < z.heads; ++head) {
          zero(row_of<T>(p.y, z.cu_seqlens ? 0 : n, t, head), z.head_dim);
        }
      }
      continue;
    }
    if (plan.length(n) == 0 || plan.start(n) % plan.chunk_size == 0) continue;
    const int64_t from = (owner * pool.ring + (plan.start(n) - 1) % pool.ring) * count;
    const size_t bytes = static_cast<size_t>(count) * sizeof(A);
    __builtin_memcpy(static_cast<A*>(p.initial.running_k) + n * count, static_cast<const A*>(pool.running_k) + from,
                     bytes);
    __builtin_memcpy(static_cast<A*>(p.initial.running_v) + n * count, static_cast<const A*>(pool.running_v) + from,
                     bytes);
  }
  attention_forward<T>(p, plan, w);
}
