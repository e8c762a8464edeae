// The part of DLPack 1.3's C ABI that fastclip reads: a borrowed view of a tensor, and the table of
// functions that torch >= 2.10 publishes as `torch.Tensor.__dlpack_c_exchange_api__`.
//
// Only layouts are declared, so that no header of torch or DLPack is needed to build.
// Source: the DLPack specification, https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstdint>

namespace fastclip::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kExchangeApiCapsule = "dlpack_exchange_api";

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kRocm = 10, kRocmHost = 11 };
enum TypeCode : uint8_t { kFloat = 2, kBfloat = 4 };

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

// Shape and strides (in elements) belong to the tensor; `data` already includes a view's offset in torch.
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApiHeader {
  Version version;
  ExchangeApiHeader* prev_api;
};

struct ExchangeApi {
  ExchangeApiHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  // 0 on success; otherwise a Python error is set. NULL where the producer does not offer it.
  int (*dltensor_from_py_object_no_sync)(void* py_object, Tensor* out);
  // 0 on success. Raises on CUDA builds without a driver, so it is asked for device tensors only.
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out_stream);
};

}  // namespace fastclip::dlpack
