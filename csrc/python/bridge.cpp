#include "python/bridge.h"

#include <cstddef>
#include <stdexcept>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace fastclip {
namespace {

CudaLibrary g_library;

static_assert(sizeof(Span) == sizeof(FastclipCudaSpan) &&
                  offsetof(Span, data) == offsetof(FastclipCudaSpan, data) &&
                  offsetof(Span, numel) == offsetof(FastclipCudaSpan, numel) &&
                  offsetof(Span, dtype) == offsetof(FastclipCudaSpan, dtype),
              "spans are passed on as they are");
static_assert(static_cast<int>(DType::kFloat32) == FASTCLIP_CUDA_FLOAT32 &&
                  static_cast<int>(DType::kFloat64) == FASTCLIP_CUDA_FLOAT64 &&
                  static_cast<int>(DType::kBFloat16) == FASTCLIP_CUDA_BFLOAT16 &&
                  static_cast<int>(DType::kFloat16) == FASTCLIP_CUDA_FLOAT16,
              "dtype tags are passed on as they are");

#if !defined(_WIN32)
template <class Function>
bool find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}
#endif

}  // namespace

std::string CudaLibrary::load(const std::string& path) {
#if defined(_WIN32)
  return "the CUDA library is not built for Windows";
#else
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return dlerror();
  CudaLibrary found;
#define FASTCLIP_FOUND(name) find(library, "fastclip_cuda_" #name, &found.name) &&
  const bool complete = FASTCLIP_CUDA_FUNCTIONS(FASTCLIP_FOUND) true;
#undef FASTCLIP_FOUND
  if (!complete) return path + " lacks a function of this version of fastclip";
  if (const int version = found.abi_version(); version != FASTCLIP_CUDA_ABI_VERSION) {
    return path + " has ABI version " + std::to_string(version) + "; expected " +
           std::to_string(FASTCLIP_CUDA_ABI_VERSION);
  }
  g_library = found;
  return "";
#endif
}

const CudaLibrary& CudaLibrary::get() { return g_library; }

FastclipCudaCall cuda_call(const std::vector<Span>& spans, dlpack::Device device, void* workspace) {
  const dlpack::ExchangeApi* const api = TensorTypes::get().api;
  void* stream = nullptr;
  if (api->current_work_stream(device.type, device.id, &stream) != 0) {
    PyErr_Clear();
    throw std::runtime_error(
        "fastclip: torch does not name the current stream of cuda:" + std::to_string(device.id) + ".");
  }
  FastclipCudaCall call;
  call.spans = reinterpret_cast<const FastclipCudaSpan*>(spans.data());
  call.num_spans = static_cast<int64_t>(spans.size());
  call.device = device.id;
  call.stream = stream;
  call.workspace = workspace;
  return call;
}

std::string reason_of(int status) {
  if (status == FASTCLIP_CUDA_OK) return "";
  const std::string message = g_library.message(status);
  if (status > 0)
    throw std::runtime_error("fastclip: CUDA error " + std::to_string(status) + ": " + message + ".");
  return message;
}

}  // namespace fastclip
