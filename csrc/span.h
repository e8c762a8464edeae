// One tensor's memory, as every backend's kernels see it.
#pragma once

#include <cstdint>

namespace fastclip {

// The order is the index into every kernel table.
enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kNumDTypes = 4;

constexpr int64_t item_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// A dense block of `numel` elements: contiguous, or any permutation of a contiguous layout.
struct Span {
  void* data;
  int64_t numel;
  DType dtype;

  int64_t nbytes() const { return numel * item_size(dtype); }

  bool operator==(const Span& other) const {
    return data == other.data && numel == other.numel && dtype == other.dtype;
  }
};

}  // namespace fastclip
