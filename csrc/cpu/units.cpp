#include "units.h"

namespace fastclip::cpu {

Units::Units(const Pass& pass, const std::vector<StepTarget>& targets, const UnitRule& rule,
             double grad_scale)
    : pass_(pass),
      targets_(targets),
      rule_(rule),
      grad_scale_(grad_scale),
      crossing_(rule.numel.empty() ? 0 : pass.chunks().size(), 1.0) {}

void Units::measure_crossing(int thread, int team) {
  const auto [first, last] = pass_.chunks().share(thread, team);
  for (int64_t i = first; i < last; ++i) {
    const Chunk& chunk = pass_.chunks()[i];
    if (!has(chunk)) continue;
    const int64_t end = chunk.begin + chunk.numel, start = end / numel_of(chunk) * numel_of(chunk);
    if (start < end && start >= chunk.begin) crossing_[i] = coef(chunk, start);
  }
}

double Units::coef(const Chunk& chunk, int64_t start) const {
  const Span& grad = pass_.span(chunk);
  const int64_t offset = start * item_size(grad.dtype);
  const double weights = norm(static_cast<const char*>(targets_[chunk.span].param) + offset, chunk);
  const double gradient = norm(static_cast<const char*>(grad.data) + offset, chunk) / grad_scale_;
  const double ratio = rule_.ratio * (weights > rule_.eps ? weights : rule_.eps) / gradient;
  return ratio >= 1 ? 1.0 : ratio;
}

double Units::norm(const void* unit, const Chunk& chunk) const {
  const NormType two(2.0);
  const auto kernel = pass_.table().accumulate[static_cast<int>(two.kind)][index(pass_.span(chunk).dtype)];
  return norm_of(kernel(unit, numel_of(chunk), two.p), two);
}

}  // namespace fastclip::cpu
