// Clamp a chunk to [lo, hi] in place, for inclusion in a kernels_*.cpp.
//
// Math        x = min(max(x, lo), hi), with lo and hi rounded to the element type as torch rounds them.
// Partition   elementwise.
// Traffic     reads numel * item size bytes; reads and writes as many again only if an element is outside.
// Order       none.
// Requires    nothing of alignment; lo and hi are not nan. Spans that share memory must not run together.
// Range       nan stays nan, inf becomes hi, -inf lo. lo > hi gives hi everywhere, as in torch.
// Scratch     none.

template <class T>
T bound(double value) {
  return narrow<T>(static_cast<float>(value));
}
template <>
double bound<double>(double value) {
  return value;
}

template <class T>
bool clamp(void* data, int64_t numel, double lo_value, double hi_value) {
  T* x = static_cast<T*>(data);
  const T lo = bound<T>(lo_value), hi = bound<T>(hi_value);
  const auto lo_wide = widen(lo), hi_wide = widen(hi);
  int outside = 0;
  for (int64_t i = 0; i < numel; ++i) {
    const auto wide = widen(x[i]);
    outside |= static_cast<int>(wide < lo_wide) | static_cast<int>(wide > hi_wide);
  }
  if (!outside) return false;
  for (int64_t i = 0; i < numel; ++i) {
    T value = x[i];
    value = widen(value) < lo_wide ? lo : value;
    value = widen(value) > hi_wide ? hi : value;
    x[i] = value;
  }
  return true;
}
