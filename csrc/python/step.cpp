// The step of an optimizer, clipped: Python's view of cpu/step_pipeline.h.
#include <pybind11/stl.h>

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/step_pipeline.h"
#include "python/module.h"
#include "step_list.h"

namespace py = pybind11;

namespace fastclip {
namespace {

// What the parameters of a group are updated by.
struct AdamGroup {
  static constexpr GroupReader* kReader = &adam_group;

  AdamOptions options;
  bool maximize;

  // (params, amsgrad, beta1, beta2, eps, weight_decay, decoupled, maximize, lr)
  explicit AdamGroup(const py::tuple& group)
      : options{group[8].cast<double>(), group[2].cast<double>(), group[3].cast<double>(),
                group[4].cast<double>(), group[5].cast<double>(), group[6].cast<bool>()},
        maximize(group[7].cast<bool>()) {}

  cpu::StepRule rule(double step, bool) const { return {adam_coefficients(options, step), maximize}; }
};

struct SgdGroup {
  static constexpr GroupReader* kReader = &sgd_group;

  SgdCoefficients coefficients;
  double dampening;
  bool maximize;

  // (params, momentum, dampening, weight_decay, nesterov, maximize, lr)
  explicit SgdGroup(const py::tuple& group)
      : coefficients{group[6].cast<double>(), group[3].cast<double>(), group[1].cast<double>(), 1,
                     group[4].cast<bool>()},
        dampening(group[2].cast<double>()),
        maximize(group[5].cast<bool>()) {}

  cpu::StepRule rule(double, bool fresh) const {
    SgdCoefficients c = coefficients;
    if (!fresh) c.grad_share = 1 - dampening;
    return {c, maximize};
  }
};

// (ratio, eps, elements of a unit of each gradient): cpu::UnitRule.
using UnitSettings = std::tuple<double, double, std::vector<int64_t>>;

// Answers with (total norm, coefficient, skipped, any float64); None without gradients; a list of the
// parameters that lack state; or a string, why this step is not for the CPU kernels. Only the first has
// changed anything.
template <class Group>
py::object step(const py::list& groups, const py::dict& state, const py::set& fresh, double max_norm,
                double p, double grad_scale, bool skip_nonfinite, bool write_grads, int num_threads,
                std::vector<double> given_coefs, double max_value, UnitSettings units,
                const py::object& dtensor, const py::dict& gradients) {
  StepList list({dlpack::kCpu, true, false}, state.ptr(), fresh.ptr(), {dtensor.ptr(), gradients.ptr()});
  if (const std::string reason = collect(list, groups, Group::kReader); !reason.empty()) {
    return py::str(reason);
  }
  if (!list.missing().empty()) {
    py::list missing;
    for (PyObject* param : list.missing()) missing.append(py::handle(param));
    return missing;
  }
  if (list.grads().empty()) return py::none();
  if (list.check_overlap(write_grads) == StepList::Outcome::kDeclined) return py::str(list.reason());
  const bool is_given = !given_coefs.empty();
  const size_t num_coefs = given_coefs.size();
  if (num_coefs > 1 && num_coefs != list.grads().size()) {
    return py::str("the number of coefficients is not that of the gradients");
  }
  if (!is_given && std::isinf(p) && list.has_empty()) {
    return py::str("a gradient is empty, which has no inf-norm");
  }
  std::vector<cpu::StepRule> rules;
  rules.reserve(list.rules().size());
  const auto read = groups_of<Group>(groups);
  for (const StepRuleUse& use : list.rules()) rules.push_back(read[use.group].rule(use.step, use.fresh));
  auto& [ratio, eps, unit_numel] = units;
  if (!unit_numel.empty() && unit_numel.size() != list.grads().size()) {
    return py::str("the number of units' sizes is not that of the gradients");
  }
  const bool changes_elements = std::isfinite(max_value) || !unit_numel.empty();
  const cpu::StepOptions options{cpu::NormType(p), max_norm,
                                 grad_scale,       skip_nonfinite,
                                 write_grads,      std::move(given_coefs),
                                 max_value,        {ratio, eps, std::move(unit_numel)}};
  const auto stepped = without_gil(list.nbytes(), [&] {
    return cpu::clip_and_step(list.grads(), list.targets(), rules, options, num_threads);
  });
  if (!stepped.skipped) {
    list.commit();
    // Autograd may hold parameters and gradients; the state is the optimizer's own.
    increment_versions(list.param_tensors());
    if (write_grads && (num_coefs > 1 || changes_elements || stepped.grad_factor != 1.0))
      increment_versions(list.grad_tensors());
  }
  list.prepare_next();
  // Rounded as the tensors will be that they become: a norm beyond float32 is inf there.
  const auto rounded = [&](double value) {
    return list.has_float64() ? value : static_cast<double>(static_cast<float>(value));
  };
  return py::make_tuple(rounded(stepped.total_norm), rounded(stepped.coef), stepped.skipped,
                        list.has_float64());
}

}  // namespace

void bind_step(py::module_& m) {
  using namespace pybind11::literals;
  const auto define = [&m](const char* name, auto function) {
    m.def(name, function, "groups"_a, "state"_a, "fresh"_a, "max_norm"_a, "p"_a, "grad_scale"_a,
          "skip_nonfinite"_a, "write_grads"_a, "num_threads"_a, "given_coefs"_a, "max_value"_a, "units"_a,
          "dtensor"_a, "gradients"_a,
          "(norm, coefficient, skipped, any float64), None, [parameters without state] or a reason.");
  };
  define("adam_step", &step<AdamGroup>);
  define("sgd_step", &step<SgdGroup>);
}

}  // namespace fastclip
