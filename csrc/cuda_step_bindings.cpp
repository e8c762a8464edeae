// An optimizer's step on a CUDA device: its groups are read once, Python allocates what the kernels write,
// and passes addresses in.
#include <pybind11/stl.h>

#include <cstddef>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "bindings.h"
#include "cuda_bindings.h"
#include "cuda_bridge.h"
#include "step_list.h"

namespace py = pybind11;

namespace fastclip {
namespace {

static_assert(sizeof(StepTarget) == sizeof(FastclipCudaStepTarget) &&
                  offsetof(StepTarget, state) == offsetof(FastclipCudaStepTarget, state) &&
                  offsetof(StepTarget, step) == offsetof(FastclipCudaStepTarget, step) &&
                  offsetof(StepTarget, rule) == offsetof(FastclipCudaStepTarget, rule) &&
                  offsetof(StepTarget, state_dtype) == offsetof(FastclipCudaStepTarget, state_dtype) &&
                  offsetof(StepTarget, step_dtype) == offsetof(FastclipCudaStepTarget, step_dtype),
              "targets are passed on as they are");

template <class T>
T* pointer(const py::handle& address) {
  return reinterpret_cast<T*>(address.cast<uintptr_t>());
}

uint8_t float_dtype(bool is_float64) { return is_float64 ? FASTCLIP_CUDA_FLOAT64 : FASTCLIP_CUDA_FLOAT32; }

// (params, lr, address of lr on the device or 0, whether that is a float64, amsgrad, beta1, beta2, eps,
// weight_decay, decoupled, maximize)
struct AdamGroup {
  using Rule = FastclipCudaAdamRule;

  Rule options;
  bool amsgrad;

  explicit AdamGroup(const py::tuple& group)
      : options{pointer<void>(group[2]),
                group[1].cast<double>(),
                group[5].cast<double>(),
                group[6].cast<double>(),
                group[7].cast<double>(),
                group[8].cast<double>(),
                float_dtype(group[3].cast<bool>()),
                group[9].cast<bool>(),
                group[10].cast<bool>()},
        amsgrad(group[4].cast<bool>()) {}

  StepGroup parameters(const py::tuple& group) const { return adam_parameters(group[0].ptr(), amsgrad); }
  Rule rule(bool) const { return options; }
};

// (params, lr, address of lr on the device or 0, whether that is a float64, momentum, dampening,
// weight_decay, nesterov, maximize)
struct SgdGroup {
  using Rule = FastclipCudaSgdRule;

  Rule options;
  double dampening;

  explicit SgdGroup(const py::tuple& group)
      : options{pointer<void>(group[2]), group[1].cast<double>(),
                group[4].cast<double>(), 1,
                group[6].cast<double>(), float_dtype(group[3].cast<bool>()),
                group[7].cast<bool>(),   group[8].cast<bool>()},
        dampening(group[5].cast<double>()) {}

  StepGroup parameters(const py::tuple& group) const {
    return sgd_parameters(group[0].ptr(), options.momentum);
  }
  Rule rule(bool fresh) const {
    Rule rule = options;
    if (!fresh) rule.grad_share = 1 - dampening;
    return rule;
  }
};

// An optimizer's parameters with their gradients and state, held while this object lives.
template <class Group>
class CudaStep {
 public:
  CudaStep(int32_t device_type, const py::dict& state, const py::set& fresh)
      : list_(device_type, false, state.ptr(), fresh.ptr()) {}

  // Returns a CudaStep, or the reason why there is none. It is whole if `missing` and `counted_on_cpu` are
  // empty.
  static py::object collect(const py::list& groups, const py::dict& state, const py::set& fresh,
                            bool write_grads, int32_t device_type) {
    auto step = std::make_unique<CudaStep>(device_type, state, fresh);
    std::vector<Group> read;
    for (const py::handle handle : groups) {
      const auto group = py::reinterpret_borrow<py::tuple>(handle);
      const auto outcome = step->list_.collect(read.emplace_back(group).parameters(group));
      if (outcome == StepList::Outcome::kPythonError) throw py::error_already_set();
      if (outcome == StepList::Outcome::kDeclined) return py::str(step->list_.reason());
    }
    if (step->list_.check_overlap(write_grads) == StepList::Outcome::kDeclined) {
      return py::str(step->list_.reason());
    }
    for (const StepRuleUse& use : step->list_.rules()) {
      step->rules_.push_back(read[use.group].rule(use.fresh));
    }
    return py::cast(std::move(step));
  }

