// One decoding step, in one pass of tasks, one for each (row, head, slice): each rotates the query and attends to a slice of
// chunk states, bound by the bytes of the cache. Slice 0 also updates the running state, and appends the state of a chunk
// that closes, which lies past the keys that this token sees. The task that is the last of its (row, head) combines the
// slices with the self term and applies the output gate. A slice has a fixed number of keys, so that a row's arithmetic
// depends on its own length alone. Several tokens are as many steps.
//
// What is not finite becomes what the definition makes of it: a score of -inf weighs 0, also in a run that has no other;
// one of +inf or NaN, or nothing but -inf, makes y NaN; the weight of a key multiplies its value, 0 * inf = NaN.

// The new token of one (row, head).
template <class T>
struct NewToken {
  using A = Acc<T>;
  int64_t row, head, slot;
  int64_t token;             // of the row's new ones
  int64_t item;              // row * heads + head
  int64_t position;          // in its sequence
  alignas(64) A query[256];  // (ld): scale * q

  NewToken(const DecodeParams& p, int64_t item_, int64_t slot_, int64_t token_, int64_t ld)
      : row(item_ / p.heads),
        head(item_ % p.heads),
        slot(slot_),
        token(token_),
        item(item_),
        position(p.pool.lengths[slot_]) {
    load_row(row_of<T>(p.q, row, token, head / (p.heads / p.q_groups)), p.head_dim, ld, query);
    scale_rows(query, ld, static_cast<A>(p.scale));
  }
  int64_t chunk(const DecodeParams& p) const { return position / p.chunk_size; }
  // The row of chunk state c of its sequence and head, among all rows of the pool.
  int64_t state_row(const DecodeParams& p, int64_t c) const {
    const Pool& pool = p.pool;
    if (!pool.page_table) return (slot * p.heads + head) * pool.rows + c;
    const int64_t page = pool.page_table[slot * (pool.rows / pool.page_rows) + c / pool.page_rows];
    return (page * p.heads + head) * pool.page_rows + c % pool.page_rows;
  }
  // The running state after the token at `at`.
  A* running(const DecodeParams& p, void* base, int64_t at) const {
    return static_cast<A*>(base) + ((slot * p.pool.ring + at % p.pool.ring) * p.heads + head) * p.head_dim;
  }
};

// Running state, self term, closing chunk.
template <class T, class S>
void decode_state(const DecodeParams& p, const DecodeWorkspace& w, const NewToken<T>& t) {
  using A = Acc<T>;
  constexpr int64_t W = Simd<A>::width;
  const int64_t D = p.head_dim, ld = w.padded_dim;
  A k[256], v[256], x[256], bias[256];
  A running_k[256], running_v[256];
  zero(bias, ld);
  zero(running_k, ld);
  zero(running_v, ld);
  const size_t bytes = static_cast<size_t>(D) * sizeof(A);
  if (p.gate_bias) __builtin_memcpy(bias, static_cast<const A*>(p.gate_bias) + t.head * D, bytes);
  if (t.position % p.chunk_size != 0) {
    __builtin_memcpy(running_k, t.running(p, p.pool.running_k, t.position - 1), bytes);
    __builtin_memcpy(running_v, t.running(p, p.pool.running_v, t.position - 1), bytes);
  }
  load_row(row_of<T>(p.k, t.row, t.token, t.head / (p.heads / p.k_groups)), D, ld, k);
  load_row(row_of<T>(p.v, t.row, t.token, t.head), D, ld, v);
  load_row(row_of<T>(p.gate, t.row, t.token, t.head), D, ld, x);
  Vec<A> dot = {};
  for (int64_t d = 0; d < ld; d += W) {
    const auto gate = sigmoid_pair<A>(load(x + d) + load(bias + d));
    const Vec<A> new_k = gate.plus * load(running_k + d) + gate.minus * load(k + d);
    const Vec<A> new_v = gate.plus * load(running_v + d) + gate.minus * load(v + d);
    store(running_k + d, new_k);
    store(running_v + d, new_v);
    dot = dot + load(t.query + d) * new_k;
  }
  static_cast<A*>(w.self)[t.item] = sum_lanes<A>(dot);
  __builtin_memcpy(static_cast<A*>(w.state) + t.item * ld, running_v, static_cast<size_t>(ld) * sizeof(A));
  __builtin_memcpy(t.running(p, p.pool.running_k, t.position), running_k, bytes);
  __builtin_memcpy(t.running(p, p.pool.running_v, t.position), running_v, bytes);
  if ((t.position + 1) % p.chunk_size == 0) {
    rotate_row<A>(p.rotary, t.chunk(p), D, 1, running_k);
    const int64_t row = t.state_row(p, t.chunk(p));
    store_state(running_k, D, static_cast<S*>(p.pool.chunk_k) + row * D, p.pool.scale_k + row);
    store_state(running_v, D, static_cast<S*>(p.pool.chunk_v) + row * D, p.pool.scale_v + row);
  }
}

// A chunk state as acc, with zeros up to ld: where it lies, or in scratch.
template <class A>
RAT_INLINE const A* acc_row(const A* state, int64_t dim, int64_t ld, A* scratch) {
  if (dim == ld) return state;
  load_row(state, dim, ld, scratch);
  return scratch;
}

template <class S, class A>
RAT_INLINE const A* acc_row(const S* state, int64_t dim, int64_t ld, A* scratch) {
  for (int64_t d = 0; d < dim; d += 8) convert8(state + d, scratch + d);
  zero(scratch + dim, ld - dim);
  return scratch;
}

