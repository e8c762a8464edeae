// Apply: multiply or clamp every span in place.
#pragma once

#include "launch.h"

namespace fastclip::cuda {

// Where the coefficient comes from: a coefficient, or a norm from which it is min(1, max_norm / (norm +
// 1e-6)).
struct Coefficient {
  enum class Source { kCoefficient, kFloat32Norm, kFloat64Norm };

  const void* on_device;
  Source source;
  double max_norm;
};

cudaError_t scale(const Table& table, Grid grid, const Coefficient& coefficient);

// Clamps to [-limit, limit].
cudaError_t clamp(const Table& table, Grid grid, double limit);

}  // namespace fastclip::cuda
