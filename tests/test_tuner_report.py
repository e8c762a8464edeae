import base64
import re
import shutil
import sys
from itertools import pairwise
from xml.etree import ElementTree

import optuna
import pytest
import tuner_cases as cases
from click.testing import CliRunner
from matplotlib.figure import Figure
from programs import run_python
from report_cases import MadeUpStudy, exploded, fold, scored
from report_pages import Page
from sklearn.exceptions import NotFittedError

from fastclip.pages.ticks import scale_log
from fastclip.tuner import Choice, Float, TunerCV
from fastclip.tuner.cli import tune
from fastclip.tuner.report import StudyView, write_plots, write_report, writing
from fastclip.tuner.report.limits import score_limits
from fastclip.tuner.study.output import OutputDir
from fastclip.tuner.training.explosion import Verdict

optuna.logging.set_verbosity(optuna.logging.WARNING)

NAMES = [picture.name for picture in writing.PICTURES]
CONFIG = """
[study]
n_trials = 2
max_epochs = 1
[model]
factory = "tuner_cases:{factory}"
[data]
source = "tuner_cases:blobs"
[cv]
folds = 2
[space]
lr = {{ low = 0.01, high = 0.1 }}
"""
PNG = b"\x89PNG\r\n\x1a\n"


def drawing(view: StudyView, name: str):
    """Return the axes of a picture."""
    return next(p for p in writing.PICTURES if p.name == name).draw(view).axes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a search in which half of the trials explode."""
    path = tmp_path_factory.mktemp("study") / "run"
    space = {"lr": Float(0.05, 1.0, log=True), "max_norm": Float(0.1, 10.0, log=True), "momentum": 0.5}
    options = {"cv": 3, "max_epochs": 3, "n_trials": 16, "sampler": "random"}
    TunerCV(cases.nan_above_half, space, output_dir=path, **options).fit(cases.blobs())
    return path


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    return Page(write_report(StudyView.open(run), tmp_path_factory.mktemp("page") / "report.html"))


class TestPage:
    def test_nothing_is_fetched(self, page):
        assert page.sources
        assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
        assert {"link", "iframe", "object", "base"}.isdisjoint(tag for tag, _ in page.tags)

    def test_every_picture_is_there(self, page):
        assert list(page.pictures) == NAMES
        for source in page.pictures.values():
            svg = base64.b64decode(source.partition(",")[2])
            root = ElementTree.fromstring(svg)
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            assert not re.search(rb'href="(?!#|data:)', svg)

    def test_every_trial_has_its_row(self, page, run):
        records = StudyView.open(run).records
        badges = [attrs["class"] for tag, attrs in page.tags if "badge" in (attrs.get("class") or "")]
        assert badges == [f"badge {record.status}" for record in records]
        assert {"badge ok", "badge exploded"} <= set(badges) <= {
            "badge ok", "badge exploded", "badge collapsed",
        }  # fmt: skip
        assert page.text.count("the loss is nan") >= badges.count("badge exploded")

    def test_what_decides_stands_on_the_left_of_the_trials(self, tmp_path):
        study = MadeUpStudy(n_folds=10).add(scored(*[0.9] * 10), lr=0.1, max_norm=1.0)
        html = write_report(study.view, tmp_path / "report.html").read_text()
        table = html.partition('<table id="trials">')[2].partition("</thead>")[0]
        headings = re.findall(r"<th(?: [^>]*)?>([^<]*)", table)
        first = ["trial", "status", "accuracy", "lr", "max_norm", "what happened"]
        assert headings == [*first, "clipped", "steps", "seconds", *(f"fold {i}" for i in range(10))]
        row = html.partition('<table id="trials">')[2].partition("<tbody>")[2].partition("</tr>")[0]
        cells = [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
        assert cells == ["0", "ok", "0.9", "0.1", "1", "", "30 %", "400", "0.0", *["0.9"] * 10]

    def test_dark_screens_and_phones_are_served(self, page, run, tmp_path):
        html = write_report(StudyView.open(run), tmp_path / "report.html").read_text()
        assert ("meta", {"name": "color-scheme", "content": "light dark"}) in page.tags
        assert "@media (prefers-color-scheme: dark)" in html
        opened = [attrs.get("class") if tag == "div" else tag for tag, attrs in page.tags]
        tables = [i for i, tag in enumerate(opened) if tag == "table"]
        assert len(tables) >= 3
        assert {opened[i - 1] for i in tables} == {"scroll"}  # a table scrolls, and never the page

    def test_directory_alone_is_enough(self, run, tmp_path):
        moved = shutil.copytree(run, tmp_path / "moved")
        pages = [
            write_report(StudyView.open(folder), tmp_path / f"{i}.html")
            for i, folder in enumerate((run, moved))
        ]
        assert pages[0].read_bytes() == pages[1].read_bytes()

    def test_names_and_messages_are_text_and_not_markup(self, tmp_path):
        study = MadeUpStudy(name="<script>alert(1)</script>").add(scored(0.9, 0.9, 0.9), lr=0.1)
        study.add([fold(status=Verdict.ERROR, message="<img src=x>")], lr=0.2)
        page = Page(write_report(study.view, tmp_path / "report.html"))
        assert "<script>alert(1)</script>" in page.text
        assert "<img src=x>" in page.text
        assert [tag for tag, _ in page.tags].count("script") == 1

    def test_failing_leaves_the_old_file(self, run, tmp_path, monkeypatch):
        path = tmp_path / "report.html"
        path.write_text("old")

        def fail(handle):
            raise OSError("no space left")

        monkeypatch.setattr("fastclip.files.os.fsync", fail)
        with pytest.raises(OSError, match="no space left"):
            write_report(StudyView.open(run), path)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


class TestStudies:
    def test_every_trial_exploded(self, tmp_path):
        space = {"lr": Choice([0.2, 0.4]), "max_norm": Choice([None])}
        search = TunerCV(cases.always_nan, space, sampler="grid", cv=2, output_dir=tmp_path / "run")
        with pytest.raises(RuntimeError, match="all 2 trials exploded"):
            search.fit(cases.blobs())
        page = Page(write_report(StudyView.open(tmp_path / "run"), tmp_path / "report.html"))
        assert "All 2 trials exploded" in page.text
        assert "lr went from 0.2 to 0.4: search below 0.02" in page.text
        assert set(NAMES) - set(page.pictures) == {"fold_scores", "importances"}
        assert "No trial has a score on every fold" in page.text

    def test_interrupted(self, tmp_path):
        def stop(study, trial):
            if trial.number == 1:
                raise KeyboardInterrupt

        search = TunerCV(
            cases.mlp, {"lr": Float(0.01, 0.1)}, cv=2, max_epochs=2, n_trials=5, callbacks=[stop],
            output_dir=tmp_path / "run",
        )  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            search.fit(cases.blobs())
        page = Page(write_report(StudyView.open(tmp_path / "run"), tmp_path / "report.html"))
        assert "2 of 5 trials have finished: resume the search" in page.text
        assert {"search_history", "fold_scores", "learning_curves"} <= set(page.pictures)

    def test_trial_under_way_is_counted_and_not_listed(self, tmp_path):
        study = MadeUpStudy().add(scored(0.8, 0.9, 0.9), lr=0.1).add(scored(0.9), lr=0.2, is_told=False)
        page = Page(write_report(study.view, tmp_path / "report.html"))
        assert "1 trial(s) are under way" in page.text
        assert sum("badge" in (attrs.get("class") or "") for _, attrs in page.tags) == 1

    def test_nothing_finished(self, tmp_path):
        page = Page(write_report(MadeUpStudy().view, tmp_path / "report.html"))
        assert page.pictures == {}
        assert "No trial has finished" in page.text
        assert write_plots(MadeUpStudy().view, tmp_path / "plots") == []

    def test_every_verdict_can_be_shown(self, tmp_path):
        study = MadeUpStudy().add(scored(0.8, 0.9, 0.9), lr=0.1, max_norm=1.0)
        for status in set(Verdict) - {Verdict.OK, Verdict.NOT_RUN, Verdict.DEGENERATE}:
            score = 0.3 if status is Verdict.COLLAPSED else None
            study.add([fold(score, status, message="what went wrong")], lr=0.5, max_norm=None)
        study.add([fold(status=Verdict.DEGENERATE, norms={}), *scored(0.7, 0.8)], lr=0.1, max_norm=1.0)
        page = Page(write_report(study.view, tmp_path / "report.html"))
        assert page.text.count("what went wrong") >= 4
        assert len(drawing(study.view, "search_history")[0].get_legend().get_texts()) == 2 + 7

    def test_study_in_another_storage(self, tmp_path):
        url = f"sqlite:///{tmp_path}/elsewhere.db"
        options = {"cv": 2, "max_epochs": 1, "n_trials": 1, "storage": url, "output_dir": tmp_path / "run"}
        TunerCV(cases.mlp, {"lr": Float(0.01, 0.1)}, **options).fit(cases.blobs())
        with pytest.raises(FileNotFoundError, match=r"has no study\.db.*--storage"):
            StudyView.open(tmp_path / "run")
        assert len(StudyView.open(tmp_path / "run", url).records) == 1

    def test_what_is_no_study_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"has no config\.json.*Give the output directory"):
            StudyView.open(tmp_path)
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(ValueError, match="was not made by fastclip"):
            StudyView(optuna.create_study())


class TestTuner:
    def test_report_of_a_study_in_memory(self, tmp_path):
        options = {"cv": 2, "max_epochs": 1, "n_trials": 2, "refit": False}
        search = TunerCV(cases.mlp, {"lr": Float(0.01, 0.1)}, **options)
        with pytest.raises(NotFittedError):
            search.report(tmp_path / "report.html")
        with pytest.raises(ValueError, match="neither path nor output_dir"):
            search.fit(cases.blobs()).report()
        page = Page(search.report(tmp_path / "report.html"))
        assert "gradient_norms" in page.pictures
        assert "Epoch records are kept in an output directory" in page.text

    def test_report_of_a_failed_search_goes_to_its_directory(self, tmp_path):
        search = TunerCV(cases.always_nan, {"lr": Float(0.1, 1.0)}, cv=2, n_trials=2, output_dir=tmp_path)
        with pytest.raises(RuntimeError):
            search.fit(cases.blobs())
        assert "All 2 trials exploded" in Page(search.report()).text
        assert (tmp_path / "report.html").exists()


class TestCommands:
    def invoke(self, *arguments):
        return CliRunner().invoke(tune, [str(argument) for argument in arguments])

    def test_report_and_plots(self, run, tmp_path):
        moved = shutil.copytree(run, tmp_path / "moved")
        done = self.invoke("report", moved, "--plots", tmp_path / "plots")
        assert done.exit_code == 0
        assert f"6 pictures in {tmp_path / 'plots'}" in done.output
        assert len(list((tmp_path / "plots").iterdir())) == 6
        page = (moved / "report.html").read_bytes()
        assert self.invoke("report", run, "-o", tmp_path / "other.html").exit_code == 0
        assert (tmp_path / "other.html").read_bytes() == page

    def test_directory_without_a_study_is_refused(self, tmp_path):
        done = self.invoke("report", tmp_path)
        assert done.exit_code == 1
        assert "has no config.json" in done.output
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("factory", "code"), [("mlp", 0), ("always_nan", 1)])
    def test_run_leaves_a_report(self, tmp_path, factory, code):
        config = tmp_path / "study.toml"
        config.write_text(CONFIG.format(factory=factory))
        done = self.invoke("run", config, "-o", tmp_path / "run")
        assert done.exit_code == code
        assert f"report: {tmp_path / 'run' / 'report.html'}" in done.output
        assert (tmp_path / "run" / "report.html").exists()

    def test_run_without_the_extra_says_so(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "fastclip.tuner.report", None)
        config = tmp_path / "study.toml"
        config.write_text(CONFIG.format(factory="mlp"))
        done = self.invoke("run", config, "-o", tmp_path / "run")
        assert done.exit_code == 0
        assert "no report: " in done.output
        assert not (tmp_path / "run" / "report.html").exists()


class TestPictures:
    def test_plots_are_png_files(self, run, tmp_path):
        files = write_plots(StudyView.open(run), tmp_path / "plots")
        assert [path.stem for path in files] == NAMES
        assert all(path.read_bytes().startswith(PNG) for path in files)
        assert sorted(files) == sorted((tmp_path / "plots").iterdir())

    def test_history_shows_the_best_so_far(self):
        study = MadeUpStudy()
        for value in (0.5, 0.8, 0.6, 0.9):
            study.add(scored(value), lr=0.1)
        study.add(exploded(), lr=0.9)
        axes = drawing(study.view, "search_history")[0]
        assert axes.lines[0].get_ydata().tolist() == [0.5, 0.8, 0.8, 0.9]
        assert [len(points.get_offsets()) for points in axes.collections] == [4, 1]

    def test_history_of_a_loss_falls(self):
        study = MadeUpStudy(direction="minimize", primary="loss")
        for value in (0.5, 0.8, 0.3):
            study.add(scored(value), lr=0.1)
        assert drawing(study.view, "search_history")[0].lines[0].get_ydata().tolist() == [0.5, 0.5, 0.3]
        assert study.view.best.number == 2
        axes = drawing(study.add(exploded(), lr=0.9).view, "search_history")[0]
        assert (
            axes.collections[1].get_offsets()[0, 1] > 0.5
        )  # exploded trials stand above, where losses are high

    def test_outliers_neither_squash_the_history_nor_the_colours(self):
        study = MadeUpStudy()
        for value in (0.90, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.1):
            study.add(scored(value), lr=0.1, max_norm=1.0)
        history = drawing(study.view, "search_history")[0]
        bottom, top = history.get_ylim()
        assert 0.88 < bottom < 0.90 < 0.96 < top < 0.98
        ((place, edge),) = history.collections[-1].get_offsets().tolist()
        assert place == 7
        assert bottom < edge < 0.90
        assert "1 beyond the axis" in [text.get_text() for text in history.get_legend().get_texts()]
        assert [text.get_text() for text in history.texts] == ["trial 6"]
        trained = drawing(study.view, "explosion_map")[0].collections[0]
        assert trained.get_clim() == (0.90, 0.96)
        lightness = trained.to_rgba([0.90, 0.96])[:, :3].mean(axis=1)
        assert lightness[1] < lightness[0]  # dark on white, light where a page is inverted

    @pytest.mark.parametrize(
        ("scores", "sign", "limits"),
        [
            ([0.5, 0.5], 1, (0.5, 0.5)),
            ([0.9, 0.8, 0.7, 0.1], 1, (0.1, 0.9)),  # the quartile of the bad half is 0.55
            ([1.0, 1.1, 1.2, 1.3, 1.4, 900.0], -1, (1.0, 1.4)),
            ([1.0, 1.1, 1.2, 1.3, 1.4, 900.0], 1, (1.0, 900.0)),  # the best is shown whatever it is
        ],
    )
    def test_limits_hold_the_best_and_no_outlier(self, scores, sign, limits):
        assert score_limits(scores, sign) == limits

    def test_map_places_trials_by_outcome(self):
        study = MadeUpStudy()
        study.add(scored(0.9, 0.9, 0.9), lr=0.01, max_norm=0.1)
        study.add(scored(0.8, 0.8, 0.8), lr=0.1, max_norm=10.0)
        study.add(exploded(), lr=0.9, max_norm=None).add(exploded(), lr=0.8, max_norm=10.0)
        lane, axes, *_ = drawing(study.view, "explosion_map")
        assert [label.get_text() for label in lane.get_yticklabels()] == ["no clipping"]
        assert [points.get_offsets().tolist() for points in lane.collections] == [[[0.9, 0.0]]]
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        lost, trained, ring = axes.collections
        assert trained.get_offsets().tolist() == [[0.01, 0.1], [0.1, 10.0]]
        assert trained.get_array().tolist() == pytest.approx([0.9, 0.8])
        assert lost.get_offsets().tolist() == [[0.8, 10.0]]
        assert ring.get_offsets().tolist() == [[0.01, 0.1]]
        assert [(text.get_text(), text.xy) for text in axes.texts] == [
            ("0", (0.01, 0.1)), ("1", (0.1, 10.0)),
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("ends", "labels"),
        [
            ((0.1, 3.0), ["0.1", "0.2", "0.5", "1", "2"]),
            ((1e-3, 1.0), ["0.001", "0.003", "0.01", "0.03", "0.1", "0.3", "1"]),
            ((1e-6, 1.0), ["1e-06", "1e-05", "0.0001", "0.001", "0.01", "0.1", "1"]),
        ],
    )
    def test_log_ticks_are_few_and_short(self, ends, labels):
        figure = Figure()
        axes = figure.subplots()
        axes.set_xlim(*ends)
        scale_log(axes.xaxis, *ends)
        figure.draw_without_rendering()
        visible = [label for label in axes.get_xticklabels(which="both") if label.get_text()]
        visible = [label for label in visible if ends[0] <= label.get_position()[0] <= ends[1]]
        assert [label.get_text() for label in visible] == labels
        boxes = [label.get_window_extent() for label in visible]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))

    def test_map_without_a_rate_or_without_clipping(self, tmp_path):
        study = MadeUpStudy().add(scored(0.9), depth=3)
        page = Page(write_report(study.view, tmp_path / "report.html"))
        assert "no finished trial has a learning rate" in page.text.lower()
        axes = drawing(MadeUpStudy().add(scored(0.9), lr=0.1, max_norm=None).view, "explosion_map")[0]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["no clipping"]

    def test_few_folds_are_points_with_their_mean(self):
        study = MadeUpStudy().add(scored(0.1, 0.2, 0.3), lr=0.1).add(scored(0.7, 0.8, 0.9), lr=0.2)
        study.add(exploded(), lr=0.9)
        axes = drawing(study.view, "fold_scores")[0]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "0"]
        *folds, means = axes.collections
        assert [points.get_offsets()[:, 1].tolist() for points in folds] == [
            [0.7, 0.1], [0.8, 0.2], [0.9, 0.3],
        ]  # fmt: skip
        assert [dash[0][1] for dash in means.get_segments()] == pytest.approx([0.8, 0.2])
        assert not axes.patches

    def test_ten_folds_are_boxes_that_leave_room(self):
        scores = [0.8 + 0.01 * i for i in range(10)]
        study = MadeUpStudy(n_folds=10).add(scored(*scores), lr=0.1).add(scored(*scores), lr=0.2)
        figure = next(p for p in writing.PICTURES if p.name == "fold_scores").draw(study.view)
        figure.draw_without_rendering()
        (axes,) = figure.axes
        assert len(axes.patches) == 2
        assert [points.get_offsets()[:, 1].tolist() for points in axes.collections] == [scores, scores]
        assert axes.get_position().height > 0.7
        assert axes.get_position().width > 0.7

    def test_curves_are_means_in_the_band_of_the_folds(self, tmp_path):
        folds = scored(0.5, 0.7)
        for result, scores in zip(folds, ([0.2, 0.5], [0.4, 0.7, 0.8]), strict=True):
            result.history = [
                {"epoch": float(e), "accuracy": score, "loss": 1.0 - score, "train_loss": 1.0}
                for e, score in enumerate(scores)
            ]
        view = MadeUpStudy(OutputDir(tmp_path), n_folds=2).add(folds, lr=0.1).view
        accuracy = drawing(view, "learning_curves")[1]
        *single, mean = accuracy.lines
        assert [len(line.get_xdata()) for line in single] == [2, 3]
        assert mean.get_ydata().tolist() == pytest.approx([0.3, 0.6])  # over the epochs that both folds have
        band = accuracy.collections[0].get_paths()[0].get_extents()
        assert (band.ymin, band.ymax) == pytest.approx((0.2, 0.7))

    def test_norms_are_shares_of_the_steps_with_the_threshold(self):
        study = MadeUpStudy().add(scored(0.9, 0.9, 0.9, norms={-10: 1, 0: 3}), lr=0.1, max_norm=0.5)
        axes = drawing(study.add(exploded(), lr=0.9).view, "gradient_norms")[0]
        best, lost = (steps.get_data() for steps in axes.patches)
        assert best.values.sum() == pytest.approx(1.0)
        assert best.values[0] == 0.25
        assert best.edges[[0, 1, -1]] == pytest.approx([0.1, 10**-0.9, 10**0.1])
        assert lost.values.sum() == pytest.approx(1.0)
        assert axes.lines[0].get_xdata() == [0.5, 0.5]
        assert [text.get_text() for text in axes.texts] == ["30% of the steps clipped"]

    def test_importance_finds_what_the_score_and_explosions_hang_on(self):
        study = MadeUpStudy()
        for i in range(40):
            lr, max_norm = 0.001 * 1.18**i, 0.01 * (i * 7 % 40 + 1)
            study.add(exploded() if lr > 0.3 else scored(max_norm), lr=lr, max_norm=max_norm)
        axes = drawing(study.view, "importances")[0]
        names = [label.get_text() for label in axes.get_yticklabels()]
        score, explosion = (
            dict(zip(names, (bar.get_width() for bar in bars), strict=True)) for bars in axes.containers
        )
        assert score["max_norm"] > 0.9
        assert explosion["lr"] > 0.9
        assert sum(score.values()) == pytest.approx(1.0)

    @pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
    def test_importance_does_not_depend_on_the_scale_of_the_score(self, scale):
        study = MadeUpStudy()
        for i in range(12):
            study.add(scored(scale * (i % 4)), lr=0.01 * (i + 1), max_norm=0.1 * (i % 4 + 1))
        axes = drawing(study.view, "importances")[0]
        assert axes.get_yticklabels()[-1].get_text() == "max_norm"

    def test_scores_equal_but_for_rounding_have_no_importance(self, tmp_path):
        study = MadeUpStudy()
        for i in range(8):
            study.add(scored(0.9 + 1e-13 * i), lr=0.01 * (i + 1), max_norm=0.1 * (i % 4 + 1))
        page = Page(write_report(study.view, tmp_path / "report.html"))
        assert "Importances need at least" in page.text


def test_missing_extra_is_named():
    code = "import sys; sys.modules['matplotlib'] = None; import fastclip.tuner, fastclip.tuner.report"
    done = run_python(code)
    assert "fastclip.tuner.report: matplotlib is not installed" in done.stderr
    assert "pip install 'fastclip[tune,report]'" in done.stderr
