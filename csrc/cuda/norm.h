// Accumulate, combine and finalize on the device.
#pragma once

#include "launch.h"

namespace fastclip::cuda {

enum class Measure { kOne, kTwo, kInf, kAny, kNonfinite };

// The accumulator of a block and a span, of whatever measure, is at most this large.
constexpr int64_t kPartialBytes = 24;

// Where results go. `values` is one norm or one per span, in float32 or float64; for kNonfinite, pairs of
// int64. `coefficient` is written by total_norm only.
struct NormOutput {
  void* values;
  bool is_float64;
  double* coefficient;
  double max_norm;
  const double* max_norm_on_device;  // in the place of `max_norm`, or NULL
};

// `partials` holds grid.num_blocks accumulators; *ticket is 0 and is 0 again afterwards. At most one call at
// a time may use them, as in one stream.
cudaError_t total_norm(const Table& table, Grid grid, Measure measure, double p, void* partials,
                       unsigned* ticket, const NormOutput& output);

// `partials` holds grid.num_blocks + table.num_spans() accumulators.
cudaError_t span_norms(const Table& table, Grid grid, Measure measure, double p, void* partials,
                       const NormOutput& output);

// Whether the current device can run the kernels that were compiled.
cudaError_t probe_kernels();

}  // namespace fastclip::cuda
