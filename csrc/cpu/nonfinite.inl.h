// Count what is not finite in a chunk, for inclusion in a kernels_*.cpp.
//
// Math        how many elements are nan, and how many are inf or -inf.
// Partition   elementwise.
// Traffic     reads numel * item size bytes, writes nothing.
// Order       integers: any.
// Requires    nothing of alignment; numel is 64-bit.
// Scratch     none.

template <class T>
NonfiniteCount count_nonfinite(const void* data, int64_t numel) {
  const T* x = static_cast<const T*>(data);
  NonfiniteCount count;
  for (int64_t i = 0; i < numel; ++i) {
    const auto bits = magnitude_bits(x[i]);
    count.nan += bits > Format<T>::kInf;
    count.inf += bits == Format<T>::kInf;
  }
  return count;
}