// The keys of one slice. The query is rotated.
template <class T, class S>
void decode_attend(const DecodeParams& p, const DecodeWorkspace& w, const NewToken<T>& t, int64_t slice) {
  using A = Acc<T>;
  constexpr int64_t W = Simd<A>::width;
  const int64_t D = p.head_dim, ld = w.padded_dim;
  const int64_t begin = slice * kSlice, end = minimum(t.chunk(p), begin + kSlice);
  const S *const k = static_cast<const S*>(p.pool.chunk_k), *const v = static_cast<const S*>(p.pool.chunk_v);
  const int64_t part = t.item * w.slices + slice;
  A* const sum = static_cast<A*>(w.sum) + part * ld;
  A m = no_score<A>(), l = 0;
  alignas(64) A score[kKeys], scratch[256];
  zero(sum, ld);
  for (int64_t first = begin; first < end; first += kKeys) {
    const int64_t count = minimum(kKeys, end - first);
    int64_t row[kKeys];
    for (int64_t j = 0; j < count; ++j) row[j] = t.state_row(p, first + j);
    A top = m;
    for (int64_t j = 0; j < count; ++j) {
      const A* const key = acc_row(k + row[j] * D, D, ld, scratch);
      Vec<A> dot = {};
      for (int64_t d = 0; d < ld; d += W) dot = dot + load(t.query + d) * load(key + d);
      score[j] = sum_lanes<A>(dot) * scale_of(p.pool.scale_k, row[j]);
      top = score[j] > top ? score[j] : top;
    }
    for (int64_t j = count; j < kKeys; ++j) score[j] = -static_cast<A>(__builtin_inf());
    Vec<A> weights = {};
    for (int64_t j = 0; j < kKeys; j += W) {
      const Vec<A> e = exp(load(score + j) - top);
      store(score + j, e);
      weights = weights + e;
    }
    if (top != m) {
      const A decay = exp(broadcast(m - top))[0];
      l *= decay;
      for (int64_t d = 0; d < ld; d += W) store(sum + d, load(sum + d) * decay);
      m = top;
    }
    l += sum_lanes<A>(weights);
    for (int64_t j = 0; j < count; ++j) {
      const A* const value = acc_row(v + row[j] * D, D, ld, scratch);
      const A weight = score[j] * scale_of(p.pool.scale_v, row[j]);
      for (int64_t d = 0; d < ld; d += W) store(sum + d, load(sum + d) + weight * load(value + d));
    }
  }
  static_cast<A*>(w.maximum)[part] = m;
  static_cast<A*>(w.weight)[part] = l;
}

// The slices and the self term, joined.
template <class T>
void decode_finish(const DecodeParams& p, const DecodeWorkspace& w, const NewToken<T>& t, int64_t slices) {
  using A = Acc<T>;
  constexpr int64_t W = Simd<A>::width;
  const int64_t ld = w.padded_dim, first = t.item * w.slices;
  const A *const m = static_cast<const A*>(w.maximum) + first, *const l = static_cast<const A*>(w.weight) + first;
  const A *const state = static_cast<const A*>(w.state) + t.item * ld, self = static_cast<const A*>(w.self)[t.item];
  A top = self;
  for (int64_t i = 0; i < slices; ++i) top = m[i] > top ? m[i] : top;
  A weight = exp(broadcast(self - top))[0], total = weight;
  A out[256], gate[256];
  for (int64_t d = 0; d < ld; d += W) store(out + d, weight * load(state + d));
  for (int64_t i = 0; i < slices; ++i) {
    weight = exp(broadcast(m[i] - top))[0];
    total += weight * l[i];
    const A* const sum = static_cast<const A*>(w.sum) + (first + i) * ld;
    for (int64_t d = 0; d < ld; d += W) store(out + d, load(out + d) + weight * load(sum + d));
  }
  if (p.out_gate.ptr) load_row(row_of<T>(p.out_gate, t.row, t.token, t.head), p.head_dim, ld, gate);
  for (int64_t d = 0; d < ld; d += W) {
    Vec<A> y = load(out + d) / total;
    if (p.out_gate.ptr) y = y * sigmoid_pair<A>(load(gate + d)).plus;
    store(out + d, y);
  }
  store_row(out, p.head_dim, row_of<T>(p.y, t.row, t.token, t.head));
}

// Token `token` of each row. S: the type of chunk states.
template <class T, class S>
void decode(const DecodeParams& p, const DecodeWorkspace& w, int64_t token) {
  for_each_task(p.batch * p.heads * w.slices, w.workers, [&](int64_t task, int) {
    const int64_t item = task / w.slices, slice = task % w.slices, row = item / p.heads;
    const int64_t slot = p.slots ? p.slots[row] : row;
    if (slot < 0) {
      if (slice == 0) zero(row_of<T>(p.y, row, token, item % p.heads), p.head_dim);
      return;
    }
    const int64_t slices = decode_slices(p, slot);
    if (slice >= slices) return;
    NewToken<T> t(p, item, slot, token, w.padded_dim);
    if (slice == 0) decode_state<T, S>(p, w, t);
    rotate_row<Acc<T>>(p.rotary, t.chunk(p), p.head_dim, 1, t.query);
    decode_attend<T, S>(p, w, t, slice);
    // What the others wrote is seen by the last.
    if (__atomic_add_fetch(w.done + item, 1, __ATOMIC_ACQ_REL) == slices) decode_finish(p, w, t, slices);
  });
}
