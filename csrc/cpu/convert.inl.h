// Element types and their conversions, for inclusion in a kernels_*.cpp, inside its anonymous namespace.
//
// bfloat16 and float16 travel as their 16 bits. Nothing here comes from the standard library: an inline
// function shared between translation units would leak one instruction set's code into another's.

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

inline float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  // Read as float32, the exponent is too small by 127 - 15; the product also normalizes subnormals.
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  if (magnitude >= 0x7c00u << 13) bits |= 0x7f800000u;  // inf and nan
  return bit_cast<float>(bits | static_cast<uint32_t>(x.bits & 0x8000u) << 16);
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

// Round to nearest, ties to even; nan stays nan.
template <class T>
inline T narrow(float x);
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
}
template <>
inline Float16 narrow<Float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 2^16 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 1/2 shifts the mantissa to where a subnormal float16 has it, rounding on the way.
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}
template <>
inline float narrow<float>(float x) {
  return x;
}

inline double magnitude(double x) { return __builtin_fabs(x); }

// The bits of |x| as an unsigned integer: ordered like the magnitudes, with inf above all finite ones and
// nan above inf, so that a maximum over them cannot lose a nan.
inline uint32_t magnitude_bits(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }
inline uint64_t magnitude_bits(double x) { return bit_cast<uint64_t>(x) & 0x7fffffffffffffffu; }
inline uint16_t magnitude_bits(BFloat16 x) { return x.bits & 0x7fffu; }
inline uint16_t magnitude_bits(Float16 x) { return x.bits & 0x7fffu; }

template <class T>
struct Format;
template <>
struct Format<float> {
  static constexpr uint32_t kInf = 0x7f800000u;
  static double value(uint32_t bits) { return bit_cast<float>(bits); }
};
template <>
struct Format<double> {
  static constexpr uint64_t kInf = 0x7ff0000000000000u;
  static double value(uint64_t bits) { return bit_cast<double>(bits); }
};
template <>
struct Format<BFloat16> {
  static constexpr uint16_t kInf = 0x7f80u;
  static double value(uint16_t bits) { return widen(BFloat16{bits}); }
};
template <>
struct Format<Float16> {
  static constexpr uint16_t kInf = 0x7c00u;
  static double value(uint16_t bits) { return widen(Float16{bits}); }
};
