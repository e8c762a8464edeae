// Finalize: from the norm to the coefficient, and from an optimizer's options to those of its update; one
// definition for every native backend.
#pragma once

#include <cmath>
#include <limits>

#include "span.h"
#include "step_rule.h"

#if defined(__CUDACC__)
#define FASTCLIP_HOST_DEVICE __host__ __device__
#else
#define FASTCLIP_HOST_DEVICE
#endif

namespace fastclip {

// Added to the norm before dividing, as torch.nn.utils.clip_grad_norm_ does.
constexpr double kNormEpsilon = 1e-6;

// min(1, max_norm / (total_norm + 1e-6)); nan if either is nan, so that it reaches the gradients. An infinite
// max_norm is how trainers ask for the norm alone: 1, whatever the norm is.
constexpr double clip_coefficient(double total_norm, double max_norm) {
  if (max_norm == std::numeric_limits<double>::infinity()) return 1.0;
  const double coef = max_norm / (total_norm + kNormEpsilon);
  return coef > 1.0 ? 1.0 : coef;
}

// Whether multiplying by the coefficient can change a value: float32 and narrower types multiply by its
// float32 value.
constexpr bool changes_values(double coef, DType dtype) {
  return dtype == DType::kFloat64 ? coef != 1.0 : static_cast<float>(coef) != 1.0f;
}

// What a clipped step makes of the norm.
struct StepVerdict {
  double total_norm;  // of the gradients divided by the scale
  double coef;        // of the clip alone
  bool skipped;
  double grad_factor;  // what the gradients are multiplied by
};

// `scaled_norm` is that of gradients which are `grad_scale` times too large. With `skip_nonfinite` a norm
// that is nan or inf skips the step.
constexpr StepVerdict step_verdict(double scaled_norm, double grad_scale, double max_norm,
                                   bool skip_nonfinite) {
  const double norm = scaled_norm / grad_scale;
  const double coef = clip_coefficient(norm, max_norm);
  const bool finite = norm - norm == 0;
  return {norm, coef, skip_nonfinite && !finite, coef / grad_scale};
}

// `step` counts this one.
FASTCLIP_HOST_DEVICE inline AdamCoefficients adam_coefficients(const AdamOptions& options, double step) {
  AdamCoefficients c;
  c.decay_factor = options.decoupled ? 1 - options.lr * options.weight_decay : 1;
  c.coupled_decay = options.decoupled ? 0 : options.weight_decay;
  c.beta1 = options.beta1;
  c.beta2 = options.beta2;
  c.step_size = options.lr / (1 - std::pow(options.beta1, step));
  c.bias_correction2_sqrt = std::sqrt(1 - std::pow(options.beta2, step));
  c.eps = options.eps;
  return c;
}

// `fresh` is the first step of a buffer, which begins as the gradient itself.
constexpr SgdCoefficients sgd_coefficients(const SgdOptions& options, bool fresh) {
  return {options.lr, options.weight_decay, options.momentum, fresh ? 1 : 1 - options.dampening,
          options.nesterov};
}

}  // namespace fastclip
