#include "step_list.h"

#include <algorithm>

#include "cpu/pass.h"

namespace fastclip {
namespace {

// Whether two dense tensors of one shape have their elements in the same order.
bool same_layout(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; ++d) {
    if (a.shape[d] != b.shape[d]) return false;
    if (a.shape[d] == 1) continue;
    if (a.strides == nullptr || b.strides == nullptr) return a.strides == b.strides;
    if (a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

// What the last call read and asked.
FetchAhead::Trail g_trail;
Negations::Trail g_asked;

// A parameter's state. Asked for in the order in which torch made it, nothing is searched for.
class Entries {
 public:
  // `dict` may be nullptr, for a parameter that has no state.
  explicit Entries(PyObject* dict) : dict_(dict) {}

  // Borrowed; nullptr if there is none of this name.
  PyObject* get(PyObject* name) {
    if (dict_ == nullptr) return nullptr;
    PyObject *key, *value;
    Py_ssize_t position = position_;
    if (PyDict_Next(dict_, &position, &key, &value) && key == name) {
      position_ = position;
      return value;
    }
    return PyDict_GetItemWithError(dict_, name);
  }

 private:
  PyObject* dict_;
  Py_ssize_t position_ = 0;
};

double load(const void* data, DType dtype) {
  return dtype == DType::kFloat64 ? *static_cast<const double*>(data) : *static_cast<const float*>(data);
}

void store(void* data, DType dtype, double value) {
  if (dtype == DType::kFloat64) {
    *static_cast<double*>(data) = value;
  } else {
    *static_cast<float*>(data) = static_cast<float>(value);
  }
}

}  // namespace

StepGroup adam_parameters(PyObject* params, bool amsgrad) {
  static PyObject* const exp_avg = PyUnicode_InternFromString("exp_avg");
  static PyObject* const exp_avg_sq = PyUnicode_InternFromString("exp_avg_sq");
  static PyObject* const max_exp_avg_sq = PyUnicode_InternFromString("max_exp_avg_sq");
  StepGroup group{params, {exp_avg, exp_avg_sq}, true};
  if (amsgrad) group.state_names.push_back(max_exp_avg_sq);
  return group;
}

StepGroup sgd_parameters(PyObject* params, double momentum) {
  static PyObject* const momentum_buffer = PyUnicode_InternFromString("momentum_buffer");
  StepGroup group{params, {}, false};
  if (momentum != 0) group.state_names.push_back(momentum_buffer);
  return group;
}

StepList::StepList(StepKernels kernels, PyObject* state, PyObject* fresh, StepShards shards)
    : kernels_(kernels),
      device_{kernels.device_type, 0},
      state_(state),
      fresh_(fresh),
      shards_(shards),
      ahead_(&g_trail),
      negations_(&g_asked) {}

StepList::~StepList() {
  // Backwards, so that a counter that several parameters share ends where it was.
  for (auto it = counted_.rbegin(); it != counted_.rend(); ++it) store(it->data, it->dtype, it->before);
  for (PyObject* tensor : grad_tensors_) Py_DECREF(tensor);
  for (PyObject* tensor : param_tensors_) Py_DECREF(tensor);
  for (PyObject* tensor : state_tensors_) Py_DECREF(tensor);
}

PyObject* StepList::memory_of(PyObject* tensor) const {
  static PyObject* const local_name = PyUnicode_InternFromString("_local_tensor");
  if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != shards_.dtensor) return Py_NewRef(tensor);
  return PyObject_GetAttr(tensor, local_name);
}

PyObject* StepList::gradient(PyObject* param) const {
  if (shards_.gradients != nullptr && PyDict_GET_SIZE(shards_.gradients) > 0) {
    PyObject* const instead = PyDict_GetItemWithError(shards_.gradients, param);
    if (instead != nullptr) return Py_NewRef(instead);
    if (PyErr_Occurred()) return nullptr;
  }
  return gradient_of(param);
}

const char* StepList::read(PyObject* whole, dlpack::Tensor* view, Span* span) {
  PyObject* const tensor = memory_of(whole);
  if (tensor == nullptr) {
    PyErr_Clear();
    return "is a DTensor that has no memory on this rank";
  }
  Py_DECREF(tensor);  // `whole` has it
  const char* obstacle = read_tensor(tensor, device_.type, view, span);
  if (obstacle != nullptr) return obstacle;
  if (!has_device_) device_ = view->device;
  has_device_ = true;
  if (view->device.id != device_.id) return "is on another device than the first parameter";
  ahead_.tensor(tensor, *view);
  return nullptr;
}

bool StepList::is_negated(PyObject* whole, const Span& span) {
  PyObject* const tensor = memory_of(whole);
  const bool negated = negations_.next(tensor, span);
  Py_DECREF(tensor);
  return negated;
}

bool StepList::decline(const std::string& what) {
  reason_ = "parameter " + std::to_string(param_index_) + " of group " + std::to_string(num_groups_ - 1) +
            ": " + what;
  return false;
}

PyObject* StepList::state_of(PyObject* param) {
  PyObject *key, *state;
  Py_ssize_t position = state_position_;
  if (PyDict_Next(state_, &position, &key, &state) && key == param) {
    state_position_ = position;
  } else {
    state = PyDict_GetItemWithError(state_, param);
  }
  if (state == nullptr || !PyDict_Check(state)) return nullptr;
  ahead_.dict(state);
  return state;
}

bool StepList::count(PyObject* param, PyObject* tensor, StepTarget* target, double* step) {
  dlpack::Tensor view;
  Span span;
  const char* obstacle = tensor == nullptr ? "is not there" : read(tensor, &view, &span);
  if (obstacle != nullptr && tensor != nullptr && !kernels_.host_counts &&
      read_tensor(tensor, dlpack::kCpu, &view, &span) == nullptr) {
    counted_on_cpu_.push_back(param);
    return true;
  }
  if (obstacle != nullptr) return decline(std::string("the step of its state ") + obstacle);
  if (span.numel != 1 || (span.dtype != DType::kFloat32 && span.dtype != DType::kFloat64)) {
    return decline("the step of its state is not one float32 or float64");
  }
  Py_INCREF(tensor);
  state_tensors_.push_back(tensor);
  if (!kernels_.host_counts) {
    target->step = span.data;
    target->step_dtype = span.dtype;
    counters_.push_back(span);
    return true;
  }
  counted_.push_back({span.data, span.dtype, load(span.data, span.dtype)});
  store(span.data, span.dtype, counted_.back().before + 1);
  *step = load(span.data, span.dtype);
  return true;
}

bool StepList::add_state(PyObject* tensor, const StepGroup& group, size_t place, const Span& param,
                         const dlpack::Tensor& layout, StepTarget* target) {
  const auto name = [&] { return std::string(PyUnicode_AsUTF8(group.state_names[place])); };
  if (tensor == nullptr) return decline("its state has no " + name());
  dlpack::Tensor view;
  Span span;
  if (const char* obstacle = read(tensor, &view, &span)) return decline("its " + name() + " " + obstacle);
  if (place == 0) target->state_dtype = span.dtype;
  const bool widened =
      kernels_.takes_wide_state && item_size(param.dtype) == 2 && span.dtype == DType::kFloat32;
  if ((span.dtype != param.dtype && !widened) || span.dtype != target->state_dtype ||
      !same_layout(view, layout)) {
    return decline("its " + name() + " has another dtype, shape or layout");
  }
  target->state[place] = span.data;
  Py_INCREF(tensor);
  state_tensors_.push_back(tensor);
  return true;
}

bool StepList::add(PyObject* param, PyObject* grad, const StepGroup& group) {
  dlpack::Tensor param_view, grad_view;
  Span param_span, grad_span;
  if (const char* obstacle = read(param, &param_view, &param_span)) {
    return decline(std::string("it ") + obstacle);
  }
  if (const char* obstacle = read(grad, &grad_view, &grad_span)) {
    return decline(std::string("its gradient ") + obstacle);
  }
  if (grad_span.dtype != param_span.dtype || !same_layout(grad_view, param_view)) {
    return decline("its gradient has another dtype, shape or layout");
  }
  if (is_negated(param, param_span) || is_negated(grad, grad_span)) {
    return decline("it or its gradient is a lazily negated view");
  }

  StepTarget target{param_span.data, {}, nullptr, 0, param_span.dtype, DType::kFloat32};
  double step = 0;
  if (group.counts_steps || !group.state_names.empty()) {
    static PyObject* const step_name = PyUnicode_InternFromString("step");
    Entries entries(state_of(param));
    PyObject* const counter = group.counts_steps ? entries.get(step_name) : nullptr;
    for (size_t s = 0; s < group.state_names.size(); ++s) {
      PyObject* const tensor = entries.get(group.state_names[s]);
      if (s == 0 && (tensor == nullptr || tensor == Py_None)) {
        if (!PyErr_Occurred()) missing_.push_back(param);
        return true;
      }
      if (!add_state(tensor, group, s, param_span, param_view, &target)) return false;
    }
    if (group.counts_steps && !count(param, counter, &target, &step)) return false;
  }
  const int in_fresh = PySet_GET_SIZE(fresh_) > 0 ? PySet_Contains(fresh_, param) : 0;
  const StepRuleUse rule{num_groups_ - 1, step, in_fresh == 1};
  if (rules_.empty() || rules_.back().group != rule.group || rules_.back().step != rule.step ||
      rules_.back().fresh != rule.fresh) {
    rules_.push_back(rule);
  }
  target.rule = static_cast<uint32_t>(rules_.size() - 1);
  targets_.push_back(target);
  grads_.push_back(grad_span);
  params_.push_back(param_span);
  nbytes_ += grad_span.nbytes();
  has_float64_ |= grad_span.dtype == DType::kFloat64;
  Py_INCREF(grad);
  grad_tensors_.push_back(grad);
  Py_INCREF(param);
  param_tensors_.push_back(param);
  return true;
}

StepList::Outcome StepList::collect(const StepGroup& group) {
  if (++num_groups_ == 1) {  // nearly always the only one, or of the largest
    const Py_ssize_t size = PyList_GET_SIZE(group.params);
    grads_.reserve(size);
    params_.reserve(size);
    targets_.reserve(size);
    grad_tensors_.reserve(size);
    param_tensors_.reserve(size);
    state_tensors_.reserve(size * (group.state_names.size() + group.counts_steps));
    if (group.counts_steps && kernels_.host_counts) counted_.reserve(size);
    if (group.counts_steps && !kernels_.host_counts) counters_.reserve(size);
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(group.params); ++i) {
    param_index_ = i;
    PyObject* param = PyList_GET_ITEM(group.params, i);
    Py_INCREF(param);
    PyObject* grad = gradient(param);
    const bool ok = grad == nullptr || grad == Py_None || add(param, grad, group);
    Py_XDECREF(grad);
    Py_DECREF(param);
    if (PyErr_Occurred()) return Outcome::kPythonError;
    if (!ok) return Outcome::kDeclined;
  }
  return Outcome::kOk;
}

bool StepList::has_empty() const {
  return std::any_of(grads_.begin(), grads_.end(), [](const Span& grad) { return grad.numel == 0; });
}

StepList::Outcome StepList::check_overlap(bool write_grads) {
  // From step to step the same memory, mostly: sorting it took 3 % of a step of 2000 tiny tensors.
  static std::vector<Span> apart_params, apart_counters, apart_grads;
  const auto overlap = [](const std::vector<Span>& spans, std::vector<Span>& apart) {
    if (spans == apart) return false;
    if (cpu::overlap(spans)) return true;
    apart = spans;
    return false;
  };
  if (overlap(params_, apart_params)) {
    reason_ = "two parameters share memory";
    return Outcome::kDeclined;
  }
  if (overlap(counters_, apart_counters)) {
    reason_ = "two parameters share a step counter";
    return Outcome::kDeclined;
  }
  if (write_grads && overlap(grads_, apart_grads)) {
    reason_ = "two gradients share memory";
    return Outcome::kDeclined;
  }
  return Outcome::kOk;
}

}  // namespace fastclip
