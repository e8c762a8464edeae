#include "python/read.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>

namespace py = pybind11;

namespace fastclip {
namespace {

int64_t address(const void* pointer) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(pointer)); }

py::list to_list(const std::vector<PyObject*>& tensors) {
  py::list result;
  for (PyObject* tensor : tensors) result.append(py::handle(tensor));
  return result;
}

int64_t bits(double value) {
  int64_t result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// A group's first columns of RULE_*, and those of its optimizer.
using RuleRow = std::array<int64_t, 9>;

template <class Group>
RuleRow rule_row(const Group& group, const std::array<double, 4>& own) {
  return {bits(group.options.lr),
          address(group.rate.address),
          bits(group.rate.is_float64),
          bits(group.maximize ? -1 : 1),
          bits(group.options.weight_decay),
          bits(own[0]),
          bits(own[1]),
          bits(own[2]),
          bits(own[3])};
}

RuleRow rule_row(const AdamGroup& group) {
  const AdamOptions& o = group.options;
  return rule_row(group, {o.beta1, o.beta2, o.eps, o.decoupled ? 1.0 : 0.0});
}

RuleRow rule_row(const SgdGroup& group) {
  const SgdOptions& o = group.options;
  return rule_row(group, {o.momentum, o.dampening, o.nesterov ? 1.0 : 0.0, 0.0});
}

// Whether a list has a DTensor, and else whether it has what carries this attribute. About 15 ns per tensor.
py::tuple find_shards(const py::list& list, const py::handle& dtensor, const py::object& mark) {
  bool any_marked = false;
  for (const py::handle item : list) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(item.ptr())) == dtensor.ptr()) return py::make_tuple(true, false);
    any_marked = any_marked || (!mark.is_none() && PyObject_HasAttr(item.ptr(), mark.ptr()));
  }
  return py::make_tuple(false, any_marked);
}

// What a list of parameters or tensors holds on this rank: (values, memory, specs, plain, whether all memory
// is there and arrived). A gradient that is not there is None, and then the parameter's spec counts. `plain`
// are the items without a spec. About 150 ns per DTensor.
py::tuple read_shards(const py::list& list, bool of_gradients, const py::handle& dtensor) {
  static PyObject* const local_name = PyUnicode_InternFromString("_local_tensor");
  static PyObject* const spec_name = PyUnicode_InternFromString("_spec");
  const auto checked = [](PyObject* value) {
    if (value == nullptr) throw py::error_already_set();
    return value;
  };
  const auto is_dtensor = [&](PyObject* tensor) {
    return reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == dtensor.ptr();
  };
  const py::ssize_t size = PyList_GET_SIZE(list.ptr());
  // Filled at once below; a list that an exception leaves is freed with the places that are still empty.
  py::list values(size), memory(size), specs(size), plain;
  bool arrived = true;
  for (py::ssize_t i = 0; i < size; ++i) {
    PyObject* const item = PyList_GET_ITEM(list.ptr(), i);
    PyObject* const value = of_gradients ? checked(gradient_of(item)) : Py_NewRef(item);
    PyList_SET_ITEM(values.ptr(), i, value);
    PyObject* const shown = value == Py_None ? item : value;
    const bool spread = is_dtensor(shown);
    PyList_SET_ITEM(specs.ptr(), i,
                    spread ? checked(PyObject_GetAttr(shown, spec_name)) : Py_NewRef(Py_None));
    if (!spread) plain.append(py::handle(item));
    PyObject* const local =
        is_dtensor(value) ? checked(PyObject_GetAttr(value, local_name)) : Py_NewRef(value);
    PyList_SET_ITEM(memory.ptr(), i, local);
    arrived = arrived && reinterpret_cast<PyObject*>(Py_TYPE(local)) == TensorTypes::get().tensor;
  }
  return py::make_tuple(values, memory, specs, plain, arrived);
}

}  // namespace

std::string collect(TensorList& tensors, const py::list& list, TensorList::Source source,
                    int32_t device_type) {
  switch (tensors.collect(list.ptr(), source, device_type)) {
    case TensorList::Outcome::kPythonError:
      throw py::error_already_set();
    case TensorList::Outcome::kDeclined:
      return tensors.reason();
    case TensorList::Outcome::kOk:
      break;
  }
  return "";
}

py::tuple HeldTensors::tensors() const {
  py::tuple result(size());
  for (size_t i = 0; i < size(); ++i) result[i] = py::handle(list_.tensors()[i]);
  return result;
}

