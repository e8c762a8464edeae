// A Python list of tensors, or of parameters whose gradients are meant, as spans of memory.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string>
#include <vector>

#include "dlpack_abi.h"
#include "span.h"

namespace fastclip {

// The Python objects that reading tensors needs, set once at import by `TensorTypes::set`.
struct TensorTypes {
  PyObject* tensor = nullptr;     // torch.Tensor
  PyObject* parameter = nullptr;  // torch.nn.Parameter
  const dlpack::ExchangeApi* api = nullptr;
  const PyGetSetDef* grad = nullptr;  // the C getter behind Tensor.grad, if it is one

  // Returns an empty string, or why this torch cannot be read.
  static std::string set(PyObject* tensor_type, PyObject* parameter_type);
  static const TensorTypes& get();
};

// Owns a reference to every tensor in it: a gradient may be replaced by a hook or another thread while its
// pointer is in use. Must be destroyed with the GIL held.
class TensorList {
 public:
  enum class Source { kTensors, kGradients };
  enum class Outcome { kOk, kDeclined, kPythonError };

  TensorList() = default;
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;
  ~TensorList();

  // Reads `list`, skipping parameters without a gradient. About 100 ns per tensor.
  //
  // Declines, with the reason in `reason()`, whatever is not plain memory of a supported dtype on one
  // device of the given type: subclasses (their raw pointer may be NULL or stand for something else), sparse,
  // complex and integer tensors, strided ones with gaps or repeats. A Python error is one that the caller
  // must see, such as an element without `.grad`.
  Outcome collect(PyObject* list, Source source, int32_t device_type);

  const std::vector<Span>& spans() const { return spans_; }
  const std::vector<PyObject*>& tensors() const { return tensors_; }
  // Index in the Python list of each span.
  const std::vector<int64_t>& positions() const { return positions_; }
  const std::string& reason() const { return reason_; }
  // The device of all spans; the first of its type for an empty list.
  dlpack::Device device() const { return device_; }
  bool has_empty() const { return has_empty_; }
  bool has_float64() const { return has_float64_; }
  int64_t nbytes() const { return nbytes_; }

  // True if a tensor is a lazily negated view (`x.conj().imag`), whose memory holds the opposite values.
  // False with a Python error set if a tensor cannot say.
  bool has_lazy_negation() const;

 private:
  bool add(PyObject* tensor, int64_t position, int32_t device_type);
  static PyObject* gradient_of(PyObject* parameter);
  bool decline(PyObject* tensor, int64_t position, const char* what);

  std::vector<Span> spans_;
  std::vector<PyObject*> tensors_;
  std::vector<int64_t> positions_;
  std::string reason_;
  dlpack::Device device_{dlpack::kCpu, 0};
  bool has_empty_ = false;
  bool has_float64_ = false;
  int64_t nbytes_ = 0;
};

}  // namespace fastclip
