// Python's view of the CUDA library: a list of tensors is read once, Python then allocates what the kernels
// write (so that torch's allocator knows of it, in streams and in graph captures) and passes addresses in.
//
// As in module.cpp, a string is the reason why these tensors are not for the library.
#include <string>

#include "python/bridge.h"
#include "python/read.h"

namespace py = pybind11;

namespace fastclip {
namespace {

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

double* doubles(uintptr_t address) { return static_cast<double*>(pointer(address)); }

int norm_dtype(bool is_float64) { return is_float64 ? FASTCLIP_CUDA_FLOAT64 : FASTCLIP_CUDA_FLOAT32; }

// Returns an empty string, or why the kernels cannot run on the device.
std::string probe_cuda(int device) {
  const int status = CudaLibrary::get().probe(device);
  return status == FASTCLIP_CUDA_OK ? "" : CudaLibrary::get().message(status);
}

// Tensors on one CUDA device.
class CudaTensors : public HeldTensors {
 public:
  int64_t workspace_bytes() const {
    int64_t nbytes = 0;
    const auto num_spans = static_cast<int64_t>(size());
    reason_of(CudaLibrary::get().workspace_bytes(device(), num_spans, &nbytes));
    return nbytes;
  }

  // Addresses are on the device; 0 is NULL.
  std::string total_norm(double p, double max_norm, uintptr_t max_norm_on_device, uintptr_t norm,
                         bool norm_is_float64, uintptr_t coefficient, uintptr_t workspace) const {
    const auto call = cuda_call(list_.spans(), list_.device(), pointer(workspace));
    return reason_of(CudaLibrary::get().total_norm(&call, p, max_norm, doubles(max_norm_on_device),
                                                   norm_dtype(norm_is_float64), pointer(norm),
                                                   doubles(coefficient)));
  }

  std::string clip_grad_norm(double max_norm, uintptr_t max_norm_on_device, double p, uintptr_t norm,
                             uintptr_t workspace) const {
    const auto call = cuda_call(list_.spans(), list_.device(), pointer(workspace));
    return reason_of(CudaLibrary::get().clip_grad_norm(&call, p, max_norm, doubles(max_norm_on_device),
                                                       norm_dtype(has_float64()), pointer(norm)));
  }

  std::string scale(uintptr_t coefficients, bool per_span) const {
    const auto call = cuda_call(list_.spans(), list_.device(), nullptr);
    return reason_of(CudaLibrary::get().scale(&call, doubles(coefficients), per_span));
  }

  std::string clip_grads_with_norm(double max_norm, uintptr_t max_norm_on_device, uintptr_t norm,
                                   bool norm_is_float64) const {
    const auto call = cuda_call(list_.spans(), list_.device(), nullptr);
    return reason_of(CudaLibrary::get().clip_grads_with_norm(&call, max_norm, doubles(max_norm_on_device),
                                                             norm_dtype(norm_is_float64), pointer(norm)));
  }

  std::string norms(double p, uintptr_t norms, bool norms_are_float64, uintptr_t workspace) const {
    const auto call = cuda_call(list_.spans(), list_.device(), pointer(workspace));
    return reason_of(CudaLibrary::get().norms(&call, p, norm_dtype(norms_are_float64), pointer(norms)));
  }

  std::string count_nonfinite(uintptr_t counts, uintptr_t workspace) const {
    const auto call = cuda_call(list_.spans(), list_.device(), pointer(workspace));
    return reason_of(CudaLibrary::get().count_nonfinite(&call, static_cast<int64_t*>(pointer(counts))));
  }

  std::string elementwise(const char* name, double value, uintptr_t value_on_device) const {
    const auto call = cuda_call(list_.spans(), list_.device(), nullptr);
    return reason_of(CudaLibrary::get().elementwise(&call, name, value, doubles(value_on_device)));
  }
};

}  // namespace

void bind_cuda(py::module_& m) {
  using namespace pybind11::literals;
  m.def("load_cuda_library", &CudaLibrary::load, "path"_a,
        "Load libfastclip_cuda; returns why it cannot be used, or an empty string.");
  m.def("probe_cuda", &probe_cuda, "device"_a,
        "Why the loaded library cannot run on a device, or an empty string.");
  py::class_<CudaTensors, HeldTensors>(m, "CudaTensors")
      .def_static("collect", &HeldTensors::collect<CudaTensors>, "list"_a, "of_gradients"_a, "device_type"_a,
                  "CudaTensors, or why the list is not for the library.")
      .def_property_readonly("workspace_bytes", &CudaTensors::workspace_bytes)
      .def("total_norm", &CudaTensors::total_norm, "p"_a, "max_norm"_a, "max_norm_on_device"_a, "norm"_a,
           "norm_is_float64"_a, "coefficient"_a, "workspace"_a)
      .def("clip_grad_norm", &CudaTensors::clip_grad_norm, "max_norm"_a, "max_norm_on_device"_a, "p"_a,
           "norm"_a, "workspace"_a)
      .def("scale", &CudaTensors::scale, "coefficients"_a, "per_span"_a)
      .def("clip_grads_with_norm", &CudaTensors::clip_grads_with_norm, "max_norm"_a, "max_norm_on_device"_a,
           "norm"_a, "norm_is_float64"_a)
      .def("norms", &CudaTensors::norms, "p"_a, "norms"_a, "norms_are_float64"_a, "workspace"_a)
      .def("count_nonfinite", &CudaTensors::count_nonfinite, "counts"_a, "workspace"_a)
      .def("elementwise", &CudaTensors::elementwise, "operation"_a, "value"_a, "value_on_device"_a);
}

}  // namespace fastclip
