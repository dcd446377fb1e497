// One decoding step. A task for each (row, head) updates the running state and rotates the query; a task for each (row,
// head, split) attends to a run of chunk states, bound by the bytes of the cache; the last pass combines the splits
// with the self term, applies the output gate and appends the state of a chunk that closes.

template <class A>
struct DecodeScratch {
  A* query;  // (items, ld): scale * R q
  A* state;  // (items, ld): v~ of the new token
  A* self;   // (items): s_tt
  A* sum;    // (items, splits, ld): sum of e^(s - m) V
  A* m;      // (items, splits)
  A* l;      // (items, splits)
  DecodeScratch(void* base, int64_t items, int64_t splits, int64_t ld) {
    query = static_cast<A*>(base);
    state = query + items * ld;
    sum = state + items * ld;
    self = sum + items * splits * ld;
    m = self + items;
    l = m + items * splits;
  }
};

template <class T>
void decode_state(const DecodeParams& p, int64_t row, int64_t head, int64_t slot, int64_t ld,
                  const DecodeScratch<Acc<T>>& s) {
  using A = Acc<T>;
  constexpr int64_t W = Simd<A>::width;
  const int64_t D = p.head_dim, position = p.lengths[slot], item = row * p.heads + head;
  A k[256], v[256], x[256], q[256], bias[256];
  A running_k[256], running_v[256];
  zero(bias, ld);
  zero(running_k, ld);
  zero(running_v, ld);
  const size_t bytes = static_cast<size_t>(D) * sizeof(A);
  A* const cache_k = static_cast<A*>(p.running_k) + (slot * p.heads + head) * D;
  A* const cache_v = static_cast<A*>(p.running_v) + (slot * p.heads + head) * D;
  if (p.gate_bias) __builtin_memcpy(bias, static_cast<const A*>(p.gate_bias) + head * D, bytes);
  if (position % p.chunk_size != 0) {
    __builtin_memcpy(running_k, cache_k, bytes);
    __builtin_memcpy(running_v, cache_v, bytes);
  }
  load_row(row_of<T>(p.q, row, 0, head / (p.heads / p.q_groups)), D, ld, q);
  load_row(row_of<T>(p.k, row, 0, head / (p.heads / p.k_groups)), D, ld, k);
  load_row(row_of<T>(p.v, row, 0, head), D, ld, v);
  load_row(row_of<T>(p.gate, row, 0, head), D, ld, x);
  Vec<A> dot = {};
  for (int64_t d = 0; d < ld; d += W) {
    const auto gate = sigmoid_pair<A>(load(x + d) + load(bias + d));
    const Vec<A> new_k = gate.plus * load(running_k + d) + gate.minus * load(k + d);
    const Vec<A> new_v = gate.plus * load(running_v + d) + gate.minus * load(v + d);
    const Vec<A> query = load(q + d) * static_cast<A>(p.scale);
    store(running_k + d, new_k);
    store(running_v + d, new_v);
    store(q + d, query);
    dot = dot + query * new_k;
  }
  s.self[item] = sum_lanes<A>(dot);
  rotate_row<A>(p.rotary, position / p.chunk_size, D, 1, q);
  __builtin_memcpy(s.query + item * ld, q, static_cast<size_t>(ld) * sizeof(A));
  __builtin_memcpy(s.state + item * ld, running_v, static_cast<size_t>(ld) * sizeof(A));
  __builtin_memcpy(cache_k, running_k, bytes);
  __builtin_memcpy(cache_v, running_v, bytes);
  if ((position + 1) % p.chunk_size == 0) {
    const int64_t chunk = position / p.chunk_size, at = ((slot * p.heads + head) * p.rows + chunk) * D;
    rotate_row<A>(p.rotary, chunk, D, 1, running_k);
    store_row(running_k, D, static_cast<T*>(p.chunk_k) + at);
    store_row(running_v, D, static_cast<T*>(p.chunk_v) + at);
  }
}

