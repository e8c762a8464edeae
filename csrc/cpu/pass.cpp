#include "pass.h"

#include <algorithm>
#include <utility>

namespace fastclip::cpu {

bool overlap(const std::vector<Span>& spans) {
  std::vector<std::pair<const char*, const char*>> ranges;
  ranges.reserve(spans.size());
  for (const Span& span : spans) {
    const char* begin = static_cast<const char*>(span.data);
    if (span.numel > 0) ranges.emplace_back(begin, begin + span.nbytes());
  }
  if (!std::is_sorted(ranges.begin(), ranges.end())) std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return true;
  }
  return false;
}

}  // namespace fastclip::cpu
