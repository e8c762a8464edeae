#include "upload.h"

#include <cstring>

#include "launch.h"

namespace fastclip::cuda {
namespace {

// Fits the 32,764 bytes of arguments.
constexpr uint32_t kMaxWords = 2000;

struct Words {
  uint4 word[kMaxWords];
};

// Copy from the kernel arguments to device memory: unlike a copy from pageable memory it does not make the
// host wait, and unlike one from page-locked memory it needs no buffer that must outlive it.
//
// Math      to[i] = words[i].
// Grid      one block.
// Traffic   writes 16 bytes per word.
// Order     elementwise.
// Requires  num_words <= kMaxWords.
// Range     any.
// Scratch   none.
// Measured  not by itself.
// Source    own.
__global__ void __launch_bounds__(kThreads)
    write_words(const __grid_constant__ Words words, uint4* const to, const uint32_t num_words) {
  for (uint32_t i = threadIdx.x; i < num_words; i += kThreads) to[i] = words.word[i];
}

}  // namespace

cudaError_t upload(const void* from, size_t nbytes, void* to, cudaStream_t stream) {
  Words words;
  for (size_t first = 0; first < nbytes; first += sizeof(words)) {
    const size_t count = std::min(nbytes - first, sizeof(words));
    std::memcpy(&words, static_cast<const char*>(from) + first, count);
    const auto num_words = static_cast<uint32_t>((count + sizeof(uint4) - 1) / sizeof(uint4));
    auto* const target = reinterpret_cast<uint4*>(static_cast<char*>(to) + first);
    const cudaError_t error = launch(write_words, Grid{1, stream}, kThreads, words, target, num_words);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fastclip::cuda
