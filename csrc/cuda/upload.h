// Writing a span table into device memory.
#pragma once

#include "launch.h"

namespace fastclip::cuda {

// Fills table.on_device in stream order: one launch per kLargeTable entries.
cudaError_t upload(const Table& table, cudaStream_t stream);

}  // namespace fastclip::cuda
