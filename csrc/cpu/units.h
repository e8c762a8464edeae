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
// before any is updated: by then another thread may have changed half of its weights. Where the total norm
// is measured, the same arithmetic gives the norms of the units' gradients.
class Units {
 public:
  // `is_measured`: `accumulate` comes first.
  Units(const Pass& pass, const std::vector<StepTarget>& targets, const UnitRule& rule, double grad_scale,
        bool is_measured);

  // As Pass::accumulate for the 2-norm, and keeps the sums of all units but tiny ones.
  void accumulate(int thread, int team, std::vector<Accumulator>& parts);

  // To be done by all threads before any runs `for_each`.
  void measure_crossing(int thread, int team);

  // Calls run(begin, numel, coef) for what of chunk i belongs to one unit, from the first element to the
  // last; all threads have accumulated before, if any has.
  template <class Run>
  void for_each(int64_t i, Run run) const {
    for_each_piece(i, [&](int64_t begin, int64_t numel, int64_t start) {
      const double factor = coef(owner(i, start), start);
      fetch_weights(i, begin + numel, unit(i));
      run(begin, numel, factor);
    });
  }

  bool has(int64_t i) const { return !rule_.numel.empty() && unit(i) > 0; }

 private:
  struct Norms {
    double weights = 0, gradient = 0;
  };

  // Shorter units are measured twice: what is kept of one is to be little beside its elements.
  static constexpr int64_t kMinKept = 64;

  // Elements of a unit of chunk i.
  int64_t unit(int64_t i) const { return rule_.numel[pass_.chunks()[i].span]; }
  bool keeps(int64_t i) const { return !kept_.empty() && unit(i) >= kMinKept; }

  // Calls run(begin, numel, start) for what of chunk i belongs to the unit that begins at element `start`.
  template <class Run>
  void for_each_piece(int64_t i, Run run) const {
    const Chunk& chunk = pass_.chunks()[i];
    const int64_t end = chunk.begin + chunk.numel;
    for (int64_t begin = chunk.begin, start = begin / unit(i) * unit(i); begin < end;) {
      const int64_t next = std::min(start + unit(i), end);
      run(begin, next - begin, start);
      begin = start = next;
    }
  }

  // The chunk in which a unit begins that chunk i has a part of.
  int64_t owner(int64_t i, int64_t start) const {
    const Chunk& chunk = pass_.chunks()[i];
    return start >= chunk.begin ? i : i - parts_of(chunk.begin - start, pass_.chunks()[i - 1].numel);
  }
  static int64_t parts_of(int64_t numel, int64_t step) { return (numel + step - 1) / step; }

  // Of a unit that begins in chunk i, at element `start`.
  bool is_crossing(int64_t i, int64_t start) const;
  double coef(int64_t i, int64_t start) const;
  double kept_norm(int64_t i, int64_t start) const;
  double weight_norm(int64_t i, int64_t start) const;
  double grad_norm(int64_t i, int64_t start) const;
  // Asks for the weights from element `begin` on while others are updated: a unit is too short for the
  // hardware to see a stream in it.
  void fetch_weights(int64_t i, int64_t begin, int64_t numel) const;
  // Of a tensor that is laid out like the span of chunk i.
  Accumulator sum(const void* data, int64_t i, int64_t begin, int64_t numel) const;

  const Pass& pass_;
  const std::vector<StepTarget>& targets_;
  const UnitRule& rule_;
  double grad_scale_;
  std::vector<Norms> crossing_;    // for each chunk, of the unit that begins in it and does not end in it
  std::vector<Accumulator> kept_;  // of each piece of a unit, those of a chunk from first_kept_ of it on
  std::vector<int64_t> first_kept_;
};

}  // namespace fastclip::cpu
