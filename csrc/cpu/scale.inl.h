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

template <>
void scale<Float16>(void* data, int64_t numel, double coef) {
  Float16* x = static_cast<Float16*>(data);
  const float factor = static_cast<float>(coef);
  int64_t i = 0;
  for (; i + kFloat16Vector <= numel; i += kFloat16Vector) scale_float16(x + i, factor);
  for (; i < numel; ++i) x[i] = narrow<Float16>(widen(x[i]) * factor);
}
