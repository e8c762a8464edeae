// accumulate -> combine -> finalize -> update, over an optimizer's parameters.
#pragma once

#include <variant>
#include <vector>

#include "../finalize.h"
#include "combine.h"
#include "units.h"

namespace fastclip::cpu {

// How one or more parameters are updated.
struct StepRule {
  std::variant<AdamCoefficients, SgdCoefficients> coefficients;
  bool maximize;
};

struct StepOptions {
  NormType norm_type;
  double max_norm;
  double grad_scale;    // the gradients are this many times too large
  bool skip_nonfinite;  // if the norm is nan or inf, leave everything as it is
  bool write_grads;     // leave the clipped gradients behind
  // What to multiply the gradients by, where that is known beforehand: for all, or for each. Nothing is
  // measured then. Empty: it follows from their norm.
  std::vector<double> given_coefs;
  // What is clipped within each gradient, after its coefficient: elements, at inf none, and units.
  double max_value;
  UnitRule units;
};

// Clips by the norm of all gradients together, or by the coefficients given, and updates every target, in one
// parallel region. Reads every byte of the gradients once for the norm and then moves what the update moves.
// targets[i] belongs to grads[i]; neither targets nor, with `write_grads`, gradients share memory. May run
// without the GIL, and gives the same bits for any number of threads.
StepVerdict clip_and_step(const std::vector<Span>& grads, const std::vector<StepTarget>& targets,
                          const std::vector<StepRule>& rules, const StepOptions& options, int num_threads);

}  // namespace fastclip::cpu
