// A coefficient for each unit of a tensor: for each slice along its first dimension.
#pragma once

#include <algorithm>
#include <vector>

#include "pass.h"

namespace fastclip::cpu {

// A unit's gradient is to have at most the norm ratio * max(|weights of the unit|, eps).
struct UnitRule {
  double ratio;
  double eps;
  // Elements of a unit, for each span: its memory is one unit behind the other. 0: leave the tensor alone.
  // Empty: there is nothing to do.
  std::vector<int64_t> numel;
};

// The coefficients of one step, min(1, ratio * max(|w|, eps) / |g|) with |g| of the gradients divided by
// their scale; 1 for a gradient of zeros, nan for one with nan.
//
// A unit that lies in one chunk is measured right before it is updated: its weights and its gradient, which
// the update needs, are read from memory once. One that goes on into the next chunk is measured
// before any is updated: by then another thread may have changed half of its weights.
class Units {
 public:
  Units(const Pass& pass, const std::vector<StepTarget>& targets, const UnitRule& rule, double grad_scale);

  // To be done by all threads before any runs `for_each`.
  void measure_crossing(int thread, int team);

  // Calls run(begin, numel, coef) for what of chunk i belongs to one unit, from the first element to the
  // last.
  template <class Run>
  void for_each(int64_t i, Run run) const {
    const Chunk& chunk = pass_.chunks()[i];
    const int64_t unit = numel_of(chunk), end = chunk.begin + chunk.numel;
    for (int64_t at = chunk.begin; at < end;) {
      const int64_t start = at / unit * unit, next = std::min(start + unit, end);
      const bool is_whole = start == at && start + unit <= end;
      run(at, next - at, is_whole ? coef(chunk, start) : crossing_[owner(chunk, i, start)]);
      at = next;
    }
  }

  bool has(const Chunk& chunk) const { return !rule_.numel.empty() && numel_of(chunk) > 0; }

 private:
  int64_t numel_of(const Chunk& chunk) const { return rule_.numel[chunk.span]; }
  double coef(const Chunk& chunk, int64_t start) const;
  double norm(const void* unit, const Chunk& chunk) const;

  // The chunk in which a unit of the tensor of chunk i begins.
  int64_t owner(const Chunk& chunk, int64_t i, int64_t start) const {
    if (start >= chunk.begin) return i;
    const int64_t before = chunk.begin - start, step = pass_.chunks()[i - 1].numel;
    return i - (before + step - 1) / step;
  }

  const Pass& pass_;
  const std::vector<StepTarget>& targets_;
  const UnitRule& rule_;
  double grad_scale_;
  std::vector<double> crossing_;  // for each chunk, of the unit that begins in it and does not end in it
};

}  // namespace fastclip::cpu
