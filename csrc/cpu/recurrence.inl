// chunk_recurrence. Tasks for each (head, tile); where chunks are longer than tiles, three passes: what tiles do from
// zero, what they start with, and the result, so that a single long sequence still fills all cores.

template <class T>
void scan_input(const RecurrenceFwdParams& p, const Plan& plan, const void* carries, bool fresh, const Tile& t,
                int64_t head, Scratch<Acc<T>>& s, Acc<T>* before) {
  using A = Acc<T>;
  const Sizes& z = p.size;
  const int64_t D = z.head_dim, ld = plan.padded_dim;
  A* const state = s.vector[kVectorBuffers - 2];
  load_gates<T>(p.gate, p.gate_bias, t, head, D, ld, s);
  load_rows<T>(p.x, t, head / (z.heads / z.k_groups), D, ld, s.input);
  if (fresh)
    zero(before, ld);
  else
    state_before<A>(plan, t, z, head, carries, p.initial, before);
  __builtin_memcpy(state, before, static_cast<size_t>(ld) * sizeof(A));
  scan(plan, t, ld, s, s.input, state, s.state_k);
}

// What tiles start with, in w.forward.k.
template <class T>
void carry_states(const RecurrenceFwdParams& p, const Plan& plan, const Workspace& w) {
  using A = Acc<T>;
  const Sizes& z = p.size;
  const int64_t ld = plan.padded_dim;
  for_each_task(plan.all_tiles() * z.heads, w.workers, [&](int64_t id, int worker) {
    Scratch<A> s(w, worker, ld);
    int64_t head;
    const Tile t = plan.tile_by_task(id, z.heads, &head);
    scan_input<T>(p, plan, nullptr, true, t, head, s, s.vector[0]);
    const int64_t row = (t.id * z.heads + head) * ld;
    __builtin_memcpy(static_cast<A*>(w.forward.k) + row, s.state_k + (t.rows - 1) * ld,
                     static_cast<size_t>(ld) * sizeof(A));
    gate_product(t.rows, ld, s.f, static_cast<A*>(w.forward.product) + row);
  });
  for_each_task(plan.sequences * z.heads, w.workers, [&](int64_t id, int worker) {
    const Scratch<A> s(w, worker, ld);
    combine_forward(plan, z, id / z.heads, id % z.heads, w.forward.k, w.forward.product, p.initial, s.vector[0],
                    s.vector[1], [](const Tile&, A*) {});
  });
}

// to[n, head] = from[n, head], or zeros, for the empty sequences.
template <class A>
void pass_empty(const Plan& plan, const Sizes& z, const void* from, void* to) {
  if (!to) return;
  for (int64_t n = 0; n < plan.sequences; ++n) {
    if (plan.length(n) > 0) continue;
    const int64_t count = z.heads * z.head_dim;
    A* const row = static_cast<A*>(to) + n * count;
    if (from)
      __builtin_memcpy(row, static_cast<const A*>(from) + n * count, static_cast<size_t>(count) * sizeof(A));
    else
      zero(row, count);
  }
}

template <class T>
void recurrence_forward(const RecurrenceFwdParams& p, const Plan& plan, const Workspace& w) {
  using A = Acc<T>;
  const Sizes& z = p.size;
  const int64_t D = z.head_dim, ld = plan.padded_dim;
  if (plan.segmented) carry_states<T>(p, plan, w);
  for_each_task(plan.all_tiles() * z.heads, w.workers, [&](int64_t id, int worker) {
    Scratch<A> s(w, worker, ld);
    int64_t head;
    const Tile t = plan.tile_by_task(id, z.heads, &head);
    scan_input<T>(p, plan, w.forward.k, false, t, head, s, s.vector[0]);
    store_rows<T>(p.y, t, head, D, ld, s.state_k);
    if (t.last && p.final_state) {
      __builtin_memcpy(static_cast<A*>(p.final_state) + (t.sequence * z.heads + head) * D,
                       s.state_k + (t.rows - 1) * ld, static_cast<size_t>(D) * sizeof(A));
    }
  });
  pass_empty<A>(plan, z, p.initial, p.final_state);
}

