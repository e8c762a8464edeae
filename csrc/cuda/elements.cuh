// Element types, 16-byte vectors of them, and a block's way through the spans.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "launch.h"

namespace fastclip::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ inline float widen(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

// Round to nearest, ties to even; nan stays nan.
template <class T>
__device__ inline T narrow(float x);
template <>
__device__ inline BFloat16 narrow<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ inline Float16 narrow<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}

__device__ inline DType dtype_of(float) { return DType::kFloat32; }
__device__ inline DType dtype_of(double) { return DType::kFloat64; }
__device__ inline DType dtype_of(BFloat16) { return DType::kBFloat16; }
__device__ inline DType dtype_of(Float16) { return DType::kFloat16; }

// What the GPU moves in one access.
template <class T>
union Vector {
  static constexpr int kSize = sizeof(uint4) / sizeof(T);

  uint4 words;
  T element[kSize];
};

// The part of a span that one block works on, split at 16-byte boundaries: up to one vector's worth of
// elements before the first boundary and behind the last are scalars.
template <class T>
class Piece {
 public:
  __device__ Piece(const SpanEntry& entry, uint32_t first_tile, uint32_t end_tile) {
    constexpr int64_t kElementsPerTile = kTileBytes / static_cast<int64_t>(sizeof(T));
    const int64_t begin = static_cast<int64_t>(first_tile - entry.first_tile) * kElementsPerTile;
    const int64_t end = static_cast<int64_t>(end_tile - entry.first_tile) * kElementsPerTile;
    first_ = begin;
    data_ = static_cast<T*>(entry.data) + begin;
    numel_ = (end < entry.numel ? end : entry.numel) - begin;
    const auto address = reinterpret_cast<uintptr_t>(data_);
    const int64_t to_boundary = static_cast<int64_t>((0 - address) % sizeof(uint4) / sizeof(T));
    head_ = static_cast<int>(to_boundary < numel_ ? to_boundary : numel_);
    num_vectors_ = (numel_ - head_) / Vector<T>::kSize;
  }

  __device__ int64_t first() const { return first_; }  // its place in the span
  __device__ T* data() const { return data_; }
  __device__ int64_t numel() const { return numel_; }
  __device__ int head() const { return head_; }  // elements before the first boundary
  __device__ int64_t num_vectors() const { return num_vectors_; }
  __device__ uint4* vectors() const { return reinterpret_cast<uint4*>(data_ + head_); }
  __device__ int num_scalars() const { return static_cast<int>(numel_ - num_vectors_ * Vector<T>::kSize); }
  __device__ T* scalar(int i) const { return data_ + (i < head_ ? i : i + num_vectors_ * Vector<T>::kSize); }

 private:
  int64_t first_;
  T* data_;
  int64_t numel_;
  int64_t num_vectors_;
  int head_;
};

// Calls visit(Piece<T>) with the entry's element type. All threads of a block come here together.
template <class Visit>
__device__ inline void visit_piece(const SpanEntry& entry, uint32_t first_tile, uint32_t end_tile,
                                   Visit visit) {
  switch (entry.dtype) {
    case DType::kFloat32:
      return visit(Piece<float>(entry, first_tile, end_tile));
    case DType::kFloat64:
      return visit(Piece<double>(entry, first_tile, end_tile));
    case DType::kBFloat16:
      return visit(Piece<BFloat16>(entry, first_tile, end_tile));
    case DType::kFloat16:
      return visit(Piece<Float16>(entry, first_tile, end_tile));
  }
}

template <class Argument>
__device__ inline const SpanEntry* entries_of(const Argument& table) {
  return table.on_device != nullptr ? table.on_device : table.by_value;
}

// The last span that begins at or before a tile. Empty spans share their first tile with the next span, which
// comes later, so the span found holds the tile.
__device__ inline uint32_t find_span(const SpanEntry* entries, uint32_t num_spans, uint32_t tile) {
  uint32_t low = 0, high = num_spans;
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    if (entries[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Calls visit(span, piece) for the block's share of the spans, the last span first.
template <int kEntries, class Visit>
__device__ inline void visit_backwards(const TableArgument<kEntries>& table, Visit visit) {
  const SpanEntry* const entries = entries_of(table);
  const uint32_t begin = first_tile_of_block(blockIdx.x, gridDim.x, table.num_tiles);
  uint32_t end = first_tile_of_block(blockIdx.x + 1, gridDim.x, table.num_tiles);
  if (begin == end) return;
  for (uint32_t span = find_span(entries, table.num_spans, end - 1); end > begin; --span) {
    const uint32_t first = max(begin, entries[span].first_tile);
    if (first == end) continue;  // an empty span
    visit_piece(entries[span], first, end, [&](const auto& piece) { visit(span, piece); });
    end = first;
    // A grid of one block is how spans that share memory are kept from racing: they take turns.
    if (gridDim.x == 1) __syncthreads();
  }
}

}  // namespace fastclip::cuda
