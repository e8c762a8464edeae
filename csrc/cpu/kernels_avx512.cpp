// The kernels for AVX-512 (F, BW, DQ, VL), with full-width vectors.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")

namespace fastclip::cpu {
namespace {

#include "convert.inl.h"

constexpr int kLanes = 8;
typedef __m512d Vec;
typedef __m512 FloatVec;

inline Vec zero() { return _mm512_setzero_pd(); }
inline FloatVec zero_floats() { return _mm512_setzero_ps(); }
inline void store(double* to, Vec x) { _mm512_storeu_pd(to, x); }
inline Vec abs(Vec x) { return _mm512_abs_pd(x); }
inline FloatVec abs(FloatVec x) { return _mm512_abs_ps(x); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_pd(a, b, c); }
inline Vec low_doubles(FloatVec x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline Vec high_doubles(FloatVec x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }

inline void load_block(const float* x, Vec (&block)[4]) {
  for (int v = 0; v < 4; ++v) block[v] = _mm512_cvtps_pd(_mm256_loadu_ps(x + 8 * v));
}
inline void load_block(const double* x, Vec (&block)[4]) {
  for (int v = 0; v < 4; ++v) block[v] = _mm512_loadu_pd(x + 8 * v);
}

// Two bfloat16 share a 32-bit word: the even ones fill the first half of the block, the odd ones the second.
inline void load_floats(const BFloat16* x, FloatVec (&block)[2]) {
  const __m512i words = _mm512_loadu_si512(x);
  block[0] = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  block[1] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void load_floats(const Float16* x, FloatVec (&block)[2]) {
  for (int v = 0; v < 2; ++v) {
    block[v] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16 * v)));
  }
}

constexpr int kFloat16Vector = 16;
inline void scale_float16(Float16* x, float factor) {
  __m256i* at = reinterpret_cast<__m256i*>(x);
  const __m512 scaled = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256(at)), _mm512_set1_ps(factor));
  _mm256_storeu_si256(at, _mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT));
}

#include "table.inl.h"

}  // namespace

FASTCLIP_KERNEL_TABLE(kAvx512Kernels, "avx512");

}  // namespace fastclip::cpu

#pragma GCC pop_options

#endif
