#include "python/groups.h"

namespace py = pybind11;

namespace fastclip {
namespace {

// Interned, as the keys of a group are: found by their address.
struct Keys {
  PyObject* params = PyUnicode_InternFromString("params");
  PyObject* lr = PyUnicode_InternFromString("lr");
  PyObject* betas = PyUnicode_InternFromString("betas");
  PyObject* eps = PyUnicode_InternFromString("eps");
  PyObject* weight_decay = PyUnicode_InternFromString("weight_decay");
  PyObject* decoupled = PyUnicode_InternFromString("decoupled_weight_decay");
  PyObject* amsgrad = PyUnicode_InternFromString("amsgrad");
  PyObject* capturable = PyUnicode_InternFromString("capturable");
  PyObject* momentum = PyUnicode_InternFromString("momentum");
  PyObject* dampening = PyUnicode_InternFromString("dampening");
  PyObject* nesterov = PyUnicode_InternFromString("nesterov");
  PyObject* maximize = PyUnicode_InternFromString("maximize");
};

const Keys& keys() {
  static const Keys interned;
  return interned;
}

bool is_tensor(py::handle value) {
  const int answer = PyObject_IsInstance(value.ptr(), TensorTypes::get().tensor);
  if (answer < 0) throw py::error_already_set();
  return answer == 1;
}

std::string device_of(py::handle tensor) { return py::str(tensor.attr("device")); }

std::string device_type_of(py::handle tensor) { return py::str(tensor.attr("device").attr("type")); }

}  // namespace

GroupReader::GroupReader(py::handle group, size_t number, StepKernels kernels)
    : group_(group), name_("group " + std::to_string(number)), kernels_(kernels) {}

void GroupReader::decline(const std::string& reason) {
  if (reason_.empty()) reason_ = reason;
}

double GroupReader::decline(PyObject* key, const std::string& is) {
  decline("the " + std::string(PyUnicode_AsUTF8(key)) + " of " + name_ + " is " + is);
  return 0;
}

py::handle GroupReader::item(PyObject* key) {
  PyObject* const value = PyDict_GetItemWithError(group_.ptr(), key);
  if (value == nullptr) {
    if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key);
    throw py::error_already_set();
  }
  return value;
}

bool GroupReader::flag(PyObject* key) {
  const int answer = PyObject_IsTrue(item(key).ptr());
  if (answer < 0) throw py::error_already_set();
  return answer == 1;
}

double GroupReader::number(PyObject* key, py::handle value) {
  if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  if (is_tensor(value) && device_type_of(value) != "cpu") return decline(key, "on " + device_of(value));
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

std::pair<double, double> GroupReader::pair(PyObject* key) {
  const auto values = py::reinterpret_steal<py::object>(PySequence_Fast(item(key).ptr(), "expected a pair"));
  if (!values) throw py::error_already_set();
  if (PySequence_Fast_GET_SIZE(values.ptr()) != 2) return {decline(key, "not a pair"), 0};
  const double first = number(key, PySequence_Fast_GET_ITEM(values.ptr(), 0));
  return {first, number(key, PySequence_Fast_GET_ITEM(values.ptr(), 1))};
}

py::list GroupReader::params() {
  const py::handle value = item(keys().params);
  if (py::isinstance<py::list>(value)) return py::reinterpret_borrow<py::list>(value);
  decline(keys().params, "no list");
  return py::list();
}

double GroupReader::learning_rate(RateOnDevice* rate) {
  PyObject* const key = keys().lr;
  const py::handle value = item(key);
  if (kernels_.host_counts || PyFloat_CheckExact(value.ptr()) || !is_tensor(value)) return number(key, value);
  // torch has one name for CUDA and ROCm.
  if (device_type_of(value) != (kernels_.device_type == dlpack::kCpu ? "cpu" : "cuda")) {
    return number(key, value);
  }
  dlpack::Tensor view;
  Span span;
  const bool is_plain = read_tensor(value.ptr(), kernels_.device_type, &view, &span) == nullptr;
  if (!is_plain || span.numel != 1 || (span.dtype != DType::kFloat32 && span.dtype != DType::kFloat64)) {
    return decline(key, "not one float32 or float64");
  }
  *rate = {py::reinterpret_borrow<py::object>(value), span.data, span.dtype == DType::kFloat64,
           view.device.id};
  return 0;
}

void GroupReader::refuse_capturable() {
  if (kernels_.host_counts && flag(keys().capturable)) decline(name_ + " is capturable");
}

AdamGroup::AdamGroup(GroupReader& read)
    : params(read.params()), amsgrad(read.flag(keys().amsgrad)), maximize(read.flag(keys().maximize)) {
  read.refuse_capturable();
  options.weight_decay = read.number(keys().weight_decay);
  options.decoupled = read.flag(keys().decoupled);
  options.eps = read.number(keys().eps);
  const auto [beta1, beta2] = read.pair(keys().betas);
  options.beta1 = beta1;
  options.beta2 = beta2;
  options.lr = read.learning_rate(&rate);
}

SgdGroup::SgdGroup(GroupReader& read) : params(read.params()), maximize(read.flag(keys().maximize)) {
  options.weight_decay = read.number(keys().weight_decay);
  options.momentum = read.number(keys().momentum);
  options.dampening = read.number(keys().dampening);
  options.nesterov = read.flag(keys().nesterov);
  options.lr = read.learning_rate(&rate);
}

std::string collect(StepList& step, const StepGroup& group) {
  switch (step.collect(group)) {
    case StepList::Outcome::kPythonError:
      throw py::error_already_set();
    case StepList::Outcome::kDeclined:
      return step.reason();
    case StepList::Outcome::kOk:
      break;
  }
  return "";
}

std::string reason_against(const RateOnDevice& rate, size_t number, const StepList& step) {
  if (step.grads().empty() || rate.address == nullptr || rate.device == step.device().id) return "";
  return "the lr of group " + std::to_string(number) + " is on " + device_of(rate.tensor) +
         ", where the parameters are not";
}

}  // namespace fastclip
