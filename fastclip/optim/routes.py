"""The choice between the three ways to clip and step, best first: `native`, then torch's, which are here."""

from __future__ import annotations

from torch.optim import Optimizer

from fastclip.backends.base import Declined
from fastclip.errors import BackendUnavailableError
from fastclip.optim import native, plain, torch_fused
from fastclip.optim.gradients import Decided, first_nonfinite
from fastclip.optim.outcome import Tally
from fastclip.optim.settings import Amp, Settings

NAMES = ("native", "torch_fused", "plain")

LEFT_OUT = Declined("a GradScaler found inf")


def before_native(settings: Settings, amp: Amp, decided: Decided | None) -> Declined | None:
    """Return why a step is not even offered to fastclip's kernels, or None."""
    if settings.fused is False:
        return Declined("fused=False")
    # A scaler's verdict is on the host's own memory here, so nothing waits for it.
    is_left_out = decided is None and _is_on_cpu(amp) and amp.to_skip()
    return LEFT_OUT if is_left_out else None


def step_by_torch(
    optimizer: Optimizer, settings: Settings, amp: Amp, tally: Tally, decided: Decided | None, first: Declined
) -> str:
    """Clip and step by the first of torch's routes that takes this step, and count what happened.

    Args:
        optimizer: What steps.
        settings: How to clip.
        amp: What a GradScaler has set.
        tally: What counts.
        decided: What is known beforehand.
        first: Why fastclip's kernels do not take it.

    Returns:
        The route's name.

    Raises:
        BackendUnavailableError: `settings.fused` demands a folded route and there is none.
    """
    if settings.fused is not False:
        second = torch_fused.step(optimizer, settings, amp, decided)
        if not isinstance(second, Declined):
            tally.add(second)
            return "torch_fused"
        if settings.fused and first is not LEFT_OUT:
            raise BackendUnavailableError(unfolded("ClippedOptimizer", first.reason, second.reason))
    tally.add(plain.step(optimizer, settings, amp, decided))
    return "plain"


def require_folded(function: str, optimizer: Optimizer, settings: Settings) -> None:
    """Raise BackendUnavailableError if no folded route can ever take this optimizer."""
    first, second = native.unsupported(optimizer, settings), torch_fused.unsupported(optimizer)
    if first and second:
        raise BackendUnavailableError(unfolded(function, first, second))


def unfolded(function: str, native_reason: str, torch_reason: str) -> str:
    """Return the message for a demand that cannot be met."""
    return (
        f"{function}: fused=True, but the clip cannot be folded into this step: fastclip's kernels: "
        f"{native_reason}; torch's fused step: {torch_reason}. Use fused=None to clip first and step then."
    )


def settle(function: str, optimizer: Optimizer, settings: Settings, amp: Amp, tally: Tally) -> None:
    """Raise what the latest outcome calls for; asks the device only where a setting needs the answer.

    Raises:
        RuntimeError: The norm is not finite and `nonfinite` is "raise", or too many steps in a row were
            skipped. Parameters and state are as they were before the step.
    """
    if tally.last is None:
        return
    # With a scaler, a step that overflowed is how it finds its scale, and no fault.
    if settings.nonfinite == "raise" and amp.found_inf is None and bool(tally.last.skipped):
        raise RuntimeError(
            f"{function}: the total norm of order {settings.norm_type} is {float(tally.last.total_norm)}: "
            f"{first_nonfinite(optimizer, settings)}; expected finite gradients. Parameters and state are "
            f"unchanged; use nonfinite='skip' to go on without this step."
        )
    limit = settings.max_consecutive_skips
    if limit is not None and (skips := tally.stats().consecutive_skips) >= limit:
        raise RuntimeError(
            f"{function}: {skips} steps in a row were skipped because of gradients that are not finite; "
            f"expected fewer than max_consecutive_skips={limit}. Latest: "
            f"{first_nonfinite(optimizer, settings)}. Lower the learning rate or max_norm, or look at the "
            f"batches."
        )


def _is_on_cpu(amp: Amp) -> bool:
    return amp.found_inf is not None and amp.found_inf.device.type == "cpu"
