// Backward of rat_attention and chunk_attention. Nothing of size (T, D) is kept between phases.
//
// Phase 0, only where chunks are longer than tiles: the states that tiles start with, as in the forward.
// Phase 1, a task for each (sequence, query group, part of its tiles): dO, dout_gate, Delta, p_self, ds_self; the five
// products of attention, again with a column for each query; dq, summed over the heads of the group. Each part adds up
// its own dK and dV: no two tasks write one sum, and the order does not depend on threads.
// Phase 2, a task for each (sequence, head): adds the parts and the gradient of the returned chunk states, turns keys
// back; writes the gradient of the initial chunk states.
// Phase 3, only where chunks are longer than tiles: what tiles hand on in the reverse recurrence.
// Phase 4, a task for each (key group, tile): the reverse recurrence; dk, summed over the heads of the group, dv,
// dgate.

template <class A>
RAT_INLINE A* key_gradient(const AttentionFwdParams& p, const Plan& plan, const Workspace& w, void* base, int64_t part,
                           int64_t n, int64_t head) {
  return static_cast<A*>(base) + ((part * p.size.heads + head) * w.key_rows + plan.key_row(n)) * plan.padded_dim;
}

// dO = sigmoid(out_gate) dy in s.dout. With y: Delta = dy . y, and dout_gate is stored.
template <class T>
void load_dout(const AttentionBwdParams& b, const Tile& t, int64_t head, int64_t ld, Scratch<Acc<T>>& s,
               Acc<T>* delta) {
  using A = Acc<T>;
  const int64_t D = b.fwd.size.head_dim, count = t.rows * ld;
  load_rows<T>(b.dy, t, head, D, ld, s.dout);
  if (delta) {
    load_rows<T>(b.fwd.y, t, head, D, ld, s.row0);
    dot_rows(s.dout, s.row0, t.rows, ld, delta);
  }
  if (!b.fwd.out_gate.ptr) return;
  load_rows<T>(b.fwd.out_gate, t, head, D, ld, s.input);
  for (int64_t i = 0; i < count; i += Simd<A>::width) {
    const auto gate = sigmoid_pair<A>(load(s.input + i));
    const Vec<A> dy = load(s.dout + i);
    if (delta) store(s.row0 + i, dy * load(s.row0 + i) * gate.minus);
    store(s.dout + i, dy * gate.plus);
  }
  if (delta) store_rows<T>(b.dout_gate, t, head, D, ld, s.row0);
}

// Scores become p = e^(score - lse), 0 for keys that a query does not see.
template <class A>
void softmax_block_again(int64_t first, int64_t count, int64_t columns, const Visible<A>& visible, const A* lse,
                         A* score) {
  constexpr int64_t W = Simd<A>::width;
  const int64_t open = minimum(count, maximum(0, visible.all - first));
  for (int64_t q = 0; q < columns; q += W) {
    const Vec<A> log_sum = load(lse + q), extra = load(visible.extra + q);
    for (int64_t j = 0; j < open; ++j) store(score + j * kTile + q, exp(load(score + j * kTile + q) - log_sum));
    for (int64_t j = open; j < count; ++j) {
      const Vec<A> e = exp(load(score + j * kTile + q) - log_sum);
      store(score + j * kTile + q, broadcast(static_cast<A>(first + j - visible.all)) < extra ? e : Vec<A>{});
    }
  }
}

// dscore = p (dscore - Delta), where p is not 0.
template <class A>
void softmax_gradient_block(int64_t count, int64_t columns, const A* delta, const A* weight, A* dscore) {
  constexpr int64_t W = Simd<A>::width;
  for (int64_t q = 0; q < columns; q += W) {
    const Vec<A> d = load(delta + q);
    for (int64_t j = 0; j < count; ++j) {
      const Vec<A> e = load(weight + j * kTile + q), ds = e * (load(dscore + j * kTile + q) - d);
      store(dscore + j * kTile + q, e == 0 ? Vec<A>{} : ds);
    }
  }
}

