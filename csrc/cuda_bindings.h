// The CUDA half of fastclip._C.
#pragma once

#include <pybind11/pybind11.h>

namespace fastclip {

void bind_cuda(pybind11::module_& m);

// Adds the classes of cuda_step_bindings.cpp.
void bind_cuda_step(pybind11::module_& m);

}  // namespace fastclip
