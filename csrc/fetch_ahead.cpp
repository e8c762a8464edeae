#include "fetch_ahead.h"

namespace fastclip {
namespace {

constexpr size_t kPlacesAhead = 8;
constexpr size_t kCacheLine = 64;

constexpr size_t kObject = 32;
// torch describes a tensor in one block around its shape, which is read nearly whole, and a storage in
// another.
constexpr size_t kBeforeShape = 64;
constexpr size_t kAroundShape = 176;
constexpr size_t kStorage = 72;
constexpr size_t kSmallDictKeys = 192;

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// Inlined always: GCC takes a function that only prefetches for one without effect, and leaves out the call.
[[gnu::always_inline]] inline void fetch(uintptr_t begin, size_t nbytes) {
  if (begin == 0) return;
  for (uintptr_t line = begin - begin % kCacheLine; line < begin + nbytes; line += kCacheLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(line));
  }
}

// Where torch describes the storage of a tensor; where the tensor is if torch does not say.
uintptr_t storage_of(PyObject* tensor) {
  PyObject* const storage = PyObject_CallMethod(tensor, "untyped_storage", nullptr);
  PyObject* const number = storage == nullptr ? nullptr : PyObject_GetAttrString(storage, "_cdata");
  void* const found = number == nullptr ? nullptr : PyLong_AsVoidPtr(number);
  Py_XDECREF(number);
  Py_XDECREF(storage);
  PyErr_Clear();
  return address(found == nullptr ? tensor : found);
}

}  // namespace

FetchAhead::Place& FetchAhead::next() {
  if (position_ + kPlacesAhead < trail_.size()) {
    const Place& ahead = trail_[position_ + kPlacesAhead];
    fetch(ahead.object, kObject);
    fetch(ahead.body, ahead.body_nbytes);
    fetch(ahead.storage, kStorage);
    fetch(ahead.elements, 1);
  }
  if (position_ == trail_.size()) trail_.emplace_back();
  return trail_[position_++];
}

void FetchAhead::tensor(PyObject* tensor, const dlpack::Tensor& view) {
  Place& place = next();
  const bool is_known = place.object == address(tensor);
  if (is_known && place.storage == 0) unknown_.push_back({position_ - 1, tensor});
  const uintptr_t storage = is_known ? place.storage : 0;
  const uintptr_t shape = address(view.shape);
  const uintptr_t elements = view.device.type == dlpack::kCpu ? address(view.data) + view.byte_offset : 0;
  place = {address(tensor), shape == 0 ? 0 : shape - kBeforeShape, kAroundShape, storage, elements};
}

void FetchAhead::dict(const PyObject* dict) {
  const auto* const keys = reinterpret_cast<const PyDictObject*>(dict)->ma_keys;
  next() = {address(dict), address(keys), kSmallDictKeys, 0, 0};
}

void FetchAhead::find_storages() {
  for (const auto& [position, tensor] : unknown_) {
    const uintptr_t storage = storage_of(tensor);
    Place& place = trail_[position];  // looked up again: another call may have lengthened the trail
    if (place.object == address(tensor)) place.storage = storage;
  }
  unknown_.clear();
}

}  // namespace fastclip
