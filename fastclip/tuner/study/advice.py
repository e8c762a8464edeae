"""What to do when every trial fails, drawn from what was seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fastclip.tuner.errors import AllTrialsExplodedError, AllTrialsFailedError
from fastclip.tuner.study.records import TrialRecord, explosions
from fastclip.tuner.training.explosion import Verdict

RATE_STEP = 10.0


def failure(records: Sequence[TrialRecord]) -> AllTrialsFailedError:
    """Return the error to raise for a study without a single score."""
    counts = Counter(str(record.status) for record in records)
    seen = ", ".join(f"{count} {status}" for status, count in counts.most_common()) or "no trial finished"
    exploded = [record for record in records if record.status is Verdict.EXPLODED]
    if exploded and len(exploded) == len(records):
        return AllTrialsExplodedError(
            f"TunerCV: all {len(records)} trials exploded; expected at least one to train. "
            f"{' '.join(after_explosions(exploded))}",
            explosions(records),
        )
    hints = after_explosions(exploded) if exploded else []
    if counts[str(Verdict.OOM)]:
        hints.append("Memory ran out: lower batch_size or the size of the model.")
    if counts[str(Verdict.OUT_OF_TIME)]:
        hints.append("The time budget ended before a trial did: raise timeout, or lower max_epochs.")
    messages = [f.message.strip().splitlines()[-1] for r in records for f in r.folds if f.message.strip()]
    if messages and not hints:
        hints.append(f"The first message was: {messages[0]}")
    return AllTrialsFailedError(
        f"TunerCV: no trial ended with a score ({seen}); expected at least one. {' '.join(hints)}".strip()
    )


def after_explosions(exploded: Sequence[TrialRecord]) -> list[str]:
    """Return sentences that say which rates exploded and how soon, and what to change first."""
    seen = explosions(exploded)
    steps = [explosion["step"] for explosion in seen]
    sentences = [
        f"The exploded trials survived {min(steps)} to {max(steps)} steps; "
        f"the first said: {seen[0]['reason']}."
    ]
    rates = [record.params["lr"] for record in exploded if "lr" in record.params]
    if rates:
        sentences.append(
            f"lr went from {min(rates):.3g} to {max(rates):.3g}: search below {min(rates) / RATE_STEP:.2g}."
        )
    medians = [explosion["norm_median"] for explosion in seen if explosion["norm_median"] is not None]
    unclipped = [record for record in exploded if record.params.get("max_norm") is None]
    threshold = (
        f" of about {np.median(medians):.2g}, the median norm before the explosions" if medians else ""
    )
    if unclipped:
        sentences.append(f"{len(unclipped)} of them did not clip: set max_norm, to a threshold{threshold}.")
    elif medians:
        lowest = min(record.params["max_norm"] for record in exploded)
        sentences.append(f"max_norm went down to {lowest:.3g}: try a threshold{threshold} or below.")
    if max(steps) == 0:
        sentences.append(
            "The first gradients were not finite: look at init, init_gain and the scale of the data."
        )
    return sentences
