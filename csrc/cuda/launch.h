// Launching a kernel over a span table: its shape and its arguments.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "table_cache.h"

namespace fastclip::cuda {

constexpr int kThreads = 256;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
// The grid is this many blocks on each multiprocessor, and the launch bounds keep them all resident: 64 KiB
// of loads in flight per multiprocessor, with up to 64 registers per thread.
constexpr int kBlocksPerMultiprocessor = 4;
// The same where an optimizer's step keeps four or five tensors of each element in up to 128 registers.
constexpr int kUpdateBlocksPerMultiprocessor = 2;
// 16-byte loads that a thread issues before it uses the first.
constexpr int kLoadsInFlight = 4;

// Where and how wide to launch.
struct Grid {
  uint32_t num_blocks;
  cudaStream_t stream;
};

template <class... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), Grid grid, unsigned num_threads,
                   const std::common_type_t<Arguments>&... arguments) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return cudaLaunchKernel(kernel, dim3(grid.num_blocks), dim3(num_threads), pointers, 0, grid.stream);
}

// Calls run(argument) with the table as the smallest TableArgument that holds it.
template <class Run>
cudaError_t with_argument(const Table& table, Run run) {
  const auto run_with = [&](auto& argument) {
    argument.on_device = table.on_device;
    argument.num_spans = table.num_spans();
    argument.num_tiles = table.num_tiles;
    if (table.on_device == nullptr) {
      std::copy(table.entries.begin(), table.entries.end(), argument.by_value);
    }
    return run(argument);
  };
  if (table.on_device != nullptr || table.entries.size() <= kSmallTable) {
    TableArgument<kSmallTable> argument;
    return run_with(argument);
  }
  TableArgument<kLargeTable> argument;
  return run_with(argument);
}

// A kernel over a span table, compiled for both sizes of the table's argument.
template <class... Arguments>
struct TableKernel {
  void (*of_small)(TableArgument<kSmallTable>, Arguments...);
  void (*of_large)(TableArgument<kLargeTable>, Arguments...);
};

template <class... Arguments>
cudaError_t launch(const TableKernel<Arguments...>& kernel, const Table& table, Grid grid,
                   const std::common_type_t<Arguments>&... arguments) {
  return with_argument(table, [&](const auto& argument) {
    if constexpr (std::decay_t<decltype(argument)>::kCapacity == kSmallTable) {
      return launch(kernel.of_small, grid, kThreads, argument, arguments...);
    } else {
      return launch(kernel.of_large, grid, kThreads, argument, arguments...);
    }
  });
}

}  // namespace fastclip::cuda
