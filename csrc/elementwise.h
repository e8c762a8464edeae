// What can be done to every element by itself, given one number: a table that all backends follow.
//
// X(name) stands for a kernel of each: a function `name` in cpu/elementwise.inl.h, an Operation in
// cuda/elementwise.cu, a branch in fastclip/kernels/elementwise.py; fastclip/backends/eager.py says it in
// torch's operations. Python asks by the name.
#pragma once

#include <cstring>

#define FASTCLIP_ELEMENTWISE(X) X(clamp)  // min(max(x, -value), value)

namespace fastclip {

enum class Elementwise : int {
#define FASTCLIP_ENUMERATOR(name) name,
  FASTCLIP_ELEMENTWISE(FASTCLIP_ENUMERATOR)
#undef FASTCLIP_ENUMERATOR
      kCount
};

constexpr int kNumElementwise = static_cast<int>(Elementwise::kCount);

constexpr int index(Elementwise operation) { return static_cast<int>(operation); }

// Returns kCount if there is none of this name.
inline Elementwise elementwise_named(const char* wanted) {
#define FASTCLIP_IF_NAMED(name) \
  if (std::strcmp(wanted, #name) == 0) return Elementwise::name;
  FASTCLIP_ELEMENTWISE(FASTCLIP_IF_NAMED)
#undef FASTCLIP_IF_NAMED
  return Elementwise::kCount;
}

}  // namespace fastclip
