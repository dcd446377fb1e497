// Vectors of the compiler (GCC's and Clang's vector extension), RAT_VECTOR_BYTES wide, and what is computed on them.
// Included by kernels.inl inside an unnamed namespace.

#define RAT_INLINE inline __attribute__((always_inline))

template <class A>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(RAT_VECTOR_BYTES)));
  typedef int32_t Mask __attribute__((vector_size(RAT_VECTOR_BYTES)));
  static constexpr int64_t width = RAT_VECTOR_BYTES / 4;
};

template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(RAT_VECTOR_BYTES)));
  typedef int64_t Mask __attribute__((vector_size(RAT_VECTOR_BYTES)));
  static constexpr int64_t width = RAT_VECTOR_BYTES / 8;
};

template <class A>
using Vec = typename Simd<A>::Vector;

template <class A>
RAT_INLINE Vec<A> load(const A* p) {
  Vec<A> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class A>
RAT_INLINE void store(A* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class A>
RAT_INLINE Vec<A> broadcast(A x) {
  return x - Vec<A>{};
}

template <class A>
RAT_INLINE A sum_lanes(Vec<A> v) {
  A lane[Simd<A>::width];
  store(lane, v);
  for (int64_t n = Simd<A>::width / 2; n > 0; n /= 2) {
    for (int64_t i = 0; i < n; ++i) lane[i] += lane[i + n];
  }
  return lane[0];
}

// e^x within 1 ulp or so of float: x = n log 2 + r with |r| <= log(2) / 2, a polynomial for e^r, n put into the
// exponent. Exactly 0 below the least normal result (-inf included); NaN stays NaN.
RAT_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  using M = Simd<float>::Mask;
  constexpr float lowest = -87.3365402f, highest = 88.3762589f;
  const V bounded = x < lowest ? broadcast(lowest) : x > highest ? broadcast(highest) : x;
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const V shifted = bounded * 1.44269504f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  V r = bounded - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V p = r * 1.98756915e-4f + 1.39819995e-3f;
  p = p * r + 8.33345186e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 5.00000000e-1f;
  p = p * (r * r) + r + 1.0f;
  const M power = (((M)shifted - 0x4b400000) + 127) << 23;
  p = p * (V)power;
  return x < lowest ? V{} : p;
}

RAT_INLINE Vec<double> exp(Vec<double> x) {
  for (int64_t i = 0; i < Simd<double>::width; ++i) x[i] = std::exp(x[i]);
  return x;
}

// The maximum of a softmax over no keys: below no finite score, and finite, so that e^(-inf - maximum) is 0 and not NaN.
template <class A>
RAT_INLINE A no_score();
template <>
RAT_INLINE float no_score() {
  return -__FLT_MAX__;
}
template <>
RAT_INLINE double no_score() {
  return -__DBL_MAX__;
}

// sigmoid(x) and sigmoid(-x) from one exponential, neither by cancellation.
template <class A>
struct SigmoidPair {
  Vec<A> plus, minus;
};

template <class A>
RAT_INLINE SigmoidPair<A> sigmoid_pair(Vec<A> x) {
  const Vec<A> e = exp(x < 0 ? x : -x);
  const Vec<A> large = A(1) / (A(1) + e);
  const Vec<A> small = e * large;
  return {x < 0 ? small : large, x < 0 ? large : small};
}

// ---- conversion, eight elements at a time ---------------------------------------------------------------------------

typedef uint16_t Half8 __attribute__((vector_size(16)));
typedef uint32_t Word8 __attribute__((vector_size(32)));
typedef float Float8 __attribute__((vector_size(32)));

RAT_INLINE Word8 widen(const void* p) {
  Half8 h;
  __builtin_memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, Word8);
}

RAT_INLINE void narrow(void* p, const Word8& w) {
  const Half8 h = __builtin_convertvector(w, Half8);
  __builtin_memcpy(p, &h, sizeof h);
}

RAT_INLINE void convert8(const bf16* from, float* to) {
  const Word8 w = widen(from) << 16;
  __builtin_memcpy(to, &w, sizeof w);
}

