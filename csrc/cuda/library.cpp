// The C interface: from a call to its kernels.
#include <algorithm>
#include <cmath>
#include <new>

#include "context.h"
#include "elementwise.h"
#include "fastclip_cuda.h"
#include "norm.h"
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

// `coefficient` may be NULL.
NormOutput norm_output(void* values, int dtype, double* coefficient = nullptr, double max_norm = INFINITY,
                       const double* max_norm_on_device = nullptr) {
  return {values, dtype == FASTCLIP_CUDA_FLOAT64, coefficient, max_norm, max_norm_on_device};
}

// An infinite max_norm is how trainers ask for the norm alone.
bool measures_only(double max_norm, const double* max_norm_on_device) {
  return max_norm == INFINITY && max_norm_on_device == nullptr;
}

int measure_spans(const FastclipCudaCall& call, Measure measure, double p, const NormOutput& output) {
  if (call.num_spans == 0) return FASTCLIP_CUDA_OK;
  return run_call(call, nullptr, [&](const Context::Prepared& prepared, Grid grid) -> int {
    const AccumulateArguments arguments{p, partials_in(call.workspace), nullptr, output};
    const cudaError_t error = launch(accumulate_kernel(measure), *prepared.table, grid, arguments);
    if (error != cudaSuccess) return error;
    const Grid warp_per_span{(prepared.table->num_spans() + kWarps - 1) / kWarps, grid.stream};
    return launch(reduce_spans_kernel(measure), *prepared.table, warp_per_span, arguments, grid.num_blocks);
  });
}

