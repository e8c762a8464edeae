// What an optimizer's update needs to know: what it writes, the options that it has, and the coefficients
// that follow from them. Plain structs; finalize.h computes the coefficients.
#pragma once

#include "span.h"

namespace fastclip {

constexpr int kMaxStepState = 3;

// What the step writes, beside the gradient that it belongs to: dense, and in the order of the gradient.
struct StepTarget {
  void* param;
  void* state[kMaxStepState];
  void* step;     // the counter; null where there is none, and on the CPU, where the host counts
  uint32_t rule;  // index into the rules
  DType state_dtype;
  DType step_dtype;
};

// Of torch.optim.Adam and AdamW.
struct AdamOptions {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  bool decoupled;  // decay the parameter and not the gradient
};

// The state is exp_avg, exp_avg_sq and max_exp_avg_sq; the last is null without amsgrad.
struct AdamCoefficients {
  double decay_factor;   // decoupled weight decay: 1 - lr * weight_decay, or 1
  double coupled_decay;  // weight decay that is added to the gradient, or 0
  double beta1;
  double beta2;
  double step_size;  // lr / (1 - beta1^step)
  double bias_correction2_sqrt;
  double eps;
};

// Of torch.optim.SGD.
struct SgdOptions {
  double lr;
  double weight_decay;
  double momentum;
  double dampening;
  bool nesterov;
};

// The state is momentum_buffer, null without momentum.
struct SgdCoefficients {
  double lr;
  double weight_decay;
  double momentum;
  double grad_share;  // of the gradient in the momentum: 1 - dampening, or 1 in a buffer's first step
  bool nesterov;
};

}  // namespace fastclip
