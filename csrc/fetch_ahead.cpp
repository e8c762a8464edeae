#include "fetch_ahead.h"

namespace fastclip {
namespace {

constexpr size_t kRegionsAhead = 36;
constexpr size_t kCacheLine = 64;

// torch describes a tensor in one block, which holds the shape, and has mostly allocated the block that
// describes its storage, and small elements, shortly before it.
constexpr size_t kBeforeShape = 368;
constexpr size_t kAfterShape = 112;

constexpr size_t kTensorObject = 32;
constexpr size_t kSmallDictKeys = 192;

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

void fetch(const FetchAhead::Region& region) {
  for (uintptr_t line = region.begin - region.begin % kCacheLine; line < region.end; line += kCacheLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(line));
  }
}

}  // namespace

void FetchAhead::region(uintptr_t begin, size_t nbytes) {
  if (position_ + kRegionsAhead < trail_.size()) fetch(trail_[position_ + kRegionsAhead]);
  if (position_ == trail_.size()) trail_.emplace_back();
  trail_[position_++] = {begin, begin + nbytes};
}

void FetchAhead::tensor(const PyObject* tensor, const dlpack::Tensor& view) {
  region(address(tensor), kTensorObject);
  const uintptr_t elements = address(view.data) + view.byte_offset;
  const uintptr_t begin = address(view.shape) - kBeforeShape, nbytes = kBeforeShape + kAfterShape;
  if (view.shape != nullptr) region(begin, nbytes);
  const bool beside = view.shape != nullptr && elements - begin < nbytes;
  if (view.device.type == dlpack::kCpu && !beside) region(elements, 1);
}

void FetchAhead::dict(const PyObject* dict) {
  region(address(dict), sizeof(PyDictObject));
  region(address(reinterpret_cast<const PyDictObject*>(dict)->ma_keys), kSmallDictKeys);
}

}  // namespace fastclip
