// Apply: multiply a chunk in place, for inclusion in a kernels_*.cpp.
//
// Math        x *= coef, one rounding to the element type; float32 and narrower multiply in float32 by
//             float32(coef), float64 in double.
// Partition   elementwise.
// Traffic     reads and writes numel * item size bytes.
// Order       none.
// Requires    nothing of alignment; numel is 64-bit. Spans that share memory must not run at the same time.
// Range       nan and inf as IEEE 754 multiplies them: 0 * inf is nan.
// Scratch     none.

template <class T>
void scale(void* data, int64_t numel, double coef) {
  T* x = static_cast<T*>(data);
  const float factor = static_cast<float>(coef);
  for (int64_t i = 0; i < numel; ++i) x[i] = narrow<T>(widen(x[i]) * factor);
}

template <>
void scale<double>(void* data, int64_t numel, double coef) {
  double* x = static_cast<double*>(data);
  for (int64_t i = 0; i < numel; ++i) x[i] *= coef;
}

// Two bfloat16 in one 32-bit word, which is how a vector of words holds twice as many.
typedef uint32_t BFloat16Pair __attribute__((may_alias, aligned(2)));

// Rounds to the upper 16 bits, ties to even. The nan of a product whose factors have empty lower halves has
// an empty lower half too, so it cannot be carried into another value.
inline uint32_t rounded_to_upper_half(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

template <>
void scale<BFloat16>(void* data, int64_t numel, double coef) {
  const float factor = coef == coef ? static_cast<float>(coef) : __builtin_nanf("");
  BFloat16Pair* pairs = static_cast<BFloat16Pair*>(data);
  for (int64_t i = 0; i < numel / 2; ++i) {
    const uint32_t low = rounded_to_upper_half(bit_cast<float>(pairs[i] << 16) * factor);
    const uint32_t high = rounded_to_upper_half(bit_cast<float>(pairs[i] & 0xffff0000u) * factor);
    pairs[i] = (high & 0xffff0000u) | (low >> 16);
  }
  if (numel % 2 != 0) {
    BFloat16& last = static_cast<BFloat16*>(data)[numel - 1];
    last = narrow<BFloat16>(widen(last) * factor);
  }
}

template <>
void scale<Float16>(void* data, int64_t numel, double coef) {
  Float16* x = static_cast<Float16*>(data);
  const float factor = static_cast<float>(coef);
  int64_t i = 0;
  for (; i + kFloat16Vector <= numel; i += kFloat16Vector) scale_float16(x + i, factor);
  for (; i < numel; ++i) x[i] = narrow<Float16>(widen(x[i]) * factor);
}
