#include "step.h"

#include "update.cuh"

namespace fastclip::cuda {

// What settle_step leaves for update_spans: first this, then one SpanStep per span.
struct alignas(16) StepHeader {
  bool skipped;
};

namespace {

template <class Rule>
struct Step;

template <>
struct Step<FastclipCudaAdamRule> {
  using Coefficients = AdamCoefficients;

  static __device__ Coefficients coefficients(const FastclipCudaAdamRule& rule, double lr, double step) {
    return adam_coefficients({lr, rule.beta1, rule.beta2, rule.eps, rule.weight_decay, rule.decoupled != 0},
                             step);
  }

  // Calls run(update) with the update that a target's state asks for.
  template <class Real, class Run>
  static __device__ void with_update(const Coefficients& c, const FastclipCudaStepTarget& target, Run run) {
    if (target.state[2] != nullptr) {
      run(AdamUpdate<Real, true>(c));
    } else {
      run(AdamUpdate<Real, false>(c));
    }
  }
};

template <>
struct Step<FastclipCudaSgdRule> {
  using Coefficients = SgdCoefficients;

  static __device__ Coefficients coefficients(const FastclipCudaSgdRule& rule, double lr, double) {
    return {lr, rule.weight_decay, rule.momentum, rule.grad_share, rule.nesterov != 0};
  }

