"""Search for a distillation's settings with Optuna (Akiba et al., arXiv 1907.10902).

A trial trains the student as the arm "full" does, with settings of its own, over one seed or
several, and is worth its mean accuracy on training images that were held out; the test images take
no part. The teacher is trained once and asked once, and every trial learns from its kept
predictions. At the end the best settings and the defaults each train on all training images, over
seeds that the search did not see, and are tested on the test images.

The run's folder holds, beside config.json::

    study.sqlite     Optuna's studies "search" and "confirm"
    search, confirm  each study's teacher and its predictions, as a run's folder
    best.json        options for ``kdkernels distill --config``
    results.json, plots/*.png, report.html
"""

import contextlib
import dataclasses
import fcntl
import multiprocessing
import os
import shutil
import signal
import sqlite3
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from kdkernels.tools.settings import Search
from kdkernels.tools.space import NOISE, Space
from kdkernels.train import TrainError, checks, console, distillation
from kdkernels.train.run_folder import RunFolder, lock
from kdkernels.train.settings import Distil, count


@dataclasses.dataclass(frozen=True)
class _TeacherOnly(Distil):
    """An arm without epochs: the run trains the teacher and keeps its predictions."""

    epochs: int = count(0, "none", low=0, high=0)


SEARCH, CONFIRM = "search", "confirm"
DEFAULTS, BEST = "the defaults", "the best trial's"
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


def _options(chosen: dict) -> dict:
    """A trial's values as options of ``kdkernels distill``."""
    found = {("noise_std" if name in NOISE else name): value for name, value in chosen.items()}
    return {name: value for name, value in found.items() if (name, value) != ("noise", "none")}


