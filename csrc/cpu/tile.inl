// What a worker does with the rows of one tile. Rows are brought into scratch as acc, padded with zeros to `ld` =
// Plan::padded_dim columns, a multiple of every vector width; columns past head_dim hold finite numbers that are never
// stored.

template <class A>
struct Scratch {
  // (kTile, ld), one row per token
  A *f, *g;  // forget gate and one minus it
  A* input;  // rows just loaded
  A *state_k, *state_v;
  A* query;    // scale * q
  A* rotated;  // scale * R q
  A* dout;     // dO
  A *row0, *row1, *row2;
  // (ld, kTile), one column per token
  A *query_t, *dout_t, *sum_t;
  // (kKeys, kTile)
  A *score, *dscore;
  // (kKeys, ld)
  A *keys, *values;
  A* vector[kVectorBuffers];  // 256 each

  Scratch(const Workspace& w, int worker, int64_t ld) {
    A* p = reinterpret_cast<A*>(w.scratch + static_cast<size_t>(worker) * w.scratch_bytes);
    A** const rows[] = {&f, &g, &input, &state_k, &state_v, &query, &rotated, &dout, &row0, &row1, &row2};
    A** const columns[] = {&query_t, &dout_t, &sum_t};
    A** const scores[] = {&score, &dscore};
    A** const key_rows[] = {&keys, &values};
    static_assert(sizeof rows / sizeof *rows == kRowBuffers, "");
    static_assert(sizeof columns / sizeof *columns == kColumnBuffers, "");
    static_assert(sizeof scores / sizeof *scores == kScoreBuffers, "");
    static_assert(sizeof key_rows / sizeof *key_rows == kKeyBuffers, "");
    for (A** r : rows) *r = p, p += kTile * ld;
    for (A** c : columns) *c = p, p += kTile * ld;
    for (A** s : scores) *s = p, p += kKeys * kTile;
    for (A** k : key_rows) *k = p, p += kKeys * ld;
    for (A*& v : vector) v = p, p += 256;
  }
};

template <class F>
void for_each_task(int64_t tasks, int workers, const F& body) {
  run_tasks(
      tasks, workers, [](void* f, int64_t id, int worker) { (*static_cast<const F*>(f))(id, worker); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

RAT_INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
RAT_INLINE int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
RAT_INLINE T* row_of(const Rows& r, int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(r.ptr) + batch * r.batch + token * r.token + head * r.head;
}

// ---- moving rows ----------------------------------------------------------------------------------------------------

template <class A>
RAT_INLINE void zero(A* p, int64_t n) {
  __builtin_memset(p, 0, static_cast<size_t>(n) * sizeof(A));
}

template <class T, class A>
void load_row(const T* from, int64_t dim, int64_t ld, A* to) {
  for (int64_t d = 0; d < dim; d += 8) convert8(from + d, to + d);
  zero(to + dim, ld - dim);
}

template <class T>
void store_row(const Acc<T>* from, int64_t dim, T* to) {
  for (int64_t d = 0; d < dim; d += 8) convert8(from + d, to + d);
}

// A chunk state in the dtype of the rows. There are no scales.
template <class T>
void store_state(const Acc<T>* from, int64_t dim, T* to, float*) {
  store_row(from, dim, to);
}

// In e4m3: the scale is the least power of two that brings the largest element to 448; 1 for zeros. What is not finite makes all
// of the state NaN.
template <class A>
void store_state(const A* from, int64_t dim, e4m3* to, float* scale) {
  A amax = 0, scaled[256];
  for (int64_t d = 0; d < dim; ++d) {
    const A x = from[d] < 0 ? -from[d] : from[d];
    if (!(x <= amax)) amax = x;
    if (amax != amax) break;
  }
  *scale = amax == 0 ? 1.0f : static_cast<float>(amax);
  if (amax > 0 && *scale <= __FLT_MAX__) {
    int exponent;
    const double fraction = __builtin_frexp(static_cast<double>(amax), &exponent);  // in [1/2, 1); 448 is 7/8 of 2^9
    exponent += fraction <= 0.875 ? -9 : -8;
    *scale = static_cast<float>(__builtin_ldexp(1.0, exponent < -117 ? -117 : exponent));
  }
  for (int64_t d = 0; d < dim; ++d) scaled[d] = from[d] / static_cast<A>(*scale);
  for (int64_t d = 0; d < dim; d += 8) convert8(scaled + d, to + d);
}

RAT_INLINE float scale_of(const float* scales, int64_t row) { return scales ? scales[row] : 1.0f; }

// Rows of one head lie H * D apart, too far for most hardware prefetchers. Asked for ahead, they arrive while others
// are worked on.
template <class T>
void prefetch_rows(const Rows& r, const Tile& t, int64_t head, int64_t dim) {
  if (!r.ptr) return;
  const char* const from = reinterpret_cast<const char*>(row_of<T>(r, t.batch, t.token, head));
  const int64_t bytes = dim * static_cast<int64_t>(sizeof(T)), stride = r.token * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < t.rows; ++i) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + i * stride + at, 0, 2);
  }
}

