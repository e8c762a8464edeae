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
  struct Region {
    uintptr_t begin;
    uintptr_t end;
  };
  using Trail = std::vector<Region>;

  // Follows and rewrites `trail`, which outlives this.
  explicit FetchAhead(Trail* trail) : trail_(*trail) {}
  FetchAhead(const FetchAhead&) = delete;
  FetchAhead& operator=(const FetchAhead&) = delete;

  // Each says that a call reads this now. Only the address is taken.
  void tensor(const PyObject* tensor, const dlpack::Tensor& view);
  void dict(const PyObject* dict);

 private:
  void region(uintptr_t begin, size_t nbytes);

  Trail& trail_;
  size_t position_ = 0;
};

}  // namespace fastclip
