"""TunerCV: a search over training parameters by cross-validation, in scikit-learn's manner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from fastclip.tuner.executors.guarding import refuse_unguarded
from fastclip.tuner.predicting import Predictor
from fastclip.tuner.study import advice
from fastclip.tuner.study.epochs import FoldEpochCallback
from fastclip.tuner.study.opening import OpenedStudy, open_study
from fastclip.tuner.study.preparation import make_context
from fastclip.tuner.study.probing import probe_context
from fastclip.tuner.study.records import collect, cv_results, explosions, ranked
from fastclip.tuner.study.refitting import median_epochs, refit_best
from fastclip.tuner.study.search import Search, TrialCallback
from fastclip.tuner.study.spaces import Space, SpaceLike
from fastclip.tuner.study.specification import DEFAULT_STUDY_NAME, StudySpec
from fastclip.tuner.study.storage import STALE_SECONDS, quiet_logging
from fastclip.tuner.training.data import TuningData
from fastclip.tuner.training.explosion import ExplosionRule
from fastclip.tuner.training.folds import FoldContext, ModelInit
from fastclip.tuner.training.losses import LossFunction
from fastclip.tuner.training.reading import as_data


class TunerCV(Predictor, BaseEstimator):  # type: ignore[misc]
    """Find learning rate, threshold, initialisation and the rest by cross-validation.

    A fold that explodes stops at once and its trial is told as the worst value with a constraint, so the
    sampler learns where training explodes. Splits are made once and are the same for every trial; seeds
    depend on the study and the fold, so folds are paired across trials.

    Args:
        model_init: Function of the dict of parameters that returns a new torch module.
        space: Mapping of names to `Float`, `Int`, `Choice` or fixed values, or a function of an Optuna trial
            that returns the parameters. Lists are choices, and dimensions of Optuna and scipy are taken as
            they are. The training loop reads `lr`, `max_norm` (None: no clipping), `norm_type`, `optimizer`
            and every argument of it, `no_decay` (no weight decay of biases and norms), `param_groups` (a
            function of model and parameters), `l1`, `l2`, `dropout`, `init`, `init_gain`, `batch_size`,
            `accumulate` (mini-batches per step), `amp` (None, "bfloat16" or "float16"), `scheduler`, and
            with the default loss of classes `label_smoothing` and `class_weight`; `lr_x_max_norm` stands
            for lr * max_norm, and `strategy`, a name in `fastclip.strategies` with settings `strategy__k`
            and such, in the place of max_norm. A parameter that neither it nor model_init reads is an error.
        sampler: "grid", "random", "tpe", "gp", an Optuna sampler, or an Optuna study to search in.
        cv: Folds, a test share, a scikit-learn splitter, or index pairs; see `check_cv`.
        scoring: What is measured; see `check_scoring`.
        refit: Train `best_estimator_` on all data; with several measures the name of the one to follow.
        refit_on: "all" trains on all data for the median of the folds' best epochs; "holdout" keeps a
            tenth for patience and target.
        n_trials: Finished trials, those of a resumed run included. None runs a grid whole.
        timeout: Seconds after which no trial starts and those under way end, as `out of time`.
        max_epochs: Epochs per fold.
        patience: Stop after this many epochs without a better score, and go back to the best epoch.
        target: Stop at this score.
        explosion: When training counts as exploded; see `ExplosionRule`.
        loss: Function of (outputs, targets); cross-entropy, of class scores or of one logit, or mean squared
            error by default.
        search_clipped: Train with `fastclip.ClippedOptimizer`, which clips in its step, instead of clipping
            before it: the trials are those of a training loop that uses it, to rounding.
        pruner: None, "median", "hyperband", "successive_halving", "patient_median" or an Optuna pruner.
        n_jobs: Folds trained at the same time, in processes of their own when above 1; -1 takes every core.
        executor: "auto", "inline", "processes" or "ray"; see `make_executor`.
        devices: One device per job, in turn.
        threads: torch's threads per fold. The same number for every n_jobs gives the same bits for every
            n_jobs; "divide" divides torch's threads among the jobs; None leaves torch's number alone.
        hang_timeout: Seconds without a training step after which a worker is replaced.
        storage: Optuna storage URL, which several processes may share, or a storage object; by default
            SQLite in output_dir, or memory.
        study_name: Name of the study in the storage.
        stale_after: In a shared storage, seconds without a sign of life after which another process takes a
            trial over.
        output_dir: Where everything is written; see `output`.
        resume: Go on with the study in output_dir or storage.
        seed: Seed of everything.
        callbacks: Called with the study and each finished trial; `study.stop()` ends the search.
        epoch_callbacks: Called in this process with the Optuna trial, the number of the fold and the record
            of each epoch (`epoch`, `train_loss`, `lr`, `grad_norm_median`, `grad_norm_max`, `clip_fraction`,
            every held-out measure), wherever the fold is trained. They return nothing: what one raises ends
            the search, which can be resumed. The epochs of a fold whose worker was lost come again.
        verbose: Show a bar with the trials, the best score and the time left, or a line per trial where there
            is no terminal; needs the extra `cli`.
        return_train_score: Measure the model of each fold on its training part, too.
        study_attrs: User attributes for a new study.

    Attributes:
        best_params_: Parameters of the best trial.
        best_score_: Its mean score over the folds.
        best_index_: Its index in `cv_results_`.
        cv_results_: scikit-learn's keys, plus `split{i}_status` and `split{i}_clip_fraction`.
        best_estimator_: The module retrained on all data, in evaluation mode.
        refit_scores_: Its measures on what it was trained on, `train`, and on a holdout, `test`, if any.
        classes_: What the classes are called, for classes alone.
        n_features_in_: Columns of X, where X is a table.
        study_: The Optuna study.
        explosions_: One dict per exploded fold.
        records_: One `TrialRecord` per finished trial, in the order of `cv_results_`.
        splits_: The (train, test) indices of every fold.
        scoring_: The measures, see `Scoring`.
    """

    def __init__(
        self,
        model_init: ModelInit,
        space: SpaceLike,
        *,
        sampler: Any = "tpe",
        cv: Any = 5,
        scoring: Any = None,
        refit: bool | str = True,
        refit_on: str = "all",
        n_trials: int | None = None,
        timeout: float | None = None,
        max_epochs: int = 10,
        patience: int | None = None,
        target: float | None = None,
        explosion: ExplosionRule | None = None,
        loss: LossFunction | None = None,
        search_clipped: bool = False,
        pruner: Any = None,
        n_jobs: int = 1,
        executor: str = "auto",
        devices: Sequence[Any] | None = None,
        threads: int | str | None = 1,
        hang_timeout: float = 600.0,
        storage: Any = None,
        study_name: str = DEFAULT_STUDY_NAME,
        stale_after: int = STALE_SECONDS,
        output_dir: str | Path | None = None,
        resume: bool = False,
        seed: int = 0,
        callbacks: Sequence[TrialCallback] = (),
        epoch_callbacks: Sequence[FoldEpochCallback] = (),
        study_attrs: Mapping[str, Any] | None = None,
        return_train_score: bool = False,
        verbose: bool | int = False,
    ) -> None:
        self.model_init = model_init
        self.space = space
        self.sampler = sampler
        self.cv = cv
        self.scoring = scoring
        self.refit = refit
        self.refit_on = refit_on
        self.n_trials = n_trials
        self.timeout = timeout
        self.max_epochs = max_epochs
        self.patience = patience
        self.target = target
        self.explosion = explosion
        self.loss = loss
        self.search_clipped = search_clipped
        self.pruner = pruner
        self.n_jobs = n_jobs
        self.executor = executor
        self.devices = devices
        self.threads = threads
        self.hang_timeout = hang_timeout
        self.storage = storage
        self.study_name = study_name
        self.stale_after = stale_after
        self.output_dir = output_dir
        self.resume = resume
        self.seed = seed
        self.callbacks = callbacks
        self.epoch_callbacks = epoch_callbacks
        self.study_attrs = study_attrs
        self.return_train_score = return_train_score
        self.verbose = verbose

    def fit(self, data: Any, y: Any = None, groups: Any = None, *, eval_data: Any = None) -> TunerCV:
        """Search, and retrain with the best parameters.

        Args:
            data: torch Dataset of samples that `split_sample` takes, a DataLoader of it, a pair (X, y), or X.
            y: Targets for X: integers or names for classes, floating-point numbers for a regression.
            groups: Group labels for splitters that want them.
            eval_data: The same Dataset as it is measured, without augmentation.

        Returns:
            self.

        Raises:
            AllTrialsExplodedError: every trial exploded; the message says what to change.
            AllTrialsFailedError: no trial ended with a score.
            ResumeError: output_dir or the study is in use, or was made with other settings or data.
            RefitExplodedError: the best parameters exploded on all data.
            KeyboardInterrupt: stopped by the user; resume=True goes on at the fold where it stopped.
        """
        context = self.search(data, y, groups, eval_data=eval_data)
        if self.refit:
            self._refit(context)
        return self

    def search(self, data: Any, y: Any = None, groups: Any = None, *, eval_data: Any = None) -> FoldContext:
        """Do what `fit` does except for training the best parameters on all data.

        Several processes that share a storage search together; one of them calls `fit`.
        """
        refuse_unguarded()
        spec = self._spec()
        context = self._check(spec, data, y, groups, eval_data)
        self._remember(context)
        self.splits_, self.scoring_ = context.splits, context.objective.scoring
        opened = open_study(spec, context)
        self.study_, self._output = opened.study, opened.output
        self._run(spec, context, opened)
        self.records_ = collect(self.study_, len(context.splits))
        self._set_results()
        return context

    def check(self, data: Any, y: Any = None, groups: Any = None, *, eval_data: Any = None) -> FoldContext:
        """Check every argument against the data and try model_init, without opening or training anything.

        Returns:
            What all folds share: the data, the splits, the measures and the rules.

        Raises:
            ValueError: an argument is out of range or unknown, or does not fit the data.
            TypeError: an argument has the wrong type.
        """
        return self._check(self._spec(), data, y, groups, eval_data)

    def report(self, path: str | Path | None = None) -> Path:
        """Write what the study found as one HTML file that needs no network.

        Works also after a search that was interrupted, or in which every trial exploded. Learning curves
        need the epoch records that are kept in output_dir.

        Args:
            path: The file; report.html in output_dir by default.

        Returns:
            The path.

        Raises:
            ImportError: the extra `report` is not installed.
            ValueError: neither path nor output_dir.
        """
        from fastclip.tuner.report import StudyView, write_report

        check_is_fitted(self, "study_")
        if path is None:
            if self._output is None:
                raise ValueError(
                    "TunerCV.report: neither path nor output_dir is given; expected one of them."
                )
            path = self._output.report_path
        return write_report(StudyView(self.study_, self._output), path)

    def _data(self, data: Any, y: Any, groups: Any, eval_data: Any) -> TuningData:
        return as_data(data, y, groups, caller="TunerCV.fit", eval_data=eval_data)

    def _spec(self) -> StudySpec:
        return StudySpec.of(self, "TunerCV")

    def _check(self, spec: StudySpec, data: Any, y: Any, groups: Any, eval_data: Any) -> FoldContext:
        view = self._data(data, y, groups, eval_data)
        spec.check()
        for name in ("callbacks", "epoch_callbacks"):
            given = getattr(self, name)
            if callable(given) or not all(map(callable, given)):
                raise TypeError(f"TunerCV: {name}={given!r}; expected a list of functions.")
        if self.verbose and find_spec("rich") is None:
            raise ImportError(
                f"TunerCV: rich is not installed; expected the extra `cli` for verbose={self.verbose!r}. "
                "pip install 'fastclip[tune,cli]'",
                name="rich",
            )
        context = make_context(spec, view)
        return replace(context, model=probe_context(context, spec))

    def _run(self, spec: StudySpec, context: FoldContext, opened: OpenedStudy) -> None:
        with ExitStack() as stack:
            callbacks = list(self.callbacks)
            if self.verbose:
                from fastclip.tuner.progress import progress

                stack.enter_context(quiet_logging())
                callbacks.append(stack.enter_context(progress(n_trials=self.n_trials)))
            Search(opened, spec, context, callbacks, self.epoch_callbacks).run()

    def _set_results(self) -> None:
        space = Space(self.space)
        scoring = self.scoring_
        metrics = {name: scoring.key(name) for name in scoring.scorers}
        sign = 1 if scoring.direction == "maximize" else -1
        self.cv_results_ = cv_results(
            self.records_, metrics, scoring.primary, sign, has_train_scores=self.return_train_score
        )
        self.explosions_ = explosions(self.records_)
        self._params = [space.sample(optuna.trial.FixedTrial(record.chosen)) for record in self.records_]
        self.cv_results_["params"] = self._params
        if not any(record.has_score for record in self.records_):
            raise advice.failure(self.records_)
        self._set_best(ranked(self.records_, scoring.direction)[0])

    def _set_best(self, index: int) -> None:
        self.best_index_ = index
        self.best_params_ = self._params[index]
        score = self.records_[index].score
        if score is None:
            raise RuntimeError("fastclip bug: the best trial has no score.")
        self.best_score_ = score

    def _refit(self, context: FoldContext) -> None:
        order = ranked(self.records_, self.scoring_.direction)
        candidates = [(i, self._params[i], median_epochs(self.records_[i])) for i in order]
        index, self.best_estimator_, self.refit_run_, self.refit_scores_ = refit_best(
            context, candidates, self._device(), context.threads, self.refit_on
        )
        self._set_best(index)
        if self._output is not None:
            self._output.write_best(self.best_estimator_, self.best_params_, self.best_score_)
