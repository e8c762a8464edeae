"""What the pictures of a study add to the style of all reports: a colour and a marker for each outcome."""

from __future__ import annotations

from fastclip.tuner.training.explosion import Verdict

# The palette of Okabe and Ito, which people with any colour vision can tell apart.
COLOURS = {
    Verdict.OK: "#0072B2",
    Verdict.COLLAPSED: "#F0E442",
    Verdict.EXPLODED: "#D55E00",
    Verdict.OOM: "#CC79A7",
    Verdict.PRUNED: "#8C8C8C",
    Verdict.ERROR: "#222222",
    Verdict.KILLED: "#7A5C00",
    Verdict.OUT_OF_TIME: "#009E73",
    Verdict.DEGENERATE: "#56B4E9",
    Verdict.NOT_RUN: "#C8C8C8",
}
MARKERS = {
    Verdict.OK: "o",
    Verdict.COLLAPSED: "D",
    Verdict.EXPLODED: "X",
    Verdict.PRUNED: "v",
    Verdict.OOM: "s",
}
OTHER_MARKER = "P"
