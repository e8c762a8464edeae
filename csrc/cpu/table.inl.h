// The kernels, compiled for the including kernels_*.cpp, and the table of them, in the order of DType and
// NormKind.

#include "elementwise.inl.h"
#include "nonfinite.inl.h"
#include "power.inl.h"
// Which norm needs.
#include "norm.inl.h"
#include "scale.inl.h"
#include "step.inl.h"

#define FASTCLIP_PER_DTYPE(kernel) {kernel<float>, kernel<double>, kernel<BFloat16>, kernel<Float16>}

#define FASTCLIP_PER_DTYPE_IN_LIST(kernel) FASTCLIP_PER_DTYPE(kernel),

#define FASTCLIP_KERNEL_TABLE(name, instruction_set)                            \
  const Kernels name = {                                                        \
      instruction_set,                                                          \
      {FASTCLIP_PER_DTYPE(accumulate_one), FASTCLIP_PER_DTYPE(accumulate_two),  \
       FASTCLIP_PER_DTYPE(accumulate_inf), FASTCLIP_PER_DTYPE(accumulate_any)}, \
      FASTCLIP_PER_DTYPE(scale),                                                \
      {FASTCLIP_ELEMENTWISE(FASTCLIP_PER_DTYPE_IN_LIST)},                       \
      FASTCLIP_PER_DTYPE(count_nonfinite),                                      \
      FASTCLIP_PER_DTYPE(adam),                                                 \
      FASTCLIP_PER_DTYPE(sgd),                                                  \
  }
