// An optimizer's step on a CUDA device: its groups are read once, Python allocates what the kernels write,
// and passes addresses in.
#include <cstddef>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "finalize.h"
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

FastclipCudaAdamRule rule_of(const AdamGroup& group, bool) {
  const AdamOptions& options = group.options;
  return {group.rate.address,
          options.lr,
          options.beta1,
          options.beta2,
          options.eps,
          options.weight_decay,
          float_dtype(group.rate.is_float64),
          options.decoupled,
          group.maximize};
}

FastclipCudaSgdRule rule_of(const SgdGroup& group, bool fresh) {
  const SgdCoefficients c = sgd_coefficients(group.options, fresh);
  return {group.rate.address, c.lr,           c.momentum,
          c.grad_share,       c.weight_decay, float_dtype(group.rate.is_float64),
          c.nesterov,         group.maximize};
}

// A step by libfastclip_cuda.
template <class Group>
class CudaStep : public GroupedStep<Group> {
 public:
  static constexpr bool kTakesWideState = true;

  using GroupedStep<Group>::GroupedStep;

  int64_t workspace_bytes() const {
    int64_t nbytes = 0;
    const auto num_spans = static_cast<int64_t>(this->size());
    reason_of(CudaLibrary::get().step_workspace_bytes(this->device(), num_spans, &nbytes));
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
    const StepList& list = this->list_;
    const auto call = cuda_call(list.grads(), list.device(), pointer<void>(workspace));
    const auto* targets = reinterpret_cast<const FastclipCudaStepTarget*>(list.targets().data());
    std::vector<decltype(rule_of(std::declval<Group>(), false))> rules;
    rules.reserve(list.rules().size());
    for (const StepRuleUse& use : list.rules()) {
      rules.push_back(rule_of(this->groups_[use.group], use.fresh));
    }
    const auto num_rules = static_cast<int64_t>(rules.size());
    int status;
    if constexpr (std::is_same_v<Group, AdamGroup>) {
      status = CudaLibrary::get().adam_step(&call, targets, rules.data(), num_rules, &options);
    } else {
      status = CudaLibrary::get().sgd_step(&call, targets, rules.data(), num_rules, &options);
    }
    std::string reason = reason_of(status);
    if (reason.empty()) this->increment_versions(write_grads);
    return reason;
  }
};

template <class Group>
void define(py::module_& m, const char* name) {
  using namespace pybind11::literals;
  using Step = CudaStep<Group>;
  define_step<Step>(m, name)
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