template <class T>
void part_task(const AttentionBwdParams& b, const Plan& plan, const Workspace& w, int64_t task, int worker) {
  using A = Acc<T>;
  constexpr int64_t W = Simd<A>::width;
  const AttentionFwdParams& p = b.fwd;
  const Sizes& z = p.size;
  const int64_t D = z.head_dim, ld = plan.padded_dim;
  const int64_t part = task % w.parts, group = task / w.parts % z.q_groups, n = task / w.parts / z.q_groups;
  const int64_t members = z.heads / z.q_groups;
  Scratch<A> s(w, worker, ld);
  if (part < plan.tiles(n)) {
    for (int64_t head = group * members; head < (group + 1) * members; ++head) {
      zero(key_gradient<A>(p, plan, w, w.dkeys, part, n, head), plan.closed_chunks(n) * ld);
      zero(key_gradient<A>(p, plan, w, w.dvalues, part, n, head), plan.closed_chunks(n) * ld);
    }
  }
  A *const delta = s.vector[2], *const lse = s.vector[3], *const p_self = s.vector[4], *const ds_self = s.vector[5];
  A* const dov = s.vector[6];
  for (int64_t index = part; index < plan.tiles(n); index += w.parts) {
    const Tile t = plan.tile(n, index);
    const int64_t columns = (t.rows + W - 1) / W * W;
    const Visible<A> visible(t, plan.chunk_size, s.vector[7]);
    load_rows<T>(p.q, t, group, D, ld, s.query);
    scale_rows(s.query, t.rows * ld, static_cast<A>(p.scale));
    if (visible.any > 0) {
      __builtin_memcpy(s.rotated, s.query, static_cast<size_t>(t.rows * ld) * sizeof(A));
      rotate_rows<A>(p.rotary, t, plan.chunk_size, D, ld, 1, s.rotated);
      transpose_in(s.rotated, t.rows, ld, s.query_t);
    }
    zero(s.row2, t.rows * ld);  // the self part of dq, over scale
    for (int64_t head = group * members; head < (group + 1) * members; ++head) {
      prefetch_rows<T>(b.dy, t, head, D);
      prefetch_rows<T>(p.y, t, head, D);
      prefetch_rows<T>(p.out_gate, t, head, D);
      scan_tile<T>(p, plan, &w.forward, t, head, s, s.vector[0], s.vector[1]);
      load_dout<T>(b, t, head, ld, s, delta);
      const int64_t row = (t.batch * z.heads + head) * z.tokens + t.token;
      zero(lse, kTile);
      __builtin_memcpy(lse, static_cast<const A*>(p.lse) + row, static_cast<size_t>(t.rows) * sizeof(A));
      dot_rows(s.query, s.state_k, t.rows, ld, p_self);
      dot_rows(s.dout, s.state_v, t.rows, ld, dov);
      for (int64_t i = t.rows; i < columns; ++i) delta[i] = p_self[i] = dov[i] = 0;
      for (int64_t q = 0; q < columns; q += W) store(p_self + q, exp(load(p_self + q) - load(lse + q)));

      const T* const keys = chunk_row<T>(z, plan, p.chunks, p.chunks.k, t.sequence, head);
      const T* const values = chunk_row<T>(z, plan, p.chunks, p.chunks.v, t.sequence, head);
      A* const dkeys = key_gradient<A>(p, plan, w, w.dkeys, part, n, head);
      A* const dvalues = key_gradient<A>(p, plan, w, w.dvalues, part, n, head);
      if (visible.any > 0) transpose_in(s.dout, t.rows, ld, s.dout_t);
      // With all keys in one block, Delta = sum_j p_j dO . V_j, self included, comes for nothing and without the
      // rounding of y, which is felt most where keys are few. Over sum_j p_j, which is 1 but for the rounding of lse:
      // where all values are alike nothing is left of dO . V - Delta.
      const bool one_block = visible.any <= kKeys;
      A* const sum = ds_self;  // until that is known
      const auto divide_by_sum = [&] {
        for (int64_t q = 0; q < columns; q += W) {
          const Vec<A> of = load(sum + q);
          store(delta + q, load(delta + q) / (of == 0 ? broadcast(A{1}) : of));
        }
      };
      if (one_block) {
        for (int64_t q = 0; q < columns; q += W) {
          const Vec<A> e = load(p_self + q);
          store(sum + q, e);
          store(delta + q, e * load(dov + q));
        }
        if (visible.any == 0) divide_by_sum();
      }
      for (int64_t first = 0; first < visible.any; first += kKeys) {
        const int64_t count = minimum(kKeys, visible.any - first);
        int64_t k_stride, v_stride;
        const A* const k = key_block(keys, first, count, D, ld, s.keys, &k_stride);
        const A* const v = key_block(values, first, count, D, ld, s.values, &v_stride);
        multiply<A, true>(count, columns, D, k, k_stride, s.query_t, kTile, s.score, kTile, false);
        multiply<A, true>(count, columns, D, v, v_stride, s.dout_t, kTile, s.dscore, kTile, false);
        softmax_block_again(first, count, columns, visible, lse, s.score);
        for (int64_t j = 0; one_block && j < count; ++j) {
          for (int64_t q = 0; q < columns; q += W) {
            const Vec<A> e = load(s.score + j * kTile + q), term = e * load(s.dscore + j * kTile + q);
            store(delta + q, load(delta + q) + (e == 0 ? Vec<A>{} : term));
            store(sum + q, load(sum + q) + e);
          }
        }
        if (one_block) divide_by_sum();
        softmax_gradient_block(count, columns, delta, s.score, s.dscore);
        multiply<A, true>(count, ld, t.rows, s.score, kTile, s.dout, ld, dvalues + first * ld, ld, true);
        multiply<A, true>(count, ld, t.rows, s.dscore, kTile, s.rotated, ld, dkeys + first * ld, ld, true);
        multiply<A, false>(D, columns, count, k, k_stride, s.dscore, kTile, s.sum_t, kTile,
                           first > 0 || head > group * members);
      }
      for (int64_t q = 0; q < columns; q += W) {
        store(ds_self + q, load(p_self + q) * (load(dov + q) - load(delta + q)));
      }
      __builtin_memcpy(static_cast<A*>(w.p_self) + row, p_self, static_cast<size_t>(t.rows) * sizeof(A));
      __builtin_memcpy(static_cast<A*>(w.ds_self) + row, ds_self, static_cast<size_t>(t.rows) * sizeof(A));
      add_scaled_rows(s.row2, s.state_k, ds_self, t.rows, ld);
    }
    if (visible.any > 0) {
      transpose_out(s.sum_t, t.rows, D, ld, s.row0);
      rotate_rows<A>(p.rotary, t, plan.chunk_size, D, ld, -1, s.row0);
      for (int64_t i = 0; i < t.rows; ++i) add_to(s.row2 + i * ld, s.row0 + i * ld, ld);
    }
    scale_rows(s.row2, t.rows * ld, static_cast<A>(p.scale));
    store_rows<T>(b.dq, t, group, D, ld, s.row2);
  }
}

