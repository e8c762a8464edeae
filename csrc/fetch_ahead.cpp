#include "fetch_ahead.h"

#include "tensor_list.h"

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

size_t FetchAhead::tensor(PyObject* tensor, const dlpack::Tensor& view) {
  Place& place = next();
  const bool is_known = place.object == address(tensor);
  if (is_known && place.storage == 0) unknown_.push_back({position_ - 1, tensor});
  const uintptr_t storage = is_known ? place.storage : 0;
  const uintptr_t shape = address(view.shape);
  const uintptr_t body = shape == 0 ? 0 : shape - kBeforeShape;
  const void* const data = static_cast<const char*>(view.data) + view.byte_offset;
  const uintptr_t elements = view.device.type == dlpack::kCpu ? address(data) : 0;
  const bool is_same = is_known && place.body == body && place.data == data;
  place = {address(tensor), body, kAroundShape, storage, elements, data, is_same && place.is_not_negated};
  return position_ - 1;
}

bool FetchAhead::is_negated(PyObject* tensor, size_t place, int64_t numel) {
  if (trail_[place].is_not_negated && numel > 1) return false;
  const bool negated = fastclip::is_negated(tensor);
  if (place < trail_.size()) trail_[place].is_not_negated = !negated;  // without the GIL, it may have changed
  return negated;
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
