// The kernels for the baseline of the architecture: SSE2 on x86-64, NEON on aarch64. Written with the
// compiler's portable vectors.
#include "kernels.h"

namespace fastclip::cpu {
namespace {

#include "convert.inl.h"

constexpr int kLanes = 2;
typedef double Vec __attribute__((vector_size(16)));
typedef float FloatVec __attribute__((vector_size(16)));
typedef float FloatPair __attribute__((vector_size(8)));
typedef uint32_t Words __attribute__((vector_size(16)));

inline Vec zero() { return Vec{0, 0}; }
inline FloatVec zero_floats() { return FloatVec{0, 0, 0, 0}; }
inline void store(double* to, Vec x) { __builtin_memcpy(to, &x, sizeof(x)); }
inline Vec abs(Vec x) { return Vec{__builtin_fabs(x[0]), __builtin_fabs(x[1])}; }
inline FloatVec abs(FloatVec x) { return bit_cast<FloatVec>(bit_cast<Words>(x) & 0x7fffffffu); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec low_doubles(FloatVec x) { return __builtin_convertvector((FloatPair{x[0], x[1]}), Vec); }
inline Vec high_doubles(FloatVec x) { return __builtin_convertvector((FloatPair{x[2], x[3]}), Vec); }

inline void load_block(const float* x, Vec (&block)[16]) {
  for (int v = 0; v < 16; ++v) {
    FloatPair pair;
    __builtin_memcpy(&pair, x + 2 * v, sizeof(pair));
    block[v] = __builtin_convertvector(pair, Vec);
  }
}
inline void load_block(const double* x, Vec (&block)[16]) { __builtin_memcpy(block, x, sizeof(block)); }

// Two bfloat16 share a 32-bit word: the even ones fill the first half of the block, the odd ones the second.
inline void load_floats(const BFloat16* x, FloatVec (&block)[8]) {
  for (int v = 0; v < 4; ++v) {
    Words words;
    __builtin_memcpy(&words, x + 8 * v, sizeof(words));
    block[v] = bit_cast<FloatVec>(words << 16);
    block[4 + v] = bit_cast<FloatVec>(words & 0xffff0000u);
  }
}
inline void load_floats(const Float16* x, FloatVec (&block)[8]) {
  for (int v = 0; v < 8; ++v) {
    const Float16* at = x + 4 * v;
    block[v] = FloatVec{widen(at[0]), widen(at[1]), widen(at[2]), widen(at[3])};
  }
}

constexpr int kFloat16Vector = 1;
inline void scale_float16(Float16* x, float factor) { *x = narrow<Float16>(widen(*x) * factor); }

#include "table.inl.h"

}  // namespace

FASTCLIP_KERNEL_TABLE(kBaseKernels, "base");

}  // namespace fastclip::cpu
