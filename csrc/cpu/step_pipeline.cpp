#include "step_pipeline.h"

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
  double grad_factor;

  void operator()(const AdamCoefficients& c) const { table.adam[index(dtype)](chunk, numel, grad_factor, c); }
  void operator()(const SgdCoefficients& c) const { table.sgd[index(dtype)](chunk, numel, grad_factor, c); }
};

void update(const Kernels& table, const Span& grad, const Chunk& chunk, const StepTarget& target,
            const StepRule& rule, double grad_factor) {
  const int64_t offset = chunk.begin * item_size(grad.dtype);
  StepChunk at{advance(target.param, offset), chunk.data(grad), {}};
  for (int s = 0; s < kMaxStepState; ++s) at.state[s] = advance(target.state[s], offset);
  const double factor = rule.maximize ? -grad_factor : grad_factor;
  std::visit(CallKernel{table, grad.dtype, at, chunk.numel, factor}, rule.coefficients);
}

}  // namespace

StepVerdict clip_and_step(const std::vector<Span>& grads, const std::vector<StepTarget>& targets,
                          const std::vector<StepRule>& rules, const StepOptions& options, int num_threads) {
  const Pass pass(grads, num_threads);
  const std::vector<double>& given = options.given_coefs;
  std::vector<Accumulator> parts(given.empty() ? pass.chunks().size() : 0);
  StepVerdict stepped{0.0, 1.0, false, 1.0};
  run_stages(
      pass.num_threads(),
      [&](int thread, int team) {
        if (given.empty()) pass.accumulate(options.norm_type, thread, team, parts);
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
          double factor = given.size() > 1 ? given[chunk.span] / options.grad_scale : stepped.grad_factor;
          if (options.write_grads && changes_values(factor, grad.dtype)) {
            pass.table().scale[index(grad.dtype)](chunk.data(grad), chunk.numel, factor);
            factor = 1.0;
          }
          update(pass.table(), grad, chunk, target, rules[target.rule], factor);
        }
      });
  return stepped;
}

}  // namespace fastclip::cpu
