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

// Rule is FastclipCudaAdamRule or FastclipCudaSgdRule. Two launches, of which the second is `grid`; one more
// for every kMaxRules rules.
template <class Rule>
cudaError_t step(const Table& table, const TargetTable& targets, const Rule* rules, int64_t num_rules,
                 const FastclipCudaStepOptions& options, const StepMemory& memory, Grid grid);

}  // namespace fastclip::cuda
