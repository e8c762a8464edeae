// fastclip._C: Python's view of the native backends. Only the files of this folder include pybind11; none
// includes torch.
//
// Every function takes a list and answers with a result, or with a string: the reason why these tensors are
// not for this backend. Nothing has been read or written then.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/pipeline.h"
#include "cpu/threads.h"
#include "finalize.h"
#include "python/module.h"

namespace py = pybind11;

namespace fastclip {
namespace {

py::object* g_increment_version = nullptr;

std::string set_torch(py::object tensor, py::object parameter, py::object increment_version) {
  delete g_increment_version;
  g_increment_version = new py::object(std::move(increment_version));
  return TensorTypes::set(tensor.ptr(), parameter.ptr());
}

// Tells autograd of those tensors that `changed`.
template <class Changed>
void increment_versions(const TensorList& tensors, Changed changed) {
  std::vector<PyObject*> written;
  written.reserve(tensors.tensors().size());
  for (size_t i = 0; i < tensors.tensors().size(); ++i) {
    if (changed(i)) written.push_back(tensors.tensors()[i]);
  }
  fastclip::increment_versions(written);
}

// The norm rounded to the type in which it is returned, which a norm beyond float32 leaves as inf.
py::tuple returned_norm(double norm, bool is_float64) {
  return py::make_tuple(is_float64 ? norm : static_cast<double>(static_cast<float>(norm)), is_float64);
}

py::object total_norm(const py::list& list, double p, bool wide, int num_threads) {
  TensorList tensors;
  if (auto reason = collect(tensors, list, TensorList::Source::kTensors); !reason.empty())
    return py::str(reason);
  if (tensors.spans().empty()) return py::none();
  if (std::isinf(p) && tensors.has_empty()) return py::str("a gradient is empty, which has no inf-norm");
  const double norm = without_gil(
      tensors.nbytes(), [&] { return cpu::total_norm(tensors.spans(), cpu::NormType(p), num_threads); });
  return returned_norm(norm, wide || tensors.has_float64());
}

py::object clip_grad_norm(const py::list& parameters, double max_norm, double p, bool error_if_nonfinite,
                          int num_threads) {
  TensorList grads;
  if (auto reason = collect(grads, parameters, TensorList::Source::kGradients); !reason.empty()) {
    return py::str(reason);
  }
  if (grads.spans().empty()) return py::none();
  if (std::isinf(p) && grads.has_empty()) return py::str("a gradient is empty, which has no inf-norm");
  const auto clipped = without_gil(grads.nbytes(), [&] {
    return cpu::clip_norm(grads.spans(), cpu::NormType(p), max_norm, error_if_nonfinite, !grads.has_float64(),
                          num_threads);
  });
  if (clipped.coef != 1.0) {
    increment_versions(grads, [&](size_t i) { return changes_values(clipped.coef, grads.spans()[i].dtype); });
  }
  return returned_norm(clipped.total_norm, grads.has_float64());
}

py::object clip_grads_with_norm(const py::list& parameters, double max_norm, double norm, int num_threads) {
  TensorList grads;
  if (auto reason = collect(grads, parameters, TensorList::Source::kGradients); !reason.empty()) {
    return py::str(reason);
  }
  const double coef = clip_coefficient(norm, max_norm);
  without_gil(grads.nbytes(), [&] {
    cpu::scale(grads.spans(), coef, num_threads);
    return true;
  });
  increment_versions(grads, [&](size_t i) { return changes_values(coef, grads.spans()[i].dtype); });
  return py::none();
}

// One coefficient for all, or one for each gradient.
py::object scale_grads(const py::list& parameters, const std::vector<double>& coefs, int num_threads) {
  TensorList grads;
  if (auto reason = collect(grads, parameters, TensorList::Source::kGradients); !reason.empty()) {
    return py::str(reason);
  }
  if (coefs.size() != 1 && coefs.size() != grads.spans().size()) {
    return py::str("the number of coefficients is neither 1 nor that of the gradients");
  }
  without_gil(grads.nbytes(), [&] {
    if (coefs.size() == 1) {
      cpu::scale(grads.spans(), coefs[0], num_threads);
    } else {
      cpu::scale_each(grads.spans(), coefs, num_threads);
    }
    return true;
  });
  increment_versions(grads, [&](size_t i) {
    return changes_values(coefs.size() == 1 ? coefs[0] : coefs[i], grads.spans()[i].dtype);
  });
  return py::none();
}

// The number of gradients.
py::object elementwise(const py::list& parameters, const char* name, double value, int num_threads) {
  const Elementwise operation = elementwise_named(name);
  if (operation == Elementwise::kCount) return py::str(std::string("there is no kernel for ") + name);
  TensorList grads;
  if (auto reason = collect(grads, parameters, TensorList::Source::kGradients); !reason.empty()) {
    return py::str(reason);
  }
  if (grads.has_lazy_negation()) return py::str("a gradient is a lazily negated view");
  if (PyErr_Occurred()) throw py::error_already_set();
  const auto changed = without_gil(
      grads.nbytes(), [&] { return cpu::elementwise(grads.spans(), operation, value, num_threads); });
  increment_versions(grads, [&](size_t i) { return changed[i] != 0; });
  return py::int_(grads.spans().size());
}

py::object grad_norms(const py::list& parameters, double p, int num_threads) {
  TensorList grads;
  if (auto reason = collect(grads, parameters, TensorList::Source::kGradients); !reason.empty()) {
    return py::str(reason);
  }
  const auto norms =
      without_gil(grads.nbytes(), [&] { return cpu::norms(grads.spans(), cpu::NormType(p), num_threads); });
  return py::make_tuple(norms, grads.has_float64());
}

py::object count_nonfinite(const py::list& list, int num_threads) {
  TensorList tensors;
  if (auto reason = collect(tensors, list, TensorList::Source::kTensors); !reason.empty())
    return py::str(reason);
  const auto counts =
      without_gil(tensors.nbytes(), [&] { return cpu::count_nonfinite(tensors.spans(), num_threads); });
  py::list result;
  for (size_t i = 0; i < counts.size(); ++i) {
    if (counts[i].nan + counts[i].inf == 0) continue;
    result.append(py::make_tuple(tensors.positions()[i], counts[i].nan, counts[i].inf));
  }
  return result;
}

}  // namespace

void increment_versions(const std::vector<PyObject*>& tensors) {
  if (tensors.empty()) return;
  const auto arguments =
      py::reinterpret_steal<py::tuple>(PyTuple_New(static_cast<Py_ssize_t>(tensors.size())));
  if (!arguments) throw py::error_already_set();
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyTuple_SET_ITEM(arguments.ptr(), static_cast<Py_ssize_t>(i), Py_NewRef(tensors[i]));
  }
  (*g_increment_version)(arguments);
}

}  // namespace fastclip