class Study:
    """One of a folder's two Optuna studies, as a process sees it.

    The study "search" tries the space; a trial of "confirm" is one seed of the defaults or of the
    best trial's settings.

    Attributes:
        settings, given, space: from the folder's config.
        plain: the trainer's settings before a trial's own.
        study: Optuna's.
        points: values that must be tried; for a grid and for "confirm" these are all.
        limit: number of trials.
    """

    def __init__(self, folder: RunFolder, name: str):
        self.folder, self.name = folder, name
        self.settings = Search(**folder.config["tune"])
        self.given = folder.config["distill"]
        self.space = Space(self.settings.search, self.given)
        self.plain = self.wanted({})
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        file = folder.path / "study.sqlite"
        with contextlib.closing(sqlite3.connect(file, timeout=60)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")  # readers and a writer do not wait
        self.storage = optuna.storages.RDBStorage(
            f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": 60}}
        )
        most = self.plain.epochs * self.settings.seeds
        pruner = {
            # After the first epoch BatchNorm's running averages still trail the weights.
            "median": optuna.pruners.MedianPruner(n_warmup_steps=2),
            "hyperband": optuna.pruners.HyperbandPruner(min_resource=2, max_resource=max(2, most)),
        }.get(self.settings.prune if name == SEARCH else "none", optuna.pruners.NopPruner())
        self.study = optuna.create_study(
            storage=self.storage,
            study_name=name,
            direction="maximize",
            pruner=pruner,
            load_if_exists=True,
        )
        self.closed = name == CONFIRM or self.settings.sampler == "grid"
        first = self.plain.seed + self.settings.seeds
        self.seeds = range(first, first + self.settings.confirm)
        if name == CONFIRM:
            both = (DEFAULTS, BEST)
            self.points = [{"settings": a, "seed": seed} for seed in self.seeds for a in both]
        else:
            self.points = self.space.grid() if self.closed else self.space.defaults()
        self.limit = len(self.points) if self.closed else self.settings.trials or 30

    def wanted(self, more: dict) -> Distil:
        """What a trial asks of the trainer that has these options of its own."""
        validation = self.settings.validation if self.name == SEARCH else 0.0
        return Distil(**self.given | {"validation": validation, "arms": ()} | more)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Those in these states, all by default."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def queue(self) -> None:
        """Let all points wait that were not tried, and trials that were stopped halfway.

        No other process may be at work on the study.
        """
        stale = self.trials(TrialState.RUNNING)
        for trial in stale:
            self.study.tell(trial.number, state=TrialState.FAIL)
        again = [] if self.closed else [trial.params for trial in stale if trial.params]
        known = {
            tuple(sorted((trial.params or trial.system_attrs["fixed_params"]).items()))
            for trial in self.trials(TrialState.WAITING, *DONE)
        }
        for point in self.points + again:
            if (key := tuple(sorted(point.items()))) not in known:
                self.study.enqueue_trial(point)
                known.add(key)

    def ask(self) -> tuple[optuna.Trial, dict] | None:
        """The next trial and its values; None where there is none left."""
        with (self.folder.path / "ask.lock").open("w") as file:  # let go when closed, or killed
            lock(file, fcntl.LOCK_EX)
            number = len(self.trials(TrialState.RUNNING, *DONE))
            if number >= self.limit:
                return None
            # A sampler of the trial's own: one for all would draw the same again after a resume.
            tpe = self.settings.sampler == "tpe" and self.name == SEARCH
            make = optuna.samplers.TPESampler if tpe else optuna.samplers.RandomSampler
            self.study.sampler = make(seed=(self.plain.seed * 1_000_003 + number) % 2**32)
            trial = self.study.ask()
            if self.name == SEARCH:
                return trial, self.space.suggest(trial)
            which = trial.suggest_categorical("settings", (DEFAULTS, BEST))
            seed = trial.suggest_int("seed", self.seeds[0], self.seeds[-1])
            return trial, {"settings": which, "seed": seed}

    def prepare(self, screen, threads: int | None) -> None:
        """Train the teacher and keep its predictions of the training images, once."""
        inner = RunFolder(self.folder.path / self.name, {})
        if inner.read_json("teacher.json"):
            return
        inner.path.mkdir(parents=True, exist_ok=True)
        given: dict[str, Any] = dataclasses.asdict(self.plain)
        given |= {"epochs": 0, "arms": ("full",), "noise": None, "noise_std": None}
        given["threads"] = threads
        wanted = _TeacherOnly(**given)
        screen.print(f"{self.name}: the teacher learns and predicts")
        with console.progress(screen) as show:
            distillation.run(wanted, inner, *show)
        found = inner.load("teacher-test")
        assert found is not None  # what the run has written
        right = (found[0]["logits"].argmax(1) == found[0]["labels"]).double().mean().item()
        inner.write_json("teacher.json", {"accuracy": right})

    def work(self, threads: int | None, parent: int = 0, after: Callable = lambda: None) -> None:
        """Run trials until none is left, calling ``after`` after each.

        ``parent``: id of the process without which this one shall not go on; 0: none.
        """
        plain, images = self.plain, checks.load_images(self.plain)
        kept = str(self.folder.path / self.name / "predictions/teacher")
        common = {"teacher_predictions": kept, "teacher_weights": "none", "threads": threads}

        def on_step(*_):
            if parent and os.getppid() != parent:
                os._exit(1)

        while (asked := self.ask()) is not None:
            trial, chosen = asked
            more, first, seeds = chosen, plain.seed, self.settings.seeds
            if self.name == CONFIRM:
                best = self.study.user_attrs["best"]
                more, first, seeds = best if chosen["settings"] == BEST else {}, chosen["seed"], 1
            wanted = self.wanted(_options(more) | common)
            began, found = time.monotonic(), []
            try:
                for seed in range(first, first + seeds):
                    found.append(self._train(trial, wanted, seed, images, on_step, len(found)))
            except optuna.TrialPruned:
                self.study.tell(trial, state=TrialState.PRUNED)
            except TrainError as error:
                if error.status < 128:  # no signal: the process that started this one reads it
                    trial.set_user_attr("error", str(error))
                    self.study.tell(trial, state=TrialState.FAIL)
                raise
            else:
                trial.set_user_attr("accuracies", found)
                trial.set_user_attr("seconds", time.monotonic() - began)
                self.study.tell(trial, statistics.fmean(found))
            after()

    def _train(self, trial, settings, seed, images, on_step, number) -> float:
        """A seed's accuracy after its last epoch; 0 where the loss stopped being finite."""
        inner = RunFolder(self.folder.path / "trials" / f"{self.name}-{trial.number}-{seed}", {})
        inner.path.mkdir(parents=True)
        arms = () if settings.noise else ("full",)

        def lines(kind):
            return [line for line in inner.metrics() if line["kind"] == kind]

        def epoch_is_over(_):
            epochs = lines("epoch")
            trial.report(epochs[-1]["accuracy"], number * settings.epochs + len(epochs))
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            distillation.run(
                dataclasses.replace(settings, seed=seed, arms=arms),
                inner,
                on_step,
                epoch_is_over,
                images=images,
            )
            return lines("epoch")[-1]["accuracy"]
        except TrainError:
            steps = lines("step")
            if steps and not isinstance(steps[-1]["loss"], float):  # JSON has no NaN
                return 0.0
            raise
        finally:
            shutil.rmtree(inner.path)


def _work(path: str, name: str, threads: int | None, parent: int) -> None:
    """A worker process."""
    folder = RunFolder.open(path)
    with (folder.path / "workers.lock").open("w") as file:
        lock(file, fcntl.LOCK_SH)
        try:
            Study(folder, name).work(threads, parent)
        except TrainError as error:  # the trial has the sentence
            sys.exit(error.status)


def _spread(study: Study, workers: int, threads: int | None, watch: Callable) -> None:
    """Let worker processes run the study's trials; ``watch()`` tells how many are finished."""
    context = multiprocessing.get_context("spawn")
    threads = threads or max(1, torch.get_num_threads() // workers)
    arguments = (str(study.folder.path), study.name, threads, os.getpid())
    processes = [context.Process(target=_work, args=arguments) for _ in range(workers)]
    # Ctrl-C goes to all of a terminal's processes; the workers leave it to this one.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for process in processes:
            process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while watch() < study.limit and any(process.is_alive() for process in processes):
            time.sleep(0.2)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    if watch() < study.limit:
        status = [process.exitcode for process in processes if process.exitcode] or [1]
        said = [t.user_attrs["error"] for t in study.trials() if "error" in t.user_attrs]
        how = f"was killed by signal {-status[0]}" if status[0] < 0 else f"exited with {status[0]}"
        reason = said[-1] if said and status[0] > 0 else f"a worker {how}"
        raise TrainError(f"{reason}; go on with kdkernels tune --resume {study.folder.path}", 1)


def _finish(study: Study, workers: int, threads: int | None, screen) -> None:
    """Run what is left of a study, with a line per trial and a progress bar."""
    study.queue()
    shutil.rmtree(study.folder.path / "trials", ignore_errors=True)
    shown = {trial.number for trial in study.trials(*DONE)}
    if len(shown) >= study.limit:
        return
    study.prepare(screen, threads and threads * workers)
    with console.progress(screen) as (on_step, say):

        def watch():
            for trial in study.trials(*DONE):
                if trial.number not in shown:
                    shown.add(trial.number)
                    values = ", ".join(f"{k} {text(v)}" for k, v in trial.params.items())
                    say(f"{study.name} {len(shown)} of {study.limit}: {score(trial)}, {values}")
            on_step(study.name, len(shown), study.limit)
            return len(shown)

        watch()
        if workers == 1:
            study.work(threads, after=watch)
        else:
            _spread(study, workers, threads, watch)


def text(value) -> str:
    """A setting's value for a person."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def accuracy(trial: FrozenTrial) -> float:
    """The accuracy of a trial that is complete, or was stopped early."""
    assert trial.value is not None, "the trial failed or is not over"
    return trial.value


def score(trial: FrozenTrial) -> str:
    """A finished trial's accuracy, with the standard deviation over its seeds."""
    if trial.state == TrialState.PRUNED:
        return f"stopped early at {accuracy(trial):.1%}"
    found = trial.user_attrs["accuracies"]
    spread = f" ± {statistics.stdev(found):.1%}" if len(found) > 1 else ""
    return f"{accuracy(trial):.1%}{spread}"


def check(config: dict) -> None:
    """Raise TrainError where a config's ``"tune"`` or ``"distill"`` asks for what cannot be."""
    settings = Search(**config["tune"])
    space = Space(settings.search, config["distill"])
    if settings.sampler == "grid" and settings.trials not in (None, len(space.grid())):
        raise TrainError(
            f"trials {settings.trials}: this grid has {len(space.grid())} points, and a trial is "
            "a point; leave trials out, or change search"
        )


def run(
    folder: RunFolder, screen, workers: int = 1, threads: int | None = None
) -> tuple[Study, Study | None]:
    """Run a search, or what is left of it, and write best.json.

    The folder's config has ``"tune"``, the fields of :class:`Search`, and ``"distill"``, options of
    ``kdkernels distill``. ``threads`` are those of each worker. Returns the search, and the
    comparison on the test images, None where there was none.
    """
    folder.hold()
    try:
        with (folder.path / "workers.lock").open("w") as file:
            lock(file, fcntl.LOCK_EX)  # a killed command's workers end with their step
        return _run(folder, screen, workers, threads)
    finally:
        folder.close()


def _run(folder, screen, workers, threads):
    search, confirm = Study(folder, SEARCH), None
    try:
        _finish(search, workers, threads, screen)
        best = search.study.best_params
        _write_best(folder, search.given, best)
        if search.settings.confirm and search.wanted(_options(best)) != search.plain:
            confirm = Study(folder, CONFIRM)
            if confirm.study.user_attrs.get("best", best) != best:  # more trials found better
                optuna.delete_study(study_name=CONFIRM, storage=confirm.storage)
                confirm = Study(folder, CONFIRM)
            confirm.study.set_user_attr("best", best)
            _finish(confirm, workers, threads, screen)
    except (KeyboardInterrupt, TrainError) as error:
        status = getattr(error, "status", 130)
        if status < 128:
            raise
        at = confirm or search
        raise TrainError(
            f"interrupted after {len(at.trials(*DONE))} of {at.limit} trials of {at.name}: go on "
            f"with kdkernels tune --resume {folder.path}",
            status,
        ) from None
    return search, confirm


def _write_best(folder: RunFolder, given: dict, best: dict) -> None:
    """Write best.json: what was given, without what only made the search short, and the best."""
    short = ("device", "threads", "train_samples", "test_samples")
    kept = {name: value for name, value in given.items() if name not in short}
    folder.write_json("best.json", kept | _options(best) | {"arms": ["full"]})
