#include "step_pipeline.h"

#include <cmath>

#include "pass.h"

namespace fastclip::cpu {
namespace {

void* advance(void* base, int64_t nbytes) {
  return base == nullptr ? nullptr : static_cast<char*>(base) + nbytes;
}

struct CallKernel {
  const Kernels& table;
  DType dtype;
  const StepChunk& chunk;
  int64_t numel;
  GradRule grad_rule;

  void operator()(const AdamCoefficients& c) const { table.adam[index(dtype)](chunk, numel, grad_rule, c); }
  void operator()(const SgdCoefficients& c) const { table.sgd[index(dtype)](chunk, numel, grad_rule, c); }
};

// Elements begin .. begin + numel of one tensor. With `write_grads` the clipped gradient is left behind.
void update(const Kernels& table, const Span& grad, int64_t begin, int64_t numel, const StepTarget& target,
            const StepRule& rule, GradRule grad_rule, bool write_grads) {
  const int64_t offset = begin * item_size(grad.dtype);
  StepChunk at{advance(target.param, offset), advance(grad.data, offset), {}};
  for (int s = 0; s < kMaxStepState; ++s) at.state[s] = advance(target.state[s], offset);
  if (write_grads) {
    void* const written = advance(grad.data, offset);
    if (changes_values(grad_rule.factor, grad.dtype)) {
      table.scale[index(grad.dtype)](written, numel, grad_rule.factor);
      grad_rule.factor = 1.0;
    }
    if (std::isfinite(grad_rule.max_value)) {
      table.elementwise[index(Elementwise::clamp)][index(grad.dtype)](written, numel, grad_rule.max_value);
    }
  }
  if (rule.maximize) grad_rule.factor = -grad_rule.factor;
  std::visit(CallKernel{table, grad.dtype, at, numel, grad_rule}, rule.coefficients);
}

}  // namespace

StepVerdict clip_and_step(const std::vector<Span>& grads, const std::vector<StepTarget>& targets,
                          const std::vector<StepRule>& rules, const StepOptions& options, int num_threads) {
  const Pass pass(grads, num_threads);
  const std::vector<double>& given = options.given_coefs;
  std::vector<Accumulator> parts(given.empty() ? pass.chunks().size() : 0);
  const bool has_units = !options.units.numel.empty();
  const bool sums_units = has_units && given.empty() && options.norm_type.kind == NormKind::kTwo;
  Units units(pass, targets, options.units, options.grad_scale, sums_units);
  StepVerdict stepped{0.0, 1.0, false, 1.0};
  run_stages(
      pass.num_threads(),
      [&](int thread, int team) {
        if (sums_units) {
          units.accumulate(thread, team, parts);
        } else if (given.empty()) {
          pass.accumulate(options.norm_type, thread, team, parts);
        }
        if (has_units) units.measure_crossing(thread, team);
      },
      [&] {
        if (!given.empty()) {
          stepped.grad_factor = given[0] / options.grad_scale;
          return;
        }
        const double scaled_norm =
            norm_of(combine(parts.data(), parts.size(), options.norm_type), options.norm_type);
        stepped = step_verdict(scaled_norm, options.grad_scale, options.max_norm, options.skip_nonfinite);
      },
      [&](int thread, int team) {
        if (stepped.skipped) return;
        const auto [first, last] = pass.chunks().share(thread, team);
        // Backwards, so that the gradients that the first pass read last, and the cache still holds, come
        // first.
        for (int64_t i = last - 1; i >= first; --i) {
          const Chunk& chunk = pass.chunks()[i];
          const Span& grad = pass.span(chunk);
          const StepTarget& target = targets[chunk.span];
          const double factor =
              given.size() > 1 ? given[chunk.span] / options.grad_scale : stepped.grad_factor;
          const auto run = [&](int64_t begin, int64_t numel, double coef) {
            update(pass.table(), grad, begin, numel, target, rules[target.rule],
                   {factor * coef, options.max_value}, options.write_grads);
          };
          if (units.has(i)) {
            units.for_each(i, run);
          } else {
            run(chunk.begin, chunk.numel, 1.0);
          }
        }
      });
  return stepped;
}

}  // namespace fastclip::cpu