template <class T>
void load_rows(const Rows& r, const Tile& t, int64_t head, int64_t dim, int64_t ld, Acc<T>* to) {
  const T* from = row_of<T>(r, t.batch, t.token, head);
  for (int64_t i = 0; i < t.rows; ++i) load_row(from + i * r.token, dim, ld, to + i * ld);
}

template <class T>
void store_rows(const Rows& r, const Tile& t, int64_t head, int64_t dim, int64_t ld, const Acc<T>* from) {
  T* to = row_of<T>(r, t.batch, t.token, head);
  for (int64_t i = 0; i < t.rows; ++i) store_row(from + i * ld, dim, to + i * r.token);
}

// ---- elementwise ----------------------------------------------------------------------------------------------------

template <class A>
RAT_INLINE void add_to(A* to, const A* from, int64_t n) {
  for (int64_t i = 0; i < n; i += Simd<A>::width) store(to + i, load(to + i) + load(from + i));
}

template <class A>
void scale_rows(A* x, int64_t n, A factor) {
  for (int64_t i = 0; i < n; i += Simd<A>::width) store(x + i, load(x + i) * factor);
}

// to += factor[row] * from
template <class A>
void add_scaled_rows(A* to, const A* from, const A* factor, int64_t rows, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) {
    const A x = factor[i];
    for (int64_t d = 0; d < ld; d += Simd<A>::width) {
      store(to + i * ld + d, load(to + i * ld + d) + x * load(from + i * ld + d));
    }
  }
}

// x (rows, kTile) *= factor[column]
template <class A>
void scale_columns(A* x, int64_t rows, int64_t columns, const A* factor) {
  for (int64_t d = 0; d < rows; ++d) {
    for (int64_t q = 0; q < columns; q += Simd<A>::width) {
      store(x + d * kTile + q, load(x + d * kTile + q) * load(factor + q));
    }
  }
}

// out[row] = a[row] . b[row], over the head_dim columns that are defined to be zero past the end in one of them.
template <class A>
void dot_rows(const A* a, const A* b, int64_t rows, int64_t ld, A* out) {
  for (int64_t i = 0; i < rows; ++i) {
    Vec<A> sum = {};
    for (int64_t d = 0; d < ld; d += Simd<A>::width) sum = sum + load(a + i * ld + d) * load(b + i * ld + d);
    out[i] = sum_lanes<A>(sum);
  }
}

