// The kernel table of the including kernels_*.cpp, in the order of DType and NormKind.

#define FASTCLIP_PER_DTYPE(kernel) {kernel<float>, kernel<double>, kernel<BFloat16>, kernel<Float16>}

#define FASTCLIP_KERNEL_TABLE(name, instruction_set)                            \
  const Kernels name = {                                                        \
      instruction_set,                                                          \
      {FASTCLIP_PER_DTYPE(accumulate_one), FASTCLIP_PER_DTYPE(accumulate_two),  \
       FASTCLIP_PER_DTYPE(accumulate_inf), FASTCLIP_PER_DTYPE(accumulate_any)}, \
      FASTCLIP_PER_DTYPE(scale),                                                \
      FASTCLIP_PER_DTYPE(clamp),                                                \
      FASTCLIP_PER_DTYPE(count_nonfinite),                                      \
  }
