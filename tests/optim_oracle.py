"""Clip and step in float64, with a bound for the error of any implementation in a narrower type.

Beside each value stands an error that is propagated to first order through the same formula: what went in
with an error comes out with it, times the derivative, plus the roundings of the operation. u is the unit
roundoff of the stored dtype, v that of the arithmetic (float32, or float64 for float64). The counts of
roundings cover torch's order of operations, fused or not, as well as fastclip's:

    gradient    coefficient (norm, sum, quotient, product, a division by grad_scale), stored by torch: 8 v + u
    decay       product and sum: 2 v
    moments     constants, products and sum of b |old| + (1 - b) (|new| + |old|): 4 v, stored: u
    squares     one product more: 5 v, stored: u
    quotient    root, correction, eps, step size, product, quotient: 8 v
    parameter   decay factor and product, difference: 3 v, stored: u
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from fastclip import reference


@dataclass
class Bounded:
    """A float64 value and the largest error that an implementation may have made on the way to it."""

    value: Tensor
    error: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> Bounded:
        value = value.detach().to(torch.float64)
        return cls(value, torch.zeros_like(value))

    def assert_near(self, got: Tensor, what: str, times: float = 1.0) -> None:
        error = (got.detach().to("cpu", torch.float64) - self.value).abs()
        excess = error - times * self.error
        assert bool((excess <= 0).all()), (
            f"{what}: {excess.max():.3g} beyond a bound of {self.error.max():.3g}"
        )


class Oracle:
    """Follows one optimizer's parameters and state through clipped steps."""

    def __init__(self, optimizer: Optimizer, max_norm: float, norm_type: float = 2.0) -> None:
        self.optimizer, self.max_norm, self.norm_type = optimizer, max_norm, norm_type
        (self.group,) = optimizer.param_groups
        params = self.group["params"]
        self.dtype = params[0].dtype
        stored = torch.finfo(self.dtype)
        computed = torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32)
        self.u, self.v = stored.eps / 2, computed.eps / 2
        self.tiny = stored.smallest_normal * stored.eps / 2  # below the normal range
        self.params = [Bounded.exact(p) for p in params]
        self.state: list[dict[str, Bounded]] = [{} for _ in params]
        self.num_steps = 0

    def step(self, grads: list[Tensor]) -> None:
        """Take the gradients as they are stored."""
        self.num_steps += 1
        clipped = reference.clipped(grads, self.max_norm, self.norm_type)
        for i, grad in enumerate(clipped):
            sign = -1.0 if self.group["maximize"] else 1.0
            error = grad.abs() * (8 * self.v + self.u) + self.tiny
            update = self._sgd if isinstance(self.optimizer, SGD) else self._adam
            self.params[i] = update(self.params[i], Bounded(sign * grad, error), self.state[i])

    def _decayed(self, grad: Bounded, param: Bounded, decay: float) -> Bounded:
        if decay == 0:
            return grad
        magnitude = grad.value.abs() + decay * param.value.abs()
        return Bounded(
            grad.value + decay * param.value, grad.error + decay * param.error + 2 * self.v * magnitude
        )

    def _average(self, old: Bounded, new: Bounded, keep: float, share: float, roundings: int) -> Bounded:
        value = keep * old.value + share * new.value
        magnitude = keep * old.value.abs() + abs(share) * (new.value.abs() + old.value.abs())
        error = keep * old.error + abs(share) * new.error + roundings * self.v * magnitude
        return self._stored(value, error)

    def _stored(self, value: Tensor, error: Tensor) -> Bounded:
        return Bounded(value, error + self.u * (value.abs() + error) + self.tiny)

    def _adam(self, param: Bounded, grad: Bounded, state: dict[str, Bounded]) -> Bounded:
        group, v = self.group, self.v
        lr, (beta1, beta2), eps = float(group["lr"]), group["betas"], group["eps"]
        zero = Bounded.exact(torch.zeros_like(param.value))
        decoupled = group["decoupled_weight_decay"]
        grad = self._decayed(grad, param, 0.0 if decoupled else group["weight_decay"])
        first = self._average(state.get("exp_avg", zero), grad, beta1, 1 - beta1, 4)
        square = Bounded(grad.value.square(), 2 * grad.value.abs() * grad.error + grad.error.square())
        second = self._average(state.get("exp_avg_sq", zero), square, beta2, 1 - beta2, 5)
        state["exp_avg"], state["exp_avg_sq"] = first, second
        if group["amsgrad"]:
            before = state.get("max_exp_avg_sq", zero)
            second = Bounded(
                torch.maximum(before.value, second.value), torch.maximum(before.error, second.error)
            )
            state["max_exp_avg_sq"] = second
        correction = math.sqrt(1 - beta2**self.num_steps)
        step_size = lr / (1 - beta1**self.num_steps)
        low = (second.value - second.error).clamp(min=0).sqrt() / correction + eps
        high = (second.value + second.error).sqrt() / correction + eps
        quotient = step_size * first.value / (second.value.sqrt() / correction + eps)
        largest = step_size * (first.value.abs() + first.error) / low
        smallest = step_size * (first.value.abs() - first.error) / high
        error = torch.maximum(largest - quotient.abs(), quotient.abs() - smallest) + 8 * v * largest
        factor = 1 - lr * group["weight_decay"] if decoupled else 1.0
        value = factor * param.value - quotient
        roundings = 3 * v * (param.value.abs() + quotient.abs() + error)
        return self._stored(value, abs(factor) * param.error + error + roundings)

    def _sgd(self, param: Bounded, grad: Bounded, state: dict[str, Bounded]) -> Bounded:
        group, v = self.group, self.v
        lr, momentum = float(group["lr"]), group["momentum"]
        grad = self._decayed(grad, param, group["weight_decay"])
        if momentum != 0:
            if "momentum_buffer" in state:
                old = state["momentum_buffer"]
                buffer = self._average(old, grad, momentum, 1 - group["dampening"], 4)
            else:
                buffer = self._stored(grad.value, grad.error)
            state["momentum_buffer"] = buffer
            if group["nesterov"]:
                magnitude = grad.value.abs() + momentum * buffer.value.abs()
                error = grad.error + momentum * buffer.error + 3 * v * magnitude
                grad = Bounded(grad.value + momentum * buffer.value, error)
            else:
                grad = buffer
        value = param.value - lr * grad.value
        roundings = 3 * v * (param.value.abs() + lr * grad.value.abs())
        return self._stored(value, param.error + lr * grad.error + roundings)

    def assert_near(self, optimizer: Optimizer, times: float = 1.0) -> None:
        """Compare parameters and state of an optimizer that has taken the same steps."""
        (group,) = optimizer.param_groups
        for i, param in enumerate(group["params"]):
            self.params[i].assert_near(param, f"parameter {i}", times)
            for name, bounded in self.state[i].items():
                bounded.assert_near(optimizer.state[param][name], f"{name} of parameter {i}", times)
