// An optimizer's step on a CUDA device: its groups are read once, Python allocates what the kernels write,
// and passes addresses in.
#include <cstddef>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "python/bridge.h"
#include "python/read.h"

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

// (params, amsgrad, beta1, beta2, eps, weight_decay, decoupled, maximize, lr, address of lr on the device or
// 0, whether that is a float64)
struct AdamGroup {
  using Rule = FastclipCudaAdamRule;
  static constexpr GroupReader* kReader = &adam_group;

  Rule options;

  explicit AdamGroup(const py::tuple& group)
      : options{pointer<void>(group[9]),
                group[8].cast<double>(),
                group[2].cast<double>(),
                group[3].cast<double>(),
                group[4].cast<double>(),
                group[5].cast<double>(),
                float_dtype(group[10].cast<bool>()),
                group[6].cast<bool>(),
                group[7].cast<bool>()} {}

  Rule rule(bool) const { return options; }
};

// (params, momentum, dampening, weight_decay, nesterov, maximize, lr, address of lr on the device or 0,
// whether that is a float64)
struct SgdGroup {
  using Rule = FastclipCudaSgdRule;
  static constexpr GroupReader* kReader = &sgd_group;

  Rule options;
  double dampening;

  explicit SgdGroup(const py::tuple& group)
      : options{pointer<void>(group[7]), group[6].cast<double>(),
                group[1].cast<double>(), 1,
                group[3].cast<double>(), float_dtype(group[8].cast<bool>()),
                group[4].cast<bool>(),   group[5].cast<bool>()},
        dampening(group[2].cast<double>()) {}

  Rule rule(bool fresh) const {
    Rule rule = options;
    if (!fresh) rule.grad_share = 1 - dampening;
    return rule;
  }
};

// A step by libfastclip_cuda.
template <class Group>
class CudaStep : public HeldStep {
 public:
  using HeldStep::HeldStep;

  // Returns a CudaStep, or the reason why there is none.
  static py::object collect(const py::list& groups, const py::dict& state, const py::set& fresh,
                            bool write_grads, int32_t device_type, const py::object& dtensor,
                            const py::dict& gradients) {
    auto step = std::make_unique<CudaStep>(StepKernels{device_type, false, true}, state, fresh,
                                           StepShards{dtensor.ptr(), gradients.ptr()});
    const std::string reason = step->HeldStep::collect(groups, Group::kReader, write_grads);
    if (!reason.empty()) return py::str(reason);
    const auto read = groups_of<Group>(groups);
    for (const StepRuleUse& use : step->list_.rules()) {
      step->rules_.push_back(read[use.group].rule(use.fresh));
    }
    return py::cast(std::move(step));
  }

  int64_t workspace_bytes() const {
    int64_t nbytes = 0;
    const auto num_spans = static_cast<int64_t>(size());
    reason_of(CudaLibrary::get().step_workspace_bytes(device(), num_spans, &nbytes));
    return nbytes;
  }

  // Pointers are addresses on the device; 0 is NULL.
  std::string run(double p, double max_norm, const py::int_& max_norm_on_device, const py::int_& given_coefs,
                  bool given_per_span, double max_value, bool skip_nonfinite, bool write_grads,
                  const py::int_& grad_scale, const py::int_& found_inf, bool norm_is_float64,
                  const py::int_& total_norm, const py::int_& clip_coef, const py::int_& skipped,
                  const py::int_& counts, const py::int_& workspace) const {
    const FastclipCudaStepOptions options{p,
                                          max_norm,
                                          pointer<double>(max_norm_on_device),
                                          pointer<double>(given_coefs),
                                          given_per_span,
                                          max_value,
                                          pointer<float>(grad_scale),
                                          pointer<float>(found_inf),
                                          skip_nonfinite,
                                          write_grads,
                                          float_dtype(norm_is_float64),
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
    if (reason.empty()) increment_versions(write_grads);
    return reason;
  }

 private:
  std::vector<typename Group::Rule> rules_;
};

template <class Group>
void define(py::module_& m, const char* name) {
  using namespace pybind11::literals;
  using Step = CudaStep<Group>;
  py::class_<Step, HeldStep>(m, name)
      .def_static("collect", &Step::collect, "groups"_a, "state"_a, "fresh"_a, "write_grads"_a,
                  "device_type"_a, "dtensor"_a, "gradients"_a, "The step, or why it is not for the library.")
      .def_property_readonly("workspace_bytes", &Step::workspace_bytes)
      .def("run", &Step::run, "p"_a, "max_norm"_a, "max_norm_on_device"_a, "given_coefs"_a,
           "given_per_span"_a, "max_value"_a, "skip_nonfinite"_a, "write_grads"_a, "grad_scale"_a,
           "found_inf"_a, "norm_is_float64"_a, "total_norm"_a, "clip_coef"_a, "skipped"_a, "counts"_a,
           "workspace"_a);
}

}  // namespace

void bind_cuda_step(py::module_& m) {
  define<AdamGroup>(m, "CudaAdamStep");
  define<SgdGroup>(m, "CudaSgdStep");
}

}  // namespace fastclip
