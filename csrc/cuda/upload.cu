#include "upload.h"

namespace fastclip::cuda {
namespace {

// Copy entries from the kernel arguments to device memory: unlike a copy from pageable memory it does not
// make the host wait, and unlike one from page-locked memory it needs no buffer that must outlive it.
//
// Math      to[i] = entries[i].
// Grid      one block.
// Traffic   writes 24 bytes per entry.
// Order     elementwise.
// Requires  num_entries <= kLargeTable.
// Range     any.
// Scratch   none.
// Measured  nothing.
// Source    own.
__global__ void __launch_bounds__(kThreads)
    write_entries(const __grid_constant__ TableArgument<kLargeTable> entries, SpanEntry* const to,
                  const uint32_t num_entries) {
  for (uint32_t i = threadIdx.x; i < num_entries; i += kThreads) to[i] = entries.by_value[i];
}

}  // namespace

cudaError_t upload(const Table& table, cudaStream_t stream) {
  const uint32_t size = table.num_spans() + 1;
  TableArgument<kLargeTable> entries;
  for (uint32_t first = 0; first < size; first += kLargeTable) {
    const uint32_t count = std::min<uint32_t>(kLargeTable, size - first);
    std::copy_n(table.entries.begin() + first, count, entries.by_value);
    const cudaError_t error =
        launch(write_entries, Grid{1, stream}, kThreads, entries, table.on_device + first, count);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fastclip::cuda