// Adds the gradient of a returned chunk state, then stores the sum as the gradient of an initial one.
template <class T>
void finish_keys(const AttentionBwdParams& b, const Plan& plan, const Workspace& w, int64_t n, int64_t head, void* base,
                 const void* returned, void* initial) {
  using A = Acc<T>;
  const AttentionFwdParams& p = b.fwd;
  const int64_t D = p.size.head_dim, ld = plan.padded_dim, rows = plan.closed_chunks(n);
  const int64_t before = plan.start(n) / plan.chunk_size;
  A* const total = key_gradient<A>(p, plan, w, base, 0, n, head);
  const int64_t parts = minimum(w.parts, plan.tiles(n));
  if (parts == 0) zero(total, rows * ld);
  for (int64_t part = 1; part < parts; ++part) {
    add_to(total, key_gradient<A>(p, plan, w, base, part, n, head), rows * ld);
  }
  if (returned) {
    const T* const from = static_cast<const T*>(returned) + (n * p.size.heads + head) * p.chunks.rows * D;
    A extra[256];
    for (int64_t c = 0; c < rows; ++c) {
      load_row(from + c * D, D, D, extra);
      for (int64_t d = 0; d < D; ++d) total[c * ld + d] += extra[d];
    }
  }
  if (initial) {
    T* const to = static_cast<T*>(initial) + (n * p.size.heads + head) * p.initial.rows * D;
    for (int64_t c = 0; c < before; ++c) store_row(total + c * ld, D, to + c * D);
    zero(to + before * D, (p.initial.rows - before) * D);
  }
}

template <class T>
void keys_task(const AttentionBwdParams& b, const Plan& plan, const Workspace& w, int64_t task, int) {
  using A = Acc<T>;
  const AttentionFwdParams& p = b.fwd;
  const int64_t n = task / p.size.heads, head = task % p.size.heads, D = p.size.head_dim, ld = plan.padded_dim;
  finish_keys<T>(b, plan, w, n, head, w.dkeys, b.dchunk_k, b.dinitial.k);
  finish_keys<T>(b, plan, w, n, head, w.dvalues, b.dchunk_v, b.dinitial.v);
  A* const dkeys = key_gradient<A>(p, plan, w, w.dkeys, 0, n, head);
  for (int64_t c = plan.start(n) / plan.chunk_size; c < plan.closed_chunks(n); ++c) {
    rotate_row<A>(p.rotary, c, D, -1, dkeys + c * ld);
  }
  if (plan.length(n) > 0) return;
  // An empty sequence passes its running state through.
  const size_t bytes = static_cast<size_t>(D) * sizeof(A);
  const int64_t row = (n * p.size.heads + head) * D;
  const void* const from[] = {b.drunning_k, b.drunning_v};
  void* const to[] = {b.dinitial.running_k, b.dinitial.running_v};
  for (int i = 0; i < 2; ++i) {
    if (!to[i]) continue;
    if (from[i])
      __builtin_memcpy(static_cast<A*>(to[i]) + row, static_cast<const A*>(from[i]) + row, bytes);
    else
      zero(static_cast<A*>(to[i]) + row, D);
  }
}