// Measures, unless the coefficients are given, then calls run(prepared, memory, grid) to settle and update.
template <class Run>
int run_step(const FastclipCudaCall& call, const FastclipCudaStepTarget* targets,
             const FastclipCudaStepOptions& options, Run run) {
  if (call.num_spans == 0) return FASTCLIP_CUDA_OK;
  Measure measure;
  if (!to_measure(options.norm_type, &measure)) return FASTCLIP_CUDA_BAD_NORM_TYPE;
  return run_call(call, targets, [&](const Context::Prepared& prepared, Grid grid) -> int {
    double* const norm = static_cast<double*>(call.workspace);
    if (options.given_coefs == nullptr) {
      const cudaError_t error =
          launch(accumulate_kernel(measure), *prepared.table, grid,
                 AccumulateArguments{options.norm_type, partials_in(call.workspace), prepared.ticket,
                                     norm_output(norm, FASTCLIP_CUDA_FLOAT64)});
      if (error != cudaSuccess) return error;
    }
    void* const scratch = static_cast<char*>(call.workspace) + step_scratch_offset(grid.num_blocks);
    const Grid update{std::min(grid.num_blocks, prepared.max_update_blocks), grid.stream};
    return run(prepared, StepMemory{norm, scratch}, update);
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
    case FASTCLIP_CUDA_NO_OPERATION:
      return "the library has no such elementwise operation";
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
  Measure measure;
  if (!to_measure(norm_type, &measure)) return FASTCLIP_CUDA_BAD_NORM_TYPE;
  return run_call(*call, nullptr, [&](const Context::Prepared& prepared, Grid grid) -> int {
    const NormOutput output = norm_output(total_norm, norm_dtype, coefficient, max_norm, max_norm_on_device);
    return launch(accumulate_kernel(measure), *prepared.table, grid,
                  AccumulateArguments{norm_type, partials_in(call->workspace), prepared.ticket, output});
  });
}

int fastclip_cuda_clip_grad_norm(const FastclipCudaCall* call, double norm_type, double max_norm,
                                 const double* max_norm_on_device, int norm_dtype, void* total_norm) {
  Measure measure;
  if (!to_measure(norm_type, &measure)) return FASTCLIP_CUDA_BAD_NORM_TYPE;
  return run_call(*call, nullptr, [&](const Context::Prepared& prepared, Grid grid) -> int {
    double* const coefficient = coefficient_in(call->workspace);
    const NormOutput output = norm_output(total_norm, norm_dtype, coefficient, max_norm, max_norm_on_device);
    const cudaError_t error =
        launch(accumulate_kernel(measure), *prepared.table, grid,
               AccumulateArguments{norm_type, partials_in(call->workspace), prepared.ticket, output});
    if (error != cudaSuccess || measures_only(max_norm, max_norm_on_device)) return error;
    return launch(scale_kernel(), *prepared.table, writing_grid(*prepared.table, grid),
                  Coefficient{coefficient, Coefficient::Source::kOne});
  });
}

int fastclip_cuda_scale(const FastclipCudaCall* call, const double* coefficients, int per_span) {
  const auto source = per_span != 0 ? Coefficient::Source::kPerSpan : Coefficient::Source::kOne;
  return run_call(*call, nullptr, [&](const Context::Prepared& prepared, Grid grid) -> int {
    return launch(scale_kernel(), *prepared.table, writing_grid(*prepared.table, grid),
                  Coefficient{coefficients, source});
  });
}

int fastclip_cuda_clip_grads_with_norm(const FastclipCudaCall* call, double max_norm,
                                       const double* max_norm_on_device, int norm_dtype,
                                       const void* total_norm) {
  if (measures_only(max_norm, max_norm_on_device)) return FASTCLIP_CUDA_OK;
  const auto source = norm_dtype == FASTCLIP_CUDA_FLOAT64 ? Coefficient::Source::kFloat64Norm
                                                          : Coefficient::Source::kFloat32Norm;
  return run_call(*call, nullptr, [&](const Context::Prepared& prepared, Grid grid) -> int {
    return launch(scale_kernel(), *prepared.table, writing_grid(*prepared.table, grid),
                  Coefficient{total_norm, source, max_norm, max_norm_on_device});
  });
}

int fastclip_cuda_norms(const FastclipCudaCall* call, double norm_type, int norm_dtype, void* norms) {
  Measure measure;
  if (!to_measure(norm_type, &measure)) return FASTCLIP_CUDA_BAD_NORM_TYPE;
  return measure_spans(*call, measure, norm_type, norm_output(norms, norm_dtype));
}

int fastclip_cuda_count_nonfinite(const FastclipCudaCall* call, int64_t* counts) {
  return measure_spans(*call, Measure::kNonfinite, 0, norm_output(counts, FASTCLIP_CUDA_FLOAT32));
}

int fastclip_cuda_elementwise(const FastclipCudaCall* call, const char* name, double value,
                              const double* value_on_device) {
  const fastclip::Elementwise operation = fastclip::elementwise_named(name);
  if (operation == fastclip::Elementwise::kCount) return FASTCLIP_CUDA_NO_OPERATION;
  return run_call(*call, nullptr, [&](const Context::Prepared& prepared, Grid grid) -> int {
    return launch(elementwise_kernel(operation), *prepared.table, writing_grid(*prepared.table, grid), value,
                  value_on_device);
  });
}

int fastclip_cuda_adam_step(const FastclipCudaCall* call, const FastclipCudaStepTarget* targets,
                            const FastclipCudaAdamRule* rules, int64_t num_rules,
                            const FastclipCudaStepOptions* options) {
  return run_step(*call, targets, *options,
                  [&](const Context::Prepared& prepared, const StepMemory& memory, Grid grid) -> int {
                    UpdateArguments<FastclipCudaAdamRule> update;
                    const cudaError_t error =
                        settle(*prepared.targets, rules, num_rules, *options, memory, grid.stream, &update);
                    if (error != cudaSuccess) return error;
                    return launch(update_kernel<FastclipCudaAdamRule>(), *prepared.table, grid, update);
                  });
}

int fastclip_cuda_sgd_step(const FastclipCudaCall* call, const FastclipCudaStepTarget* targets,
                           const FastclipCudaSgdRule* rules, int64_t num_rules,
                           const FastclipCudaStepOptions* options) {
  return run_step(*call, targets, *options,
                  [&](const Context::Prepared& prepared, const StepMemory& memory, Grid grid) -> int {
                    UpdateArguments<FastclipCudaSgdRule> update;
                    const cudaError_t error =
                        settle(*prepared.targets, rules, num_rules, *options, memory, grid.stream, &update);
                    if (error != cudaSuccess) return error;
                    return launch(update_kernel<FastclipCudaSgdRule>(), *prepared.table, grid, update);
                  });
}
