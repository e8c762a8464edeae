// Tensors and steps that are read for kernels on a device, and held while Python launches those.
#pragma once

#include <pybind11/numpy.h>

#include <memory>
#include <string>
#include <utility>

#include "python/module.h"
#include "step_list.h"
#include "tensor_list.h"

namespace fastclip {

// The tensors of a list.
class HeldTensors {
 public:
  // Returns a `Held`, which is this class or derived from it, or the reason why there is none.
  template <class Held>
  static pybind11::object collect(const pybind11::list& list, bool of_gradients, int32_t device_type) {
    auto held = std::make_unique<Held>();
    const auto source = of_gradients ? TensorList::Source::kGradients : TensorList::Source::kTensors;
    const std::string reason = fastclip::collect(held->list_, list, source, device_type);
    if (!reason.empty()) return pybind11::str(reason);
    return pybind11::cast(std::move(held));
  }

  size_t size() const { return list_.spans().size(); }
  int device() const { return list_.device().id; }
  bool has_empty() const { return list_.has_empty(); }
  bool has_float64() const { return list_.has_float64(); }
  const std::vector<int64_t>& positions() const { return list_.positions(); }
  pybind11::tuple tensors() const;
  bool has_lazy_negation() const;
  // (n, 3): address, numel and dtype tag.
  pybind11::array_t<int64_t> spans() const;

 protected:
  TensorList list_;
};

// An optimizer's parameters with their gradients and state, of which those on `missing` have none, and those
// on `counted_on_cpu` a counter that no kernel can reach. Whole if both are empty.
class HeldStep {
 public:
  HeldStep(StepKernels kernels, const pybind11::dict& state, const pybind11::set& fresh, StepShards shards)
      : list_(kernels, state.ptr(), fresh.ptr(), shards) {}

  // Returns an empty string, or why the step is not for the kernels.
  std::string collect(const pybind11::list& groups, GroupReader* reader, bool write_grads);

  size_t size() const { return list_.grads().size(); }
  int device() const { return list_.device().id; }
  bool has_empty() const { return list_.has_empty(); }
  bool has_float64() const { return list_.has_float64(); }
  pybind11::list missing() const;
  pybind11::list counted_on_cpu() const;
  // (n, 11): addresses of gradient, parameter, three states and counter, 0 where there is none; the number
  // of the group; whether the state is fresh, and whether the counter is float64; numel and dtype tag.
  pybind11::array_t<int64_t> rows() const;
  // Tells autograd, which may hold parameters and gradients; the state is the optimizer's own.
  void increment_versions(bool with_grads) const;

 protected:
  StepList list_;
};

}  // namespace fastclip
