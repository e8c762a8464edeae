import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from report_cases import MadeUpStudy, exploded, fold, scored

from fastclip.tuner.report.next_steps import next_steps
from fastclip.tuner.study.output import OutputDir
from fastclip.tuner.training.explosion import Verdict


def advice(study: MadeUpStudy) -> str:
    return "\n".join(next_steps(study.view))


def sound(**settings) -> MadeUpStudy:
    """A study that calls for nothing."""
    study = MadeUpStudy(**settings).add(scored(0.9, 0.91, 0.92), lr=0.05, max_norm=0.5)
    return study.add(scored(0.5, 0.51, 0.52), lr=0.02, max_norm=0.2)


def test_sound_study_is_called_sound():
    steps = next_steps(sound().view)
    assert len(steps) == 2
    assert steps[0].startswith("Nothing stands in the way")
    assert "best of 2 scores flatters itself" in steps[1]
    assert "nested_cv" in steps[1]


def test_empty_study():
    assert next_steps(MadeUpStudy().view)[0].startswith("No trial has finished: resume")


class TestExplosions:
    def test_rate_that_separates_is_named(self):
        study = sound()
        for lr in (0.5, 0.9):
            study.add(exploded(), lr=lr, max_norm=0.5)
        assert "2 of 4 trials exploded (50%)." in advice(study)
        assert "No rate above 0.05 trained, and rates up to 0.9 were tried: lower the upper end" in advice(
            study
        )

    def test_a_few_explosions_are_no_alarm(self):
        study = (
            sound().add(scored(0.6, 0.6, 0.6), lr=0.03, max_norm=0.3).add(exploded(), lr=0.9, max_norm=0.5)
        )
        assert "exploded" not in advice(study)

    def test_unclipped_explosions_call_for_clipping(self):
        study = sound().add(exploded(), lr=0.03, max_norm=None).add(exploded(), lr=0.04, max_norm=None)
        assert "None of them clipped: search max_norm" in advice(study)

    def test_overlapping_rates_call_for_the_product(self):
        study = sound().add(exploded(), lr=0.03, max_norm=5.0).add(exploded(), lr=0.04, max_norm=None)
        assert "1 of them did not clip" in advice(study)
        assert "search lr_x_max_norm with max_norm" in advice(study)

    def test_all_exploded(self):
        study = MadeUpStudy().add(exploded(), lr=0.5, max_norm=4.0).add(exploded(), lr=0.9, max_norm=3.0)
        assert next_steps(study.view) == [
            "The exploded trials survived 7 to 7 steps; the first said: the loss is nan.",
            "lr went from 0.5 to 0.9: search below 0.05.",
            "max_norm went down to 3: try a threshold of about 2, the median norm before the explosions "
            "or below.",
        ]


class TestFailures:
    @pytest.mark.parametrize(
        ("status", "expected"),
        [
            (Verdict.OOM, "1 trial(s) ran out of memory: lower batch_size"),
            (Verdict.KILLED, "1 trial(s) lost their worker twice"),
            (Verdict.ERROR, "1 trial(s) ended in an error; the first, trial 2, said: ValueError: no"),
        ],
    )
    def test_each_is_named(self, status, expected):
        study = sound().add([fold(status=status, message="Traceback:\nValueError: no\n")], lr=0.05)
        assert expected in advice(study)

    def test_degenerate_fold(self):
        folds = [fold(status=Verdict.DEGENERATE), *scored(0.9, 0.9)]
        assert "1 fold(s) lack a class" in advice(MadeUpStudy().add(folds, lr=0.05, max_norm=0.5))

    def test_no_score_and_no_explosion(self):
        study = MadeUpStudy().add([fold(status=Verdict.OOM)], lr=0.1)
        assert next_steps(study.view) == [
            "1 trial(s) ran out of memory: lower batch_size or the size of the model in the space."
        ]