// The direct gradients of the states of a tile and the reverse recurrence over them: a in s.row0, b in s.row1. state_k
// and state_v (ld) come in as what the next tile hands on and leave as what this one does.
template <class T>
void reverse_tile(const AttentionBwdParams& b, const Plan& plan, const Workspace& w, const Tile& t, int64_t head,
                  Scratch<Acc<T>>& s, Acc<T>* state_k, Acc<T>* state_v) {
  using A = Acc<T>;
  const AttentionFwdParams& p = b.fwd;
  const Sizes& z = p.size;
  const int64_t D = z.head_dim, ld = plan.padded_dim, L = plan.chunk_size;
  const int64_t scalars = (t.batch * z.heads + head) * z.tokens + t.token;
  load_rows<T>(p.q, t, head / (z.heads / z.q_groups), D, ld, s.query);
  scale_rows(s.query, t.rows * ld, static_cast<A>(p.scale));
  load_dout<T>(b, t, head, ld, s, nullptr);
  zero(s.row0, t.rows * ld);
  zero(s.row1, t.rows * ld);
  add_scaled_rows(s.row0, s.query, static_cast<const A*>(w.ds_self) + scalars, t.rows, ld);
  add_scaled_rows(s.row1, s.dout, static_cast<const A*>(w.p_self) + scalars, t.rows, ld);
  const A* const dkeys = key_gradient<A>(p, plan, w, w.dkeys, 0, t.sequence, head);
  const A* const dvalues = key_gradient<A>(p, plan, w, w.dvalues, 0, t.sequence, head);
  for (int64_t i = L - 1 - t.position % L; i < t.rows; i += L) {
    const int64_t chunk = (t.position + i) / L;
    for (int64_t d = 0; d < D; ++d) {
      s.row0[i * ld + d] += dkeys[chunk * ld + d];
      s.row1[i * ld + d] += dvalues[chunk * ld + d];
    }
  }
  if (t.last) {
    const int64_t row = (t.sequence * z.heads + head) * D, end = (t.rows - 1) * ld;
    for (int64_t d = 0; b.drunning_k && d < D; ++d) s.row0[end + d] += static_cast<const A*>(b.drunning_k)[row + d];
    for (int64_t d = 0; b.drunning_v && d < D; ++d) s.row1[end + d] += static_cast<const A*>(b.drunning_v)[row + d];
  }
  reverse_scan(plan, t, ld, s.f, s.row0, state_k);
  reverse_scan(plan, t, ld, s.f, s.row1, state_v);
}

template <class T>
void local_reverse_task(const AttentionBwdParams& b, const Plan& plan, const Workspace& w, int64_t task, int worker) {
  using A = Acc<T>;
  const Sizes& z = b.fwd.size;
  const int64_t ld = plan.padded_dim;
  Scratch<A> s(w, worker, ld);
  int64_t head;
  const Tile t = plan.tile_by_task(task, z.heads, &head);
  load_gates<T>(b.fwd.gate, b.fwd.gate_bias, t, head, z.head_dim, ld, s);
  A* const k = static_cast<A*>(w.reverse.k) + (t.id * z.heads + head) * ld;
  A* const v = static_cast<A*>(w.reverse.v) + (t.id * z.heads + head) * ld;
  zero(k, ld);
  zero(v, ld);
  reverse_tile<T>(b, plan, w, t, head, s, k, v);
}

