// The device behind cuda_runtime.h, and what tests may ask and tell it.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <map>
#include <vector>

#include "cuda_runtime.h"

namespace emulation {

Position thread, block, grid;

namespace {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;
constexpr int kNumDevices = 2;
// Device 1 is of another model.
constexpr int kNumMultiprocessors[kNumDevices] = {3, 2};

struct Launch {
  unsigned num_blocks;
  unsigned num_threads;
  std::function<void()> kernel;
};

struct State {
  int device = 0;
  bool has_driver = true;
  int allocations_until_failure = -1;
  const void* capturing = nullptr;
  bool invalidated = false;  // by a call that a capture does not permit
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::vector<Launch> recorded;
  uintptr_t num_streams = 0;
  int num_launches = 0;
  int num_allocations = 0;
} state;

struct Barrier {
  unsigned arrived = 0;
  unsigned generation = 0;
};

// Entered through its context, which costs system calls, and switched to by jumps, which do not.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool entered = false;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool done = false;
};

struct Block {
  jmp_buf scheduler;
  const Launch* launch = nullptr;
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  Barrier barrier;
  std::vector<Barrier> warp_barriers = std::vector<Barrier>(kMaxThreads / kWarpSize);
  std::vector<unsigned long long> shuffled = std::vector<unsigned long long>(kMaxThreads);
} running;

void yield() {
  if (_setjmp(running.fibers[thread.x].place) == 0) _longjmp(running.scheduler, 1);
}

// These two in frames of their own, so that their callers' variables are not lost in a jump.
__attribute__((noinline)) void resume(Fiber& fiber) {
  if (_setjmp(running.scheduler) != 0) return;
  if (fiber.entered) _longjmp(fiber.place, 1);
  fiber.entered = true;
  setcontext(&fiber.context);
}

void wait(Barrier& barrier, unsigned size) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == size) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
}

void run_thread() {
  running.launch->kernel();
  running.fibers[thread.x].done = true;
  yield();
}

__attribute__((noinline)) void prepare(Fiber& fiber) {
  fiber.done = fiber.entered = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  makecontext(&fiber.context, run_thread, 0);
}

void run_block(const Launch& launch) {
  running.launch = &launch;
  for (unsigned i = 0; i < launch.num_threads; ++i) prepare(running.fibers[i]);
  for (bool any = true; any;) {
    any = false;
    for (unsigned i = 0; i < launch.num_threads; ++i) {
      if (running.fibers[i].done) continue;
      any = true;
      thread.x = i;
      resume(running.fibers[i]);
    }
  }
}

// Backwards: nothing may rely on the order of blocks.
void run(const Launch& launch) {
  ++state.num_launches;
  grid.x = launch.num_blocks;
  for (unsigned i = launch.num_blocks; i-- > 0;) {
    block.x = i;
    run_block(launch);
  }
}

// What a capture does not permit ends it, as on a device.
cudaError_t refuse() {
  state.invalidated = true;
  return cudaErrorStreamCaptureUnsupported;
}

bool is_captured(const void* stream) { return state.capturing != nullptr && stream == state.capturing; }

// Calls that might wait for the captured work are forbidden to its thread unless it says that they do not.
bool may_block_capture() { return state.capturing != nullptr && state.mode == cudaStreamCaptureModeGlobal; }

}  // namespace

bool submit(const void* stream, unsigned num_blocks, unsigned num_threads, std::function<void()> kernel) {
  Launch launch{num_blocks, num_threads, std::move(kernel)};
  if (!is_captured(stream)) {
    run(launch);
    return true;
  }
  state.recorded.push_back(std::move(launch));
  return !state.invalidated;
}

void synchronize_block() { wait(running.barrier, running.launch->num_threads); }

unsigned long long shuffle_down(unsigned long long value, int delta) {
  const unsigned self = thread.x, lane = self % kWarpSize;
  Barrier& barrier = running.warp_barriers[self / kWarpSize];
  running.shuffled[self] = value;
  wait(barrier, kWarpSize);
  const unsigned long long result = lane + delta < kWarpSize ? running.shuffled[self + delta] : value;
  wait(barrier, kWarpSize);
  return result;
}

}  // namespace emulation

using emulation::state;

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInsufficientDriver ? "CUDA driver version is insufficient for CUDA runtime version"
         : error == cudaErrorMemoryAllocation ? "out of memory"
                                              : "another error";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = state.has_driver ? emulation::kNumDevices : 0;
  return state.has_driver ? cudaSuccess : cudaErrorInsufficientDriver;
}

cudaError_t cudaGetDevice(int* device) {
  *device = state.device;
  return state.has_driver ? cudaSuccess : cudaErrorInsufficientDriver;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulation::kNumDevices) return cudaErrorInvalidValue;
  state.device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = emulation::kNumMultiprocessors[device];
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(~++state.num_streams);
  return cudaSuccess;
}

// Refused in every mode; seen on an H100 with driver 580.
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  if (emulation::is_captured(stream)) return emulation::refuse();
  *id = reinterpret_cast<uintptr_t>(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = !emulation::is_captured(stream) ? cudaStreamCaptureStatusNone
            : state.invalidated             ? cudaStreamCaptureStatusInvalidated
                                            : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, state.mode);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return emulation::is_captured(stream) || emulation::may_block_capture() ? emulation::refuse() : cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t nbytes) {
  if (emulation::may_block_capture()) return emulation::refuse();
  if (state.allocations_until_failure == 0) return cudaErrorMemoryAllocation;
  if (state.allocations_until_failure > 0) --state.allocations_until_failure;
  ++state.num_allocations;
  *memory = std::malloc(nbytes);
  std::memset(*memory, 0xff, nbytes);  // poison
  return cudaSuccess;
}

// The library clears memory on a stream of its own, never as a part of a graph.
cudaError_t cudaMemsetAsync(void* memory, int value, size_t nbytes, cudaStream_t stream) {
  if (emulation::is_captured(stream)) return emulation::refuse();
  std::memset(memory, value, nbytes);
  return cudaSuccess;
}

extern "C" {

void emulation_set_driver(bool present) { state.has_driver = present; }
void emulation_set_allocations_until_failure(int count) { state.allocations_until_failure = count; }
int emulation_device() { return state.device; }
int emulation_num_launches() { return state.num_launches; }
int emulation_num_allocations() { return state.num_allocations; }

void emulation_begin_capture(void* stream) {
  state.capturing = stream;
  state.invalidated = false;
  state.recorded.clear();
}

// Returns the number of kernels in the graph, or -1 if a call has ended the capture.
int emulation_end_capture() {
  state.capturing = nullptr;
  return state.invalidated ? -1 : static_cast<int>(state.recorded.size());
}

void emulation_replay() {
  for (const auto& launch : state.recorded) emulation::run(launch);
}

}  // extern "C"
