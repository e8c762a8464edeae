// What a pass over the elements adds up: one struct per norm, and the counts of non-finite elements.
//
// Each is made of 8-byte words without constructors, so that it can live in shared memory and travel between
// lanes. add() takes one element, merge() another accumulator. add_run() takes two vectors, unless their sum
// in the elements' own precision left its range: then it returns false, and the elements are to be added
// singly.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "elements.cuh"

namespace fastclip::cuda {

// sum x^2.
//
// Elements of 32 bits and fewer are squared and added in float32, in runs of two vectors: each element of the
// second vector joins its neighbour of the first in one fused multiply-add, and a tree adds the rest, so that
// a run of 8 float32 or 16 bfloat16 or float16 elements carries at most 4 roundings: a relative error of the
// norm below 2 * 2^-24. Runs are added in float64. A run that overflowed, or came so near to zero that
// squares may have lost digits, is refused; float64 holds every square of a float32.
//
// Source: for float64, the three ranges of J. Blue, A portable Fortran program to find the Euclidean norm
// of a vector, ACM TOMS 4 (1978), as in LAPACK's dnrm2.
struct SumSquares {
  static constexpr bool kVectorized = true;
  static constexpr double kSmall = 0x1p-900, kLarge = 0x1p900;  // sums between them go to `middle`
  static constexpr double kUp = 0x1p600, kDown = 0x1p-600;      // scales of the elements outside

  double middle;
  double large;  // squares of elements times 2^-600; nan too
  double small;  // squares of elements times 2^600

  static __device__ SumSquares zero() { return {0, 0, 0}; }

  __device__ void add(double x, double) {
    const double square = x * x;
    if (square >= kSmall && square <= kLarge) {
      middle += square;
    } else if (square < kSmall) {
      small += x * kUp * (x * kUp);
    } else {
      large += x * kDown * (x * kDown);
    }
  }

  __device__ bool add_run(const Vector<double>& a, const Vector<double>& b) {
    double sum = a.element[0] * a.element[0];
    sum = fma(a.element[1], a.element[1], sum);
    sum = fma(b.element[0], b.element[0], sum);
    sum = fma(b.element[1], b.element[1], sum);
    if (!(sum >= kSmall && sum <= kLarge)) return !any_bit(a, b);
    middle += sum;
    return true;
  }

  template <class T>
  __device__ bool add_run(const Vector<T>& a, const Vector<T>& b) {
    constexpr int kSize = Vector<T>::kSize;
    float sums[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float x = widen(a.element[i]), y = widen(b.element[i]);
      sums[i] = fmaf(y, y, x * x);
    }
#pragma unroll
    for (int half = kSize / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    if (!(sums[0] >= 0x1p-100f && sums[0] <= FLT_MAX)) return !any_bit(a, b);
    middle += sums[0];
    return true;
  }

  __device__ void merge(const SumSquares& other, double) {
    middle += other.middle;
    large += other.large;
    small += other.small;
  }

  __device__ double norm(double) const {
    if (large != 0) return sqrt(large + middle * kDown * kDown) * kUp;
    if (middle == 0) return sqrt(small) * kDown;
    return sqrt(middle + small * kDown * kDown);
  }

 private:
  // Zeros, the commonest elements whose squares are small, need no second look.
  template <class T>
  static __device__ bool any_bit(const Vector<T>& a, const Vector<T>& b) {
    return (a.words.x | a.words.y | a.words.z | a.words.w | b.words.x | b.words.y | b.words.z | b.words.w) !=
           0;
  }
};

// sum |x|, in the same runs; sums cannot lose digits near zero, so only overflow is refused.
struct SumMagnitudes {
  static constexpr bool kVectorized = true;

  double sum;

  static __device__ SumMagnitudes zero() { return {0}; }

  __device__ void add(double x, double) { sum += fabs(x); }

  __device__ bool add_run(const Vector<double>& a, const Vector<double>& b) {
    sum += (fabs(a.element[0]) + fabs(a.element[1])) + (fabs(b.element[0]) + fabs(b.element[1]));
    return true;
  }