class TestEdges:
    @pytest.mark.parametrize(
        ("value", "distribution", "side", "bound", "further"),
        [
            (0.95, FloatDistribution(0.001, 1.0, log=True), "upper", "1", "10"),
            (0.01, FloatDistribution(0.01, 1.0, log=True), "lower", "0.01", "0.001"),
            (0.5, FloatDistribution(0.0, 0.5), "upper", "0.5", "1"),
            (8, IntDistribution(2, 8), "upper", "8", "14"),
            (-1.0, FloatDistribution(-1.0, 1.0), "lower", "-1", "-3"),
        ],
    )  # fmt: skip
    def test_value_at_the_end_of_its_range(self, value, distribution, side, bound, further):
        expected = f"{side} end of its range ({bound}): widen the range to {further}."
        study = MadeUpStudy().add(scored(0.9, 0.91, 0.92), x=value, distributions={"x": distribution})
        assert f"The best x, {value:.3g}, lies at the {expected}" in advice(study)

    @pytest.mark.parametrize(
        ("value", "distribution"),
        [
            (0.03, FloatDistribution(0.001, 1.0, log=True)),
            (0.0, FloatDistribution(0.0, 0.5)),  # nothing is below 0
            (3, IntDistribution(3, 3)),
        ],
    )
    def test_value_inside_or_with_nowhere_to_go(self, value, distribution):
        study = MadeUpStudy().add(scored(0.9, 0.91, 0.92), x=value, distributions={"x": distribution})
        assert "end of its range" not in advice(study)

    def test_border_of_the_explosions_is_no_reason_to_widen(self):
        study = MadeUpStudy().add(scored(0.9, 0.91, 0.92), lr=0.9, max_norm=0.5).add(exploded(), lr=0.99)
        assert "next to the region that explodes: that border, not the range, limits it" in advice(study)
        assert "widen" not in advice(study)


class TestClipping:
    def test_clipping_all_the_time(self):
        study = MadeUpStudy().add(scored(0.9, 0.91, 0.92, clip=0.99), lr=0.1, max_norm=0.5)
        assert "clipped 99% of its steps" in advice(study)
        assert "lr * max_norm = 0.05" in advice(study)

    def test_clipping_never(self):
        study = MadeUpStudy().add(scored(0.9, 0.91, 0.92, clip=0.0), lr=0.1, max_norm=5.0)
        assert "The threshold of the best trial, 5, clipped 0.0% of its steps" in advice(study)

    def test_no_threshold_no_word(self):
        study = MadeUpStudy().add(scored(0.9, 0.91, 0.92, clip=0.0), lr=0.1, max_norm=None)
        assert "clip" not in advice(study)


class TestEpochs:
    def study(self, path, accuracies, losses):
        folds = scored(0.9, 0.91, 0.92)
        for result in folds:
            result.history = [
                {"epoch": float(e), "accuracy": a, "loss": v, "train_loss": v}
                for e, (a, v) in enumerate(zip(accuracies, losses, strict=True))
            ]
        return MadeUpStudy(OutputDir(path)).add(folds, lr=0.05, max_norm=0.5)

    def test_still_improving(self, tmp_path):
        text = advice(self.study(tmp_path, [0.5, 0.6, 0.7, 0.9], [2.0, 1.5, 1.2, 1.0]))
        assert "still improving in its last epoch: raise max_epochs above 4" in text

    def test_overfitting(self, tmp_path):
        text = advice(self.study(tmp_path, [0.5, 0.9, 0.9, 0.9], [2.0, 1.0, 1.1, 1.5]))
        assert "is lowest after epoch 2 and rises to 1.5 from 1: set patience" in text

    def test_better_score_at_a_worse_loss_is_overfitting(self, tmp_path):
        text = advice(self.study(tmp_path, [0.5, 0.6, 0.7, 0.9], [2.0, 1.0, 1.1, 1.5]))
        assert "is lowest after epoch 2" in text
        assert "raise max_epochs" not in text

    def test_flat_end(self, tmp_path):
        text = advice(self.study(tmp_path, [0.5, 0.9, 0.91, 0.9], [2.0, 1.0, 1.0, 1.0]))
        assert "Nothing stands in the way" in text


def test_best_found_late():
    study = MadeUpStudy()
    for i in range(10):
        study.add(scored(0.1 * i, 0.1 * i, 0.1 * i), lr=0.05, max_norm=0.5)
    assert "The best trial came late (10 of 10)" in advice(study)
    study.settings["sampler"] = "grid"
    study.study.set_user_attr("fastclip:settings", study.settings)
    assert "came late" not in advice(study)


def test_scores_within_the_error_of_the_folds():
    study = MadeUpStudy().add(scored(0.8, 0.9, 1.0), lr=0.05, max_norm=0.5)
    study.add(scored(0.88, 0.88, 0.88), lr=0.02, max_norm=0.5).add(
        scored(0.2, 0.2, 0.2), lr=0.02, max_norm=0.5
    )
    assert (
        "1 other trial(s) score within one standard error of the best (0.058 over 3 folds), trial 1"
        in advice(study)
    )
