// Finalize: from the norm to the coefficient, one definition for every native backend.
#pragma once

#include "span.h"

namespace fastclip {

// Added to the norm before dividing, as torch.nn.utils.clip_grad_norm_ does.
constexpr double kNormEpsilon = 1e-6;

// min(1, max_norm / (total_norm + 1e-6)); nan if either is nan, so that it reaches the gradients.
constexpr double clip_coefficient(double total_norm, double max_norm) {
  const double coef = max_norm / (total_norm + kNormEpsilon);
  return coef > 1.0 ? 1.0 : coef;
}

// Whether multiplying by the coefficient can change a value: float32 and narrower types multiply by its
// float32 value.
constexpr bool changes_values(double coef, DType dtype) {
  return dtype == DType::kFloat64 ? coef != 1.0 : static_cast<float>(coef) != 1.0f;
}

}  // namespace fastclip