bool HeldTensors::has_lazy_negation() const {
  const bool negated = list_.has_lazy_negation();
  if (PyErr_Occurred()) throw py::error_already_set();
  return negated;
}

py::array_t<int64_t> HeldTensors::spans() const {
  py::array_t<int64_t> rows({static_cast<py::ssize_t>(size()), static_cast<py::ssize_t>(3)});
  int64_t* cell = rows.mutable_data();
  for (const Span& span : list_.spans()) {
    *cell++ = address(span.data);
    *cell++ = span.numel;
    *cell++ = static_cast<int64_t>(span.dtype);
  }
  return rows;
}

py::list HeldStep::missing() const { return to_list(list_.missing()); }

py::list HeldStep::counted_on_cpu() const { return to_list(list_.counted_on_cpu()); }

py::array_t<int64_t> HeldStep::rows() const {
  py::array_t<int64_t> rows({static_cast<py::ssize_t>(size()), static_cast<py::ssize_t>(8 + kMaxStepState)});
  int64_t* cell = rows.mutable_data();
  for (size_t i = 0; i < size(); ++i) {
    const Span& grad = list_.grads()[i];
    const StepTarget& target = list_.targets()[i];
    const StepRuleUse& rule = list_.rules()[target.rule];
    *cell++ = address(grad.data);
    *cell++ = address(target.param);
    for (const void* state : target.state) *cell++ = address(state);
    *cell++ = address(target.step);
    *cell++ = static_cast<int64_t>(rule.group);
    *cell++ = rule.fresh;
    *cell++ = target.step != nullptr && target.step_dtype == DType::kFloat64;
    *cell++ = grad.numel;
    *cell++ = static_cast<int64_t>(grad.dtype);
  }
  return rows;
}

void HeldStep::increment_versions(bool with_grads) const {
  fastclip::increment_versions(list_.param_tensors());
  if (with_grads) fastclip::increment_versions(list_.grad_tensors());
}

template <class Group>
py::array_t<int64_t> GroupedStep<Group>::rules() const {
  py::array_t<int64_t> rows({groups_.size(), std::tuple_size_v<RuleRow>});
  int64_t* cell = rows.mutable_data();
  for (const Group& group : groups_) {
    const RuleRow row = rule_row(group);
    cell = std::copy(row.begin(), row.end(), cell);
  }
  return rows;
}

void bind_read(py::module_& m) {
  using namespace pybind11::literals;
  py::class_<HeldTensors>(m, "Tensors")
      .def("__len__", &HeldTensors::size)
      .def_property_readonly("device", &HeldTensors::device)
      .def_property_readonly("has_empty", &HeldTensors::has_empty)
      .def_property_readonly("has_float64", &HeldTensors::has_float64)
      .def_property_readonly("positions", &HeldTensors::positions)
      .def_property_readonly("tensors", &HeldTensors::tensors)
      .def("has_lazy_negation", &HeldTensors::has_lazy_negation)
      .def("spans", &HeldTensors::spans, "(n, 3) int64: address, numel, dtype tag.");
  m.def("read_tensors", &HeldTensors::collect<HeldTensors>, "list"_a, "of_gradients"_a, "device_type"_a,
        "Tensors, or why the list is not for kernels on that type of device.");
  m.def("find_shards", &find_shards, "list"_a, "dtensor"_a, "mark"_a, "(any DTensor, else any marked).");
  m.def("read_shards", &read_shards, "list"_a, "of_gradients"_a, "dtensor"_a,
        "(values, memory, specs, plain, whether all memory is there).");
  py::class_<HeldStep>(m, "Step")
      .def("__len__", &HeldStep::size)
      .def_property_readonly("device", &HeldStep::device)
      .def_property_readonly("has_empty", &HeldStep::has_empty)
      .def_property_readonly("has_float64", &HeldStep::has_float64)
      .def_property_readonly("missing", &HeldStep::missing)
      .def_property_readonly("counted_on_cpu", &HeldStep::counted_on_cpu)
      .def("rows", &HeldStep::rows, "(n, 11) int64, see fastclip/kernels/step_table.py.")
      .def("increment_versions", &HeldStep::increment_versions, "with_grads"_a);
  define_step<GroupedStep<AdamGroup>>(m, "AdamStep").def("rules", &GroupedStep<AdamGroup>::rules);
  define_step<GroupedStep<SgdGroup>>(m, "SgdStep").def("rules", &GroupedStep<SgdGroup>::rules);
}

}  // namespace fastclip