  size_t size() const { return list_.grads().size(); }
  int device() const { return list_.device().id; }
  bool has_empty() const { return list_.has_empty(); }
  bool has_float64() const { return list_.has_float64(); }
  py::list missing() const { return to_list(list_.missing()); }
  py::list counted_on_cpu() const { return to_list(list_.counted_on_cpu()); }

  int64_t workspace_bytes() const {
    int64_t nbytes = 0;
    const auto num_spans = static_cast<int64_t>(size());
    reason_of(CudaLibrary::get().step_workspace_bytes(device(), num_spans, &nbytes));
    return nbytes;
  }

  // Pointers are addresses on the device; 0 is NULL.
  std::string run(double p, double max_norm, bool skip_nonfinite, bool write_grads,
                  const py::int_& grad_scale, const py::int_& found_inf, const py::int_& total_norm,
                  const py::int_& clip_coef, const py::int_& skipped, const py::int_& counts,
                  const py::int_& workspace) const {
    const FastclipCudaStepOptions options{p,
                                          max_norm,
                                          pointer<float>(grad_scale),
                                          pointer<float>(found_inf),
                                          skip_nonfinite,
                                          write_grads,
                                          float_dtype(has_float64()),
                                          pointer<void>(total_norm),
                                          pointer<void>(clip_coef),
                                          pointer<uint8_t>(skipped),
                                          pointer<double>(counts)};
    const auto call = cuda_call(list_.grads(), list_.device(), pointer<void>(workspace));
    const auto* targets = reinterpret_cast<const FastclipCudaStepTarget*>(list_.targets().data());
    const auto num_rules = static_cast<int64_t>(rules_.size());
    int status;
    if constexpr (std::is_same_v<Group, AdamGroup>) {
      status = CudaLibrary::get().adam_step(&call, targets, rules_.data(), num_rules, &options);
    } else {
      status = CudaLibrary::get().sgd_step(&call, targets, rules_.data(), num_rules, &options);
    }
    std::string reason = reason_of(status);
    if (reason.empty()) {
      // Autograd may hold parameters and gradients; the state is the optimizer's own.
      increment_versions(list_.param_tensors());
      if (write_grads) increment_versions(list_.grad_tensors());
    }
    return reason;
  }

 private:
  static py::list to_list(const std::vector<PyObject*>& tensors) {
    py::list result;
    for (PyObject* tensor : tensors) result.append(py::handle(tensor));
    return result;
  }

  StepList list_;
  std::vector<typename Group::Rule> rules_;
};

template <class Group>
void define(py::module_& m, const char* name) {
  using namespace pybind11::literals;
  using Step = CudaStep<Group>;
  py::class_<Step>(m, name)
      .def_static("collect", &Step::collect, "groups"_a, "state"_a, "fresh"_a, "write_grads"_a,
                  "device_type"_a, "The step, or why it is not for the library.")
      .def("__len__", &Step::size)
      .def_property_readonly("device", &Step::device)
      .def_property_readonly("has_empty", &Step::has_empty)
      .def_property_readonly("has_float64", &Step::has_float64)
      .def_property_readonly("missing", &Step::missing)
      .def_property_readonly("counted_on_cpu", &Step::counted_on_cpu)
      .def_property_readonly("workspace_bytes", &Step::workspace_bytes)
      .def("run", &Step::run, "p"_a, "max_norm"_a, "skip_nonfinite"_a, "write_grads"_a, "grad_scale"_a,
           "found_inf"_a, "total_norm"_a, "clip_coef"_a, "skipped"_a, "counts"_a, "workspace"_a);
}

}  // namespace

void bind_cuda_step(py::module_& m) {
  define<AdamGroup>(m, "CudaAdamStep");
  define<SgdGroup>(m, "CudaSgdStep");
}

}  // namespace fastclip
