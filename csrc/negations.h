// Whether tensors are lazily negated views, without asking torch each time.
//
// torch gives away the GIL to tell, and waits as long as another thread keeps it. But call after call meets
// the same tensors in the same order: so each notes which it has asked, and the next asks what it meets anew.
// A tensor of a single element is asked in every call, for torch's differentiation makes such views; one of
// more is dense only if it was made so by hand. What `.data = torch._neg_view(...)` makes of a tensor that
// has been asked, with the memory that it has, goes unnoticed.
#pragma once

#include <Python.h>

#include <vector>

#include "span.h"

namespace fastclip {

// Guarded by the GIL, like the trail.
class Negations {
 public:
  // A tensor that was asked and is no such view.
  struct Asked {
    const PyObject* tensor = nullptr;
    const void* data = nullptr;
  };
  using Trail = std::vector<Asked>;

  // Follows and rewrites `trail`, which outlives this.
  explicit Negations(Trail* trail) : trail_(*trail) {}
  Negations(const Negations&) = delete;
  Negations& operator=(const Negations&) = delete;

  // Whether the tensor that a call meets now, and holds, is one: is_negated of tensor_list.h.
  bool next(PyObject* tensor, const Span& span);

 private:
  Trail& trail_;
  size_t position_ = 0;
};

}  // namespace fastclip
