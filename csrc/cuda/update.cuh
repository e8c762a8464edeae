// The updates of Adam, AdamW and SGD: one element in registers, and the pieces of a span in memory.
#pragma once

#include "../finalize.h"
#include "elements.cuh"

namespace fastclip::cuda {

// In which precision elements are updated, and how results are stored.
template <class T>
struct Arithmetic {
  using Real = float;
  static __device__ T rounded(float x) { return narrow<T>(x); }
};
template <>
struct Arithmetic<double> {
  using Real = double;
  static __device__ double rounded(double x) { return x; }
};

// An update answers with the new parameter and changes the state in place, unrounded. `kNumStates` is how
// many tensors of state it has.
template <class Real, bool kAmsgrad>
struct AdamUpdate {
  static constexpr int kNumStates = kAmsgrad ? 3 : 2;

  Real decay_factor, coupled_decay, beta1, grad_share, beta2, square_share, step_size, per_correction, eps;

  explicit __device__ AdamUpdate(const AdamCoefficients& c)
      : decay_factor(static_cast<Real>(c.decay_factor)),
        coupled_decay(static_cast<Real>(c.coupled_decay)),
        beta1(static_cast<Real>(c.beta1)),
        grad_share(static_cast<Real>(1 - c.beta1)),
        beta2(static_cast<Real>(c.beta2)),
        square_share(static_cast<Real>(1 - c.beta2)),
        step_size(static_cast<Real>(c.step_size)),
        per_correction(static_cast<Real>(1 / c.bias_correction2_sqrt)),
        eps(static_cast<Real>(c.eps)) {}

  __device__ Real operator()(Real param, Real grad, Real* state) const {
    // Without decay an infinite parameter must not become nan.
    if (coupled_decay != 0) grad += coupled_decay * param;
    state[0] = beta1 * state[0] + grad_share * grad;
    state[1] = beta2 * state[1] + square_share * grad * grad;
    Real divisor = state[1];
    if constexpr (kAmsgrad) {
      // The negated comparison keeps a nan, as torch.maximum does.
      state[2] = divisor = !(divisor <= state[2]) ? divisor : state[2];
    }
    return param * decay_factor - step_size * state[0] / (sqrt(divisor) * per_correction + eps);
  }
};

template <class Real, bool kMomentum>
struct SgdUpdate {
  static constexpr int kNumStates = kMomentum ? 1 : 0;

  Real lr, weight_decay, momentum, grad_share;
  bool nesterov;

  explicit __device__ SgdUpdate(const SgdCoefficients& c)
      : lr(static_cast<Real>(c.lr)),
        weight_decay(static_cast<Real>(c.weight_decay)),
        momentum(static_cast<Real>(c.momentum)),
        grad_share(static_cast<Real>(c.grad_share)),
        nesterov(c.nesterov) {}

  __device__ Real operator()(Real param, Real grad, Real* state) const {
    if (weight_decay != 0) grad += weight_decay * param;
    if constexpr (kMomentum) {
      state[0] = momentum * state[0] + grad_share * grad;
      grad = nesterov ? grad + momentum * state[0] : state[0];
    }
    return param - lr * grad;
  }
};

// What becomes of a gradient before the update sees it.
template <class Real>
struct GradRule {
  Real factor;
  Real max_value;  // bound of the magnitude, after the factor; inf: none
  bool maximize;
  bool written;  // leave what the gradient becomes behind, and update with that, as rounded
};

// A nan stays, and without a bound everything does.
template <class Real>
__device__ Real bounded(Real x, Real max_value) {
  x = x > max_value ? max_value : x;
  return x < -max_value ? -max_value : x;
}

// kCount neighbours, moved 16 bytes at a time, or all at once where they are fewer.
template <class T, int kCount>
struct Neighbours {
  static constexpr size_t kBytes = sizeof(T) * kCount;
  using Word = std::conditional_t<kBytes % sizeof(uint4) == 0, uint4,
                                  std::conditional_t<kBytes == sizeof(uint2), uint2, T>>;
  static constexpr int kWords = kBytes / sizeof(Word);

