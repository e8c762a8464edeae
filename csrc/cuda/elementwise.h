// Change every element of every span in place.
#pragma once

#include "../elementwise.h"
#include "launch.h"

namespace fastclip::cuda {

// Where the coefficient comes from: one for all spans, one for each, or a norm from which it is min(1,
// max_norm / (norm + 1e-6)).
struct Coefficient {
  enum class Source { kOne, kPerSpan, kFloat32Norm, kFloat64Norm };

  const void* on_device;
  Source source;
  double max_norm = 0;
  const double* max_norm_on_device = nullptr;  // in the place of `max_norm`, or NULL
};

TableKernel<Coefficient> scale_kernel();

// Takes the operation's number, and what is in its place on the device, or NULL.
TableKernel<double, const double*> elementwise_kernel(Elementwise operation);

}  // namespace fastclip::cuda
