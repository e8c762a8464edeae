// What an optimizer's param_groups say, read by key: one struct for each kind of optimizer, whatever steps.
#pragma once

#include <string>
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

// Of torch.optim.Adam and AdamW.
struct AdamGroup {
  pybind11::object params;  // a list
  bool amsgrad;
  bool maximize;
  AdamOptions options;
  RateOnDevice rate;

  StepGroup parameters() const { return adam_parameters(params.ptr(), amsgrad); }
};

// Of torch.optim.SGD.
struct SgdGroup {
  pybind11::object params;  // a list
  bool maximize;
  SgdOptions options;
  RateOnDevice rate;

  StepGroup parameters() const { return sgd_parameters(params.ptr(), options.momentum); }
};

// Reads the options of all groups into `groups`, then their parameters into `step`. Returns an empty string,
// or why what it has read is not for the kernels; a key that is not there is a KeyError, as it is in torch.
template <class Group>
std::string collect(StepList& step, const pybind11::list& param_groups, std::vector<Group>* groups);

}  // namespace fastclip
