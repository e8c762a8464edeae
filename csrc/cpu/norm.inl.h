// Accumulate: one read of a chunk into a double, for inclusion in a kernels_*.cpp.
//
// Math        sum of |x|^p (p = 1, 2, any p > 0), or max |x|.
// Partition   32 running sums; element i of a block of 32 goes to a fixed one of them.
// Traffic     reads numel * item size bytes, writes nothing.
// Order       lanes are fixed by position, the 32 sums are added as a fixed tree. Vector width does not
//             matter: a fused multiply-add is used only where the product is exact, so all instruction sets
//             agree.
// Requires    nothing of alignment; numel is 64-bit.
// Range       float32 is widened to double first: its square is exact there and cannot leave the range.
//             bfloat16 and float16 are squared in float32, also exactly, and added up in runs of 8 before
//             they are widened: in double throughout, the conversions and not the memory would set the pace.
//             A sum that came near the limits of its type is done again, in double or with the elements
//             scaled by a power of two. inf and nan give inf and nan.
// Scratch     none.
// Source      Higham, Accuracy and Stability of Numerical Algorithms, ch. 4 (error of partial sums), 27.8
//             (scaling).

constexpr int kBlock = 32;
constexpr int kVectors = kBlock / kLanes;
constexpr int kFloatVectors = kVectors / 2;
constexpr int kRun = 8;

struct One {
  static FloatVec term(FloatVec x) { return abs(x); }
  static Vec add(Vec sum, Vec x, bool) { return sum + abs(x); }
};

struct Two {
  static FloatVec term(FloatVec x) { return x * x; }
  static Vec add(Vec sum, Vec x, bool exact_square) {
    return exact_square ? multiply_add(x, x, sum) : sum + x * x;
  }
};

// The 16-bit types reach double through float32.
template <class T>
inline void load_block(const T* x, Vec (&block)[kVectors]) {
  FloatVec floats[kFloatVectors];
  load_floats(x, floats);
  for (int v = 0; v < kFloatVectors; ++v) {
    block[2 * v] = low_doubles(floats[v]);
    block[2 * v + 1] = high_doubles(floats[v]);
  }
}

// Halves 32 to 16, 8, .. 1: by whole vectors as long as there are several, which is the same tree.
inline double sum_lanes(Vec (&sums)[kVectors]) {
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int v = 0; v < half; ++v) sums[v] = sums[v] + sums[v + half];
  }
  double lane[kLanes];
  store(lane, sums[0]);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// Calls body(block) for every whole block of 32 elements, and for the rest padded with zeros.
template <int kBlocks, class T, class Body>
inline void for_each_run(const T* x, int64_t numel, Body body) {
  constexpr int64_t kElements = kBlocks * kBlock;
  int64_t i = 0;
  for (; i + kElements <= numel; i += kElements) body(x + i);
  if (i < numel) {
    T padded[kElements] = {};
    __builtin_memcpy(padded, x + i, static_cast<std::size_t>(numel - i) * sizeof(T));
    body(padded);
  }
}

template <class T, class Term>
double sum_in_double(const T* x, int64_t numel) {
  constexpr bool exact_square = sizeof(T) < sizeof(double);
  Vec sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = zero();
  for_each_run<1>(x, numel, [&](const T* block_start) {
    Vec block[kVectors];
    load_block(block_start, block);
    for (int v = 0; v < kVectors; ++v) sums[v] = Term::add(sums[v], block[v], exact_square);
  });
  return sum_lanes(sums);
}

// For the 16-bit types.
template <class T, class Term>
double sum_in_float_runs(const T* x, int64_t numel) {
  Vec sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = zero();
  for_each_run<kRun>(x, numel, [&](const T* run_start) {
    FloatVec run[kFloatVectors];
    for (int v = 0; v < kFloatVectors; ++v) run[v] = zero_floats();
    for (int b = 0; b < kRun; ++b) {
      FloatVec block[kFloatVectors];
      load_floats(run_start + b * kBlock, block);
      for (int v = 0; v < kFloatVectors; ++v) run[v] = run[v] + Term::term(block[v]);
    }
    for (int v = 0; v < kFloatVectors; ++v) {
      sums[2 * v] = sums[2 * v] + low_doubles(run[v]);
      sums[2 * v + 1] = sums[2 * v + 1] + high_doubles(run[v]);
    }
  });
  return sum_lanes(sums);
}

