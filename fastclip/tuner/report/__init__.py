"""What a study found, as one HTML file or as PNG pictures.

Needs `fastclip[tune,report]`. Works from an output directory or from a study, finished or not.
"""

try:
    import jinja2 as _jinja2  # noqa: F401
    import matplotlib as _matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fastclip.tuner.report: {error.name} is not installed; expected the extra `report`. pip install "
        "'fastclip[tune,report]'"
    ) from error

from fastclip.tuner.report.study_view import StudyView
from fastclip.tuner.report.writing import write_plots, write_report

__all__ = ["StudyView", "write_plots", "write_report"]
