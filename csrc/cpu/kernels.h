// The table of CPU kernels; one table per instruction set, all with the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../span.h"

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

constexpr int kMaxStepState = 3;

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

// What an update of torch.optim.Adam or AdamW needs to know beside the memory. The state is exp_avg,
// exp_avg_sq and max_exp_avg_sq; the last is null without amsgrad.
struct AdamCoefficients {
  double decay_factor;   // decoupled weight decay: 1 - lr * weight_decay, or 1
  double coupled_decay;  // weight decay that is added to the gradient, or 0
  double beta1;
  double beta2;
  double step_size;  // lr / (1 - beta1^step)
  double bias_correction2_sqrt;
  double eps;
};

// The same for torch.optim.SGD. The state is momentum_buffer, null without momentum.
struct SgdCoefficients {
  double lr;
  double weight_decay;
  double momentum;
  double grad_share;  // of the gradient in the momentum: 1 - dampening, or 1 in a buffer's first step
  bool nesterov;
};

using AccumulateKernel = Accumulator (*)(const void* x, int64_t numel, double p);
using ScaleKernel = void (*)(void* x, int64_t numel, double coef);
// Clamps to [lo, hi], nan stays; true if an element changed. Nothing is written otherwise.
using ClampKernel = bool (*)(void* x, int64_t numel, double lo, double hi);
using CountNonfiniteKernel = NonfiniteCount (*)(const void* x, int64_t numel);

// Update a parameter and its state with the gradient times `grad_factor`.
using AdamKernel = void (*)(const StepChunk& chunk, int64_t numel, double grad_factor,
                            const AdamCoefficients& coefficients);
using SgdKernel = void (*)(const StepChunk& chunk, int64_t numel, double grad_factor,
                           const SgdCoefficients& coefficients);

struct Kernels {
  const char* instruction_set;
  AccumulateKernel accumulate[kNumNormKinds][kNumDTypes];
  ScaleKernel scale[kNumDTypes];
  ClampKernel clamp[kNumDTypes];
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
