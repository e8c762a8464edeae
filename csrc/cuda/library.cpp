// The C interface: from a call to its kernels.
#include <algorithm>
#include <cmath>
#include <new>

#include "context.h"
#include "fastclip_cuda.h"
#include "norm.h"
#include "scale.h"

namespace fastclip::cuda {
namespace {

// The workspace: a coefficient, then the partials.
constexpr int64_t kCoefficientBytes = 16;

double* coefficient_in(void* workspace) { return static_cast<double*>(workspace); }
void* partials_in(void* workspace) { return static_cast<char*>(workspace) + kCoefficientBytes; }

bool to_measure(double norm_type, Measure* measure) {
  if (!(norm_type > 0)) return false;
  *measure = norm_type == 1.0        ? Measure::kOne
             : norm_type == 2.0      ? Measure::kTwo
             : std::isinf(norm_type) ? Measure::kInf
                                     : Measure::kAny;
  return true;
}

// Calls run(prepared, grid) with the call's device current and its table locked.
template <class Run>
int run_call(const FastclipCudaCall& call, Run run) {
  try {
    const DeviceGuard guard(call.device);
    if (guard.error() != cudaSuccess) return guard.error();
    Context* context = nullptr;
    int status = Context::of_device(call.device, &context);
    if (status != FASTCLIP_CUDA_OK) return status;
    const std::lock_guard<std::mutex> lock(context->mutex());
    Context::Prepared prepared;
    status = context->prepare(call, &prepared);
    if (status != FASTCLIP_CUDA_OK) return status;
    const uint32_t num_blocks = std::clamp(prepared.table->num_tiles, 1u, context->max_blocks());
    return run(prepared, Grid{num_blocks, static_cast<cudaStream_t>(call.stream)});
  } catch (const std::bad_alloc&) {
    return FASTCLIP_CUDA_NO_MEMORY;
  }
}

// The grid of a kernel that writes: spans that share memory must not run together.
Grid writing_grid(const Table& table, Grid grid) {
  return {table.overlapping ? 1 : grid.num_blocks, grid.stream};
}

int total_norm_call(const FastclipCudaCall& call, double norm_type, double max_norm, int norm_dtype,
                    void* norm, double* coefficient, bool apply) {
  Measure measure;
  if (!to_measure(norm_type, &measure)) return FASTCLIP_CUDA_BAD_NORM_TYPE;
  return run_call(call, [&](const Context::Prepared& prepared, Grid grid) -> int {
    const NormOutput output{norm, norm_dtype == FASTCLIP_CUDA_FLOAT64, coefficient, max_norm};
    const cudaError_t error = total_norm(*prepared.table, grid, measure, norm_type,
                                         partials_in(call.workspace), prepared.ticket, output);
    // An infinite max_norm is how trainers ask for the norm alone.
    if (error != cudaSuccess || !apply || max_norm == INFINITY) return error;
    return scale(*prepared.table, writing_grid(*prepared.table, grid),
                 {coefficient, Coefficient::Source::kCoefficient, 0});
  });
}

int scale_call(const FastclipCudaCall& call, const Coefficient& coefficient) {
  return run_call(call, [&](const Context::Prepared& prepared, Grid grid) -> int {
    return scale(*prepared.table, writing_grid(*prepared.table, grid), coefficient);
  });
}

int span_norms_call(const FastclipCudaCall& call, Measure measure, double p, const NormOutput& output) {
  if (call.num_spans == 0) return FASTCLIP_CUDA_OK;
  return run_call(call, [&](const Context::Prepared& prepared, Grid grid) -> int {
    return span_norms(*prepared.table, grid, measure, p, partials_in(call.workspace), output);
  });
}

}  // namespace
}  // namespace fastclip::cuda

using namespace fastclip::cuda;

int fastclip_cuda_abi_version(void) { return FASTCLIP_CUDA_ABI_VERSION; }

const char* fastclip_cuda_message(int status) {
  switch (status) {
    case FASTCLIP_CUDA_TOO_LARGE:
      return "the list has more than 2^32 - 1 tiles of 16 KiB";
    case FASTCLIP_CUDA_BAD_DTYPE:
      return "a dtype is not float16, bfloat16, float32 or float64";
    case FASTCLIP_CUDA_MISALIGNED:
      return "a tensor does not begin at a multiple of its element size";
    case FASTCLIP_CUDA_BAD_NORM_TYPE:
      return "norm_type is not positive";
    case FASTCLIP_CUDA_NO_MEMORY:
      return "the host is out of memory";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(status));
  }
}

int fastclip_cuda_device_count(int* count) { return cudaGetDeviceCount(count); }

int fastclip_cuda_probe(int device) {
  const DeviceGuard guard(device);
  return guard.error() != cudaSuccess ? guard.error() : probe_kernels();
}

int fastclip_cuda_workspace_bytes(int device, int64_t num_spans, int64_t* nbytes) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  Context* context = nullptr;
  const int status = Context::of_device(device, &context);
  if (status == FASTCLIP_CUDA_OK) {
    *nbytes = kCoefficientBytes + (context->max_blocks() + num_spans) * kPartialBytes;
  }
  return status;
}

int fastclip_cuda_total_norm(const FastclipCudaCall* call, double norm_type, double max_norm, int norm_dtype,
                             void* total_norm, double* coefficient) {
  return total_norm_call(*call, norm_type, max_norm, norm_dtype, total_norm, coefficient, false);
}

int fastclip_cuda_clip_grad_norm(const FastclipCudaCall* call, double norm_type, double max_norm,
                                 int norm_dtype, void* total_norm) {
  return total_norm_call(*call, norm_type, max_norm, norm_dtype, total_norm, coefficient_in(call->workspace),
                         true);
}

int fastclip_cuda_scale(const FastclipCudaCall* call, const double* coefficient) {
  return scale_call(*call, {coefficient, Coefficient::Source::kCoefficient, 0});
}

int fastclip_cuda_clip_grads_with_norm(const FastclipCudaCall* call, double max_norm, int norm_dtype,
                                       const void* total_norm) {
  if (max_norm == INFINITY) return FASTCLIP_CUDA_OK;
  const auto source = norm_dtype == FASTCLIP_CUDA_FLOAT64 ? Coefficient::Source::kFloat64Norm
                                                          : Coefficient::Source::kFloat32Norm;
  return scale_call(*call, {total_norm, source, max_norm});
}

int fastclip_cuda_norms(const FastclipCudaCall* call, double norm_type, int norm_dtype, void* norms) {
  Measure measure;
  if (!to_measure(norm_type, &measure)) return FASTCLIP_CUDA_BAD_NORM_TYPE;
  return span_norms_call(*call, measure, norm_type,
                         {norms, norm_dtype == FASTCLIP_CUDA_FLOAT64, nullptr, INFINITY});
}

int fastclip_cuda_count_nonfinite(const FastclipCudaCall* call, int64_t* counts) {
  return span_norms_call(*call, Measure::kNonfinite, 0, {counts, false, nullptr, INFINITY});
}

int fastclip_cuda_clamp(const FastclipCudaCall* call, double limit) {
  return run_call(*call, [&](const Context::Prepared& prepared, Grid grid) -> int {
    return clamp(*prepared.table, writing_grid(*prepared.table, grid), limit);
  });
}
