// Spans cut into chunks: the fixed partition that makes results reproducible.
//
// The cut depends on the sizes and dtypes of the tensors alone, never on the number of threads, and partial
// sums are added in chunk order: so 1, 2 and 64 threads give the same bits.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "span.h"

namespace fastclip {

// Elements begin .. begin + numel of one span; never crosses spans.
struct Chunk {
  int64_t span;
  int64_t begin;
  int64_t numel;
  int64_t bytes_before;  // bytes of all earlier chunks, for balancing threads

  void* data(const Span& s) const { return static_cast<char*>(s.data) + begin * item_size(s.dtype); }
};

class Chunks {
 public:
  // Chunks of at least kMinBytes, larger for larger lists: at most kMaxChunks plus one per span, so what a
  // call allocates does not grow with the gradients. Spans without elements get no chunk.
  static constexpr int64_t kMinBytes = 64 * 1024;
  static constexpr int64_t kMaxChunks = 4096;

  explicit Chunks(const std::vector<Span>& spans);

  int64_t size() const { return static_cast<int64_t>(chunks_.size()); }
  const Chunk& operator[](int64_t i) const { return chunks_[i]; }
  int64_t nbytes() const { return nbytes_; }

  // The contiguous range of chunks [first, last) of one of num_threads threads, balanced by bytes.
  std::pair<int64_t, int64_t> share(int thread, int num_threads) const;

 private:
  std::vector<Chunk> chunks_;
  int64_t nbytes_ = 0;
};

}  // namespace fastclip
