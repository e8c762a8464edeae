// Cache lines fetched before they are needed.
//
// Tensors, their storages and their state are scattered over the heap, and with small ones a call waits for
// memory rather than for arithmetic. But call after call reads the same objects in the same order: so each
// notes what it read, and the next fetches it some steps ahead. An address that no longer holds the object is
// fetched in vain, and never read.
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
  };
  using Trail = std::vector<Place>;

  // Follows and rewrites `trail`, which outlives this.
  explicit FetchAhead(Trail* trail) : trail_(*trail) {}
  FetchAhead(const FetchAhead&) = delete;
  FetchAhead& operator=(const FetchAhead&) = delete;

  // Each says that a call reads this now.
  void tensor(PyObject* tensor, const dlpack::Tensor& view);
  void dict(const PyObject* dict);

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
