// The table of spans that every kernel reads, and the partition of its bytes into tiles.
//
// A tile is 16 KiB of one span. Tiles are numbered through all spans, and each block of a grid takes a
// contiguous range of them: so the work is balanced by bytes, a block reads memory in order, and which block
// adds up which element follows from the sizes and the grid alone.
#pragma once

#include <cstdint>

#include "../span.h"

namespace fastclip::cuda {

constexpr int64_t kTileBytes = 16 * 1024;

struct SpanEntry {
  void* data;
  int64_t numel;
  uint32_t first_tile;  // tiles of all spans before this one
  DType dtype;
};

// The first tile of a block's share; the share ends where the next block's begins.
constexpr uint32_t first_tile_of_block(uint32_t block, uint32_t num_blocks, uint32_t num_tiles) {
  return static_cast<uint32_t>(static_cast<uint64_t>(num_tiles) * block / num_blocks);
}

// The block whose share holds a tile.
constexpr uint32_t block_of_tile(uint32_t tile, uint32_t num_blocks, uint32_t num_tiles) {
  return static_cast<uint32_t>(((static_cast<uint64_t>(tile) + 1) * num_blocks - 1) / num_tiles);
}

// A table as a kernel argument: small ones by value, so that launching needs no copy and a captured graph
// holds its own; larger ones in device memory. An entry behind the last span holds the number of tiles.
template <int kEntries>
struct TableArgument {
  static constexpr int kCapacity = kEntries;

  const SpanEntry* on_device;  // NULL: by value
  uint32_t num_spans;
  uint32_t num_tiles;
  SpanEntry by_value[kEntries];
};

// The first fits the 4 KiB of arguments that every launch has; the second, with the other arguments, the
// 32,764 bytes of compute capability 7.0 and CUDA 12.1.
constexpr int kSmallTable = 128;
constexpr int kLargeTable = 1344;
static_assert(sizeof(TableArgument<kSmallTable>) <= 4096 - 256, "too large for the classic argument space");
static_assert(sizeof(TableArgument<kLargeTable>) <= 32764 - 256, "too large for the argument space");

}  // namespace fastclip::cuda
