// One call's chunks, and the stages that walk over them.
#pragma once

#include <vector>

#include "../chunks.h"
#include "../finalize.h"
#include "combine.h"
#include "dispatch.h"
#include "threads.h"

namespace fastclip::cpu {

inline size_t index(DType dtype) { return static_cast<size_t>(dtype); }

// Whether two spans share memory, as the same gradient given twice does.
bool overlap(const std::vector<Span>& spans);

// One call's chunks and their accumulators.
class Pass {
 public:
  Pass(const std::vector<Span>& spans, int num_threads)
      : kernels_(kernels()),
        spans_(spans),
        chunks_(spans),
        num_threads_(threads_for(chunks_.nbytes(), chunks_.size(), num_threads)) {}

  int num_threads() const { return num_threads_; }
  // How many threads may write to the spans at once: one if some share memory.
  int num_writers() const { return num_threads_ > 1 && overlap(spans_) ? 1 : num_threads_; }
  const Chunks& chunks() const { return chunks_; }
  const Span& span(const Chunk& chunk) const { return spans_[chunk.span]; }
  const Kernels& table() const { return kernels_; }

  void accumulate(NormType type, int thread, int team, std::vector<Accumulator>& parts) const {
    const auto [first, last] = chunks_.share(thread, team);
    for (int64_t i = first; i < last; ++i) {
      const Span& s = span(chunks_[i]);
      const auto kernel = kernels_.accumulate[static_cast<int>(type.kind)][index(s.dtype)];
      parts[i] = kernel(chunks_[i].data(s), chunks_[i].numel, type.p);
    }
  }

  // Backwards, so that what the first pass read last, and the cache still holds, comes first.
  void scale(double coef, int thread, int team) const {
    const auto [first, last] = chunks_.share(thread, team);
    for (int64_t i = last - 1; i >= first; --i) {
      const Span& s = span(chunks_[i]);
      if (!changes_values(coef, s.dtype)) continue;
      kernels_.scale[index(s.dtype)](chunks_[i].data(s), chunks_[i].numel, coef);
    }
  }

 private:
  const Kernels& kernels_;
  const std::vector<Span>& spans_;
  Chunks chunks_;
  int num_threads_;
};

}  // namespace fastclip::cpu
