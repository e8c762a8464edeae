#include "tensor_list.h"

#include <algorithm>
#include <array>

#include "negations.h"

namespace fastclip {
namespace {

TensorTypes g_types;

// What the last call asked.
Negations::Trail g_asked;

constexpr int kMaxSortedDims = 16;

// Parameters are scattered over the heap and seldom in cache.
constexpr Py_ssize_t kPrefetchAhead = 8;

// True if the elements fill their memory without gap or repeat, in any order of the dimensions.
bool is_dense(const dlpack::Tensor& t) {
  if (t.strides == nullptr) return true;
  int64_t expected = 1;
  bool contiguous = true;
  for (int d = t.ndim - 1; d >= 0 && contiguous; --d) {
    if (t.shape[d] == 1) continue;
    contiguous = t.strides[d] == expected;
    expected *= t.shape[d];
  }
  if (contiguous) return true;

  std::array<std::pair<int64_t, int64_t>, kMaxSortedDims> dims;  // (stride, size)
  int n = 0;
  for (int d = 0; d < t.ndim; ++d) {
    if (t.shape[d] == 1) continue;
    if (n == kMaxSortedDims) return false;
    dims[n++] = {t.strides[d], t.shape[d]};
  }
  std::sort(dims.begin(), dims.begin() + n);
  expected = 1;
  for (int i = 0; i < n; ++i) {
    if (dims[i].first != expected) return false;
    expected *= dims[i].second;
  }
  return true;
}

bool to_dtype(dlpack::DataType type, DType* out) {
  if (type.lanes != 1) return false;
  if (type.code == dlpack::kFloat && type.bits == 32) return *out = DType::kFloat32, true;
  if (type.code == dlpack::kFloat && type.bits == 64) return *out = DType::kFloat64, true;
  if (type.code == dlpack::kFloat && type.bits == 16) return *out = DType::kFloat16, true;
  if (type.code == dlpack::kBfloat && type.bits == 16) return *out = DType::kBFloat16, true;
  return false;
}

// Page-locked host memory is ordinary memory to the CPU.
dlpack::Device normalized(dlpack::Device device) {
  if (device.type == dlpack::kCudaHost || device.type == dlpack::kRocmHost) return {dlpack::kCpu, 0};
  return device;
}

}  // namespace

std::string TensorTypes::set(PyObject* tensor_type, PyObject* parameter_type) {
  PyObject* capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    return "this torch has no DLPack exchange API (torch >= 2.10 has it)";
  }
  void* pointer = PyCapsule_GetPointer(capsule, dlpack::kExchangeApiCapsule);
  // torch keeps the table in static memory, so the capsule need not be held.
  Py_DECREF(capsule);
  if (pointer == nullptr) {
    PyErr_Clear();
    return "torch.Tensor.__dlpack_c_exchange_api__ is not a capsule named dlpack_exchange_api";
  }
  const auto* api = static_cast<const dlpack::ExchangeApi*>(pointer);
  while (api != nullptr && api->header.version.major != dlpack::kMajorVersion) {
    api = reinterpret_cast<const dlpack::ExchangeApi*>(api->header.prev_api);
  }
  if (api == nullptr) return "torch offers no version 1 of the DLPack exchange API";
  if (api->dltensor_from_py_object_no_sync == nullptr) {
    return "torch's DLPack exchange API has no dltensor_from_py_object_no_sync";
  }
  Py_INCREF(tensor_type);
  Py_INCREF(parameter_type);
  Py_XSETREF(g_types.tensor, tensor_type);
  Py_XSETREF(g_types.parameter, parameter_type);
  g_types.api = api;
  PyObject* descriptor = PyObject_GetAttrString(tensor_type, "grad");
  if (descriptor == nullptr) {
    PyErr_Clear();
    return "torch.Tensor has no attribute grad";
  }
  if (Py_TYPE(descriptor) == &PyGetSetDescr_Type) {
    g_types.grad = reinterpret_cast<PyGetSetDescrObject*>(descriptor)->d_getset;
  }
  // torch.Tensor keeps the descriptors alive.
  Py_DECREF(descriptor);
  PyObject* method = PyObject_GetAttrString(tensor_type, "is_neg");
  if (method == nullptr) {
    PyErr_Clear();
    return "torch.Tensor has no method is_neg";
  }
  if (Py_TYPE(method) == &PyMethodDescr_Type) {
    const PyMethodDef* definition = reinterpret_cast<PyMethodDescrObject*>(method)->d_method;
    if (definition->ml_flags == METH_NOARGS) g_types.is_neg = definition;
  }
  Py_DECREF(method);
  return "";
}

