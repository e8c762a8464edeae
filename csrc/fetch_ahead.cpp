#include "fetch_ahead.h"

#include <cstdint>

namespace fastclip {
namespace {

constexpr size_t kRegionsAhead = 36;
constexpr size_t kCacheLine = 64;

// torch describes a tensor in one block, which holds the shape, and allocates the block of its storage
// shortly before it, and its version counter and what autograd keeps shortly after.
constexpr size_t kBeforeShape = 368;
constexpr size_t kAfterShape = 112;

constexpr size_t kTensorObject = 32;
constexpr size_t kSmallDictKeys = 192;

void fetch(const FetchAhead::Region& region) {
  const char* line = region.begin - reinterpret_cast<uintptr_t>(region.begin) % kCacheLine;
  for (; line < region.end; line += kCacheLine) __builtin_prefetch(line);
}

}  // namespace

void FetchAhead::region(const void* begin, size_t nbytes) {
  if (position_ + kRegionsAhead < trail_.size()) fetch(trail_[position_ + kRegionsAhead]);
  if (position_ == trail_.size()) trail_.emplace_back();
  const auto* first = static_cast<const char*>(begin);
  trail_[position_++] = {first, first + nbytes};
}

void FetchAhead::tensor(const PyObject* tensor, const dlpack::Tensor& view) {
  region(tensor, kTensorObject);
  const auto* const shape = reinterpret_cast<const char*>(view.shape);
  const char *const begin = shape - kBeforeShape, *const end = shape + kAfterShape;
  if (shape != nullptr) region(begin, end - begin);
  const char* const elements = static_cast<const char*>(view.data) + view.byte_offset;
  const bool within = shape != nullptr && elements >= begin && elements < end;
  if (view.device.type == dlpack::kCpu && !within) region(elements, 1);
}

void FetchAhead::dict(const PyObject* dict) {
  region(dict, sizeof(PyDictObject));
  region(reinterpret_cast<const PyDictObject*>(dict)->ma_keys, kSmallDictKeys);
}

}  // namespace fastclip
