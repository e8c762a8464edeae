"""Route 1: a step by a backend's kernels, which read norm and clip the gradients on the way into the update.

For exactly torch.optim.Adam, AdamW and SGD. The state is torch's own, made as torch makes it (`state`), so
checkpoints go in and out of plain torch. `fastclip.backends` chooses whose kernels take a step, as for every
other operation; what they have to know of it is a `request`.
"""

from __future__ import annotations

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastclip import backends
from fastclip.backends import Backend
from fastclip.backends.base import Declined
from fastclip.backends.step import Stepped, Unready
from fastclip.optim.gradients import Decided
from fastclip.optim.native.request import request
from fastclip.optim.native.state import discard_state, make_ready
from fastclip.optim.outcome import NO_GRADIENTS, Outcome, Tally
from fastclip.optim.settings import Amp, Settings

Answer = Stepped | Unready | Declined | None


def unsupported(optimizer: Optimizer, settings: Settings) -> str | None:
    """Return why this optimizer can never take this route, or None."""
    return _no_kernel_for(optimizer, settings) or backends.without_kernels()


def _no_kernel_for(optimizer: Optimizer, settings: Settings) -> str | None:
    if type(optimizer) not in (Adam, AdamW, SGD):
        return f"fastclip has kernels for torch.optim.Adam, AdamW and SGD, not for {type(optimizer).__name__}"
    if not settings.norm_type > 0:
        return f"there is no kernel for norm_type={settings.norm_type}"
    return None


def step(
    optimizer: Optimizer, settings: Settings, amp: Amp, tally: Tally, decided: Decided | None
) -> Outcome | Declined:
    """Clip and update in one call, and count what happened; of DTensors their memory on this rank.

    Moves what the update moves, and unless it is `decided` reads the gradients once more. `.grad` keeps its
    values unless `settings.write_grads`. On a device the host waits for a step that made state, if that can
    have been skipped, and for no other.
    """
    if reason := _no_kernel_for(optimizer, settings) or _declined_now(optimizer):
        return Declined(reason)
    asked = request(optimizer, settings, amp, tally, decided)
    if isinstance(asked, Declined):
        return asked
    made: list[Tensor] = []
    is_taken = False
    try:
        answer: Answer
        answer = backends.run_foreach(None, Backend.clip_and_step, asked)
        if isinstance(answer, Unready):
            made = make_ready(optimizer, answer)
            answer = backends.run_foreach(None, Backend.clip_and_step, asked._replace(fresh=set(made)))
            if isinstance(answer, Unready):
                answer = Declined("a parameter's state is incomplete")
        is_taken = not isinstance(answer, Declined)
    finally:
        if not is_taken:
            discard_state(optimizer, made)
    if isinstance(answer, Declined):
        return answer
    # A scheduler that was given the wrapped optimizer looks here to warn of a step left out.
    optimizer._opt_called = True  # type: ignore[attr-defined]
    outcome = _counted(answer, tally, decided)
    may_skip = settings.skips or amp.found_inf is not None if decided is None else decided.may_skip
    if made and may_skip and bool(outcome.skipped):
        discard_state(optimizer, made)
    return outcome


def _counted(answer: Stepped | None, tally: Tally, decided: Decided | None) -> Outcome:
    """Return what happened, and count it unless the kernels have."""
    outcome = NO_GRADIENTS if answer is None else Outcome.of(answer)
    if decided is not None:
        outcome = decided.outcome
    if answer is not None and isinstance(answer.skipped, Tensor):
        tally.last = outcome
    else:
        tally.add(outcome)
    return outcome


def _declined_now(optimizer: Optimizer) -> str | None:
    if backends.is_tracing():
        return "torch traces or compiles this step"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the wrapped optimizer has step hooks of its own"
    own_step = vars(optimizer).get("step")
    if own_step is not None and not hasattr(own_step, "_wrapped_by_lr_sched"):
        return "the wrapped optimizer's step was replaced"
    for number, group in enumerate(optimizer.param_groups):
        if group["differentiable"]:
            return f"group {number} is differentiable"
    return None