// a in s.row0; `state` comes in as what the next tile hands on and leaves as what this one does.
template <class T>
void reverse_input(const RecurrenceBwdParams& b, const Plan& plan, const Tile& t, int64_t head, Scratch<Acc<T>>& s,
                   Acc<T>* state) {
  using A = Acc<T>;
  const Sizes& z = b.fwd.size;
  const int64_t D = z.head_dim, ld = plan.padded_dim;
  load_rows<T>(b.dy, t, head, D, ld, s.row0);
  if (t.last && b.dfinal) {
    const A* const from = static_cast<const A*>(b.dfinal) + (t.sequence * z.heads + head) * D;
    for (int64_t d = 0; d < D; ++d) s.row0[(t.rows - 1) * ld + d] += from[d];
  }
  reverse_scan(plan, t, ld, s.f, s.row0, state);
}

template <class T>
void recurrence_backward(const RecurrenceBwdParams& b, const Plan& plan, const Workspace& w) {
  using A = Acc<T>;
  const RecurrenceFwdParams& p = b.fwd;
  const Sizes& z = p.size;
  const int64_t D = z.head_dim, ld = plan.padded_dim, members = z.heads / z.k_groups;
  if (plan.segmented) {
    carry_states<T>(p, plan, w);
    for_each_task(plan.all_tiles() * z.heads, w.workers, [&](int64_t id, int worker) {
      Scratch<A> s(w, worker, ld);
      int64_t head;
      const Tile t = plan.tile_by_task(id, z.heads, &head);
      load_gates<T>(p.gate, p.gate_bias, t, head, D, ld, s);
      A* const state = static_cast<A*>(w.reverse.k) + (t.id * z.heads + head) * ld;
      zero(state, ld);
      reverse_input<T>(b, plan, t, head, s, state);
    });
    for_each_task(plan.sequences * z.heads, w.workers, [&](int64_t id, int worker) {
      const Scratch<A> s(w, worker, ld);
      combine_reverse(plan, z, id / z.heads, id % z.heads, w.reverse.k, w.forward.product, s.vector[0]);
    });
  }
  for_each_task(plan.all_tiles() * z.k_groups, w.workers, [&](int64_t id, int worker) {
    Scratch<A> s(w, worker, ld);
    int64_t group;
    const Tile t = plan.tile_by_task(id, z.k_groups, &group);
    A *const before = s.vector[0], *const state = s.vector[1];
    zero(s.row2, t.rows * ld);  // dx
    for (int64_t head = group * members; head < (group + 1) * members; ++head) {
      scan_input<T>(p, plan, w.forward.k, false, t, head, s, before);
      zero(state, ld);
      if (plan.segmented) {
        __builtin_memcpy(state, static_cast<const A*>(w.reverse.k) + (t.id * z.heads + head) * ld,
                         static_cast<size_t>(ld) * sizeof(A));
      }
      reverse_input<T>(b, plan, t, head, s, state);
      if (t.first && b.dinitial) {
        __builtin_memcpy(static_cast<A*>(b.dinitial) + (t.sequence * z.heads + head) * D, state,
                         static_cast<size_t>(D) * sizeof(A));
      }
      zero(s.row1, t.rows * ld);
      gate_gradient(plan, t, ld, s.row0, s.input, before, s.state_k, s.row1);
      A* const bias = w.dbias ? static_cast<A*>(w.dbias) + (t.id * z.heads + head) * ld : nullptr;
      finish_gate_gradient<T>(b.dgate, t, head, D, ld, s, s.row1, bias);
      for (int64_t i = 0; i < t.rows * ld; i += Simd<A>::width) {
        store(s.row2 + i, load(s.row2 + i) + load(s.g + i) * load(s.row0 + i));
      }
    }
    store_rows<T>(b.dx, t, group, D, ld, s.row2);
  });
  pass_empty<A>(plan, z, b.dfinal, b.dinitial);
  if (b.dgate_bias) sum_bias<A>(plan, z, w.dbias, b.dgate_bias, w.workers);
}
