// The step of an optimizer, clipped: Python's view of cpu/step_pipeline.h.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "bindings.h"
#include "step_list.h"

namespace py = pybind11;

namespace fastclip {
namespace {

// (params, amsgrad, lr, beta1, beta2, eps, weight_decay, decoupled, maximize)
StepGroup adam_group(const py::tuple& group) {
  static PyObject* const exp_avg = PyUnicode_InternFromString("exp_avg");
  static PyObject* const exp_avg_sq = PyUnicode_InternFromString("exp_avg_sq");
  static PyObject* const max_exp_avg_sq = PyUnicode_InternFromString("max_exp_avg_sq");
  StepGroup result{group[0].ptr(), {exp_avg, exp_avg_sq}, true, {}};
  if (group[1].cast<bool>()) result.state_names.push_back(max_exp_avg_sq);
  const double lr = group[2].cast<double>(), weight_decay = group[6].cast<double>();
  const bool decoupled = group[7].cast<bool>(), maximize = group[8].cast<bool>();
  cpu::AdamCoefficients c{};
  c.beta1 = group[3].cast<double>();
  c.beta2 = group[4].cast<double>();
  c.eps = group[5].cast<double>();
  c.decay_factor = decoupled ? 1 - lr * weight_decay : 1;
  c.coupled_decay = decoupled ? 0 : weight_decay;
  result.rule = [c, lr, maximize](double step, bool) mutable {
    c.step_size = lr / (1 - std::pow(c.beta1, step));
    c.bias_correction2_sqrt = std::sqrt(1 - std::pow(c.beta2, step));
    return cpu::StepRule{c, maximize};
  };
  return result;
}

// (params, lr, momentum, dampening, weight_decay, nesterov, maximize)
StepGroup sgd_group(const py::tuple& group) {
  static PyObject* const momentum_buffer = PyUnicode_InternFromString("momentum_buffer");
  StepGroup result{group[0].ptr(), {}, false, {}};
  cpu::SgdCoefficients c{};
  c.lr = group[1].cast<double>();
  c.momentum = group[2].cast<double>();
  c.weight_decay = group[4].cast<double>();
  c.nesterov = group[5].cast<bool>();
  const double dampening = group[3].cast<double>();
  const bool maximize = group[6].cast<bool>();
  if (c.momentum != 0) result.state_names.push_back(momentum_buffer);
  result.rule = [c, dampening, maximize](double, bool fresh) mutable {
    c.grad_share = fresh ? 1 : 1 - dampening;
    return cpu::StepRule{c, maximize};
  };
  return result;
}

// Answers with (total norm, coefficient, skipped, any float64); None without gradients; a list of the
// parameters that lack state; or a string, why this step is not for the CPU kernels. Only the first has
// changed anything.
template <class ReadGroup>
py::object step(ReadGroup read_group, const py::list& groups, const py::dict& state, const py::set& fresh,
                double max_norm, double p, double grad_scale, bool skip_nonfinite, bool write_grads,
                int num_threads) {
  StepList list(state.ptr(), fresh.ptr());
  for (const py::handle group : groups) {
    const auto outcome = list.collect(read_group(py::reinterpret_borrow<py::tuple>(group)));
    if (outcome == StepList::Outcome::kPythonError) throw py::error_already_set();
    if (outcome == StepList::Outcome::kDeclined) return py::str(list.reason());
  }
  if (!list.missing().empty()) {
    py::list missing;
    for (PyObject* param : list.missing()) missing.append(py::handle(param));
    return missing;
  }
  if (list.grads().empty()) return py::none();
  if (list.check_overlap(write_grads) == StepList::Outcome::kDeclined) return py::str(list.reason());
  const auto is_empty = [](const Span& grad) { return grad.numel == 0; };
  if (std::isinf(p) && std::any_of(list.grads().begin(), list.grads().end(), is_empty)) {
    return py::str("a gradient is empty, which has no inf-norm");
  }
  const cpu::StepOptions options{cpu::NormType(p), max_norm, grad_scale, skip_nonfinite, write_grads};
  const auto stepped = without_gil(list.nbytes(), [&] {
    return cpu::clip_and_step(list.grads(), list.targets(), list.rules(), options, num_threads);
  });
  if (!stepped.skipped) {
    list.commit();
    // Autograd may hold parameters and gradients; the state is the optimizer's own.
    increment_versions(list.param_tensors());
    if (write_grads && stepped.grad_factor != 1.0) increment_versions(list.grad_tensors());
  }
  // Rounded as the tensors will be that they become: a norm beyond float32 is inf there.
  const auto rounded = [&](double value) {
    return list.has_float64() ? value : static_cast<double>(static_cast<float>(value));
  };
  return py::make_tuple(rounded(stepped.total_norm), rounded(stepped.coef), stepped.skipped,
                        list.has_float64());
}

}  // namespace

void define_step(py::module_& m) {
  using namespace pybind11::literals;
  const auto define = [&m](const char* name, auto read_group) {
    m.def(
        name,
        [read_group](const py::list& groups, const py::dict& state, const py::set& fresh, double max_norm,
                     double p, double grad_scale, bool skip_nonfinite, bool write_grads, int num_threads) {
          return step(read_group, groups, state, fresh, max_norm, p, grad_scale, skip_nonfinite, write_grads,
                      num_threads);
        },
        "groups"_a, "state"_a, "fresh"_a, "max_norm"_a, "p"_a, "grad_scale"_a, "skip_nonfinite"_a,
        "write_grads"_a, "num_threads"_a,
        "(norm, coefficient, skipped, any float64), None, [parameters without state] or a reason.");
  };
  define("adam_step", adam_group);
  define("sgd_step", sgd_group);
}

}  // namespace fastclip
