// What the library keeps per device: the grid, the tables, the tickets.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <vector>

#include "launch.h"
#include "table_cache.h"

namespace fastclip::cuda {

// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

// Lets this thread allocate, wait and load code while a stream is being captured, by it or by another thread:
// what runs inside this scope is no part of a capture. Outside captures it changes nothing.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

class Context {
 public:
  // The context of a device; lives as long as the process. Returns a status.
  static int of_device(int device, Context** context);

  // Held from prepare() until the kernels are launched: another thread could otherwise rewrite the table
  // first.
  std::mutex& mutex() { return mutex_; }

  uint32_t max_blocks() const { return num_multiprocessors_ * kBlocksPerMultiprocessor; }

  // Where a call's kernels find their spans and their ticket.
  struct Prepared {
    const Table* table = nullptr;
    const TargetTable* targets = nullptr;
    unsigned* ticket = nullptr;  // 0 between calls
    uint32_t max_update_blocks = 0;
  };
  // `targets` may be NULL.
  int prepare(const FastclipCudaCall& call, const FastclipCudaStepTarget* targets, Prepared* prepared);

 private:
  class Memory;

  int initialize(int device);
  int find_ticket(StreamId stream, unsigned** ticket);
  int take_ticket(unsigned** ticket);

  std::mutex mutex_;
  bool initialized_ = false;
  uint32_t num_multiprocessors_ = 0;
  cudaStream_t upload_stream_ = nullptr;  // for what must not become part of a capture
  TableCache<Table> tables_;
  TableCache<TargetTable> target_tables_;
  // Every stream has a ticket of its own, and so has every captured call: a graph may run beside the stream
  // it was captured from, and its branches beside each other.
  std::map<uint64_t, unsigned*> tickets_;
  unsigned* free_tickets_ = nullptr;
  size_t num_free_tickets_ = 0;
};

}  // namespace fastclip::cuda
