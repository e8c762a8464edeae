// float16 on the CPU, as the compiler converts it.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return static_cast<float>(emulation_bit_cast<_Float16>(x.bits)); }
inline __half __float2half_rn(float x) { return {emulation_bit_cast<uint16_t>(static_cast<_Float16>(x))}; }