// to (ld, kTile) = transpose of from (rows, ld). Columns from `rows` on become zero up to the next multiple of the
// vector width.
template <class A>
void transpose_in(const A* from, int64_t rows, int64_t ld, A* to) {
  constexpr int64_t W = Simd<A>::width;
  const int64_t padded = (rows + W - 1) / W * W;
  for (int64_t d0 = 0; d0 < ld; d0 += 8) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < 8; ++d) to[(d0 + d) * kTile + i] = from[i * ld + d0 + d];
    }
  }
  if (padded > rows) {
    for (int64_t d = 0; d < ld; ++d) zero(to + d * kTile + rows, padded - rows);
  }
}

// to (rows, ld) = transpose of from (dim, kTile), with zeros past dim.
template <class A>
void transpose_out(const A* from, int64_t rows, int64_t dim, int64_t ld, A* to) {
  for (int64_t d0 = 0; d0 < dim; d0 += 8) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < 8; ++d) to[i * ld + d0 + d] = from[(d0 + d) * kTile + i];
    }
  }
  for (int64_t i = 0; i < rows; ++i) zero(to + i * ld + dim, ld - dim);
}

// x = R_c x (sign = 1) or its inverse (sign = -1). D / 2 is a multiple of 4 but not of every vector width.
template <class A>
struct Quad {
  typedef A Vector __attribute__((vector_size(4 * sizeof(A))));
};

template <class A>
void rotate_row(const Rotary& rotary, int64_t chunk, int64_t dim, A sign, A* x) {
  if (!rotary.cos) return;
  using V = typename Quad<A>::Vector;
  const int64_t half = dim / 2;
  const A* cosine = static_cast<const A*>(rotary.cos) + chunk * half;
  const A* sine = static_cast<const A*>(rotary.sin) + chunk * half;
  for (int64_t d = 0; d < half; d += 4) {
    V c, s, x1, x2;
    __builtin_memcpy(&c, cosine + d, sizeof c);
    __builtin_memcpy(&s, sine + d, sizeof s);
    __builtin_memcpy(&x1, x + d, sizeof x1);
    __builtin_memcpy(&x2, x + half + d, sizeof x2);
    s = s * sign;
    const V y1 = x1 * c - x2 * s, y2 = x2 * c + x1 * s;
    __builtin_memcpy(x + d, &y1, sizeof y1);
    __builtin_memcpy(x + half + d, &y2, sizeof y2);
  }
}

template <class A>
void rotate_rows(const Rotary& rotary, const Tile& t, int64_t chunk_size, int64_t dim, int64_t ld, A sign, A* x) {
  if (!rotary.cos) return;
  for (int64_t i = 0; i < t.rows; ++i) rotate_row(rotary, (t.position + i) / chunk_size, dim, sign, x + i * ld);
}

// ---- the recurrence -------------------------------------------------------------------------------------------------

// f = sigmoid(logits + bias), g = 1 - f. Without a gate f = 0.
template <class T>
void load_gates(const Rows& gate, const void* bias, const Tile& t, int64_t head, int64_t dim, int64_t ld,
                Scratch<Acc<T>>& s) {
  using A = Acc<T>;
  if (!gate.ptr) {
    zero(s.f, t.rows * ld);
    for (int64_t i = 0; i < t.rows * ld; i += Simd<A>::width) store(s.g + i, broadcast(A(1)));
    return;
  }
  load_rows<T>(gate, t, head, dim, ld, s.f);
  A* const shift = s.vector[kVectorBuffers - 1];
  zero(shift, ld);
  if (bias) __builtin_memcpy(shift, static_cast<const A*>(bias) + head * dim, static_cast<size_t>(dim) * sizeof(A));
  for (int64_t i = 0; i < t.rows; ++i) {
    for (int64_t d = 0; d < ld; d += Simd<A>::width) {
      const auto pair = sigmoid_pair<A>(load(s.f + i * ld + d) + load(shift + d));
      store(s.f + i * ld + d, pair.plus);
      store(s.g + i * ld + d, pair.minus);
    }
  }
}

