#include "pipeline.h"

#include <algorithm>
#include <cmath>

#include "../finalize.h"
#include "pass.h"
#include "threads.h"

namespace fastclip::cpu {

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
  int num_writers = 1;
  run_stages(
      pass.num_threads(), [&](int thread, int team) { pass.accumulate(type, thread, team, parts); },
      [&] {
        clipped.total_norm = norm_of(combine(parts.data(), parts.size(), type), type);
        const double returned = single_precision ? static_cast<double>(static_cast<float>(clipped.total_norm))
                                                 : clipped.total_norm;
        if (keep_nonfinite && !std::isfinite(returned)) return;
        clipped.coef = clip_coefficient(clipped.total_norm, max_norm);
        if (clipped.coef != 1.0) num_writers = pass.num_writers();
      },
      [&](int thread, int team) {
        const int writing = std::min(num_writers, team);
        if (clipped.coef == 1.0 || thread >= writing) return;
        pass.scale(clipped.coef, thread, writing);
      });
  return clipped;
}

void scale(const std::vector<Span>& spans, double coef, int num_threads) {
  const Pass pass(spans, num_threads);
  if (coef == 1.0) return;
  run_parallel(pass.num_writers(), [&](int thread, int team) { pass.scale(coef, thread, team); });
}

void scale_each(const std::vector<Span>& spans, const std::vector<double>& coefs, int num_threads) {
  const Pass pass(spans, num_threads);
  run_parallel(pass.num_writers(), [&](int thread, int team) {
    const auto [first, last] = pass.chunks().share(thread, team);
    for (int64_t i = first; i < last; ++i) {
      const Chunk& chunk = pass.chunks()[i];
      const Span& s = pass.span(chunk);
      const double coef = coefs[chunk.span];
      if (changes_values(coef, s.dtype)) pass.table().scale[index(s.dtype)](chunk.data(s), chunk.numel, coef);
    }
  });
}

std::vector<char> elementwise(const std::vector<Span>& spans, Elementwise operation, double value,
                              int num_threads) {
  const Pass pass(spans, num_threads);
  const auto& kernels = pass.table().elementwise[index(operation)];
  // One flag per chunk: threads never write to the same one.
  std::vector<char> changed(pass.chunks().size(), 0);
  run_parallel(pass.num_writers(), [&](int thread, int team) {
    const auto [first, last] = pass.chunks().share(thread, team);
    for (int64_t i = first; i < last; ++i) {
      const Chunk& chunk = pass.chunks()[i];
      const Span& s = pass.span(chunk);
      changed[i] = kernels[index(s.dtype)](chunk.data(s), chunk.numel, value);
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
