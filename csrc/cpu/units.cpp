#include "units.h"

namespace fastclip::cpu {
namespace {

const NormType kNorm(2.0);
constexpr int64_t kCacheLine = 64;
constexpr int kInL2 = 2;

}  // namespace

Units::Units(const Pass& pass, const std::vector<StepTarget>& targets, const UnitRule& rule,
             double grad_scale, bool is_measured)
    : pass_(pass), targets_(targets), rule_(rule), grad_scale_(grad_scale) {
  if (rule.numel.empty()) return;
  const int64_t num_chunks = pass.chunks().size();
  crossing_.resize(num_chunks);
  if (!is_measured) return;
  first_kept_.reserve(num_chunks);
  int64_t num_kept = 0;
  for (int64_t i = 0; i < num_chunks; ++i) {
    const Chunk& chunk = pass.chunks()[i];
    first_kept_.push_back(num_kept);
    if (unit(i) < kMinKept) continue;
    num_kept += parts_of(chunk.begin + chunk.numel, unit(i)) - chunk.begin / unit(i);
  }
  kept_.resize(num_kept);
}

void Units::accumulate(int thread, int team, std::vector<Accumulator>& parts) {
  const auto [first, last] = pass_.chunks().share(thread, team);
  for (int64_t i = first; i < last; ++i) {
    const Chunk& chunk = pass_.chunks()[i];
    if (!keeps(i)) {
      parts[i] = sum(pass_.span(chunk).data, i, chunk.begin, chunk.numel);
      continue;
    }
    Accumulator* const kept = kept_.data() + first_kept_[i];
    int64_t count = 0;
    for_each_piece(i, [&](int64_t begin, int64_t numel, int64_t) {
      kept[count++] = sum(pass_.span(chunk).data, i, begin, numel);
    });
    parts[i] = combine(kept, count, kNorm);
  }
}

void Units::measure_crossing(int thread, int team) {
  const auto [first, last] = pass_.chunks().share(thread, team);
  for (int64_t i = first; i < last; ++i) {
    if (!has(i)) continue;
    const Chunk& chunk = pass_.chunks()[i];
    const int64_t end = chunk.begin + chunk.numel, start = end / unit(i) * unit(i);
    if (start >= chunk.begin && is_crossing(i, start)) {
      crossing_[i] = {weight_norm(i, start), keeps(i) ? 0.0 : grad_norm(i, start)};
    }
  }
}

bool Units::is_crossing(int64_t i, int64_t start) const {
  const Chunk& chunk = pass_.chunks()[i];
  const int64_t end = chunk.begin + chunk.numel;
  return start < end && start + unit(i) > end;
}

double Units::coef(int64_t i, int64_t start) const {
  const bool crosses = is_crossing(i, start);
  const double weights = crosses ? crossing_[i].weights : weight_norm(i, start);
  const double scaled = keeps(i)  ? kept_norm(i, start)
                        : crosses ? crossing_[i].gradient
                                  : grad_norm(i, start);
  const double ratio = rule_.ratio * (weights > rule_.eps ? weights : rule_.eps) / (scaled / grad_scale_);
  return ratio >= 1 ? 1.0 : ratio;
}

double Units::kept_norm(int64_t i, int64_t start) const {
  const Chunk& chunk = pass_.chunks()[i];
  const int64_t beyond = start + unit(i) - (chunk.begin + chunk.numel);
  const int64_t count = 1 + (beyond > 0 ? parts_of(beyond, chunk.numel) : 0);
  const int64_t at = first_kept_[i] + start / unit(i) - chunk.begin / unit(i);
  return norm_of(combine(kept_.data() + at, count, kNorm), kNorm);
}

double Units::weight_norm(int64_t i, int64_t start) const {
  return norm_of(sum(targets_[pass_.chunks()[i].span].param, i, start, unit(i)), kNorm);
}

double Units::grad_norm(int64_t i, int64_t start) const {
  return norm_of(sum(pass_.span(pass_.chunks()[i]).data, i, start, unit(i)), kNorm);
}

void Units::fetch_weights(int64_t i, int64_t begin, int64_t numel) const {
  const Chunk& chunk = pass_.chunks()[i];
  const int64_t size = item_size(pass_.span(chunk).dtype);
  const char* const at = static_cast<const char*>(targets_[chunk.span].param) + begin * size;
  const int64_t nbytes = std::min(numel, chunk.begin + chunk.numel - begin) * size;
  for (int64_t offset = 0; offset < nbytes; offset += kCacheLine) __builtin_prefetch(at + offset, 0, kInL2);
}

Accumulator Units::sum(const void* data, int64_t i, int64_t begin, int64_t numel) const {
  const DType dtype = pass_.span(pass_.chunks()[i]).dtype;
  const auto kernel = pass_.table().accumulate[static_cast<int>(kNorm.kind)][index(dtype)];
  return kernel(static_cast<const char*>(data) + begin * item_size(dtype), numel, kNorm.p);
}

}  // namespace fastclip::cpu