// Rows of a tile where the recurrence starts anew: `first`, then every `period`.
struct Resets {
  int64_t first, period;
  Resets(const Plan& plan, const Tile& t)
      : first((plan.reset - t.position % plan.reset) % plan.reset), period(plan.reset) {}
};

// out_t = f_t out_{t-1} + g_t x_t, starting from state (ld), which ends as the last row.
template <class A>
void scan(const Plan& plan, const Tile& t, int64_t ld, const Scratch<A>& s, const A* x, A* state, A* out) {
  const Resets resets(plan, t);
  for (int64_t d = 0; d < ld; d += Simd<A>::width) {
    Vec<A> h = load(state + d);
    int64_t next = resets.first;
    for (int64_t i = 0; i < t.rows; ++i) {
      if (i == next) {
        h = Vec<A>{};
        next += resets.period;
      }
      const int64_t at = i * ld + d;
      h = load(s.f + at) * h + load(s.g + at) * load(x + at);
      store(out + at, h);
    }
    store(state + d, h);
  }
}

// The state before a tile, (ld), into `state`: that of the token before it, or zeros where the recurrence starts anew.
// `carries` are combined; `initial` is (N, H, D).
template <class A>
void state_before(const Plan& plan, const Tile& t, const Sizes& size, int64_t head, const void* carries,
                  const void* initial, A* state) {
  zero(state, plan.padded_dim);
  if (t.position % plan.reset == 0) return;
  const size_t row = static_cast<size_t>(size.head_dim) * sizeof(A);
  if (carries) {
    __builtin_memcpy(state, static_cast<const A*>(carries) + (t.id * size.heads + head) * plan.padded_dim, row);
  } else if (initial) {
    __builtin_memcpy(state, static_cast<const A*>(initial) + (t.sequence * size.heads + head) * size.head_dim, row);
  }
}

// Product of the forget gates of a tile.
template <class A>
void gate_product(int64_t rows, int64_t ld, const A* f, A* out) {
  for (int64_t d = 0; d < ld; d += Simd<A>::width) {
    Vec<A> product = load(f + d);
    for (int64_t i = 1; i < rows; ++i) product = product * load(f + i * ld + d);
    store(out + d, product);
  }
}

// Turns what each tile of (sequence n, head) ends with when it starts from zero into what it starts with. Calls
// ended(tile, state) with what it truly ends with.
template <class A, class F>
void combine_forward(const Plan& plan, const Sizes& size, int64_t n, int64_t head, void* carries, const void* product,
                     const void* initial, A* state, A* swap, const F& ended) {
  const int64_t ld = plan.padded_dim;
  for (int64_t i = 0; i < plan.tiles(n); ++i) {
    const Tile t = plan.tile(n, i);
    if (i == 0 || t.position % plan.reset == 0) state_before<A>(plan, t, size, head, nullptr, initial, state);
    A* const carry = static_cast<A*>(carries) + (t.id * size.heads + head) * ld;
    const A* const factor = static_cast<const A*>(product) + (t.id * size.heads + head) * ld;
    for (int64_t d = 0; d < ld; ++d) swap[d] = carry[d] + factor[d] * state[d];
    __builtin_memcpy(carry, state, static_cast<size_t>(ld) * sizeof(A));
    __builtin_memcpy(state, swap, static_cast<size_t>(ld) * sizeof(A));
    ended(t, state);
  }
}

// The same for gradients, from the last tile to the first: what a tile hands to the token before it when nothing comes
// in from behind becomes what comes in.
template <class A>
void combine_reverse(const Plan& plan, const Sizes& size, int64_t n, int64_t head, void* carries, const void* product,
                     A* state) {
  const int64_t ld = plan.padded_dim;
  zero(state, ld);
  for (int64_t i = plan.tiles(n) - 1; i >= 0; --i) {
    const Tile t = plan.tile(n, i);
    if ((t.position + t.rows) % plan.reset == 0) zero(state, ld);
    A* const carry = static_cast<A*>(carries) + (t.id * size.heads + head) * ld;
    const A* const factor = static_cast<const A*>(product) + (t.id * size.heads + head) * ld;
    for (int64_t d = 0; d < ld; ++d) {
      const A out = carry[d] + factor[d] * state[d];
      carry[d] = state[d];
      state[d] = out;
    }
  }
}

