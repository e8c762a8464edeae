// Writing a table into device memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace fastclip::cuda {

// Copies `nbytes` to 16-byte aligned device memory in stream order: one launch per 32,000 bytes. What is
// behind them up to the next multiple of 16 bytes is overwritten, too.
cudaError_t upload(const void* from, size_t nbytes, void* to, cudaStream_t stream);

}  // namespace fastclip::cuda
