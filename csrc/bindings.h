// What the files that include pybind11 share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace fastclip {

// Tells autograd which tensors have changed, as an in-place operation of torch would.
void increment_versions(const std::vector<PyObject*>& tensors);

// Adds the functions of bindings_step.cpp.
void define_step(pybind11::module_& m);

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
