// The table of CPU kernels; one table per instruction set, all with the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../elementwise.h"
#include "../span.h"
#include "../step_rule.h"

namespace fastclip::cpu {

enum class NormKind : int { kOne, kTwo, kInf, kAny };
constexpr int kNumNormKinds = 4;

// The accumulator of a chunk, a tensor or a list: it stands for sum * 2^(exponent * p), where sum adds up
// |x|^p of elements scaled by 2^-exponent; for the inf-norm, for the magnitude `sum` itself (nan if any
// element is). The exponent is 0 unless the powers left the range of a double.
struct Accumulator {
  double sum = 0;
  int64_t exponent = 0;
};

struct NonfiniteCount {
  int64_t nan = 0;
  int64_t inf = 0;
};

// One chunk of a parameter, its gradient and the optimizer's state for it: dense, and in the same order.
struct StepChunk {
  void* param;
  const void* grad;
  void* state[kMaxStepState];
};

using AccumulateKernel = Accumulator (*)(const void* x, int64_t numel, double p);
using ScaleKernel = void (*)(void* x, int64_t numel, double coef);
// True if an element changed; nothing is written otherwise.
using ElementwiseKernel = bool (*)(void* x, int64_t numel, double value);
using CountNonfiniteKernel = NonfiniteCount (*)(const void* x, int64_t numel);

// What becomes of a gradient before the update sees it: times `factor`, then within [-max_value, max_value].
struct GradRule {
  double factor;
  double max_value;  // inf: no bound
};

// Update a parameter and its state.
using AdamKernel = void (*)(const StepChunk& chunk, int64_t numel, const GradRule& grad_rule,
                            const AdamCoefficients& coefficients);
using SgdKernel = void (*)(const StepChunk& chunk, int64_t numel, const GradRule& grad_rule,
                           const SgdCoefficients& coefficients);

struct Kernels {
  const char* instruction_set;
  AccumulateKernel accumulate[kNumNormKinds][kNumDTypes];
  ScaleKernel scale[kNumDTypes];
  ElementwiseKernel elementwise[kNumElementwise][kNumDTypes];
  CountNonfiniteKernel count_nonfinite[kNumDTypes];
  AdamKernel adam[kNumDTypes];
  SgdKernel sgd[kNumDTypes];
};

extern const Kernels kBaseKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace fastclip::cpu
