#include "dispatch.h"

#include <atomic>

namespace fastclip::cpu {
namespace {

// Narrowest first; every machine runs the first.
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> tables{&kBaseKernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    tables.push_back(&kAvx2Kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      tables.push_back(&kAvx512Kernels);
    }
  }
#endif
  return tables;
}

std::atomic<const Kernels*> g_kernels{supported().back()};

}  // namespace

std::vector<std::string> supported_instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* table : supported()) names.emplace_back(table->instruction_set);
  return names;
}

const Kernels& kernels() { return *g_kernels.load(std::memory_order_relaxed); }

bool select_instruction_set(const std::string& name) {
  for (const Kernels* table : supported()) {
    if (name == table->instruction_set) {
      g_kernels.store(table, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace fastclip::cpu
