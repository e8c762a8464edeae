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

  // Each says that a call reads this now. A tensor that is met in its place for the second time is asked for
  // its storage, which takes half a microsecond, once.
  void tensor(PyObject* tensor, const dlpack::Tensor& view);
  void dict(const PyObject* dict);

 private:
  // Fetches what lies ahead and returns where to note what is read now.
  Place& next();

  Trail& trail_;
  size_t position_ = 0;
};

}  // namespace fastclip
