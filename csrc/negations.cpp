#include "negations.h"

#include "tensor_list.h"

namespace fastclip {

bool Negations::next(PyObject* tensor, const Span& span) {
  const size_t place = position_++;
  if (place < trail_.size() && trail_[place].tensor == tensor && trail_[place].data == span.data &&
      span.numel > 1) {
    return false;
  }
  const bool negated = is_negated(tensor);
  // Only now, for meanwhile another call may have lengthened the trail.
  if (place >= trail_.size()) trail_.resize(place + 1);
  trail_[place] = negated || PyErr_Occurred() ? Asked{} : Asked{tensor, span.data};
  return negated;
}

}  // namespace fastclip
