// x^p in straight-line arithmetic that the compiler turns into vectors, for inclusion in a kernels_*.cpp.
//
// Math        2^(p log2 x) for x >= 0 and p > 0. log2 by the series of atanh around 1, 2^f by its Taylor
//             series on [-1/2, 1/2]. Relative error below (2 + p |log2 x|) 2^-51.
// Range       0, inf and nan give themselves. What leaves the range of a double becomes 0 or inf.
// Source      Cody and Waite, Software Manual for the Elementary Functions, 1980, ch. 5, 6 and 7.

// log2 of x > 0, finite.
inline double log2_positive(double x) {
  const bool subnormal = x < 0x1p-1022;
  const uint64_t bits = bit_cast<uint64_t>(subnormal ? x * 0x1p54 : x);
  // The mantissa in [sqrt(1/2), sqrt(2)), by moving the start of each binade to its upper part.
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcdu;
  const uint64_t shifted = bits - kSqrtHalf;
  const double mantissa = bit_cast<double>((shifted & 0xfffffffffffffu) + kSqrtHalf);
  // The exponent as a double: put below the point of 2^52, offset so that it is positive, and taken off
  // again.
  const uint64_t exponent_bits = (shifted + (uint64_t{1024} << 52)) >> 52;
  const double exponent =
      bit_cast<double>(exponent_bits | 0x4330000000000000u) - (0x1p52 + 1024.0) - (subnormal ? 54.0 : 0.0);
  const double s = (mantissa - 1.0) / (mantissa + 1.0);
  const double t = s * s;
  double series = 1.0 / 21;
  series = series * t + 1.0 / 19;
  series = series * t + 1.0 / 17;
  series = series * t + 1.0 / 15;
  series = series * t + 1.0 / 13;
  series = series * t + 1.0 / 11;
  series = series * t + 1.0 / 9;
  series = series * t + 1.0 / 7;
  series = series * t + 1.0 / 5;
  series = series * t + 1.0 / 3;
  series = series * t + 1.0;
  constexpr double kTwoOverLn2 = 2.8853900817779268;
  return exponent + kTwoOverLn2 * s * series;
}

// 2^y; 0 below 2^-1021 and inf from 2^1023.5 on, which is far outside the range that sums are trusted in.
inline double exp2_in_range(double y) {
  const double limited = y < -1021.0 ? -1021.0 : y > 1023.0 ? 1023.0 : y;
  // Adding 1.5 * 2^52 rounds to an integer and leaves it in the low bits.
  const double rounded = limited + 0x1.8p52;
  const double f = limited - (rounded - 0x1.8p52);
  const double z = f * 0.69314718055994531;
  double series = 1.0 / 6227020800.0;
  series = series * z + 1.0 / 479001600.0;
  series = series * z + 1.0 / 39916800.0;
  series = series * z + 1.0 / 3628800.0;
  series = series * z + 1.0 / 362880.0;
  series = series * z + 1.0 / 40320.0;
  series = series * z + 1.0 / 5040.0;
  series = series * z + 1.0 / 720.0;
  series = series * z + 1.0 / 120.0;
  series = series * z + 1.0 / 24.0;
  series = series * z + 1.0 / 6.0;
  series = series * z + 0.5;
  series = series * z + 1.0;
  series = series * z + 1.0;
  const uint64_t n = bit_cast<uint64_t>(rounded) - bit_cast<uint64_t>(0x1.8p52);
  const double result = series * bit_cast<double>((n + 1023) << 52);
  return y < -1021.0 ? 0.0 : y >= 1023.5 ? __builtin_inf() : result;
}

inline double power(double x, double p) {
  const double result = exp2_in_range(p * log2_positive(x));
  return (x > 0.0) & (x < __builtin_inf()) ? result : x;
}
