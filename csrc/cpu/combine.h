// From the accumulators of chunks to one norm.
#pragma once

#include <cstddef>

#include "kernels.h"

namespace fastclip::cpu {

// p in {1, 2, inf} or any p > 0.
struct NormType {
  explicit NormType(double p);
  double p;
  NormKind kind;
};

// Accumulators add up (or take the larger magnitude) in the order given.
Accumulator combine(const Accumulator* parts, size_t count, NormType type);

// Takes the root.
double norm_of(const Accumulator& total, NormType type);

}  // namespace fastclip::cpu