template <class T>
double sum_powers(const T* x, int64_t numel, double p, double scale) {
  double sums[kBlock] = {};
  for_each_run<1>(x, numel, [&](const T* block) {
    for (int i = 0; i < kBlock; ++i) {
      // Twice the square root of the scale: for a subnormal the scale itself is out of range.
      sums[i] += power(magnitude(widen(block[i])) * scale * scale, p);
    }
  });
  double sum = 0;
  for (int i = 0; i < kBlock; ++i) sum += sums[i];
  return sum;
}

template <class T>
double max_magnitude(const T* x, int64_t numel) {
  decltype(magnitude_bits(T{})) largest = 0;
  for (int64_t i = 0; i < numel; ++i) {
    const auto bits = magnitude_bits(x[i]);
    largest = bits > largest ? bits : largest;
  }
  return Format<T>::value(largest);
}

// The sum of |x|^p with the elements scaled so that the largest is near 1.
template <class T>
Accumulator sum_powers_scaled(const T* x, int64_t numel, double p) {
  const double largest = max_magnitude(x, numel);
  if (!(largest > 0) || largest > 0x1.fffffffffffffp1023) return {largest, 0};  // zero, nan, inf
  // An even exponent, so that its half is exact as well.
  const int64_t half_exponent = __builtin_ilogb(largest) / 2;
  const double scale = __builtin_ldexp(1.0, static_cast<int>(-half_exponent));
  return {sum_powers(x, numel, p, scale), 2 * half_exponent};
}

// Far enough from both ends for 2^63 terms and for adding accumulators up.
inline bool in_double_range(double sum) { return sum > 0x1p-900 && sum < 0x1p900; }

// What squares below the normal range of float32 lost, 2^-150 each at the most, is nothing beside this.
inline bool in_float_range(double sum) { return sum > 0x1p-60 && sum < __builtin_inf(); }

template <class T>
Accumulator accumulate_one(const void* data, int64_t numel, double) {
  const T* x = static_cast<const T*>(data);
  if constexpr (sizeof(T) == 2) {
    // A run of 8 bfloat16 may overflow; magnitudes cannot underflow.
    const double sum = sum_in_float_runs<T, One>(x, numel);
    return {sum < __builtin_inf() ? sum : sum_in_double<T, One>(x, numel), 0};
  } else {
    const double sum = sum_in_double<T, One>(x, numel);
    if (sizeof(T) == 4 || sum < 0x1p900) return {sum, 0};
    return sum_powers_scaled(x, numel, 1.0);
  }
}

template <class T>
Accumulator accumulate_two(const void* data, int64_t numel, double) {
  const T* x = static_cast<const T*>(data);
  if constexpr (sizeof(T) == 2) {
    const double sum = sum_in_float_runs<T, Two>(x, numel);
    return {in_float_range(sum) ? sum : sum_in_double<T, Two>(x, numel), 0};
  } else {
    const double sum = sum_in_double<T, Two>(x, numel);
    if (sizeof(T) == 4 || in_double_range(sum)) return {sum, 0};
    return sum_powers_scaled(x, numel, 2.0);
  }
}

template <class T>
Accumulator accumulate_inf(const void* data, int64_t numel, double) {
  return {max_magnitude(static_cast<const T*>(data), numel), 0};
}

template <class T>
Accumulator accumulate_any(const void* data, int64_t numel, double p) {
  const T* x = static_cast<const T*>(data);
  const double sum = sum_powers(x, numel, p, 1.0);
  if (in_double_range(sum)) return {sum, 0};
  return sum_powers_scaled(x, numel, p);
}
