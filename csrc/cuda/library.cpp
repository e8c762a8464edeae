// The C interface: from a call to its kernels.
#include <algorithm>
#include <cmath>
#include <new>

#include "context.h"
#include "fastclip_cuda.h"
#include "norm.h"
#include "scale.h"
#include "step.h"

namespace fastclip::cuda {
namespace {

// The workspace: a coefficient or, of a step, a norm; then the partials; then, of a step, its scratch.
constexpr int64_t kCoefficientBytes = 16;
constexpr int64_t kWordBytes = 16;

double* coefficient_in(void* workspace) { return static_cast<double*>(workspace); }
void* partials_in(void* workspace) { return static_cast<char*>(workspace) + kCoefficientBytes; }

// Behind one partial per block.
int64_t step_scratch_offset(int64_t num_blocks) {
  const int64_t end = kCoefficientBytes + num_blocks * kPartialBytes;
  return (end + kWordBytes - 1) / kWordBytes * kWordBytes;
}

bool to_measure(double norm_type, Measure* measure) {
  if (!(norm_type > 0)) return false;
  *measure = norm_type == 1.0        ? Measure::kOne
             : norm_type == 2.0      ? Measure::kTwo
             : std::isinf(norm_type) ? Measure::kInf
                                     : Measure::kAny;
  return true;
}

// Calls run(context) with the device current.
template <class Run>
int with_context(int device, Run run) {
  try {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess) return guard.error();
    Context* context = nullptr;
    const int status = Context::of_device(device, &context);
    return status != FASTCLIP_CUDA_OK ? status : run(*context);
  } catch (const std::bad_alloc&) {
    return FASTCLIP_CUDA_NO_MEMORY;
  }
}

// Calls run(prepared, grid) with the call's device current and its tables locked. `targets` may be NULL.
template <class Run>
int run_call(const FastclipCudaCall& call, const FastclipCudaStepTarget* targets, Run run) {
  return with_context(call.device, [&](Context& context) -> int {
    const std::lock_guard<std::mutex> lock(context.mutex());
    Context::Prepared prepared;
    const int status = context.prepare(call, targets, &prepared);
    if (status != FASTCLIP_CUDA_OK) return status;
    const uint32_t num_blocks = std::clamp(prepared.table->num_tiles, 1u, context.max_blocks());
    return run(prepared, Grid{num_blocks, static_cast<cudaStream_t>(call.stream)});
  });
}

// The grid of a kernel that writes: spans that share memory must not run together.
Grid writing_grid(const Table& table, Grid grid) {
  return {table.overlapping ? 1 : grid.num_blocks, grid.stream};
}

int total_norm_call(const FastclipCudaCall& call, double norm_type, const NormOutput& output, bool apply) {
  Measure measure;
  if (!to_measure(norm_type, &measure)) return FASTCLIP_CUDA_BAD_NORM_TYPE;
  return run_call(call, nullptr, [&](const Context::Prepared& prepared, Grid grid) -> int {
    const cudaError_t error = total_norm(*prepared.table, grid, measure, norm_type,
                                         partials_in(call.workspace), prepared.ticket, output);
    // An infinite max_norm is how trainers ask for the norm alone.
    const bool measures_only = output.max_norm == INFINITY && output.max_norm_on_device == nullptr;
    if (error != cudaSuccess || !apply || measures_only) return error;
    return scale(*prepared.table, writing_grid(*prepared.table, grid),
                 {output.coefficient, Coefficient::Source::kOne});
  });
}

int scale_call(const FastclipCudaCall& call, const Coefficient& coefficient) {
  return run_call(call, nullptr, [&](const Context::Prepared& prepared, Grid grid) -> int {
    return scale(*prepared.table, writing_grid(*prepared.table, grid), coefficient);
  });
}

int span_norms_call(const FastclipCudaCall& call, Measure measure, double p, const NormOutput& output) {
  if (call.num_spans == 0) return FASTCLIP_CUDA_OK;
  return run_call(call, nullptr, [&](const Context::Prepared& prepared, Grid grid) -> int {
    return span_norms(*prepared.table, grid, measure, p, partials_in(call.workspace), output);
  });
}

template <class Rule>
int step_call(const FastclipCudaCall& call, const FastclipCudaStepTarget* targets, const Rule* rules,
              int64_t num_rules, const FastclipCudaStepOptions& options) {
  if (call.num_spans == 0) return FASTCLIP_CUDA_OK;
  Measure measure;
  if (!to_measure(options.norm_type, &measure)) return FASTCLIP_CUDA_BAD_NORM_TYPE;
  return run_call(call, targets, [&](const Context::Prepared& prepared, Grid grid) -> int {
    double* const norm = static_cast<double*>(call.workspace);
    if (options.given_coefs == nullptr) {
      const cudaError_t error =
          total_norm(*prepared.table, grid, measure, options.norm_type, partials_in(call.workspace),
                     prepared.ticket, {norm, true, nullptr, INFINITY, nullptr});
      if (error != cudaSuccess) return error;
    }
    void* const scratch = static_cast<char*>(call.workspace) + step_scratch_offset(grid.num_blocks);
    const Grid update{std::min(grid.num_blocks, prepared.max_update_blocks), grid.stream};
    return step(*prepared.table, *prepared.targets, rules, num_rules, options, {norm, scratch}, update);
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

int fastclip_cuda_probe(int device) {
  const DeviceGuard guard(device);
  const RelaxedCapture relaxed;
  return guard.error() != cudaSuccess ? guard.error() : probe_kernels();
}

int fastclip_cuda_workspace_bytes(int device, int64_t num_spans, int64_t* nbytes) {
  return with_context(device, [&](const Context& context) {
    *nbytes = kCoefficientBytes + (context.max_blocks() + num_spans) * kPartialBytes;
    return FASTCLIP_CUDA_OK;
  });
}

int fastclip_cuda_step_workspace_bytes(int device, int64_t num_spans, int64_t* nbytes) {
  return with_context(device, [&](const Context& context) {
    *nbytes = step_scratch_offset(context.max_blocks()) + step_scratch_bytes(num_spans);
    return FASTCLIP_CUDA_OK;
  });
}

int fastclip_cuda_total_norm(const FastclipCudaCall* call, double norm_type, double max_norm,
                             const double* max_norm_on_device, int norm_dtype, void* total_norm,
                             double* coefficient) {
  const bool is_float64 = norm_dtype == FASTCLIP_CUDA_FLOAT64;
  return total_norm_call(*call, norm_type,
                         {total_norm, is_float64, coefficient, max_norm, max_norm_on_device}, false);
}

int fastclip_cuda_clip_grad_norm(const FastclipCudaCall* call, double norm_type, double max_norm,
                                 const double* max_norm_on_device, int norm_dtype, void* total_norm) {
  const bool is_float64 = norm_dtype == FASTCLIP_CUDA_FLOAT64;
  double* const coefficient = coefficient_in(call->workspace);
  return total_norm_call(*call, norm_type,
                         {total_norm, is_float64, coefficient, max_norm, max_norm_on_device}, true);
}

int fastclip_cuda_scale(const FastclipCudaCall* call, const double* coefficients, int per_span) {
  const auto source = per_span != 0 ? Coefficient::Source::kPerSpan : Coefficient::Source::kOne;
  return scale_call(*call, {coefficients, source});
}

int fastclip_cuda_clip_grads_with_norm(const FastclipCudaCall* call, double max_norm,
                                       const double* max_norm_on_device, int norm_dtype,
                                       const void* total_norm) {
  if (max_norm == INFINITY && max_norm_on_device == nullptr) return FASTCLIP_CUDA_OK;
  const auto source = norm_dtype == FASTCLIP_CUDA_FLOAT64 ? Coefficient::Source::kFloat64Norm
                                                          : Coefficient::Source::kFloat32Norm;
  return scale_call(*call, {total_norm, source, max_norm, max_norm_on_device});
}

int fastclip_cuda_norms(const FastclipCudaCall* call, double norm_type, int norm_dtype, void* norms) {
  Measure measure;
  if (!to_measure(norm_type, &measure)) return FASTCLIP_CUDA_BAD_NORM_TYPE;
  return span_norms_call(*call, measure, norm_type,
                         {norms, norm_dtype == FASTCLIP_CUDA_FLOAT64, nullptr, INFINITY, nullptr});
}

int fastclip_cuda_count_nonfinite(const FastclipCudaCall* call, int64_t* counts) {
  return span_norms_call(*call, Measure::kNonfinite, 0, {counts, false, nullptr, INFINITY, nullptr});
}

int fastclip_cuda_clamp(const FastclipCudaCall* call, double limit) {
  return run_call(*call, nullptr, [&](const Context::Prepared& prepared, Grid grid) -> int {
    return clamp(*prepared.table, writing_grid(*prepared.table, grid), limit);
  });
}

int fastclip_cuda_adam_step(const FastclipCudaCall* call, const FastclipCudaStepTarget* targets,
                            const FastclipCudaAdamRule* rules, int64_t num_rules,
                            const FastclipCudaStepOptions* options) {
  return step_call(*call, targets, rules, num_rules, *options);
}

int fastclip_cuda_sgd_step(const FastclipCudaCall* call, const FastclipCudaStepTarget* targets,
                           const FastclipCudaSgdRule* rules, int64_t num_rules,
                           const FastclipCudaStepOptions* options) {
  return step_call(*call, targets, rules, num_rules, *options);
}
