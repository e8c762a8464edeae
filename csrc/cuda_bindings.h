// The CUDA half of fastclip._C.
#pragma once

#include <pybind11/pybind11.h>

namespace fastclip {

void bind_cuda(pybind11::module_& m);

}  // namespace fastclip
