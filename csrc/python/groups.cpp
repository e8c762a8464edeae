#include "python/groups.h"

#include <tuple>
#include <utility>

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

// Reads one group. What the kernels cannot take leaves a reason, of which the first stays.
class GroupReader {
 public:
  GroupReader(py::handle group, size_t number, StepKernels kernels)
      : group_(group), name_("group " + std::to_string(number)), kernels_(kernels) {}

  const std::string& reason() const { return reason_; }

  void read(AdamGroup* group) {
    if (kernels_.host_counts && flag(keys().capturable)) decline(name_ + " is capturable");
    group->params = params();
    group->amsgrad = flag(keys().amsgrad);
    group->maximize = flag(keys().maximize);
    group->options.weight_decay = number(keys().weight_decay);
    group->options.decoupled = flag(keys().decoupled);
    group->options.eps = number(keys().eps);
    std::tie(group->options.beta1, group->options.beta2) = pair(keys().betas);
    group->options.lr = learning_rate(&group->rate);
  }

  void read(SgdGroup* group) {
    group->params = params();
    group->maximize = flag(keys().maximize);
    group->options.weight_decay = number(keys().weight_decay);
    group->options.momentum = number(keys().momentum);
    group->options.dampening = number(keys().dampening);
    group->options.nesterov = flag(keys().nesterov);
    group->options.lr = learning_rate(&group->rate);
  }

 private:
  void decline(const std::string& reason) {
    if (reason_.empty()) reason_ = reason;
  }

  // Says of an option what it `is`; returns 0 in its place.
  double decline(PyObject* key, const std::string& is) {
    decline("the " + std::string(PyUnicode_AsUTF8(key)) + " of " + name_ + " is " + is);
    return 0;
  }

  py::handle item(PyObject* key) const {
    PyObject* const value = PyDict_GetItemWithError(group_.ptr(), key);
    if (value != nullptr) return value;
    if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key);
    throw py::error_already_set();
  }

  bool flag(PyObject* key) const {
    const int answer = PyObject_IsTrue(item(key).ptr());
    if (answer < 0) throw py::error_already_set();
    return answer == 1;
  }

  double number(PyObject* key) { return number(key, item(key)); }

  // Declines a number on a device, for which the host would wait.
  double number(PyObject* key, py::handle value) {
    if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
    if (is_tensor(value) && device_type_of(value) != "cpu") return decline(key, "on " + device_of(value));
    const double number = PyFloat_AsDouble(value.ptr());
    if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
    return number;
  }

  std::pair<double, double> pair(PyObject* key) {
    const auto both = py::reinterpret_steal<py::object>(PySequence_Fast(item(key).ptr(), "expected a pair"));
    if (!both) throw py::error_already_set();
    if (PySequence_Fast_GET_SIZE(both.ptr()) != 2) return {decline(key, "not a pair"), 0};
    const double first = number(key, PySequence_Fast_GET_ITEM(both.ptr(), 0));
    return {first, number(key, PySequence_Fast_GET_ITEM(both.ptr(), 1))};
  }

  py::object params() {
    const py::handle value = item(keys().params);
    if (!PyList_Check(value.ptr())) decline(keys().params, "no list");
    return py::reinterpret_borrow<py::object>(value);
  }

  // The number, unless the kernels read it.
  double learning_rate(RateOnDevice* rate) {
    PyObject* const key = keys().lr;
    const py::handle value = item(key);
    // torch has one name for CUDA and ROCm.
    const bool on_kernels_device =
        !kernels_.host_counts && !PyFloat_CheckExact(value.ptr()) && is_tensor(value) &&
        device_type_of(value) == (kernels_.device_type == dlpack::kCpu ? "cpu" : "cuda");
    if (!on_kernels_device) return number(key, value);
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

  py::handle group_;
  std::string name_;  // in reasons
  StepKernels kernels_;
  std::string reason_;
};

}  // namespace

template <class Group>
std::string collect(StepList& step, const py::list& param_groups, std::vector<Group>* groups) {
  groups->reserve(param_groups.size());
  for (const py::handle dict : param_groups) {
    GroupReader reader(dict, groups->size(), step.kernels());
    reader.read(&groups->emplace_back());
    if (!reader.reason().empty()) return reader.reason();
  }
  for (const Group& group : *groups) {
    const StepList::Outcome outcome = step.collect(group.parameters());
    if (outcome == StepList::Outcome::kPythonError) throw py::error_already_set();
    if (outcome == StepList::Outcome::kDeclined) return step.reason();
  }
  for (size_t i = 0; i < groups->size() && !step.grads().empty(); ++i) {
    const RateOnDevice& rate = (*groups)[i].rate;
    if (rate.address == nullptr || rate.device == step.device().id) continue;
    return "the lr of group " + std::to_string(i) + " is on " + device_of(rate.tensor) +
           ", where the parameters are not";
  }
  return "";
}

template std::string collect(StepList&, const py::list&, std::vector<AdamGroup>*);
template std::string collect(StepList&, const py::list&, std::vector<SgdGroup>*);

}  // namespace fastclip
