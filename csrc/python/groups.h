// What an optimizer's param_groups say, read by key: one struct for each kind of optimizer, whatever steps.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "python/module.h"
#include "step_list.h"

namespace fastclip {

// A learning rate that kernels read on their device, so that a captured graph sees what a schedule writes.
struct RateOnDevice {
  pybind11::object tensor;  // holds the memory
  const void* address =
      nullptr;  // of one float32 or float64, in the place of the number; nullptr: that counts
  bool is_float64 = false;
  int32_t device = 0;
};

// Reads one group. A key that is not there is a KeyError; what the kernels cannot take leaves a reason, of
// which the first stays.
class GroupReader {
 public:
  // `group` is a dict, and has this number among the optimizer's.
  GroupReader(pybind11::handle group, size_t number, StepKernels kernels);

  pybind11::handle item(PyObject* key);
  bool flag(PyObject* key);
  // Declines a number on a device, for which the host would wait.
  double number(PyObject* key) { return number(key, item(key)); }
  double number(PyObject* key, pybind11::handle value);
  std::pair<double, double> pair(PyObject* key);
  pybind11::list params();
  // Of `lr`, whose number is returned unless the kernels read it.
  double learning_rate(RateOnDevice* rate);

  // Declines a group that torch captures, unless the kernels run on a device.
  void refuse_capturable();

  const std::string& reason() const { return reason_; }

 private:
  void decline(const std::string& reason);
  // Says of an option what it `is`; returns 0 in its place.
  double decline(PyObject* key, const std::string& is);

  pybind11::handle group_;
  std::string name_;  // of the group, in reasons
  StepKernels kernels_;
  std::string reason_;
};

// Of torch.optim.Adam and AdamW.
struct AdamGroup {
  explicit AdamGroup(GroupReader& read);

  pybind11::list params;
  bool amsgrad;
  bool maximize;
  AdamOptions options;
  RateOnDevice rate;

  StepGroup parameters() const { return adam_parameters(params.ptr(), amsgrad); }
};

// Of torch.optim.SGD.
struct SgdGroup {
  explicit SgdGroup(GroupReader& read);

  pybind11::list params;
  bool maximize;
  SgdOptions options;
  RateOnDevice rate;

  StepGroup parameters() const { return sgd_parameters(params.ptr(), options.momentum); }
};

// Each reads, and returns an empty string, or why what it has read is not for the kernels.
std::string collect(StepList& step, const StepGroup& group);
std::string reason_against(const RateOnDevice& rate, size_t number, const StepList& step);

// Reads the options of all groups into `groups`, then their parameters into `step`.
template <class Group>
std::string collect(StepList& step, const pybind11::list& dicts, std::vector<Group>* groups) {
  groups->reserve(dicts.size());
  for (const pybind11::handle dict : dicts) {
    GroupReader read(dict, groups->size(), step.kernels());
    groups->emplace_back(read);
    if (!read.reason().empty()) return read.reason();
  }
  for (const Group& group : *groups) {
    if (std::string reason = collect(step, group.parameters()); !reason.empty()) return reason;
  }
  for (size_t i = 0; i < groups->size(); ++i) {
    if (std::string reason = reason_against((*groups)[i].rate, i, step); !reason.empty()) return reason;
  }
  return "";
}

}  // namespace fastclip
