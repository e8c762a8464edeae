// What the files that include pybind11 share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "step_list.h"
#include "tensor_list.h"

namespace fastclip {

// Tells autograd which tensors have changed, as an in-place operation of torch would.
void increment_versions(const std::vector<PyObject*>& tensors);

// Each adds what the file of its name holds.
void bind_step(pybind11::module_& m);
void bind_read(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);
void bind_cuda_step(pybind11::module_& m);

// What of a group's tuple says which state its parameters have.
using GroupReader = StepGroup(const pybind11::tuple& group);
StepGroup adam_group(const pybind11::tuple& group);  // (params, amsgrad, ...)
StepGroup sgd_group(const pybind11::tuple& group);   // (params, momentum, ...)

// The tuples as the structs that `Group` makes of them.
template <class Group>
std::vector<Group> groups_of(const pybind11::list& groups) {
  std::vector<Group> result;
  for (const pybind11::handle group : groups) {
    result.emplace_back(pybind11::reinterpret_borrow<pybind11::tuple>(group));
  }
  return result;
}

// Each reads, and returns an empty string, or why what it has read is not for the kernels.
std::string collect(TensorList& tensors, const pybind11::list& list, TensorList::Source source,
                    int32_t device_type = dlpack::kCpu);
std::string collect(StepList& step, const pybind11::list& groups, GroupReader* reader);

// Below this many bytes a call is over sooner than another thread could take the GIL and give it back.
constexpr int64_t kMinBytesToReleaseGil = 64 * 1024;

// Runs `work` without the GIL if it is worth it.
template <class Work>
auto without_gil(int64_t nbytes, Work work) {
  if (nbytes < kMinBytesToReleaseGil) return work();
  const pybind11::gil_scoped_release release;
  return work();
}

}  // namespace fastclip