template <class T>
void gradient_task(const AttentionBwdParams& b, const Plan& plan, const Workspace& w, int64_t task, int worker) {
  using A = Acc<T>;
  constexpr int64_t W = Simd<A>::width;
  const AttentionFwdParams& p = b.fwd;
  const Sizes& z = p.size;
  const int64_t D = z.head_dim, ld = plan.padded_dim, members = z.heads / z.k_groups;
  Scratch<A> s(w, worker, ld);
  int64_t group;
  const Tile t = plan.tile_by_task(task, z.k_groups, &group);
  A *const before_k = s.vector[0], *const before_v = s.vector[1];
  A *const state_k = s.vector[2], *const state_v = s.vector[3];
  zero(s.row2, t.rows * ld);  // dk
  for (int64_t head = group * members; head < (group + 1) * members; ++head) {
    prefetch_rows<T>(b.dy, t, head, D);
    prefetch_rows<T>(p.out_gate, t, head, D);
    prefetch_rows<T>(p.q, t, head / (z.heads / z.q_groups), D);
    scan_tile<T>(p, plan, &w.forward, t, head, s, before_k, before_v);
    zero(state_k, ld);
    zero(state_v, ld);
    if (plan.segmented) {
      const int64_t row = (t.id * z.heads + head) * ld;
      __builtin_memcpy(state_k, static_cast<const A*>(w.reverse.k) + row, static_cast<size_t>(ld) * sizeof(A));
      __builtin_memcpy(state_v, static_cast<const A*>(w.reverse.v) + row, static_cast<size_t>(ld) * sizeof(A));
    }
    reverse_tile<T>(b, plan, w, t, head, s, state_k, state_v);
    if (t.first && b.dinitial.running_k) {
      const int64_t row = (t.sequence * z.heads + head) * D;
      const size_t bytes = static_cast<size_t>(D) * sizeof(A);
      __builtin_memcpy(static_cast<A*>(b.dinitial.running_k) + row, state_k, bytes);
      __builtin_memcpy(static_cast<A*>(b.dinitial.running_v) + row, state_v, bytes);
    }
    if (p.gate.ptr) {
      zero(s.input, t.rows * ld);
      load_rows<T>(p.k, t, group, D, ld, s.query);
      gate_gradient(plan, t, ld, s.row0, s.query, before_k, s.state_k, s.input);
      load_rows<T>(p.v, t, head, D, ld, s.query);
      gate_gradient(plan, t, ld, s.row1, s.query, before_v, s.state_v, s.input);
      A* const bias = w.dbias ? static_cast<A*>(w.dbias) + (t.id * z.heads + head) * ld : nullptr;
      finish_gate_gradient<T>(b.dgate, t, head, D, ld, s, s.input, bias);
    }
    for (int64_t i = 0; i < t.rows * ld; i += W) {
      const Vec<A> g = load(s.g + i);
      store(s.row2 + i, load(s.row2 + i) + g * load(s.row0 + i));
      store(s.row1 + i, g * load(s.row1 + i));
    }
    store_rows<T>(b.dv, t, head, D, ld, s.row1);
  }
  store_rows<T>(b.dk, t, group, D, ld, s.row2);
}

template <class T>
void attention_backward(const AttentionBwdParams& b, const Plan& plan, const Workspace& w) {
  using A = Acc<T>;
  const AttentionFwdParams& p = b.fwd;
  const Sizes& z = p.size;
  const int64_t tiles = plan.all_tiles(), lanes = plan.sequences * z.heads;
  if (plan.segmented) {
    for_each_task(tiles * z.heads, w.workers,
                  [&](int64_t id, int worker) { long_chunk_task<T>(p, plan, w, id, worker, false); });
  }
  for_each_task(plan.sequences * z.q_groups * w.parts, w.workers,
                [&](int64_t id, int worker) { part_task<T>(b, plan, w, id, worker); });
  for_each_task(lanes, w.workers, [&](int64_t id, int worker) { keys_task<T>(b, plan, w, id, worker); });
  if (plan.segmented) {
    for_each_task(tiles * z.heads, w.workers,
                  [&](int64_t id, int worker) { local_reverse_task<T>(b, plan, w, id, worker); });
    for_each_task(lanes, w.workers, [&](int64_t id, int worker) {
      const Scratch<A> s(w, worker, plan.padded_dim);
      const int64_t n = id / z.heads, head = id % z.heads;
      combine_reverse(plan, z, n, head, w.reverse.k, w.forward.product, s.vector[0]);
      combine_reverse(plan, z, n, head, w.reverse.v, w.forward.product, s.vector[0]);
    });
  }
  for_each_task(tiles * z.k_groups, w.workers,
                [&](int64_t id, int worker) { gradient_task<T>(b, plan, w, id, worker); });
  if (b.dgate_bias) sum_bias<A>(plan, z, w.dbias, b.dgate_bias, w.workers);
}
