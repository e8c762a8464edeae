// The operations of FASTCLIP_ELEMENTWISE on a chunk in place, for inclusion in a kernels_*.cpp: each returns
// whether it changed an element, and writes nothing if not. Spans that share memory must not run together.

// Clamp to [-limit, limit].
//
// Math        x = min(max(x, -limit), limit), the limits rounded to the element type as torch rounds them.
// Partition   elementwise.
// Traffic     reads numel * item size bytes; reads and writes as many again only if an element is outside.
// Order       none.
// Requires    nothing of alignment; limit is not nan.
// Range       nan stays nan, inf becomes limit. A negative limit gives its value everywhere, as in torch.
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
bool clamp(void* data, int64_t numel, double limit) {
  T* x = static_cast<T*>(data);
  const T lo = bound<T>(-limit), hi = bound<T>(limit);
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