// One stream (keys or values) of the reverse recurrence a_t = direct_t + f_{t+1} a_{t+1}, over a tile: `direct` becomes
// a; `state` (ld) comes in as what the token after the tile hands down, f a, and leaves as what the first row hands on.
template <class A>
void reverse_scan(const Plan& plan, const Tile& t, int64_t ld, const A* f, A* direct, A* state) {
  const Resets resets(plan, t);
  // The last reset inside the tile: below its row nothing is handed on.
  const int64_t last =
      resets.first < t.rows ? resets.first + (t.rows - 1 - resets.first) / resets.period * resets.period : -1;
  for (int64_t d = 0; d < ld; d += Simd<A>::width) {
    Vec<A> h = load(state + d);
    int64_t next = last;
    for (int64_t i = t.rows - 1; i >= 0; --i) {
      const int64_t at = i * ld + d;
      const Vec<A> a = load(direct + at) + h;
      store(direct + at, a);
      h = load(f + at) * a;
      if (i == next) {
        h = Vec<A>{};
        next -= resets.period;
      }
    }
    store(state + d, h);
  }
}

// grad += a_t (previous state - x_t), the part of a stream in the gradient of the gate; `before` is the state before
// the tile, `states` those of its rows.
template <class A>
void gate_gradient(const Plan& plan, const Tile& t, int64_t ld, const A* a, const A* x, const A* before,
                   const A* states, A* grad) {
  const Resets resets(plan, t);
  int64_t next = resets.first;
  for (int64_t i = 0; i < t.rows; ++i) {
    const bool fresh = i == next;
    if (fresh) next += resets.period;
    const A* const previous = i == 0 ? before : states + (i - 1) * ld;
    for (int64_t d = 0; d < ld; d += Simd<A>::width) {
      const int64_t at = i * ld + d;
      const Vec<A> p = fresh ? Vec<A>{} : load(previous + d);
      store(grad + at, load(grad + at) + load(a + at) * (p - load(x + at)));
    }
  }
}

// grad *= f g, into the gradient of the logits, stored; with its sum over the rows in `bias` (ld) if wanted.
template <class T>
void finish_gate_gradient(const Rows& dgate, const Tile& t, int64_t head, int64_t dim, int64_t ld,
                          const Scratch<Acc<T>>& s, Acc<T>* grad, Acc<T>* bias) {
  using A = Acc<T>;
  for (int64_t i = 0; i < t.rows * ld; i += Simd<A>::width) {
    store(grad + i, load(grad + i) * load(s.f + i) * load(s.g + i));
  }
  store_rows<T>(dgate, t, head, dim, ld, grad);
  if (!bias) return;
  zero(bias, ld);
  for (int64_t i = 0; i < t.rows; ++i) add_to(bias, grad + i * ld, ld);
}

// dgate_bias (H, D) from the sums of the tiles, in their order.
template <class A>
void sum_bias(const Plan& plan, const Sizes& size, const void* tiles, void* dgate_bias, int workers) {
  const int64_t ld = plan.padded_dim, count = plan.all_tiles();
  for_each_task(size.heads, workers, [&](int64_t head, int) {
    for (int64_t d = 0; d < size.head_dim; ++d) {
      double sum = 0;
      for (int64_t i = 0; i < count; ++i) {
        sum += static_cast<double>(static_cast<const A*>(tiles)[(i * size.heads + head) * ld + d]);
      }
      static_cast<A*>(dgate_bias)[head * size.head_dim + d] = static_cast<A>(sum);
    }
  });
}