template <class T>
void decode_attend(const DecodeParams& p, int64_t item, int64_t slot, int64_t head, int64_t split, int64_t splits,
                   int64_t ld, const DecodeScratch<Acc<T>>& s) {
  using A = Acc<T>;
  constexpr int64_t W = Simd<A>::width;
  const int64_t D = p.head_dim, keys = p.lengths[slot] / p.chunk_size;
  const int64_t run = (keys + splits - 1) / splits;
  const int64_t begin = minimum(keys, split * run), end = minimum(keys, begin + run);
  const T* const k = static_cast<const T*>(p.chunk_k) + (slot * p.heads + head) * p.rows * D;
  const T* const v = static_cast<const T*>(p.chunk_v) + (slot * p.heads + head) * p.rows * D;
  const A* const query = s.query + item * ld;
  A* const sum = s.sum + (item * splits + split) * ld;
  A m = -static_cast<A>(__builtin_inf()), l = 0;
  A score[kKeys], row[256];
  zero(sum, ld);
  for (int64_t first = begin; first < end; first += kKeys) {
    const int64_t count = minimum(kKeys, end - first);
    A top = m;
    for (int64_t j = 0; j < count; ++j) {
      load_row(k + (first + j) * D, D, ld, row);
      Vec<A> dot = {};
      for (int64_t d = 0; d < ld; d += W) dot = dot + load(query + d) * load(row + d);
      score[j] = sum_lanes<A>(dot);
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
      load_row(v + (first + j) * D, D, ld, row);
      for (int64_t d = 0; d < ld; d += W) store(sum + d, load(sum + d) + score[j] * load(row + d));
    }
  }
  s.m[item * splits + split] = m;
  s.l[item * splits + split] = l;
}

template <class T>
void decode_finish(const DecodeParams& p, int64_t row, int64_t head, int64_t splits, int64_t ld,
                   const DecodeScratch<Acc<T>>& s) {
  using A = Acc<T>;
  constexpr int64_t W = Simd<A>::width;
  const int64_t item = row * p.heads + head;
  const A *const m = s.m + item * splits, *const l = s.l + item * splits;
  A top = s.self[item];
  for (int64_t i = 0; i < splits; ++i) top = m[i] > top ? m[i] : top;
  A weight = exp(broadcast(s.self[item] - top))[0], total = weight;
  A out[256], gate[256];
  for (int64_t d = 0; d < ld; d += W) store(out + d, weight * load(s.state + item * ld + d));
  for (int64_t i = 0; i < splits; ++i) {
    weight = exp(broadcast(m[i] - top))[0];
    total += weight * l[i];
    const A* const sum = s.sum + (item * splits + i) * ld;
    for (int64_t d = 0; d < ld; d += W) store(out + d, load(out + d) + weight * load(sum + d));
  }
  if (p.out_gate.ptr) load_row(row_of<T>(p.out_gate, row, 0, head), p.head_dim, ld, gate);
  for (int64_t d = 0; d < ld; d += W) {
    Vec<A> y = load(out + d) / total;
    if (p.out_gate.ptr) y = y * sigmoid_pair<A>(load(gate + d)).plus;
    store(out + d, y);
  }
  store_row(out, p.head_dim, row_of<T>(p.y, row, 0, head));
}

template <class T>
void decode(const DecodeParams& p, void* scratch, int64_t splits) {
  using A = Acc<T>;
  const int64_t ld = (p.head_dim + kPad - 1) / kPad * kPad, items = p.batch * p.heads;
  const DecodeScratch<A> s(scratch, items, splits, ld);
  const int workers = num_threads();
  const auto slot_of = [&](int64_t row) { return p.slots ? p.slots[row] : row; };
  // The new chunk state, if any, lies past the keys that this token sees, so the order of the passes does not matter to
  // it.
  const auto prepare = [&](int64_t item, int) {
    const int64_t row = item / p.heads, head = item % p.heads, slot = slot_of(row);
    if (slot >= 0) {
      decode_state<T>(p, row, head, slot, ld, s);
      return;
    }
    T* const y = row_of<T>(p.y, row, 0, head);
    zero(y, p.head_dim);
  };
  const auto attend = [&](int64_t task, int) {
    const int64_t item = task / splits, slot = slot_of(item / p.heads);
    if (slot >= 0) decode_attend<T>(p, item, slot, item % p.heads, task % splits, splits, ld, s);
  };
  const auto finish = [&](int64_t item, int) {
    if (slot_of(item / p.heads) >= 0) decode_finish<T>(p, item / p.heads, item % p.heads, splits, ld, s);
  };
  if (splits == 1) {
    for_each_task(items, workers, [&](int64_t item, int worker) {
      prepare(item, worker);
      attend(item, worker);
      finish(item, worker);
    });
    return;
  }
  for_each_task(items, workers, prepare);
  for_each_task(items * splits, workers, attend);
  for_each_task(items, workers, finish);
}
