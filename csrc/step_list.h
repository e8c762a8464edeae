// The parameters of an optimizer with their gradients and state, as the step's kernels see them.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string>
#include <vector>

#include "fetch_ahead.h"
#include "negations.h"
#include "step_rule.h"
#include "tensor_list.h"

namespace fastclip {

// One of the optimizer's param_groups.
struct StepGroup {
  PyObject* params;                    // a list
  std::vector<PyObject*> state_names;  // interned; in the order of StepTarget::state
  bool counts_steps;                   // whether the state has a `step` tensor
};

// Which kernels a step is read for, and what they can do.
struct StepKernels {
  int32_t device_type;    // all tensors are to be on one device of it
  bool host_counts;       // the steps, and knows the rates; else they do, and read rates on the device
  bool takes_wide_state;  // float32, of 16-bit parameters
};

// What of the optimizer is spread over ranks. Both are borrowed.
struct StepShards {
  // The class of which the memory on this rank is meant; None or nullptr if there is none.
  PyObject* dtensor = nullptr;
  // A dict parameter -> tensor to take in the place of `.grad`, or nullptr.
  PyObject* gradients = nullptr;
};

// A group of torch.optim.Adam or AdamW, or of SGD.
StepGroup adam_parameters(PyObject* params, bool amsgrad);
StepGroup sgd_parameters(PyObject* params, double momentum);

// Parameters in a row with the same rule: those of one group, at the same step, with state as old.
struct StepRuleUse {
  size_t group;
  double step;  // counts this one; 0 where the device counts, or nobody
  bool fresh;   // the state was made for this step
};

// Owns a reference to every tensor in it, as TensorList does. Must be destroyed with the GIL held.
//
// Where the host counts, reading a parameter's `step` counts it up at once, so that parameters that share one
// tensor see what torch's loop over them would show; unless `commit` is called, the destructor puts the old
// values back. Where the kernels count, nothing of it is read.
class StepList {
 public:
  enum class Outcome { kOk, kDeclined, kPythonError };

  // `state` is the optimizer's dict parameter -> dict. `fresh`, a set, holds the parameters whose state was
  // made for this step.
  StepList(StepKernels kernels, PyObject* state, PyObject* fresh, StepShards shards = {});
  StepList(const StepList&) = delete;
  StepList& operator=(const StepList&) = delete;
  ~StepList();

  // Reads one group, skipping parameters without a gradient; about 300 ns per parameter. Parameters without
  // state are put on `missing()`, those on a device whose counter is on the CPU on `counted_on_cpu()`, and
  // the list is then not to be used. Declines, with the reason, what is not plain memory on the device, or
  // where the gradient or the state does not match the parameter.
  Outcome collect(const StepGroup& group);

  // Declines parameters that share memory, counters on a device that do, and gradients if they are written.
  Outcome check_overlap(bool write_grads);

  void commit() { counted_.clear(); }

  // Makes the next step's reading quicker. Only for a list that is whole: then it holds all that it has read.
  void prepare_next() { ahead_.find_storages(); }

  const StepKernels& kernels() const { return kernels_; }
  const std::vector<Span>& grads() const { return grads_; }
  const std::vector<StepTarget>& targets() const { return targets_; }
  // In the order of the targets, which refer to them by index.
  const std::vector<StepRuleUse>& rules() const { return rules_; }
  const std::vector<PyObject*>& missing() const { return missing_; }
  const std::vector<PyObject*>& counted_on_cpu() const { return counted_on_cpu_; }
  const std::string& reason() const { return reason_; }
  const std::vector<PyObject*>& param_tensors() const { return param_tensors_; }
  const std::vector<PyObject*>& grad_tensors() const { return grad_tensors_; }
  dlpack::Device device() const { return device_; }
  int64_t nbytes() const { return nbytes_; }
  bool has_float64() const { return has_float64_; }
  bool has_empty() const;

 private:
  // A counter and the value that it had.
  struct Counted {
    void* data;
    DType dtype;
    double before;
  };

  // A new reference to the tensor that has the memory: of a DTensor the one on this rank, else itself.
  // nullptr with a Python error set.
  PyObject* memory_of(PyObject* tensor) const;
  // A new reference; nullptr with a Python error set.
  PyObject* gradient(PyObject* param) const;
  // As read_tensor, of tensors on the device.
  const char* read(PyObject* tensor, dlpack::Tensor* view, Span* span);
  bool is_negated(PyObject* tensor, const Span& span);
  bool add(PyObject* param, PyObject* grad, const StepGroup& group);
  // Reads one tensor of a parameter's state; declines if it does not fit the parameter, or the target's
  // first.
  bool add_state(PyObject* tensor, const StepGroup& group, size_t place, const Span& param,
                 const dlpack::Tensor& layout, StepTarget* target);
  // `step` becomes the count that includes this one, unless the device counts.
  bool count(PyObject* param, PyObject* tensor, StepTarget* target, double* step);
  // Borrowed; nullptr if there is no dict. The state is nearly always in the order of the parameters.
  PyObject* state_of(PyObject* param);
  bool decline(const std::string& what);

  StepKernels kernels_;
  bool has_device_ = false;  // whether device_ is that of a tensor
  dlpack::Device device_;
  PyObject* state_;
  PyObject* fresh_;
  StepShards shards_;
  Py_ssize_t state_position_ = 0;
  std::vector<Span> grads_;
  std::vector<Span> params_;
  std::vector<Span> counters_;  // on a device
  std::vector<StepTarget> targets_;
  std::vector<StepRuleUse> rules_;
  std::vector<PyObject*> grad_tensors_;
  std::vector<PyObject*> param_tensors_;
  std::vector<PyObject*> state_tensors_;
  std::vector<PyObject*> missing_;
  std::vector<PyObject*> counted_on_cpu_;
  std::vector<Counted> counted_;
  std::string reason_;
  FetchAhead ahead_;
  Negations negations_;
  size_t num_groups_ = 0;
  int64_t param_index_ = 0;
  bool has_float64_ = false;
  int64_t nbytes_ = 0;
};

}  // namespace fastclip