  template <class T>
  __device__ bool add_run(const Vector<T>& a, const Vector<T>& b) {
    constexpr int kSize = Vector<T>::kSize;
    float sums[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) sums[i] = fabsf(widen(a.element[i])) + fabsf(widen(b.element[i]));
#pragma unroll
    for (int half = kSize / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    if (!(sums[0] <= FLT_MAX)) return false;
    sum += sums[0];
    return true;
  }

  __device__ void merge(const SumMagnitudes& other, double) { sum += other.sum; }

  __device__ double norm(double) const { return sum; }
};

// max |x|, compared as integers: the bits of a magnitude order as the magnitudes do, and nan lies above inf,
// where a comparison of floats would drop it.
struct MaxMagnitude {
  static constexpr bool kVectorized = true;

  unsigned long long bits;  // of a double

  static __device__ MaxMagnitude zero() { return {0}; }

  __device__ void raise(double magnitude) {
    const auto other = static_cast<unsigned long long>(__double_as_longlong(magnitude));
    bits = other > bits ? other : bits;
  }

  __device__ void add(double x, double) { raise(fabs(x)); }

  __device__ bool add_run(const Vector<double>& a, const Vector<double>& b) {
    raise(fabs(a.element[0]));
    raise(fabs(a.element[1]));
    raise(fabs(b.element[0]));
    raise(fabs(b.element[1]));
    return true;
  }

  template <class T>
  __device__ bool add_run(const Vector<T>& a, const Vector<T>& b) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) {
      largest = max(largest, __float_as_uint(widen(a.element[i])) & 0x7fffffffu);
      largest = max(largest, __float_as_uint(widen(b.element[i])) & 0x7fffffffu);
    }
    raise(__uint_as_float(largest));
    return true;
  }

  __device__ void merge(const MaxMagnitude& other, double) { bits = other.bits > bits ? other.bits : bits; }

  __device__ double norm(double) const { return __longlong_as_double(static_cast<long long>(bits)); }
};

// sum |x|^p as largest^p * sum, where sum adds up (|x| / largest)^p: no power of a finite element overflows,
// and the largest never vanishes. One pow per element, so its speed is that of the arithmetic.
struct SumPowers {
  static constexpr bool kVectorized = false;

  double largest;
  double sum;

  static __device__ SumPowers zero() { return {0, 0}; }

  __device__ void add(double x, double p) {
    const double magnitude = fabs(x);
    if (magnitude != magnitude) {
      sum = magnitude;
    } else if (magnitude > 0) {
      merge({magnitude, 1.0}, p);
    }
  }

  __device__ void merge(const SumPowers& other, double p) {
    // Equal ones need no division, which two infinities would not survive.
    if (other.largest == largest) {
      sum += other.sum;
      return;
    }
    const bool rises = other.largest > largest;
    const double ratio = rises ? largest / other.largest : other.largest / largest;
    const double power = pow(ratio, p);
    sum = rises ? sum * power + other.sum : sum + other.sum * power;
    if (rises) largest = other.largest;
  }

  __device__ double norm(double p) const { return largest * pow(sum, 1.0 / p); }
};

// How many elements are nan and how many infinite.
struct NonfiniteCounts {
  static constexpr bool kVectorized = true;

  unsigned long long num_nan;
  unsigned long long num_inf;

  static __device__ NonfiniteCounts zero() { return {0, 0}; }

  __device__ void add(double x, double) {
    num_nan += x != x;
    num_inf += fabs(x) > DBL_MAX;
  }

  template <class T>
  __device__ bool add_run(const Vector<T>& a, const Vector<T>& b) {
    int nans = 0, infs = 0;
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) {
      nans += static_cast<int>(is_nan(a.element[i])) + static_cast<int>(is_nan(b.element[i]));
      infs += static_cast<int>(is_inf(a.element[i])) + static_cast<int>(is_inf(b.element[i]));
    }
    num_nan += nans;
    num_inf += infs;
    return true;
  }

  __device__ void merge(const NonfiniteCounts& other, double) {
    num_nan += other.num_nan;
    num_inf += other.num_inf;
  }

 private:
  template <class T>
  static __device__ bool is_nan(T x) {
    return widen(x) != widen(x);
  }
  static __device__ bool is_inf(double x) { return fabs(x) > DBL_MAX; }
  template <class T>
  static __device__ bool is_inf(T x) {
    return fabsf(widen(x)) > FLT_MAX;
  }
};

}  // namespace fastclip::cuda
