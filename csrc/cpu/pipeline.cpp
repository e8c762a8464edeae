#include "pipeline.h"

#include <algorithm>
#include <cmath>

#include "../chunks.h"
#include "../finalize.h"
#include "dispatch.h"
#include "threads.h"

namespace fastclip::cpu {
namespace {

size_t index(DType dtype) { return static_cast<size_t>(dtype); }

// Combine: accumulators add up (or take the larger magnitude) in the order given.
Accumulator combine(const Accumulator* parts, size_t count, NormType type) {
  Accumulator total;
  if (type.kind == NormKind::kInf) {
    for (size_t i = 0; i < count; ++i) {
      // The negated comparison lets a nan in, and keeps it.
      if (!(parts[i].sum <= total.sum)) total.sum = parts[i].sum;
      if (std::isnan(total.sum)) break;
    }
    return total;
  }
  bool any = false;
  double nonfinite = 0;
  for (size_t i = 0; i < count; ++i) {
    if (!std::isfinite(parts[i].sum)) nonfinite += parts[i].sum;  // nan wins over inf, wherever it is
    if (parts[i].sum == 0) continue;
    if (!any || parts[i].exponent > total.exponent) total.exponent = parts[i].exponent;
    any = true;
  }
  if (nonfinite != 0) return {nonfinite, 0};
  for (size_t i = 0; i < count; ++i) {
    const int64_t shift = parts[i].exponent - total.exponent;
    total.sum += shift == 0 ? parts[i].sum : parts[i].sum * std::exp2(static_cast<double>(shift) * type.p);
  }
  return total;
}

double norm_of(const Accumulator& total, NormType type) {
  switch (type.kind) {
    case NormKind::kInf:
      return total.sum;
    case NormKind::kOne:
      return std::ldexp(total.sum, static_cast<int>(total.exponent));
    case NormKind::kTwo:
      return std::ldexp(std::sqrt(total.sum), static_cast<int>(total.exponent));
    default:
      return std::ldexp(std::pow(total.sum, 1.0 / type.p), static_cast<int>(total.exponent));
  }
}

// Whether two spans share memory, as the same gradient given twice does.
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

// One call's chunks and their accumulators.
class Pass {
 public:
  Pass(const std::vector<Span>& spans, int num_threads)
      : kernels_(kernels()),
        spans_(spans),
        chunks_(spans),
        num_threads_(threads_for(chunks_.nbytes(), chunks_.size(), num_threads)) {}

  int num_threads() const { return num_threads_; }
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

// How a stage that writes divides its work: alone on the first thread if spans share memory.
struct WriteTeam {
  bool alone = false;
  bool idle(int thread) const { return alone && thread > 0; }
  int size(int team) const { return alone ? 1 : team; }
};

}  // namespace

NormType::NormType(double p) : p(p) {
  kind = p == 2.0        ? NormKind::kTwo
         : p == 1.0      ? NormKind::kOne
         : std::isinf(p) ? NormKind::kInf
                         : NormKind::kAny;
}

double total_norm(const std::vector<Span>& spans, NormType type, int num_threads) {
  const Pass pass(spans, num_threads);
  std::vector<Accumulator> parts(pass.chunks().size());
  run_parallel(pass.num_threads(), [&](int thread, int team) { pass.accumulate(type, thread, team, parts); });
  return norm_of(combine(parts.data(), parts.size(), type), type);
}

std::vector<double> norms(const std::vector<Span>& spans, NormType type, int num_threads) {
  const Pass pass(spans, num_threads);
  std::vector<Accumulator> parts(pass.chunks().size());
  run_parallel(pass.num_threads(), [&](int thread, int team) { pass.accumulate(type, thread, team, parts); });
  std::vector<double> result(spans.size(), 0.0);
  const int64_t num_chunks = pass.chunks().size();
  for (int64_t first = 0; first < num_chunks;) {
    const int64_t span = pass.chunks()[first].span;
    int64_t last = first;
    while (last < num_chunks && pass.chunks()[last].span == span) ++last;
    result[span] = norm_of(combine(&parts[first], static_cast<size_t>(last - first), type), type);
    first = last;
  }
  return result;
}

Clipped clip_norm(const std::vector<Span>& spans, NormType type, double max_norm, bool keep_nonfinite,
                  bool single_precision, int num_threads) {
  const Pass pass(spans, num_threads);
  std::vector<Accumulator> parts(pass.chunks().size());
  Clipped clipped{0.0, 1.0};
  WriteTeam writers;
  run_stages(
      pass.num_threads(), [&](int thread, int team) { pass.accumulate(type, thread, team, parts); },
      [&] {
        clipped.total_norm = norm_of(combine(parts.data(), parts.size(), type), type);
        const double returned = single_precision ? static_cast<double>(static_cast<float>(clipped.total_norm))
                                                 : clipped.total_norm;
        // An infinite max_norm is how trainers ask for the norm alone.
        if (max_norm == INFINITY || (keep_nonfinite && !std::isfinite(returned))) return;
        clipped.coef = clip_coefficient(clipped.total_norm, max_norm);
        writers.alone = clipped.coef != 1.0 && overlap(spans);
      },
      [&](int thread, int team) {
        if (clipped.coef == 1.0 || writers.idle(thread)) return;
        pass.scale(clipped.coef, thread, writers.size(team));
      });
  return clipped;
}

void scale(const std::vector<Span>& spans, double coef, int num_threads) {
  const Pass pass(spans, num_threads);
  if (coef == 1.0) return;
  const int threads = overlap(spans) ? 1 : pass.num_threads();
  run_parallel(threads, [&](int thread, int team) { pass.scale(coef, thread, team); });
}

std::vector<char> clamp(const std::vector<Span>& spans, double limit, int num_threads) {
  const Pass pass(spans, num_threads);
  // One flag per chunk: threads never write to the same one.
  std::vector<char> changed(pass.chunks().size(), 0);
  const int threads = overlap(spans) ? 1 : pass.num_threads();
  run_parallel(threads, [&](int thread, int team) {
    const auto [first, last] = pass.chunks().share(thread, team);
    for (int64_t i = first; i < last; ++i) {
      const Chunk& chunk = pass.chunks()[i];
      const Span& s = pass.span(chunk);
      changed[i] = pass.table().clamp[index(s.dtype)](chunk.data(s), chunk.numel, -limit, limit);
    }
  });
  std::vector<char> result(spans.size(), 0);
  for (int64_t i = 0; i < pass.chunks().size(); ++i) result[pass.chunks()[i].span] |= changed[i];
  return result;
}

std::vector<NonfiniteCount> count_nonfinite(const std::vector<Span>& spans, int num_threads) {
  const Pass pass(spans, num_threads);
  std::vector<NonfiniteCount> parts(pass.chunks().size());
  run_parallel(pass.num_threads(), [&](int thread, int team) {
    const auto [first, last] = pass.chunks().share(thread, team);
    for (int64_t i = first; i < last; ++i) {
      const Chunk& chunk = pass.chunks()[i];
      const Span& s = pass.span(chunk);
      parts[i] = pass.table().count_nonfinite[index(s.dtype)](chunk.data(s), chunk.numel);
    }
  });
  std::vector<NonfiniteCount> result(spans.size());
  for (int64_t i = 0; i < pass.chunks().size(); ++i) {
    result[pass.chunks()[i].span].nan += parts[i].nan;
    result[pass.chunks()[i].span].inf += parts[i].inf;
  }
  return result;
}

}  // namespace fastclip::cpu
