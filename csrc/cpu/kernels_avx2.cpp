// The kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace fastclip::cpu {
namespace {

#include "convert.inl.h"

constexpr int kLanes = 4;
typedef __m256d Vec;
typedef __m256 FloatVec;

inline Vec zero() { return _mm256_setzero_pd(); }
inline FloatVec zero_floats() { return _mm256_setzero_ps(); }
inline void store(double* to, Vec x) { _mm256_storeu_pd(to, x); }
inline Vec abs(Vec x) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), x); }
inline FloatVec abs(FloatVec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_pd(a, b, c); }
inline Vec low_doubles(FloatVec x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
inline Vec high_doubles(FloatVec x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }

inline void load_block(const float* x, Vec (&block)[8]) {
  for (int v = 0; v < 8; ++v) block[v] = _mm256_cvtps_pd(_mm_loadu_ps(x + 4 * v));
}
inline void load_block(const double* x, Vec (&block)[8]) {
  for (int v = 0; v < 8; ++v) block[v] = _mm256_loadu_pd(x + 4 * v);
}

// Two bfloat16 share a 32-bit word: the even ones fill the first half of the block, the odd ones the second.
inline void load_floats(const BFloat16* x, FloatVec (&block)[4]) {
  const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (int v = 0; v < 2; ++v) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16 * v));
    block[v] = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    block[2 + v] = _mm256_castsi256_ps(_mm256_and_si256(words, odd));
  }
}
inline void load_floats(const Float16* x, FloatVec (&block)[4]) {
  for (int v = 0; v < 4; ++v) {
    block[v] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8 * v)));
  }
}

constexpr int kFloat16Vector = 8;
inline void scale_float16(Float16* x, float factor) {
  __m128i* at = reinterpret_cast<__m128i*>(x);
  const __m256 scaled = _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_set1_ps(factor));
  _mm_storeu_si128(at, _mm256_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT));
}

#include "table.inl.h"

}  // namespace

FASTCLIP_KERNEL_TABLE(kAvx2Kernels, "avx2");

}  // namespace fastclip::cpu

#pragma GCC pop_options

#endif