  union {
    Word words[kWords];
    T element[kCount];
  };

  __device__ void load(const T* at) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const Word*>(at)[i];
  }

  __device__ void store(T* at) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<Word*>(at)[i] = words[i];
  }
};

// A parameter and a gradient of elements T with state of elements S, from the first element of a piece.
template <class T, class S, int kNumStates>
struct Operands {
  T* param;
  T* grad;
  S* state[kNumStates > 0 ? kNumStates : 1];

  __device__ Operands(const Piece<T>& piece, const FastclipCudaStepTarget& target)
      : param(static_cast<T*>(target.param) + piece.first()), grad(piece.data()) {
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) state[s] = static_cast<S*>(target.state[s]) + piece.first();
  }

  // Whether all of them are at a 16-byte boundary from element `head` on, where the gradient is.
  __device__ bool aligned_at(int head) const {
    auto address = reinterpret_cast<uintptr_t>(param + head);
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) address |= reinterpret_cast<uintptr_t>(state[s] + head);
    return address % sizeof(uint4) == 0;
  }

  template <int kCount, class Update, class Real>
  __device__ void update(int64_t at, const Update& update, const GradRule<Real>& rule) const {
    Neighbours<T, kCount> params, grads;
    Neighbours<S, kCount> states[kNumStates > 0 ? kNumStates : 1];
    params.load(param + at);
    grads.load(grad + at);
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) states[s].load(state[s] + at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Real g = bounded<Real>(widen(grads.element[i]) * rule.factor, rule.max_value);
      if (rule.written) {
        grads.element[i] = Arithmetic<T>::rounded(g);
        g = widen(grads.element[i]);
      }
      Real widened[kNumStates > 0 ? kNumStates : 1];
#pragma unroll
      for (int s = 0; s < kNumStates; ++s) widened[s] = widen(states[s].element[i]);
      const Real updated = update(widen(params.element[i]), rule.maximize ? -g : g, widened);
      params.element[i] = Arithmetic<T>::rounded(updated);
#pragma unroll
      for (int s = 0; s < kNumStates; ++s) states[s].element[i] = Arithmetic<S>::rounded(widened[s]);
    }
    params.store(param + at);
    if (rule.written) grads.store(grad + at);
#pragma unroll
    for (int s = 0; s < kNumStates; ++s) states[s].store(state[s] + at);
  }
};

// Updates a piece, its end first; element by element where the tensors differ in alignment.
template <class S, class T, class Update, class Real>
__device__ void update_piece(const Piece<T>& piece, const FastclipCudaStepTarget& target,
                             const Update& update, const GradRule<Real>& rule) {
  // What fills 16 bytes of the wider type.
  constexpr int kCount = sizeof(uint4) / (sizeof(T) < sizeof(S) ? sizeof(S) : sizeof(T));
  const Operands<T, S, Update::kNumStates> operands(piece, target);
  const auto thread = static_cast<int>(threadIdx.x);
  if (!operands.aligned_at(piece.head())) {
#pragma unroll 1
    for (int64_t i = thread; i < piece.numel(); i += kThreads) operands.template update<1>(i, update, rule);
    return;
  }
  const int64_t num_groups = piece.num_vectors() * (Vector<T>::kSize / kCount);
  // Signed, so that the last round of threads ends below zero.
#pragma unroll 1
  for (int64_t first = (num_groups - 1) / kThreads * kThreads; first >= 0; first -= kThreads) {
    const int64_t i = first + thread;
    if (i < num_groups) operands.template update<kCount>(piece.head() + i * kCount, update, rule);
  }
  if (thread < piece.num_scalars()) {
    operands.template update<1>(piece.scalar(thread) - piece.data(), update, rule);
  }
}

}  // namespace fastclip::cuda
