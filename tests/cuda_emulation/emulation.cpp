// The device behind cuda_runtime.h, and what tests may ask and tell it.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <thread>
#include <utility>
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

// At most one at a time.
struct Capture {
  const void* stream = nullptr;  // NULL: none is under way
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::thread::id thread;
  bool invalidated = false;
  std::vector<Launch> recorded;
};

struct State {
  int device = 0;
  bool has_driver = true;
  int allocations_until_failure = -1;
  Capture capture;
  uintptr_t num_streams = 0;
  int num_launches = 0;
  int num_allocations = 0;
} state;

// How far captures restrict what this thread may call.
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

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

bool is_capturing(const void* stream) {
  return state.capture.stream != nullptr && stream == state.capture.stream;
}

cudaError_t refused() {
  state.capture.invalidated = true;
  return cudaErrorStreamCaptureUnsupported;
}

// What the programming guide calls potentially unsafe: allocating, creating, waiting and loading code.
cudaError_t unsafe_call() {
  const Capture& capture = state.capture;
  if (capture.stream == nullptr || thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  const bool own = capture.thread == std::this_thread::get_id();
  const bool forbidden =
      own ? capture.mode != cudaStreamCaptureModeRelaxed
          : capture.mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
  return forbidden ? refused() : cudaSuccess;
}

// What the capturing stream cannot answer in any mode, for it executes nothing; asked of another stream, as
// unsafe as the above.
cudaError_t query(const void* stream) { return is_capturing(stream) ? refused() : unsafe_call(); }

}  // namespace

cudaError_t submit(const void* stream, unsigned num_blocks, unsigned num_threads,
                   std::function<void()> kernel) {
  Launch launch{num_blocks, num_threads, std::move(kernel)};
  if (!is_capturing(stream)) {
    run(launch);
  } else if (state.capture.invalidated) {
    return cudaErrorStreamCaptureInvalidated;
  } else {
    state.capture.recorded.push_back(std::move(launch));
  }
  return cudaSuccess;
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
  return emulation::unsafe_call();
}

// Refused in every mode; seen on an H100 with driver 580.
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = reinterpret_cast<uintptr_t>(stream);
  return emulation::query(stream);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = !emulation::is_capturing(stream) ? cudaStreamCaptureStatusNone
            : state.capture.invalidated      ? cudaStreamCaptureStatusInvalidated
                                             : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, emulation::thread_mode);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return emulation::query(stream); }

cudaError_t emulation_function_attributes() { return emulation::unsafe_call(); }

cudaError_t cudaMalloc(void** memory, size_t nbytes) {
  if (const cudaError_t error = emulation::unsafe_call(); error != cudaSuccess) return error;
  if (state.allocations_until_failure == 0) return cudaErrorMemoryAllocation;
  if (state.allocations_until_failure > 0) --state.allocations_until_failure;
  ++state.num_allocations;
  *memory = std::malloc(nbytes);
  std::memset(*memory, 0xff, nbytes);  // poison
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t nbytes, cudaStream_t stream) {
  // The library clears memory on a stream of its own, never as a part of a graph.
  if (emulation::is_capturing(stream)) return emulation::refused();
  std::memset(memory, value, nbytes);
  return cudaSuccess;
}

extern "C" {

void emulation_set_driver(bool present) { state.has_driver = present; }
void emulation_set_allocations_until_failure(int count) { state.allocations_until_failure = count; }
int emulation_device() { return state.device; }
int emulation_num_launches() { return state.num_launches; }
int emulation_num_allocations() { return state.num_allocations; }

void emulation_begin_capture(void* stream, int mode) {
  state.capture = {stream, static_cast<cudaStreamCaptureMode>(mode), std::this_thread::get_id(), false, {}};
}

// Returns the number of kernels in the graph, or -1 if a call that was refused has invalidated it.
int emulation_end_capture() {
  state.capture.stream = nullptr;
  if (state.capture.invalidated) state.capture.recorded.clear();
  return state.capture.invalidated ? -1 : static_cast<int>(state.capture.recorded.size());
}

void emulation_replay() {
  for (const auto& launch : state.capture.recorded) emulation::run(launch);
}

}  // extern "C"
