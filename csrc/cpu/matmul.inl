// C (rows x columns) = or += A (rows x depth) B (depth x columns), all in scratch or cache. Rows of B and C are
// contiguous; columns is a multiple of the vector width. A is read an element at a time and may be transposed:
//   RowMajor: A(m, k) = a[m * lda + k], else A(m, k) = a[k * lda + m].
// A block of kBlockRows x kBlockVectors vectors of C stays in registers for the whole depth.

constexpr int kBlockRows = 6;
constexpr int kBlockVectors = RAT_VECTOR_BYTES == 64 ? 4 : 2;

template <class A, bool RowMajor, int M, int N>
RAT_INLINE void multiply_block(int64_t depth, const A* a, int64_t lda, const A* b, int64_t ldb, A* c, int64_t ldc,
                               bool add) {
  constexpr int64_t W = Simd<A>::width;
  Vec<A> sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[m][n] = Vec<A>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) row[n] = load<A>(b + k * ldb + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<A> x = broadcast<A>(RowMajor ? a[m * lda + k] : a[k * lda + m]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[m][n] = sum[m][n] + x * row[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      A* to = c + m * ldc + n * W;
      store(to, add ? load<A>(to) + sum[m][n] : sum[m][n]);
    }
  }
}

template <class A, bool RowMajor, int N>
RAT_INLINE void multiply_panel(int64_t rows, int64_t depth, const A* a, int64_t lda, const A* b, int64_t ldb, A* c,
                               int64_t ldc, bool add) {
  const int64_t step = RowMajor ? lda : 1;
  int64_t m = 0;
  for (; m + kBlockRows <= rows; m += kBlockRows) {
    multiply_block<A, RowMajor, kBlockRows, N>(depth, a + m * step, lda, b, ldb, c + m * ldc, ldc, add);
  }
  a += m * step;
  c += m * ldc;
  switch (rows - m) {
    case 1: return multiply_block<A, RowMajor, 1, N>(depth, a, lda, b, ldb, c, ldc, add);
    case 2: return multiply_block<A, RowMajor, 2, N>(depth, a, lda, b, ldb, c, ldc, add);
    case 3: return multiply_block<A, RowMajor, 3, N>(depth, a, lda, b, ldb, c, ldc, add);
    case 4: return multiply_block<A, RowMajor, 4, N>(depth, a, lda, b, ldb, c, ldc, add);
    case 5: return multiply_block<A, RowMajor, 5, N>(depth, a, lda, b, ldb, c, ldc, add);
    default: return;
  }
}

template <class A, bool RowMajor>
__attribute__((noinline)) void multiply(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t lda,
                                        const A* b, int64_t ldb, A* c, int64_t ldc, bool add) {
  constexpr int64_t W = Simd<A>::width;
  int64_t n = 0;
  for (; n + kBlockVectors * W <= columns; n += kBlockVectors * W) {
    multiply_panel<A, RowMajor, kBlockVectors>(rows, depth, a, lda, b + n, ldb, c + n, ldc, add);
  }
  if (kBlockVectors > 2 && n + 2 * W <= columns) {
    multiply_panel<A, RowMajor, 2>(rows, depth, a, lda, b + n, ldb, c + n, ldc, add);
    n += 2 * W;
  }
  if (n < columns) multiply_panel<A, RowMajor, 1>(rows, depth, a, lda, b + n, ldb, c + n, ldc, add);
}
