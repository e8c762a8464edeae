#include "context.h"

#include <memory>

#include "upload.h"

namespace fastclip::cuda {
namespace {

constexpr size_t kTicketsPerBlock = 4096;

// By its id and not by its handle, which another stream may get once this one is destroyed.
int identify(cudaStream_t stream, StreamId* id) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaError_t error = cudaStreamIsCapturing(stream, &status);
  if (error != cudaSuccess) return error;
  if (status == cudaStreamCaptureStatusInvalidated) return cudaErrorStreamCaptureInvalidated;
  if (status == cudaStreamCaptureStatusActive) {
    *id = kCaptured;
    return FASTCLIP_CUDA_OK;
  }
  const RelaxedCapture relaxed;
  unsigned long long number = 0;
  error = cudaStreamGetId(stream, &number);
  *id = number;
  return error;
}

}  // namespace

DeviceGuard::DeviceGuard(int device) {
  error_ = cudaGetDevice(&before_);
  if (error_ != cudaSuccess || before_ == device) return;
  error_ = cudaSetDevice(device);
  changed_ = error_ == cudaSuccess;
}

DeviceGuard::~DeviceGuard() {
  if (changed_) cudaSetDevice(before_);
}

class Context::Memory : public TableMemory {
 public:
  Memory(cudaStream_t stream, cudaStream_t upload_stream) : stream_(stream), upload_stream_(upload_stream) {}

  int allocate(size_t nbytes, void** memory) override {
    const RelaxedCapture relaxed;
    return cudaMalloc(memory, nbytes);
  }

  int upload(const void* from, size_t nbytes, void* to) override {
    return cuda::upload(from, nbytes, to, stream_);
  }

  int upload_outside_capture(const void* from, size_t nbytes, void* to) override {
    const RelaxedCapture relaxed;
    const cudaError_t error = cuda::upload(from, nbytes, to, upload_stream_);
    return error != cudaSuccess ? error : cudaStreamSynchronize(upload_stream_);
  }

 private:
  cudaStream_t stream_;
  cudaStream_t upload_stream_;
};

int Context::of_device(int device, Context** context) {
  // Never destroyed: at exit the driver may be gone before static objects are.
  static auto& contexts = *new std::map<int, std::unique_ptr<Context>>();
  static auto& contexts_mutex = *new std::mutex();
  const std::lock_guard<std::mutex> lock(contexts_mutex);
  auto& found = contexts[device];
  if (found == nullptr) found = std::make_unique<Context>();
  *context = found.get();
  return found->initialized_ ? static_cast<int>(FASTCLIP_CUDA_OK) : found->initialize(device);
}

int Context::initialize(int device) {
  int num_multiprocessors = 0;
  cudaError_t error = cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  num_multiprocessors_ = static_cast<uint32_t>(num_multiprocessors);
  const RelaxedCapture relaxed;
  error = cudaStreamCreateWithFlags(&upload_stream_, cudaStreamNonBlocking);
  if (error != cudaSuccess) return error;
  initialized_ = true;
  return FASTCLIP_CUDA_OK;
}

int Context::find_ticket(StreamId stream, unsigned** ticket) {
  if (stream == kCaptured) return take_ticket(ticket);
  if (const auto found = tickets_.find(*stream); found != tickets_.end()) {
    *ticket = found->second;
    return FASTCLIP_CUDA_OK;
  }
  const int status = take_ticket(ticket);
  if (status == FASTCLIP_CUDA_OK) tickets_[*stream] = *ticket;
  return status;
}

int Context::take_ticket(unsigned** ticket) {
  if (num_free_tickets_ == 0) {
    const RelaxedCapture relaxed;
    constexpr size_t kBytes = kTicketsPerBlock * sizeof(unsigned);
    cudaError_t error = cudaMalloc(reinterpret_cast<void**>(&free_tickets_), kBytes);
    if (error == cudaSuccess) error = cudaMemsetAsync(free_tickets_, 0, kBytes, upload_stream_);
    if (error == cudaSuccess) error = cudaStreamSynchronize(upload_stream_);
    if (error != cudaSuccess) return error;
    num_free_tickets_ = kTicketsPerBlock;
  }
  --num_free_tickets_;
  *ticket = free_tickets_++;
  return FASTCLIP_CUDA_OK;
}

int Context::prepare(const FastclipCudaCall& call, const FastclipCudaStepTarget* targets,
                     Prepared* prepared) {
  const auto stream = static_cast<cudaStream_t>(call.stream);
  StreamId id;
  int status = identify(stream, &id);
  if (status != FASTCLIP_CUDA_OK) return status;
  status = find_ticket(id, &prepared->ticket);
  if (status != FASTCLIP_CUDA_OK) return status;
  prepared->max_update_blocks = num_multiprocessors_ * kUpdateBlocksPerMultiprocessor;
  Memory memory(stream, upload_stream_);
  if (targets != nullptr) {
    status = target_tables_.find(id, {targets, call.num_spans}, memory, &prepared->targets);
    if (status != FASTCLIP_CUDA_OK) return status;
  }
  return tables_.find(id, {call.spans, call.num_spans}, memory, &prepared->table);
}

}  // namespace fastclip::cuda
