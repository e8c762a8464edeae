#include "chunks.h"

#include <algorithm>

namespace fastclip {
namespace {

// A multiple of every kernel's block and of the cache line, whatever the dtype.
constexpr int64_t kGranularity = 4096;

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

}  // namespace

Chunks::Chunks(const std::vector<Span>& spans) {
  int64_t total = 0;
  for (const Span& span : spans) total += span.nbytes();
  const int64_t chunk_bytes =
      std::max(kMinBytes, round_up((total + kMaxChunks - 1) / kMaxChunks, kGranularity));
  chunks_.reserve(spans.size() + total / chunk_bytes);
  // Divided here: with thousands of small spans, a division each is seen.
  int64_t steps[kNumDTypes];
  for (int d = 0; d < kNumDTypes; ++d) steps[d] = chunk_bytes / item_size(static_cast<DType>(d));
  for (size_t s = 0; s < spans.size(); ++s) {
    const int64_t step = steps[static_cast<size_t>(spans[s].dtype)];
    for (int64_t begin = 0; begin < spans[s].numel; begin += step) {
      const int64_t numel = std::min(step, spans[s].numel - begin);
      // Written in place: a copy would read back in one piece what was just written in several, and wait.
      Chunk& chunk = chunks_.emplace_back();
      chunk.span = static_cast<int64_t>(s);
      chunk.begin = begin;
      chunk.numel = numel;
      chunk.bytes_before = nbytes_;
      nbytes_ += numel * item_size(spans[s].dtype);
    }
  }
}

std::pair<int64_t, int64_t> Chunks::share(int thread, int num_threads) const {
  const auto first_at = [&](int t) {
    if (t == num_threads) return size();
    const int64_t target = nbytes_ / num_threads * t;
    const auto it = std::lower_bound(chunks_.begin(), chunks_.end(), target,
                                     [](const Chunk& c, int64_t b) { return c.bytes_before < b; });
    return static_cast<int64_t>(it - chunks_.begin());
  };
  return {first_at(thread), first_at(thread + 1)};
}

}  // namespace fastclip
