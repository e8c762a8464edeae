// libfastclip_cuda, loaded when it is first wanted, over a list of tensors.
#pragma once

#include <string>
#include <vector>

#include "cuda/fastclip_cuda.h"
#include "tensor_list.h"

namespace fastclip {

// The entry points; each as in cuda/fastclip_cuda.h.
struct CudaLibrary {
  decltype(&fastclip_cuda_abi_version) abi_version;
  decltype(&fastclip_cuda_message) message;
  decltype(&fastclip_cuda_probe) probe;
  decltype(&fastclip_cuda_workspace_bytes) workspace_bytes;
  decltype(&fastclip_cuda_total_norm) total_norm;
  decltype(&fastclip_cuda_clip_grad_norm) clip_grad_norm;
  decltype(&fastclip_cuda_scale) scale;
  decltype(&fastclip_cuda_clip_grads_with_norm) clip_grads_with_norm;
  decltype(&fastclip_cuda_norms) norms;
  decltype(&fastclip_cuda_count_nonfinite) count_nonfinite;
  decltype(&fastclip_cuda_clamp) clamp;
  decltype(&fastclip_cuda_step_workspace_bytes) step_workspace_bytes;
  decltype(&fastclip_cuda_adam_step) adam_step;
  decltype(&fastclip_cuda_sgd_step) sgd_step;

  // Loads the library at `path`. Returns an empty string, or why it cannot be used.
  static std::string load(const std::string& path);
  // The library that was loaded.
  static const CudaLibrary& get();
};

// Spans on a device as the library takes them, on the stream that torch works on. Throws std::runtime_error
// if torch cannot name the stream.
FastclipCudaCall cuda_call(const std::vector<Span>& spans, dlpack::Device device, void* workspace);

// What a status asks for: an empty string is success, any other the reason why these tensors are not for the
// library, which has touched nothing. Throws std::runtime_error with the message of a CUDA error.
std::string reason_of(int status);

}  // namespace fastclip
