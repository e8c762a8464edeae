// The step of an optimizer, clipped: Python's view of cpu/step_pipeline.h.
#include <pybind11/stl.h>

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/step_pipeline.h"
#include "python/groups.h"

namespace py = pybind11;

namespace fastclip {
namespace {

cpu::StepRule rule_of(const AdamGroup& group, const StepRuleUse& use) {
  return {adam_coefficients(group.options, use.step), group.maximize};
}

cpu::StepRule rule_of(const SgdGroup& group, const StepRuleUse& use) {
  return {sgd_coefficients(group.options, use.fresh), group.maximize};
}

// (ratio, eps, elements of a unit of each gradient): cpu::UnitRule.
using UnitSettings = std::tuple<double, double, std::vector<int64_t>>;

// Answers with (total norm, coefficient, skipped, any float64); None without gradients; a list of the
// parameters that lack state; or a string, why this step is not for the CPU kernels. Only the first has
// changed anything.
template <class Group>
py::object step(const py::list& param_groups, const py::dict& state, const py::set& fresh, double max_norm,
                double p, double grad_scale, bool skip_nonfinite, bool write_grads, int num_threads,
                std::vector<double> given_coefs, double max_value, UnitSettings units,
                const py::object& dtensor, const py::dict& gradients) {
  StepList list({dlpack::kCpu, true, false}, state.ptr(), fresh.ptr(), {dtensor.ptr(), gradients.ptr()});
  std::vector<Group> groups;
  if (const std::string reason = collect(list, param_groups, &groups); !reason.empty()) {
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
  for (const StepRuleUse& use : list.rules()) rules.push_back(rule_of(groups[use.group], use));
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
    m.def(name, function, "param_groups"_a, "state"_a, "fresh"_a, "max_norm"_a, "p"_a, "grad_scale"_a,
          "skip_nonfinite"_a, "write_grads"_a, "num_threads"_a, "given_coefs"_a, "max_value"_a, "units"_a,
          "dtensor"_a, "gradients"_a,
          "(norm, coefficient, skipped, any float64), None, [parameters without state] or a reason.");
  };
  define("adam_step", &step<AdamGroup>);
  define("sgd_step", &step<SgdGroup>);
}

}  // namespace fastclip
