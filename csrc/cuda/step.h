// Finalize and apply, for an optimizer's step.
#pragma once

#include "launch.h"

namespace fastclip::cuda {

// Rules that one launch takes.
constexpr int64_t kMaxRules = 512;

// Device memory of a step: where the norm of the gradients as they are is found, in float64, and scratch of
// step_scratch_bytes().
struct StepMemory {
  const double* scaled_norm;
  void* scratch;
};

int64_t step_scratch_bytes(int64_t num_spans);

struct StepHeader;
template <class Rule>
struct SpanStep;

// Rule is FastclipCudaAdamRule or FastclipCudaSgdRule, here and below.
template <class Rule>
struct UpdateArguments {
  const FastclipCudaStepTarget* targets;
  const StepHeader* header;
  const SpanStep<Rule>* steps;
  double max_value;
  bool write_grads;
};

// Launches settle_step, once for every kMaxRules rules, and says what update_spans is to be given then.
template <class Rule>
cudaError_t settle(const TargetTable& targets, const Rule* rules, int64_t num_rules,
                   const FastclipCudaStepOptions& options, const StepMemory& memory, cudaStream_t stream,
                   UpdateArguments<Rule>* update);

template <class Rule>
TableKernel<UpdateArguments<Rule>> update_kernel();

}  // namespace fastclip::cuda
