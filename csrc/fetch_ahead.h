// Cache lines fetched before they are needed.
//
// Tensors, their storages and their state are scattered over the heap, and with small ones a call waits for
// memory rather than for arithmetic. But call after call reads the same objects in the same order: so each
// notes what it read, and the next fetches it some steps ahead. An address that no longer holds the object is
// fetched in vain, and never read.
//
// What a tensor is slow to tell is noted there, too, and not asked again while it stays what it was.
#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "dlpack_abi.h"

namespace fastclip {

// Guarded by the GIL, like the trail.
class FetchAhead {
 public:
  // What reading one object touches, as addresses; 0 for nothing.
  struct Place {
    uintptr_t object;
    uintptr_t body;  // a tensor's description, a dict's keys
    size_t body_nbytes;
    uintptr_t storage;  // what describes a tensor's storage, once that is known
    uintptr_t elements;
    const void* data = nullptr;   // where a tensor's memory begins
    bool is_not_negated = false;  // said by the tensor that had this object, description and memory
  };
  using Trail = std::vector<Place>;

  // Follows and rewrites `trail`, which outlives this.
  explicit FetchAhead(Trail* trail) : trail_(*trail) {}
  FetchAhead(const FetchAhead&) = delete;
  FetchAhead& operator=(const FetchAhead&) = delete;

  // Each says that a call reads this now. Of a tensor, returns the number of its place.
  size_t tensor(PyObject* tensor, const dlpack::Tensor& view);
  void dict(const PyObject* dict);

  // Whether the tensor at a place is a lazily negated view. torch gives away the GIL to tell, which takes 60
  // ns, and as long as another thread keeps it. One of a single element is asked in every call, for torch's
  // differentiation makes such views; one of more is dense only if it was made so by hand, and is asked when
  // it is new. What `.data = torch._neg_view(...)` makes of one that is known, with the memory that it has,
  // goes unnoticed.
  bool is_negated(PyObject* tensor, size_t place, int64_t numel);

  // Asks the tensors that were met in their place for the second time for their storage: half a microsecond
  // each, once. Python may run meanwhile, so the caller holds all tensors and has read what it needs.
  void find_storages();

 private:
  // Fetches what lies ahead and returns where to note what is read now.
  Place& next();

  struct Unknown {
    size_t position;
    PyObject* tensor;
  };

  Trail& trail_;
  size_t position_ = 0;
  std::vector<Unknown> unknown_;
};

}  // namespace fastclip
