// CPU tensors that pass for tensors on emulated devices: torch's DLPack exchange API, with the places that a
// test has given to their memory.
#include <map>
#include <utility>

#include "../../csrc/dlpack_abi.h"

namespace {

using namespace fastclip::dlpack;

const ExchangeApi* g_real = nullptr;
ExchangeApi g_emulated;
std::map<const void*, int32_t> g_places;

int read(void* py_object, Tensor* out) {
  const int status = g_real->dltensor_from_py_object_no_sync(py_object, out);
  if (status != 0) return status;
  const auto place = g_places.find(static_cast<const char*>(out->data) + out->byte_offset);
  if (place != g_places.end()) out->device = {kCuda, place->second};
  return 0;
}

// A number for each device, beyond those that tests of streams choose.
int name_stream(int32_t, int32_t device, void** stream) {
  *stream = reinterpret_cast<void*>(static_cast<intptr_t>(1000000 + device));
  return 0;
}

}  // namespace

extern "C" {

const void* emulation_exchange_api(const void* real) {
  g_real = static_cast<const ExchangeApi*>(real);
  g_emulated = *g_real;
  g_emulated.dltensor_from_py_object_no_sync = read;
  g_emulated.current_work_stream = name_stream;
  g_places.clear();
  return &g_emulated;
}

void emulation_place(const void* data, int32_t device) { g_places[data] = device; }

}  // extern "C"