const TensorTypes& TensorTypes::get() { return g_types; }

TensorList::~TensorList() {
  for (PyObject* tensor : tensors_) Py_DECREF(tensor);
}

bool TensorList::decline(PyObject* tensor, int64_t position, const char* what) {
  reason_ = "gradient " + std::to_string(position) + " (" + Py_TYPE(tensor)->tp_name + ") " + what;
  return false;
}

const char* read_tensor(PyObject* tensor, int32_t device_type, dlpack::Tensor* view, Span* span) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (type != g_types.tensor && type != g_types.parameter) return "is not a plain torch.Tensor";
  if (g_types.api->dltensor_from_py_object_no_sync(tensor, view) != 0) {
    PyErr_Clear();
    return "has no plain memory (sparse, meta, nested, quantized or traced)";
  }
  if (!to_dtype(view->dtype, &span->dtype)) return "is not float16, bfloat16, float32 or float64";
  span->numel = 1;
  for (int d = 0; d < view->ndim; ++d) span->numel *= view->shape[d];
  if (span->numel > 0 && view->data == nullptr) return "has no memory";
  if (span->numel > 0 && !is_dense(*view)) return "is not dense in memory";
  view->device = normalized(view->device);
  if (view->device.type != device_type) {
    return device_type == dlpack::kCpu    ? "is not on the CPU"
           : device_type == dlpack::kCuda ? "is not on a CUDA device"
                                          : "is not on a ROCm device";
  }
  span->data = static_cast<char*>(view->data) + view->byte_offset;
  return nullptr;
}

bool TensorList::add(PyObject* tensor, int64_t position, int32_t device_type) {
  dlpack::Tensor view;
  const bool is_first = spans_.empty();
  // Read in place: a copy would wait for what was just written in pieces.
  Span& span = spans_.emplace_back();
  const char* obstacle = read_tensor(tensor, device_type, &view, &span);
  if (obstacle == nullptr && !is_first && view.device.id != device_.id) {
    obstacle = "is on another device than the first";
  }
  if (obstacle != nullptr) {
    spans_.pop_back();
    return decline(tensor, position, obstacle);
  }
  if (is_first) device_ = view.device;
  has_empty_ |= span.numel == 0;
  has_float64_ |= span.dtype == DType::kFloat64;
  nbytes_ += span.nbytes();
  Py_INCREF(tensor);
  tensors_.push_back(tensor);
  positions_.push_back(position);
  return true;
}

PyObject* gradient_of(PyObject* parameter) {
  static PyObject* const grad_name = PyUnicode_InternFromString("grad");
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(parameter));
  if (g_types.grad != nullptr && (type == g_types.parameter || type == g_types.tensor)) {
    // What attribute lookup would end in; skipping it halves the cost per parameter.
    return g_types.grad->get(parameter, g_types.grad->closure);
  }
  return PyObject_GetAttr(parameter, grad_name);
}

bool is_negated(PyObject* tensor) {
  static PyObject* const is_neg_name = PyUnicode_InternFromString("is_neg");
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  const bool direct = g_types.is_neg != nullptr && (type == g_types.parameter || type == g_types.tensor);
  PyObject* answer =
      direct ? g_types.is_neg->ml_meth(tensor, nullptr) : PyObject_CallMethodNoArgs(tensor, is_neg_name);
  Py_XDECREF(answer);
  return answer == Py_True;
}

TensorList::Outcome TensorList::collect(PyObject* list, Source source, int32_t device_type) {
  device_ = {device_type, 0};
  const Py_ssize_t size = PyList_GET_SIZE(list);
  spans_.reserve(size);
  tensors_.reserve(size);
  positions_.reserve(size);
  // `.grad` may be a Python property, so the list may change size meanwhile.
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    if (i + kPrefetchAhead < PyList_GET_SIZE(list)) {
      __builtin_prefetch(PyList_GET_ITEM(list, i + kPrefetchAhead));
    }
    PyObject* item = PyList_GET_ITEM(list, i);
    Py_INCREF(item);
    PyObject* tensor = item;
    if (source == Source::kGradients) {
      tensor = gradient_of(item);
      Py_DECREF(item);
      if (tensor == nullptr) return Outcome::kPythonError;
    }
    const bool ok = (source == Source::kGradients && tensor == Py_None) || add(tensor, i, device_type);
    Py_DECREF(tensor);
    if (!ok) return Outcome::kDeclined;
  }
  return Outcome::kOk;
}

bool TensorList::has_lazy_negation() const {
  Negations negations(&g_asked);
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (negations.next(tensors_[i], spans_[i])) return true;
  }
  return false;
}

}  // namespace fastclip