PYBIND11_MODULE(_C, m) {
  using namespace fastclip;
  using namespace pybind11::literals;
  m.doc() =
      "fastclip's CPU kernels, and what reads tensors for the others. Use the functions of `fastclip`; these "
      "check nothing twice.";
  m.attr("COMPILER") = __VERSION__;
  m.def("set_torch", &set_torch, "tensor"_a, "parameter"_a, "increment_version"_a,
        "Remember torch's types; returns why this torch cannot be read, or an empty string.");
  m.def("after_fork_in_child", [] { cpu::g_forked = true; }, "Use one thread from here on.");
  m.def("instruction_set", [] { return std::string(cpu::kernels().instruction_set); }, "The set in use.");
  m.def("supported_instruction_sets", &cpu::supported_instruction_sets, "What this machine can run.");
  m.def("select_instruction_set", &cpu::select_instruction_set, "name"_a,
        "False if this machine cannot run it.");
  m.def("total_norm", &total_norm, "tensors"_a, "p"_a, "wide"_a, "num_threads"_a,
        "(norm, whether it is a float64: if wide or any tensor is), or None for an empty list.");
  m.def("clip_grad_norm_", &clip_grad_norm, "parameters"_a, "max_norm"_a, "p"_a, "error_if_nonfinite"_a,
        "num_threads"_a, "(norm, any float64), or None without gradients.");
  m.def("clip_grads_with_norm_", &clip_grads_with_norm, "parameters"_a, "max_norm"_a, "total_norm"_a,
        "num_threads"_a, "None.");
  m.def("scale_grads_", &scale_grads, "parameters"_a, "coefs"_a, "num_threads"_a, "None.");
  m.def("elementwise_", &elementwise, "parameters"_a, "operation"_a, "value"_a, "num_threads"_a,
        "The number of gradients.");
  m.def("grad_norms", &grad_norms, "parameters"_a, "p"_a, "num_threads"_a, "([norm, ...], any float64).");
  m.def("count_nonfinite", &count_nonfinite, "tensors"_a, "num_threads"_a,
        "[(position, nan, inf), ...] of the tensors that are not finite.");
  bind_step(m);
  bind_read(m);
  bind_cuda(m);
  bind_cuda_step(m);
}
