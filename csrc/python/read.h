// Tensors and steps that are read for kernels on a device, and held while Python launches those.
#pragma once

#include <pybind11/numpy.h>

#include <memory>
#include <string>
#include <utility>

#include "python/groups.h"
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

// The same with the options of its groups, whose kind is that of the optimizer.
template <class Group>
class GroupedStep : public HeldStep {
 public:
  static constexpr bool kTakesWideState = false;

  using HeldStep::HeldStep;

  // Returns a `Held`, which is this class or derived from it, or the reason why there is none.
  template <class Held>
  static pybind11::object collect(const pybind11::list& param_groups, const pybind11::dict& state,
                                  const pybind11::set& fresh, bool write_grads, int32_t device_type,
                                  const pybind11::object& dtensor, const pybind11::dict& gradients) {
    auto step = std::make_unique<Held>(StepKernels{device_type, false, Held::kTakesWideState}, state, fresh,
                                       StepShards{dtensor.ptr(), gradients.ptr()});
    StepList& list = step->list_;
    const std::string reason = fastclip::collect(list, param_groups, &step->groups_);
    if (!reason.empty()) return pybind11::str(reason);
    if (list.check_overlap(write_grads) == StepList::Outcome::kDeclined) return pybind11::str(list.reason());
    return pybind11::cast(std::move(step));
  }

  // (groups, 9): the columns RULE_* of fastclip/kernels/coefficients.py, as the bits of float64.
  pybind11::array_t<int64_t> rules() const;

 protected:
  std::vector<Group> groups_;
};

// Defines a step that is to be read: GroupedStep, or derived from it.
template <class Held>
pybind11::class_<Held, HeldStep> define_step(pybind11::module_& m, const char* name) {
  using namespace pybind11::literals;
  return pybind11::class_<Held, HeldStep>(m, name).def_static(
      "collect", &Held::template collect<Held>, "param_groups"_a, "state"_a, "fresh"_a, "write_grads"_a,
      "device_type"_a, "dtensor"_a, "gradients"_a, "The step, or why it is not for the kernels.");
}

}  // namespace fastclip
