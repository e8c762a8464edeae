// Enough of CUDA to run csrc/cuda on the CPU: this folder comes first among the include paths.
//
// A device is this process. Kernels run where they are launched, block after block, and a block's threads are
// fibers that switch at barriers and shuffles; so races between blocks do not show, and everything else does:
// indices, tails, tables, the order of sums. Memory is malloc's, poisoned; streams are numbers that tests
// choose. A capture refuses what a real one does, is invalidated by it, and where the manual leaves open
// whether a call is permitted, it is refused.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned x) : x(x) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
};

namespace emulation {

struct Position {
  unsigned x;
};
extern Position thread, block, grid;

// Runs the kernel, or records it if the stream is capturing.
cudaError_t submit(const void* stream, unsigned num_blocks, unsigned num_threads,
                   std::function<void()> kernel);
void synchronize_block();
unsigned long long shuffle_down(unsigned long long value, int delta);

}  // namespace emulation

#define threadIdx emulation::thread
#define blockIdx emulation::block
#define gridDim emulation::grid

inline void __syncthreads() { emulation::synchronize_block(); }
inline void __threadfence() {}
inline unsigned long long __shfl_down_sync(unsigned, unsigned long long value, int delta) {
  return emulation::shuffle_down(value, delta);
}
inline unsigned atomicInc(unsigned* counter, unsigned limit) {
  const unsigned before = *counter;
  *counter = before >= limit ? 0 : before + 1;
  return before;
}
template <class T>
T __ldg(const T* at) {
  return *at;
}

template <class To, class From>
To emulation_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(unsigned bits) { return emulation_bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return emulation_bit_cast<unsigned>(x); }
inline long long __double_as_longlong(double x) { return emulation_bit_cast<long long>(x); }
inline double __longlong_as_double(long long bits) { return emulation_bit_cast<double>(bits); }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

using cudaStream_t = struct EmulatedStream*;
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone,
  cudaStreamCaptureStatusActive,
  cudaStreamCaptureStatusInvalidated
};
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
constexpr unsigned cudaStreamNonBlocking = 1;
struct cudaFuncAttributes {};

extern "C" {

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaMalloc(void** memory, size_t nbytes);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t nbytes, cudaStream_t stream);
cudaError_t emulation_function_attributes();

}  // extern "C"

template <class... Arguments>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Arguments...)) {
  return emulation_function_attributes();
}

template <class... Arguments, size_t... kIndex>
std::tuple<std::remove_const_t<Arguments>...> emulation_copies(void** arguments,
                                                               std::index_sequence<kIndex...>) {
  return {*static_cast<std::remove_const_t<Arguments>*>(arguments[kIndex])...};
}

// As on a device, the arguments are copied when the kernel is launched.
template <class... Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments...), dim3 num_blocks, dim3 num_threads,
                             void** arguments, size_t, cudaStream_t stream) {
  constexpr size_t kArgumentBytes = (sizeof(Arguments) + ... + 0);
  static_assert(kArgumentBytes <= 32764, "the arguments do not fit the argument space");
  if (num_blocks.x == 0 || num_threads.x == 0 || num_threads.x > 1024) return cudaErrorInvalidValue;
  const auto copies = emulation_copies<Arguments...>(arguments, std::index_sequence_for<Arguments...>());
  return emulation::submit(stream, num_blocks.x, num_threads.x, [=] { std::apply(kernel, copies); });
}
