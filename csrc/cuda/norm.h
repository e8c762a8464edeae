// Accumulate, combine and finalize on the device.
#pragma once

#include "launch.h"

namespace fastclip::cuda {

enum class Measure { kOne, kTwo, kInf, kAny, kNonfinite };

// The accumulator of a block and a span, of whatever measure, is at most this large.
constexpr int64_t kPartialBytes = 24;

// Where results go. `values` is one norm or one per span, in float32 or float64; for kNonfinite, pairs of
// int64. `coefficient`, of one norm of all, may be NULL.
struct NormOutput {
  void* values;
  bool is_float64;
  double* coefficient;
  double max_norm;
  const double* max_norm_on_device;  // in the place of `max_norm`, or NULL
};

// At most one call at a time may use partials and ticket, as in one stream.
struct AccumulateArguments {
  double p;
  void* partials;    // an accumulator per block; without a ticket, per block and span
  unsigned* ticket;  // 0, and 0 again afterwards. NULL: leave the accumulators for reduce_spans
  NormOutput output;
};

TableKernel<AccumulateArguments> accumulate_kernel(Measure measure);

// Takes the number of blocks that accumulate had, and a warp of its own for each span.
TableKernel<AccumulateArguments, uint32_t> reduce_spans_kernel(Measure measure);

// Whether the current device can run the kernels that were compiled.
cudaError_t probe_kernels();

}  // namespace fastclip::cuda