RAT_INLINE void convert8(const float* from, bf16* to) {
  Word8 w;
  __builtin_memcpy(&w, from, sizeof w);
  const Word8 rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;  // to nearest, ties to even
  narrow(to, (w & 0x7fffffff) > 0x7f800000 ? (w >> 16) | 0x40 : rounded);
}

RAT_INLINE void convert8(const f16* from, float* to) {
  const Word8 w = widen(from);
  // Exponent and fraction moved to where a float has them, then 2^112 makes up for the two exponent biases; this is
  // exact for subnormal halves too.
  const Word8 moved = (w & 0x7fff) << 13;
  const Word8 scaled = (Word8)((Float8)moved * 0x1p112f);
  const Word8 magnitude = (w & 0x7c00) == 0x7c00 ? moved | 0x7f800000 : scaled;
  const Word8 result = magnitude | (w & 0x8000) << 16;
  __builtin_memcpy(to, &result, sizeof result);
}

RAT_INLINE void convert8(const float* from, f16* to) {
  Word8 w;
  __builtin_memcpy(&w, from, sizeof w);
  const Word8 sign = w >> 16 & 0x8000;
  const Word8 magnitude = w & 0x7fffffff;
  const Word8 normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // Below 2^-14 the unit is 2^-24, which is the unit of floats from 0.5 on: the addition rounds.
  const Word8 subnormal = (Word8)((Float8)magnitude + 0.5f) - 0x3f000000;
  Word8 h = magnitude < 0x38800000 ? subnormal : normal;
  h = magnitude >= 0x477ff000 ? Word8{} + 0x7c00 : h;
  h = magnitude > 0x7f800000 ? Word8{} + 0x7e00 : h;
  narrow(to, h | sign);
}

typedef uint8_t Byte8 __attribute__((vector_size(8)));

RAT_INLINE void convert8(const e4m3* from, float* to) {
  Byte8 b;
  __builtin_memcpy(&b, from, sizeof b);
  const Word8 w = __builtin_convertvector(b, Word8);
  // As of halves: exponent and fraction moved, then 2^120 for the two exponent biases.
  const Word8 scaled = (Word8)((Float8)((w & 0x7f) << 20) * 0x1p120f);
  const Word8 result = ((w & 0x7f) == 0x7f ? Word8{} + 0x7fc00000 : scaled) | (w & 0x80) << 24;
  __builtin_memcpy(to, &result, sizeof result);
}

RAT_INLINE void convert8(const float* from, e4m3* to) {
  Word8 w;
  __builtin_memcpy(&w, from, sizeof w);
  const Word8 sign = w >> 24 & 0x80;
  const Word8 magnitude = w & 0x7fffffff;
  const Word8 normal = (magnitude - 0x3c000000 + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  // Below 2^-6 the unit is 2^-9, which is the unit of floats from 2^14 on: the addition rounds.
  const Word8 subnormal = (Word8)((Float8)magnitude + 16384.0f) - 0x46800000;
  Word8 b = magnitude < 0x3c800000 ? subnormal : normal;
  b = magnitude > 0x43e00000 ? Word8{} + 0x7e : b;  // the largest, 448
  b = magnitude > 0x7f800000 ? Word8{} + 0x7f : b;
  const Byte8 bytes = __builtin_convertvector(b | sign, Byte8);
  __builtin_memcpy(to, &bytes, sizeof bytes);
}

RAT_INLINE void convert8(const e4m3* from, double* to) {
  float x[8];
  convert8(from, x);
  for (int64_t i = 0; i < 8; ++i) to[i] = x[i];
}

RAT_INLINE void convert8(const double* from, e4m3* to) {
  float x[8];
  for (int64_t i = 0; i < 8; ++i) x[i] = static_cast<float>(from[i]);
  convert8(x, to);
}

template <class A>
RAT_INLINE void convert8(const A* from, A* to) {
  __builtin_memcpy(to, from, 8 * sizeof(A));
}
