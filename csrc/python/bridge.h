// libfastclip_cuda, loaded when it is first wanted, over a list of tensors.
#pragma once

#include <string>
#include <vector>

#include "cuda/fastclip_cuda.h"
#include "tensor_list.h"

namespace fastclip {

// The entry points, each as in cuda/fastclip_cuda.h without the fastclip_cuda_ before it.
#define FASTCLIP_CUDA_FUNCTIONS(X) \
  X(abi_version)                   \
  X(message)                       \
  X(probe)                         \
  X(workspace_bytes)               \
  X(total_norm)                    \
  X(clip_grad_norm)                \
  X(scale)                         \
  X(clip_grads_with_norm)          \
  X(norms)                         \
  X(count_nonfinite)               \
  X(elementwise)                   \
  X(step_workspace_bytes)          \
  X(adam_step)                     \
  X(sgd_step)

struct CudaLibrary {
#define FASTCLIP_MEMBER(name) decltype(&fastclip_cuda_##name) name;
  FASTCLIP_CUDA_FUNCTIONS(FASTCLIP_MEMBER)
#undef FASTCLIP_MEMBER

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
