// What the files that include pybind11 share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "tensor_list.h"

namespace fastclip {

// Tells autograd which tensors have changed, as an in-place operation of torch would.
void increment_versions(const std::vector<PyObject*>& tensors);

// Each adds what the file of its name holds.
void bind_step(pybind11::module_& m);
void bind_read(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);
void bind_cuda_step(pybind11::module_& m);

// Reads, and returns an empty string, or why what it has read is not for the kernels.
std::string collect(TensorList& tensors, const pybind11::list& list, TensorList::Source source,
                    int32_t device_type = dlpack::kCpu);

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
