// Apply, inside the optimizer: update a parameter and its state from the clipped gradient, for inclusion in a
// kernels_*.cpp.
//
// Math        as torch.optim.Adam, AdamW and SGD define it, with g = grad * factor, bounded in its
//             magnitude if it is to be; the factor holds the clip coefficient, the scale of a GradScaler and
//             the sign of `maximize`.
// Partition   elementwise.
// Traffic     Adam reads 4 and writes 3 times numel * item size bytes (5 and 4 with amsgrad), SGD reads 3 and
//             writes 2 with momentum, 2 and 1 without. The gradient is never written.
// Order       none. Every operation is rounded by itself, without contraction, so all instruction sets agree;
//             the memory and not the arithmetic sets the pace.
// Requires    nothing of alignment; numel is 64-bit. The tensors of a chunk do not overlap.
// Range       computed in float32 (float64 for float64) and rounded once per stored value; nan and inf spread
//             as IEEE 754 has it, so the caller leaves out a step that is to be skipped.
// Scratch     none.
// Source      Kingma and Ba, Adam, 2015; Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019;
//             Reddi et al., On the Convergence of Adam and Beyond, 2018; torch/optim/{adam,sgd}.py.

template <class T>
struct StepMath {
  using Real = float;
  static Real sqrt(Real x) { return __builtin_sqrtf(x); }
  static T round(Real x) { return narrow<T>(x); }
};
template <>
struct StepMath<double> {
  using Real = double;
  static Real sqrt(Real x) { return __builtin_sqrt(x); }
  static double round(Real x) { return x; }
};

// A nan stays, and without a bound, inf, everything does.
template <class Real>
Real bounded(Real x, Real max_value) {
  x = x > max_value ? max_value : x;
  return x < -max_value ? -max_value : x;
}

template <class T, bool kCoupledDecay, bool kAmsgrad>
void adam_loop(const StepChunk& chunk, int64_t numel, const GradRule& grad_rule, const AdamCoefficients& c) {
  using Math = StepMath<T>;
  using Real = typename Math::Real;
  T* __restrict param = static_cast<T*>(chunk.param);
  const T* __restrict grad = static_cast<const T*>(chunk.grad);
  T* __restrict exp_avg = static_cast<T*>(chunk.state[0]);
  T* __restrict exp_avg_sq = static_cast<T*>(chunk.state[1]);
  T* __restrict max_exp_avg_sq = static_cast<T*>(chunk.state[2]);
  const Real factor = static_cast<Real>(grad_rule.factor), max_value = static_cast<Real>(grad_rule.max_value);
  const Real decay_factor = static_cast<Real>(c.decay_factor), decay = static_cast<Real>(c.coupled_decay);
  const Real beta1 = static_cast<Real>(c.beta1), grad_share = static_cast<Real>(1 - c.beta1);
  const Real beta2 = static_cast<Real>(c.beta2), square_share = static_cast<Real>(1 - c.beta2);
  const Real step_size = static_cast<Real>(c.step_size), eps = static_cast<Real>(c.eps);
  const Real correction = static_cast<Real>(c.bias_correction2_sqrt);
  for (int64_t i = 0; i < numel; ++i) {
    const Real before = widen(param[i]);
    Real g = bounded(widen(grad[i]) * factor, max_value);
    if (kCoupledDecay) g += decay * before;
    const Real first = beta1 * widen(exp_avg[i]) + grad_share * g;
    const Real second = beta2 * widen(exp_avg_sq[i]) + square_share * g * g;
    exp_avg[i] = Math::round(first);
    exp_avg_sq[i] = Math::round(second);
    Real divisor = second;
    if (kAmsgrad) {
      const Real largest = widen(max_exp_avg_sq[i]);
      // The negated comparison keeps a nan, as torch.maximum does.
      divisor = !(second <= largest) ? second : largest;
      max_exp_avg_sq[i] = Math::round(divisor);
    }
    const Real denominator = Math::sqrt(divisor) / correction + eps;
    param[i] = Math::round(before * decay_factor - step_size * first / denominator);
  }
}

template <class T>
void adam(const StepChunk& chunk, int64_t numel, const GradRule& grad_rule, const AdamCoefficients& c) {
  const bool coupled = c.coupled_decay != 0, amsgrad = chunk.state[2] != nullptr;
  const auto loop = coupled ? (amsgrad ? adam_loop<T, true, true> : adam_loop<T, true, false>)
                            : (amsgrad ? adam_loop<T, false, true> : adam_loop<T, false, false>);
  loop(chunk, numel, grad_rule, c);
}

enum class Momentum { kNone, kPlain, kNesterov };

template <class T, bool kDecay, Momentum kMomentum>
void sgd_loop(const StepChunk& chunk, int64_t numel, const GradRule& grad_rule, const SgdCoefficients& c) {
  using Math = StepMath<T>;
  using Real = typename Math::Real;
  T* __restrict param = static_cast<T*>(chunk.param);
  const T* __restrict grad = static_cast<const T*>(chunk.grad);
  T* __restrict buffer = static_cast<T*>(chunk.state[0]);
  const Real factor = static_cast<Real>(grad_rule.factor), max_value = static_cast<Real>(grad_rule.max_value);
  const Real lr = static_cast<Real>(c.lr);
  const Real decay = static_cast<Real>(c.weight_decay), momentum = static_cast<Real>(c.momentum);
  const Real grad_share = static_cast<Real>(c.grad_share);
  for (int64_t i = 0; i < numel; ++i) {
    const Real before = widen(param[i]);
    Real g = bounded(widen(grad[i]) * factor, max_value);
    if (kDecay) g += decay * before;
    if (kMomentum != Momentum::kNone) {
      const Real velocity = momentum * widen(buffer[i]) + grad_share * g;
      buffer[i] = Math::round(velocity);
      g = kMomentum == Momentum::kNesterov ? g + momentum * velocity : velocity;
    }
    param[i] = Math::round(before - lr * g);
  }
}

template <class T, bool kDecay>
void sgd_with(const StepChunk& chunk, int64_t numel, const GradRule& grad_rule, const SgdCoefficients& c) {
  const auto loop = chunk.state[0] == nullptr ? sgd_loop<T, kDecay, Momentum::kNone>
                    : c.nesterov              ? sgd_loop<T, kDecay, Momentum::kNesterov>
                                              : sgd_loop<T, kDecay, Momentum::kPlain>;
  loop(chunk, numel, grad_rule, c);
}

template <class T>
void sgd(const StepChunk& chunk, int64_t numel, const GradRule& grad_rule, const SgdCoefficients& c) {
  const auto loop = c.weight_decay != 0 ? sgd_with<T, true> : sgd_with<T, false>;
  loop(chunk, numel, grad_rule, c);
}
