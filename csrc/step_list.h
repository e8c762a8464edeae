// The parameters of an optimizer with their gradients and state, as the step's kernels see them.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <functional>
#include <string>
#include <vector>

#include "cpu/step_pipeline.h"
#include "fetch_ahead.h"
#include "tensor_list.h"

namespace fastclip {

// One of the optimizer's param_groups.
struct StepGroup {
  PyObject* params;                                            // a list
  std::vector<PyObject*> state_names;                          // interned; in the order of StepChunk::state
  bool counts_steps;                                           // whether the state has a `step` tensor
  std::function<cpu::StepRule(double step, bool fresh)> rule;  // `step` counts this one
};

// Owns a reference to every tensor in it, as TensorList does. Must be destroyed with the GIL held.
//
// Reading a parameter's `step` counts it up at once, so that parameters that share one tensor see what
// torch's loop over them would show; unless `commit` is called, the destructor puts the old values back.
class StepList {
 public:
  enum class Outcome { kOk, kDeclined, kPythonError };

  // `state` is the optimizer's dict parameter -> dict. `fresh`, a set, holds the parameters whose state was
  // made for this step.
  StepList(PyObject* state, PyObject* fresh);
  StepList(const StepList&) = delete;
  StepList& operator=(const StepList&) = delete;
  ~StepList();

  // Reads one group, skipping parameters without a gradient; about 300 ns per parameter. Parameters without
  // state are put on `missing()`, and the list is then not to be used. Declines, with the reason, what is not
  // plain memory on the CPU, or where the gradient or the state does not match the parameter.
  Outcome collect(const StepGroup& group);

  // Declines parameters that share memory, and gradients that do if they are written.
  Outcome check_overlap(bool write_grads);

  void commit() { counted_.clear(); }

  const std::vector<Span>& grads() const { return grads_; }
  const std::vector<cpu::StepTarget>& targets() const { return targets_; }
  const std::vector<cpu::StepRule>& rules() const { return rules_; }
  const std::vector<PyObject*>& missing() const { return missing_; }
  const std::string& reason() const { return reason_; }
  const std::vector<PyObject*>& param_tensors() const { return param_tensors_; }
  const std::vector<PyObject*>& grad_tensors() const { return grad_tensors_; }
  int64_t nbytes() const { return nbytes_; }
  bool has_float64() const { return has_float64_; }

 private:
  // A counter and the value that it had.
  struct Counted {
    void* data;
    DType dtype;
    double before;
  };

  // As read_tensor, of tensors on the CPU.
  const char* read(PyObject* tensor, dlpack::Tensor* view, Span* span);
  bool add(PyObject* param, PyObject* grad, const StepGroup& group);
  // Reads one tensor of a parameter's state; declines if it does not fit the parameter.
  bool add_state(PyObject* tensor, PyObject* name, const Span& param, const dlpack::Tensor& layout,
                 void** data);
  // Counts this step and returns the count, or -1 after declining.
  double count(PyObject* tensor);
  // Borrowed; nullptr if there is no dict. The state is nearly always in the order of the parameters.
  PyObject* state_of(PyObject* param);
  bool decline(const std::string& what);

  PyObject* state_;
  PyObject* fresh_;
  Py_ssize_t state_position_ = 0;
  std::vector<Span> grads_;
  std::vector<Span> params_;
  std::vector<cpu::StepTarget> targets_;
  std::vector<cpu::StepRule> rules_;
  std::vector<PyObject*> grad_tensors_;
  std::vector<PyObject*> param_tensors_;
  std::vector<PyObject*> state_tensors_;
  std::vector<PyObject*> missing_;
  std::vector<Counted> counted_;
  std::string reason_;
  FetchAhead ahead_;
  int64_t num_groups_ = 0;
  int64_t param_index_ = 0;
  double last_step_ = 0;
  bool last_fresh_ = false;
  bool has_rule_ = false;  // whether the last rule belongs to this group
  bool has_float64_ = false;
  int64_t nbytes_ = 0;
};

}  // namespace fastclip