  template <class Real, class Run>
  static __device__ void with_update(const Coefficients& c, const FastclipCudaStepTarget& target, Run run) {
    if (target.state[0] != nullptr) {
      run(SgdUpdate<Real, true>(c));
    } else {
      run(SgdUpdate<Real, false>(c));
    }
  }
};

}  // namespace

template <class Rule>
struct SpanStep {
  typename Step<Rule>::Coefficients coefficients;
  double grad_factor;
  bool maximize;
};

namespace {

// Rules [first_rule, first_rule + kRules) and the spans that refer to them.
template <class Rule, int kRules>
struct RuleArgument {
  uint32_t first_rule;
  uint32_t first_span;
  uint32_t end_span;
  Rule rules[kRules];
};

template <class Rule>
struct SettleArguments {
  const double* scaled_norm;
  const FastclipCudaStepTarget* targets;
  StepHeader* header;
  SpanStep<Rule>* steps;
  FastclipCudaStepOptions options;
};

__device__ double load(const void* value, uint8_t dtype) {
  return dtype == FASTCLIP_CUDA_FLOAT64 ? *static_cast<const double*>(value)
                                        : *static_cast<const float*>(value);
}

__device__ void store(void* value, uint8_t dtype, double x) {
  if (dtype == FASTCLIP_CUDA_FLOAT64) {
    *static_cast<double*>(value) = x;
  } else {
    *static_cast<float*>(value) = static_cast<float>(x);
  }
}

// Counts one step and returns the count as it is stored; 0 where nobody counts.
__device__ double count(const FastclipCudaStepTarget& target) {
  if (target.step == nullptr) return 0;
  store(target.step, target.step_dtype, load(target.step, target.step_dtype) + 1);
  return load(target.step, target.step_dtype);
}

// What follows from the norm or, where the caller knows what to do, just that.
__device__ StepVerdict verdict_of(const FastclipCudaStepOptions& options, const double* scaled_norm) {
  const double scale = options.grad_scale != nullptr ? *options.grad_scale : 1.0;
  if (options.given_coefs != nullptr) {
    return {load(options.total_norm, options.norm_dtype), load(options.clip_coef, options.norm_dtype),
            *options.skipped != 0, *options.given_coefs / scale};
  }
  const double max_norm =
      options.max_norm_on_device != nullptr ? *options.max_norm_on_device : options.max_norm;
  StepVerdict verdict = step_verdict(*scaled_norm, scale, max_norm, options.skip_nonfinite != 0);
  if (options.found_inf != nullptr && *options.found_inf != 0) verdict.skipped = true;
  return verdict;
}

// Says what became of the step and counts it as it is said, rounded to the type of the norm.
__device__ void report(const FastclipCudaStepOptions& options, const StepVerdict& verdict) {
  if (options.given_coefs == nullptr) {
    store(options.total_norm, options.norm_dtype, verdict.total_norm);
    store(options.clip_coef, options.norm_dtype, verdict.coef);
    *options.skipped = verdict.skipped;
  }
  double* const counts = options.counts;
  if (counts == nullptr) return;
  const double norm = load(options.total_norm, options.norm_dtype);
  counts[0] += load(options.clip_coef, options.norm_dtype) < 1 && !verdict.skipped;
  counts[1] += verdict.skipped;
  counts[2] += 1;
  counts[3] = verdict.skipped ? counts[3] + 1 : 0;
  if (norm > counts[4] && norm < INFINITY) counts[4] = norm;
}

// Finalize: from the norm to what each span is updated with.
//
// Math      norm / scale, the clip coefficient, whether to skip (finalize.h), or all that as the caller gives
//           it; unless skipped, step + 1 and,
//           for Adam, lr / (1 - beta1^step) and sqrt(1 - beta2^step) in float64.
// Grid      one thread per span.
// Traffic   reads 48 bytes per span; reads and writes its counter; writes up to 80 bytes per span.
// Order     elementwise; every thread works out the same verdict from the norm.
// Requires  counters of their own for each span; the spans of a rule lie side by side.
// Range     a norm that is nan or inf skips, or gives a coefficient of nan or 0. A float32 counter stays at
//           2^24, as torch's does.
// Scratch   header and steps, which it fills.
// Measured  not by itself: H100, AdamW, 2000 tensors of 16: 37 us for the three launches of a step.
// Source    Kingma and Ba, Adam, 2015; torch/optim/adam.py.
template <class Rule, int kRules>
__global__ void __launch_bounds__(kThreads)
    settle_step(const __grid_constant__ RuleArgument<Rule, kRules> share,
                const __grid_constant__ SettleArguments<Rule> arguments) {
  const FastclipCudaStepOptions& options = arguments.options;
  const StepVerdict verdict = verdict_of(options, arguments.scaled_norm);
  const uint32_t place = blockIdx.x * kThreads + threadIdx.x;
  if (place == 0 && share.first_rule == 0) {
    *arguments.header = {verdict.skipped};
    report(options, verdict);
  }
  const uint32_t span = share.first_span + place;
  if (verdict.skipped || span >= share.end_span) return;
  const FastclipCudaStepTarget& target = arguments.targets[span];
  const Rule& rule = share.rules[target.rule - share.first_rule];
  const double lr = rule.lr_on_device != nullptr ? load(rule.lr_on_device, rule.lr_dtype) : rule.lr;
  double factor = verdict.grad_factor;
  if (options.given_per_span != 0) {
    factor = options.given_coefs[span] / (options.grad_scale != nullptr ? *options.grad_scale : 1.0);
  }
  arguments.steps[span] = {Step<Rule>::coefficients(rule, lr, count(target)), factor, rule.maximize != 0};
}

// Apply, inside the optimizer: update every parameter and its state from the clipped gradient.
//
// Math      as torch.optim.Adam, AdamW and SGD define it, with g = grad * grad_factor, bounded in its
// magnitude
//           if it is to be; the factor holds the clip coefficient and the scale of a GradScaler.
// Grid      kUpdateBlocksPerMultiprocessor blocks per multiprocessor, all resident, or one per tile if there
//           are fewer; a block walks backwards over what two blocks of accumulate read, of which L2 still
//           holds the end.
// Traffic   N = bytes of gradients, with state of the same type: Adam reads 4 N and writes 3 N (5 and 4 with
//           amsgrad), SGD reads 3 N and writes 2 N with momentum, 2 N and 1 N without. Gradients are written
//           only if asked for, and only if the factor is not 1 or there is a bound. A step that is skipped
//           reads 16 bytes.
// Order     elementwise.
// Requires  pointers aligned to their elements; those of a span that share a 16-byte boundary are moved 16
//           bytes at a time, the others singly. No two tensors share memory, except gradients that are not
//           written. Index arithmetic is 64-bit.
// Range     computed in float32 (float64 for float64) and rounded once per stored value; nan and inf spread
//           as IEEE 754 has it.
// Scratch   none of its own.
// Measured  H100, AdamW, 13.4 GB of bfloat16, accumulate included: 37.5 ms, 2868 GB/s, 95 % of a copy; since
//           then each span has a factor of its own.
// Source    Kingma and Ba, Adam, 2015; Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019;
//           Reddi et al., On the Convergence of Adam and Beyond, 2018; torch/optim/{adam,sgd}.py.
template <class Rule, int kEntries>
__global__ void __launch_bounds__(kThreads, kUpdateBlocksPerMultiprocessor)
    update_spans(const __grid_constant__ TableArgument<kEntries> table,
                 const __grid_constant__ UpdateArguments<Rule> arguments) {
  if (arguments.header->skipped) return;
  visit_backwards(table, [&](uint32_t span, const auto& piece) {
    using T = std::decay_t<decltype(*piece.data())>;
    using Real = typename Arithmetic<T>::Real;
    const FastclipCudaStepTarget& target = arguments.targets[span];
    const SpanStep<Rule>& step = arguments.steps[span];
    const bool changes = changes_values(step.grad_factor, dtype_of(T{})) || arguments.max_value < INFINITY;
    const bool written = arguments.write_grads && changes;
    const GradRule<Real> rule{static_cast<Real>(step.grad_factor), static_cast<Real>(arguments.max_value),
                              step.maximize, written};
    Step<Rule>::template with_update<Real>(step.coefficients, target, [&](const auto& update) {
      if (sizeof(T) == 2 && target.state_dtype == FASTCLIP_CUDA_FLOAT32) {
        update_piece<Real>(piece, target, update, rule);
      } else {
        update_piece<T>(piece, target, update, rule);
      }
    });
  });
}

// Of kRules rules at most.
template <class Rule, int kRules>
cudaError_t settle_share(const Rule* rules, int64_t num_rules, uint32_t first_rule, uint32_t first_span,
                         uint32_t end_span, const SettleArguments<Rule>& arguments, cudaStream_t stream) {
  RuleArgument<Rule, kRules> share;
  share.first_rule = first_rule;
  share.first_span = first_span;
  share.end_span = end_span;
  std::copy_n(rules, num_rules, share.rules);
  const uint32_t num_threads = std::max(end_span - first_span, 1u);
  const Grid grid{(num_threads + kThreads - 1) / kThreads, stream};
  return launch(settle_step<Rule, kRules>, grid, kThreads, share, arguments);
}

}  // namespace

int64_t step_scratch_bytes(int64_t num_spans) {
  constexpr auto kSpanBytes =
      std::max(sizeof(SpanStep<FastclipCudaAdamRule>), sizeof(SpanStep<FastclipCudaSgdRule>));
  return static_cast<int64_t>(sizeof(StepHeader)) + num_spans * static_cast<int64_t>(kSpanBytes);
}

template <class Rule>
cudaError_t settle(const TargetTable& targets, const Rule* rules, int64_t num_rules,
                   const FastclipCudaStepOptions& options, const StepMemory& memory, cudaStream_t stream,
                   UpdateArguments<Rule>* update) {
  constexpr int kFewRules = 32;  // fit the 4 KiB of arguments that every launch has
  auto* const header = static_cast<StepHeader*>(memory.scratch);
  auto* const steps = reinterpret_cast<SpanStep<Rule>*>(header + 1);
  const SettleArguments<Rule> arguments{memory.scaled_norm, targets.on_device, header, steps, options};
  *update = {targets.on_device, header, steps, options.max_value, options.write_grads != 0};
  uint32_t first_span = 0;
  for (int64_t first = 0; first < num_rules; first += kMaxRules) {
    const int64_t count = std::min(num_rules - first, kMaxRules);
    const auto of_later_rules = std::partition_point(
        targets.entries.begin() + first_span, targets.entries.end(),
        [=](const FastclipCudaStepTarget& target) { return target.rule < first + count; });
    const auto end_span = static_cast<uint32_t>(of_later_rules - targets.entries.begin());
    const auto run = num_rules <= kFewRules ? settle_share<Rule, kFewRules> : settle_share<Rule, kMaxRules>;
    const cudaError_t error =
        run(rules + first, count, static_cast<uint32_t>(first), first_span, end_span, arguments, stream);
    if (error != cudaSuccess) return error;
    first_span = end_span;
  }
  return cudaSuccess;
}

template <class Rule>
TableKernel<UpdateArguments<Rule>> update_kernel() {
  return {update_spans<Rule, kSmallTable>, update_spans<Rule, kLargeTable>};
}

#define FASTCLIP_INSTANTIATE(Rule)                                                                      \
  template cudaError_t settle(const TargetTable&, const Rule*, int64_t, const FastclipCudaStepOptions&, \
                              const StepMemory&, cudaStream_t, UpdateArguments<Rule>*);                 \
  template TableKernel<UpdateArguments<Rule>> update_kernel<Rule>();
FASTCLIP_INSTANTIATE(FastclipCudaAdamRule)
FASTCLIP_INSTANTIATE(FastclipCudaSgdRule)
#undef FASTCLIP_INSTANTIATE

}  // namespace fastclip::cuda
