"""Search for a distillation's settings with Optuna (Akiba et al., arXiv 1907.10902).

A trial trains the student as the arm "full" does, with settings of its own, over one seed or
several, and is worth its mean accuracy on training images that were held out; the test images take
no part. The teacher is trained once and asked once, and every trial learns from its kept
predictions. At the end the best settings and the defaults each train on all training images, over
seeds that the search did not see, and are tested on the test images.

The run's folder holds, beside config.json::

    study.sqlite     Optuna's studies "search" and "confirm"
    search, confirm  each study's teacher, as a run's folder, and its predictions
    best.json        options for ``kdkernels distill --config``
    results.json, plots/*.png, report.html
"""

import base64
import contextlib
import dataclasses
import fcntl
import io
import math
import multiprocessing
import os
import shutil
import signal
import sqlite3
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import optuna
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from optuna.trial import TrialState
from rich import progress

import kdkernels
from kdkernels.train import TrainError, console, data, distillation, report, soft_regularization
from kdkernels.train.run_folder import RunFolder

__all__ = ["LIMITS", "SPACE", "Choices", "Range", "Settings", "Space", "check", "run"]

SEARCH, CONFIRM = "search", "confirm"
DEFAULTS, BEST = "the defaults", "the best trial's"
_DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a search is asked for.

    Attributes:
        search: see :class:`Space`.
        sampler: ``"tpe"`` (tree-structured Parzen estimator), ``"random"`` or ``"grid"``.
        trials: finished ones in the end; None is 30, for a grid all its points, no other number.
        seeds: of one trial; its accuracy is their mean.
        validation: share of the training images that is held out, 0..1.
        prune: ``"median"`` or ``"hyperband"`` stops trials that do badly after an epoch; or
            ``"none"``.
        confirm: seeds of the comparison on the test images; 0: no such comparison.
    """

    search: str = "temperature,alpha,divergence,noise"
    sampler: str = "tpe"
    trials: int | None = None
    seeds: int = 1
    validation: float = 0.2
    prune: str = "none"
    confirm: int = 3


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, on a logarithmic scale with ``log``; a grid has ``count``
    of them, evenly spaced on that scale, both ends among them.
    """

    low: float
    high: float
    log: bool = False
    count: int = 4

    def suggest(self, trial: optuna.Trial, name: str) -> float:
        """This trial's value."""
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def points(self) -> list[float]:
        """A grid's values."""
        shares = [i / (self.count - 1) for i in range(1, self.count - 1)]
        if self.log:
            inner = [self.low * (self.high / self.low) ** share for share in shares]
        else:
            inner = [self.low + (self.high - self.low) * share for share in shares]
        return [self.low, *(float(f"{value:.4g}") for value in inner), self.high]

    def __contains__(self, value) -> bool:
        return self.low <= value <= self.high


@dataclasses.dataclass(frozen=True)
class Choices:
    """One of ``values``, numbers or names."""

    values: tuple

    def suggest(self, trial: optuna.Trial, name: str):
        """This trial's value."""
        return trial.suggest_categorical(name, self.values)

    def points(self) -> list:
        """A grid's values."""
        return list(self.values)

    def __contains__(self, value) -> bool:
        return value in self.values


SPACE = {
    "temperature": Range(1.0, 16.0, log=True),
    "alpha": Range(0.0, 1.0),
    "lr": Range(1e-4, 1e-2, log=True),
    "divergence": Choices(tuple(kdkernels.divergences())),
    "beta": Range(0.05, 0.95),
    "noise": Choices(("none", *distillation.NOISE_STD)),
    "input_std": Range(0.01, 1.0, log=True),
    "gradient_std": Range(0.001, 0.1, log=True),
    "parameter_std": Range(0.001, 0.1, log=True),
    "regularizer_lam": Range(0.001, 0.1, log=True),
}
"""What can be searched, and where it is unless the search says otherwise."""

LIMITS = {"alpha": (0.0, 1.0), "beta": (0.0, 1.0)}
"""Where numbers may be; others are above 0 and at most 1e6."""

_STDS = {
    "input_std": "input", "gradient_std": "gradient", "parameter_std": "parameter",
    "regularizer_lam": "regularizer",
}  # fmt: skip


def _dimension(name: str, text: str) -> Range | Choices:
    """One dimension as ``--search name=text`` has it."""
    usual = SPACE[name]
    parts = text.split(":" if ":" in text else "|")
    if isinstance(usual, Choices):
        if set(parts) <= set(usual.values) and len(set(parts)) == len(parts):
            return Choices(tuple(parts))
        known = ", ".join(usual.values)
        raise TrainError(f"--search {name}={text}: give some of {known}, separated by |")
    least, most = LIMITS.get(name, (sys.float_info.min, 1e6))
    with contextlib.suppress(ValueError):  # whatever float() and int() do not read
        numbers = [float(part) for part in (parts[:2] if ":" in text else parts)]
        fits = all(least <= number <= most for number in numbers)
        if fits and ":" not in text and len(set(numbers)) == len(numbers):
            return Choices(tuple(numbers))
        count = int(parts[2]) if len(parts) > 2 else usual.count
        if fits and 2 <= len(parts) <= 3 and numbers[0] < numbers[1] and count > 1:
            return Range(numbers[0], numbers[1], usual.log, count)
    raise TrainError(
        f"--search {name}={text}: give low:high, such as {usual.low:g}:{usual.high:g}, or numbers "
        f"separated by |, each {f'in {least:g}..{most:g}' if name in LIMITS else 'above 0'}"
    )


class Space:
    """What is searched.

    Args:
        search: names from ``SPACE``, separated by commas: ``name`` alone takes its place there,
            ``name=low:high`` a range, ``name=low:high:count`` one of which a grid has ``count``
            points, ``name=a|b|c`` some values. With divergence comes beta for those of which it is
            a parameter in 0..1, with noise each one's standard deviation or lambda.
        given: options of ``kdkernels distill`` that all trials have.

    Raises:
        TrainError: a name or a value that there is not, or that is given as well.
    """

    def __init__(self, search: str, given: dict):
        plain = distillation.Settings(**given)
        self.plain = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
        self.plain["noise"] = plain.noise or "none"
        named = {}
        for item in search.split(","):
            name, equals, text = (part.strip() for part in item.partition("="))
            if name not in SPACE:
                raise TrainError(f"--search {item}: {name!r} is not one of {', '.join(SPACE)}")
            if name in named:
                raise TrainError(f"--search has {name} twice")
            named[name] = _dimension(name, text) if equals else SPACE[name]
        values = {
            name: named[name].values if name in named else (self.plain[name],)
            for name in ("divergence", "noise")
        }
        for name in ("beta", *_STDS):
            parent = "divergence" if name == "beta" else "noise"
            if any(self.needs(name, {parent: value}) for value in values[parent]):
                if parent in named:
                    named.setdefault(name, SPACE[name])
            elif name in named:
                raise TrainError(
                    f"--search has {name}, which no {parent} that is tried takes: "
                    f"{', '.join(values[parent])}"
                )
        self.dimensions = {name: named[name] for name in SPACE if name in named}
        for name in self.dimensions:
            option = "noise_std" if name in _STDS else name
            if option in given:
                raise TrainError(
                    f"--search tries {name}, and --{option.replace('_', '-')} is given: leave it "
                    f"out, or write {name}={given[option]} in --search"
                )

    def needs(self, name: str, chosen: dict) -> bool:
        """Whether a trial that has these values has one of this name too."""
        chosen = self.plain | chosen
        if name == "beta":
            of = kdkernels.divergences()[chosen["divergence"]].parameters
            return of.get("beta", 2.0) <= 1.0
        return name not in _STDS or _STDS[name] == chosen["noise"]

    def suggest(self, trial: optuna.Trial) -> dict:
        """A trial's values."""
        chosen = {}
        for name, dimension in self.dimensions.items():
            if self.needs(name, chosen):
                chosen[name] = dimension.suggest(trial, name)
        return chosen

    def grid(self) -> list[dict]:
        """The values of all of a grid's trials."""
        points = [{}]
        for name, dimension in self.dimensions.items():
            points = [
                point | more
                for point in points
                for more in (
                    [{name: value} for value in dimension.points()]
                    if self.needs(name, point)
                    else [{}]
                )
            ]
        return points

    def defaults(self) -> list[dict]:
        """The values of the trial with the defaults; an empty list where they are outside."""
        own = kdkernels.divergences()[self.plain["divergence"]].parameters | self.plain
        own |= {name: distillation.NOISE_STD[place] for name, place in _STDS.items()}
        own["beta"] = kdkernels.divergences()[own["divergence"]].parameters.get("beta")
        chosen = {name: own[name] for name in self.dimensions if self.needs(name, {})}
        return [chosen] if all(v in self.dimensions[n] for n, v in chosen.items()) else []


def options(chosen: dict) -> dict:
    """A trial's values as options of ``kdkernels distill``."""
    found = {("noise_std" if name in _STDS else name): value for name, value in chosen.items()}
    return {name: value for name, value in found.items() if (name, value) != ("noise", "none")}


class _Study:
    """One of the two Optuna studies of a run's folder, as a process sees it.

    The study "search" tries the space; of "confirm" each trial is one seed of the defaults or of
    the best trial's settings.
    """

    def __init__(self, folder: RunFolder, name: str):
        self.folder, self.name = folder, name
        self.settings = Settings(**folder.config["tune"])
        self.given = folder.config["distill"]
        self.space = Space(self.settings.search, self.given)
        self.plain = self.wanted({})
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        file = folder.path / "study.sqlite"
        # A log of writes lets others read meanwhile; a worker waits for another's write.
        with contextlib.closing(sqlite3.connect(file, timeout=60)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        self.storage = optuna.storages.RDBStorage(
            f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": 60}}
        )
        pruners = {
            "none": optuna.pruners.NopPruner(),
            "median": optuna.pruners.MedianPruner(n_warmup_steps=1),
            "hyperband": optuna.pruners.HyperbandPruner(
                max_resource=self.plain.epochs * self.settings.seeds
            ),
        }
        self.study = optuna.create_study(
            storage=self.storage, study_name=name, direction="maximize", load_if_exists=True,
            pruner=pruners[self.settings.prune if name == SEARCH else "none"],
        )  # fmt: skip
        if name == CONFIRM:
            seeds = range(self.settings.seeds, self.settings.seeds + self.settings.confirm)
            self.points = [
                {"settings": which, "seed": self.plain.seed + seed}
                for seed in seeds
                for which in (DEFAULTS, BEST)
            ]
        else:
            grid = self.settings.sampler == "grid"
            self.points = self.space.grid() if grid else self.space.defaults()
        self.only_points = name == CONFIRM or self.settings.sampler == "grid"
        self.limit = len(self.points) if self.only_points else self.settings.trials or 30

    def wanted(self, more: dict) -> distillation.Settings:
        """What a trial asks of the trainer, with these options of its own."""
        validation = self.settings.validation if self.name == SEARCH else 0.0
        return distillation.Settings(**self.given | {"validation": validation, "arms": ()} | more)

    def trials(self, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
        """Those in these states, all by default."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def done(self) -> int:
        """Number of finished trials."""
        return len(self.trials(*_DONE))

    def queue(self) -> None:
        """Make trials that were under way wait again, and all points wait that were not tried.

        Nobody else may be at work on the study.
        """
        stale = self.trials(TrialState.RUNNING)
        for trial in stale:
            self.study.tell(trial.number, state=TrialState.FAIL)
        again = [] if self.only_points else [t.params for t in stale if t.params]
        tried = [
            trial.params or trial.system_attrs["fixed_params"]
            for trial in self.trials(TrialState.WAITING, *_DONE)
        ]
        known = {tuple(sorted(point.items())) for point in tried}
        for point in self.points + again:
            key = tuple(sorted(point.items()))
            if key not in known:
                self.study.enqueue_trial(point)
                known.add(key)

    def ask(self) -> tuple[optuna.Trial, dict] | None:
        """The next trial and its values; None where there is none left."""
        with _locked(self.folder.path / "ask.lock"):
            number = len(self.trials(TrialState.RUNNING, *_DONE))
            if number >= self.limit:
                return None
            # A sampler of the trial's own: one that went on drawing would start anew at a resume.
            seed = self.plain.seed * 1_000_003 + number
            tpe = self.settings.sampler == "tpe"
            make = optuna.samplers.TPESampler if tpe else optuna.samplers.RandomSampler
            self.study.sampler = make(seed=seed % 2**32)
            trial = self.study.ask()
            if self.name == SEARCH:
                return trial, self.space.suggest(trial)
            point = {"settings": trial.suggest_categorical("settings", (DEFAULTS, BEST))}
            seeds = sorted({point["seed"] for point in self.points})
            return trial, point | {"seed": trial.suggest_int("seed", seeds[0], seeds[-1])}

    def prepare(self, screen) -> None:
        """Train the teacher and keep its predictions of the training images, once."""
        path = self.folder.path / self.name
        if (path / "teacher.json").exists():
            return
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        inner = RunFolder(path, {})
        # An arm that has no epochs: what is left is the teacher and what it says.
        wanted = dataclasses.replace(
            self.plain, epochs=0, arms=("full",), noise=None, noise_std=None, generations=1
        )
        screen.print(f"{self.name}: the teacher learns and predicts")
        console.progress(distillation.run, wanted, inner, screen)
        found = [line for line in inner.metrics() if line["kind"] == "epoch"]
        accuracy = found[-1]["accuracy"] if found else None
        inner.write_json("teacher.json", {"accuracy": accuracy})

    def work(self, threads: int | None, parent: int = 0, after: Callable = lambda: None) -> None:
        """Run trials until none is left.

        Args:
            threads: CPU threads; None is torch's choice.
            parent: id of the process without which this one shall not go on; 0: none.
            after: called after each trial.
        """
        plain = self.plain
        images = data.load(
            plain.data, size=plain.image_size, data_dir=plain.data_dir,
            imagenet=plain.teacher_weights == "DEFAULT",
            augment=plain.augment, views=plain.views, seed=plain.seed,
        )  # fmt: skip

        kept = str(self.folder.path / self.name / "predictions/teacher")

        def on_step(*_):
            if parent and os.getppid() != parent:
                os._exit(1)

        while (asked := self.ask()) is not None:
            trial, chosen = asked
            if self.name == SEARCH:
                more, first, seeds = options(chosen), plain.seed, self.settings.seeds
            else:
                more, first, seeds = {}, chosen["seed"], 1
                if chosen["settings"] == BEST:
                    more = self.study.user_attrs["best"]
            more |= {"teacher_predictions": kept, "teacher_weights": "none", "threads": threads}
            wanted = self.wanted(more)
            began, found = time.monotonic(), []
            try:
                for seed in range(first, first + seeds):
                    found.append(self._train(trial, wanted, seed, images, on_step, len(found)))
            except optuna.TrialPruned:
                self.study.tell(trial, state=TrialState.PRUNED)
            except TrainError as error:
                if error.status != 130:  # the parent finds it: it may be another process
                    trial.set_user_attr("error", str(error))
                    self.study.tell(trial, state=TrialState.FAIL)
                raise
            else:
                trial.set_user_attr("accuracies", found)
                trial.set_user_attr("seconds", time.monotonic() - began)
                self.study.tell(trial, statistics.fmean(found))
            after()

    def _train(self, trial, settings, seed, images, on_step, number) -> float:
        """The accuracy of one seed after its last epoch; 0 where the loss stopped being finite."""
        path = self.folder.path / "trials" / f"{self.name}-{trial.number}-{seed}"
        (path / "checkpoints").mkdir(parents=True)
        inner = RunFolder(path, {})
        arms = () if settings.noise else ("full",)
        settings = dataclasses.replace(settings, seed=seed, arms=arms)

        def lines(kind):
            return [line for line in inner.metrics() if line["kind"] == kind]

        def epoch_is_over(_):
            epochs = lines("epoch")
            step = number * settings.epochs + len(epochs)
            trial.report(epochs[-1]["accuracy"], step)
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            distillation.run(settings, inner, on_step, epoch_is_over, images=images)
            return lines("epoch")[-1]["accuracy"]
        except TrainError:
            last = lines("step")[-1:]
            if last and not isinstance(last[0]["loss"], float):  # JSON has no NaN
                return 0.0
            raise
        finally:
            shutil.rmtree(path)


@contextlib.contextmanager
def _locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[int]:
    """Hold a lock file, which the system takes back from a process that dies."""
    with path.open("w") as file:
        fcntl.flock(file, how)
        yield file.fileno()


def _work(path: str, name: str, threads: int | None, parent: int) -> None:
    """A worker process."""
    folder = RunFolder.open(path)
    with _locked(folder.path / "run.lock", fcntl.LOCK_SH):
        try:
            _Study(folder, name).work(threads, parent)
        except TrainError as error:  # the trial has the sentence
            sys.exit(error.status)


def _spread(study: _Study, workers: int, threads: int | None, watch: Callable) -> None:
    """Let worker processes run the study's trials."""
    context = multiprocessing.get_context("spawn")
    threads = threads or max(1, torch.get_num_threads() // workers)
    processes = [
        context.Process(
            target=_work, args=(str(study.folder.path), study.name, threads, os.getpid())
        )
        for _ in range(workers)
    ]
    # Ctrl-C goes to all of a terminal's processes; the workers leave it to this one.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for process in processes:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        while any(process.is_alive() for process in processes):
            watch()
            time.sleep(0.3)
    finally:
        for process in processes:
            process.terminate()
            process.join()
    watch()
    status = [process.exitcode for process in processes if process.exitcode]
    if status:
        said = [t.user_attrs["error"] for t in study.trials() if "error" in t.user_attrs]
        raise TrainError(said[-1] if said else f"a worker was killed (status {status[0]})", 1)


def _finish(study: _Study, workers: int, threads: int | None, screen) -> None:
    """Run what is left of a study, with a line a trial and a progress bar."""
    study.queue()
    shutil.rmtree(study.folder.path / "trials", ignore_errors=True)
    if study.done() >= study.limit:
        return
    study.prepare(screen)
    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(),
        progress.MofNCompleteColumn(), progress.TextColumn("trials"),
        progress.TimeElapsedColumn(), progress.TextColumn("left:"), progress.TimeRemainingColumn(),
    )  # fmt: skip
    shown = {trial.number for trial in study.trials(*_DONE)}
    with progress.Progress(*columns, console=screen, transient=True) as bars:
        bar = bars.add_task(study.name, total=study.limit, completed=len(shown))

        def watch():
            for trial in study.trials(*_DONE):
                if trial.number not in shown:
                    shown.add(trial.number)
                    bars.console.print(
                        f"{study.name} {len(shown)} of {study.limit}: {_accuracy(trial)}, "
                        f"{_words(trial.params)}"
                    )
            bars.update(bar, completed=len(shown))

        if workers == 1:
            study.work(threads, after=watch)
        else:
            _spread(study, workers, threads, watch)


def check(config: dict) -> None:
    """Raise TrainError where a config's ``"tune"`` or ``"distill"`` asks for what cannot be."""
    settings = Settings(**config["tune"])
    space = Space(settings.search, config["distill"])
    if settings.sampler == "grid" and settings.trials not in (None, len(space.grid())):
        raise TrainError(
            f"--trials {settings.trials}: this grid has {len(space.grid())} points, and a trial is "
            "a point; leave --trials out, or change --search"
        )


def run(folder: RunFolder, screen, workers: int = 1, threads: int | None = None) -> list:
    """Run a search, or what is left of it, and write what it found to the folder.

    Args:
        folder: its config has ``"tune"``, the fields of :class:`Settings`, and ``"distill"``,
            options of ``kdkernels distill``.
        screen: a rich console.
        workers: processes that run trials beside each other.
        threads: CPU threads of each; None is torch's choice, shared out among the workers.

    Returns:
        The tables, to be printed.

    Raises:
        TrainError: another process is at work on this folder; a trial cannot run; Ctrl-C.
    """
    with (folder.path / "run.lock").open("w") as lock:
        for last in [False] * 40 + [True]:  # workers of a killed command end with their step
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if last:
                    raise TrainError(
                        f"another kdkernels tune is at work on {folder.path}"
                    ) from None
                time.sleep(0.2)
        fcntl.flock(lock, fcntl.LOCK_SH)  # the workers hold it too
        search = _Study(folder, SEARCH)
        try:
            _finish(search, workers, threads, screen)
            best = options(search.study.best_params)
            folder.write_json("best.json", _kept(search.given) | best | {"arms": ["full"]})
            confirm = None
            if search.settings.confirm and search.wanted(best) != search.wanted({}):
                confirm = _Study(folder, CONFIRM)
                if confirm.study.user_attrs.get("best", best) != best:
                    optuna.delete_study(study_name=CONFIRM, storage=confirm.storage)
                    confirm = _Study(folder, CONFIRM)
                confirm.study.set_user_attr("best", best)
                _finish(confirm, workers, threads, screen)
        except (KeyboardInterrupt, TrainError) as error:
            if isinstance(error, TrainError) and error.status != 130:
                raise
            raise TrainError(
                f"interrupted after {search.done()} of {search.limit} trials: continue with "
                f"kdkernels tune --resume {folder.path}",
                status=130,
            ) from None
        return _report(search, confirm)


def _kept(given: dict) -> dict:
    """Those of the options given that the best settings go with."""
    own = ("device", "threads", "train_samples", "test_samples")
    return {name: value for name, value in given.items() if name not in own}


def _accuracy(trial: optuna.trial.FrozenTrial) -> str:
    if trial.state == TrialState.PRUNED:
        return f"stopped early at {trial.value:.1%}" if trial.value is not None else "stopped early"
    found = trial.user_attrs["accuracies"]
    spread = f" ± {statistics.stdev(found):.1%}" if len(found) > 1 else ""
    return f"{trial.value:.1%}{spread}"


def _words(params: dict) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in params.items())


def _text(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _tables(search: _Study, confirm: _Study | None, importances: dict) -> list[report.Table]:
    settings, plain = search.settings, search.plain
    done = search.trials(*_DONE)
    complete = sorted(search.trials(TrialState.COMPLETE), key=lambda t: (-t.value, t.number))
    usual = search.space.defaults()
    shown = complete[:10] + [t for t in complete[10:] if [t.params] == usual]
    names = list(search.space.dimensions)
    found = report.Table(
        "Search: the best trials",
        ["trial", "held-out accuracy", *(name.replace("_", " ") for name in names), "seconds"],
        [
            [
                f"{trial.number}{' (the defaults)' if [trial.params] == usual else ''}",
                _accuracy(trial),
                *(_text(trial.params[name]) if name in trial.params else "" for name in names),
                f"{trial.user_attrs['seconds']:.0f}",
            ]
            for trial in shown
        ],
        f"{len(done)} trials by the sampler {settings.sampler}, "
        f"{len(done) - len(complete)} of them stopped early (pruner {settings.prune}); "
        f"{plain.student} taught by {plain.teacher} on {plain.data} at "
        f"{plain.image_size}x{plain.image_size}, {plain.epochs} epochs, seeds {plain.seed} to "
        f"{plain.seed + settings.seeds - 1}. Accuracy is on {settings.validation:.0%} of the "
        "training images, held out; the best of many trials is better there than elsewhere.",
    )
    tables = [found]
    if confirm is not None:
        values = {which: [] for which in (DEFAULTS, BEST)}
        for trial in sorted(confirm.trials(TrialState.COMPLETE), key=lambda t: t.params["seed"]):
            values[trial.params["settings"]].append(trial.value)
        apart = soft_regularization.difference(values[BEST], values[DEFAULTS])
        error = apart["standard_error"]
        tables.insert(
            0,
            report.Table(
                "Confirmation: the test images",
                ["settings", "test accuracy, %", "by seed, %"],
                [
                    [
                        which,
                        f"{statistics.fmean(row):.2%}".rstrip("%")
                        + (f" ± {statistics.stdev(row) * 100:.2f}" if len(row) > 1 else ""),
                        ", ".join(f"{value * 100:.2f}" for value in row),
                    ]
                    for which, row in values.items()
                ],
                f"Trained on all training images, {plain.epochs} epochs, {len(values[BEST])} seeds "
                "that the search did not see, mean ± standard deviation. Difference "
                f"{apart['mean'] * 100:+.2f}"
                + (f" ± {error * 100:.2f} (standard error of pairs)" if error else "")
                + f" points. The best trial's: {_words(search.study.best_params)}.",
            ),
        )
    if importances:
        tables.append(
            report.Table(
                "What mattered",
                ["setting", "importance, %"],
                [[name.replace("_", " "), f"{v * 100:.0f}"] for name, v in importances.items()],
                "PED-ANOVA (Watanabe et al., arXiv 2304.10255): how much a setting decides whether "
                "a trial is among the better ones; they add up to 100.",
            )
        )
    return tables


def _plot_history(search: _Study, _) -> Figure:
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.subplots()
    trials = search.trials(TrialState.COMPLETE)
    stopped = [t for t in search.trials(TrialState.PRUNED) if t.value is not None]
    colour = report.COLOURS["fused"]
    numbers, values = [t.number for t in trials], [t.value for t in trials]
    axes.plot(numbers, values, "o", color=colour, alpha=0.55, ms=5, mew=0, label="a trial")
    if stopped:
        axes.plot(
            [t.number for t in stopped], [t.value for t in stopped], "x", color="#999999", ms=5,
            label="stopped early",
        )  # fmt: skip
    best = [max(values[: i + 1]) for i in range(len(values))]
    axes.step(numbers, best, where="post", color="#c1121f", lw=1.5, label="best so far")
    for trial in trials:
        if [trial.params] == search.space.defaults():
            axes.axhline(trial.value, color="black", lw=1, ls=":", label="the defaults")
    axes.set(xlabel="trial", ylabel="held-out accuracy", title="The search")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(fontsize=9, loc="lower right")
    return figure


def _plot_settings(search: _Study, _) -> Figure:
    trials = search.trials(TrialState.COMPLETE)
    names = [n for n in search.space.dimensions if any(n in t.params for t in trials)]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 2.9 * rows + 0.3), layout="constrained")
    every = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    for axes, name in zip(every, names, strict=False):
        those = [t for t in trials if name in t.params]
        dimension = search.space.dimensions[name]
        x = [t.params[name] for t in those]
        if isinstance(dimension, Choices):
            ticks = range(len(dimension.values))
            x = [dimension.values.index(v) for v in x]
            labels = [_text(v).replace("_", "\n") for v in dimension.values]
            axes.set_xticks(ticks, labels, fontsize=7 if len(labels) > 5 else 9)
            if sum(map(len, labels)) > 30:
                axes.tick_params(axis="x", rotation=90)
            axes.set_xlim(-0.5, len(labels) - 0.5)
        elif dimension.log:
            axes.set_xscale("log")
        dots = axes.scatter(
            x, [t.value for t in those], c=[t.number for t in those], cmap="viridis_r", s=22,
            alpha=0.8, lw=0, vmin=0, vmax=max(t.number for t in trials) or 1,
        )  # fmt: skip
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in list(every)[len(names) :]:
        axes.set_visible(False)
    figure.colorbar(dots, ax=figure.axes, label="trial", shrink=0.6)
    figure.supylabel("held-out accuracy", fontsize=10)
    return figure


def _plot_importances(_, importances: dict) -> Figure:
    figure = Figure(figsize=(7.5, 0.9 + 0.36 * len(importances)), layout="constrained")
    axes = figure.subplots()
    names = [name.replace("_", " ") for name in importances]
    axes.barh(names, list(importances.values()), color=report.COLOURS["fused"], height=0.62)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(title="What mattered", xlabel="importance")
    return figure


def _report(search: _Study, confirm: _Study | None) -> list[report.Table]:
    """Write results.json, plots/*.png and report.html; returns the tables."""
    folder, importances = search.folder, {}
    complete = search.trials(TrialState.COMPLETE)
    if len({trial.value for trial in complete}) > 1:
        importances = optuna.importance.get_param_importances(search.study)
    tables = _tables(search, confirm, importances)
    plots = {"history": _plot_history, "settings": _plot_settings}
    if importances:
        plots["importances"] = _plot_importances
    pictures = []
    with matplotlib.rc_context(report.STYLE):
        for name, draw in plots.items():
            picture = io.BytesIO()
            draw(search, importances).savefig(picture, format="png")
            folder.write_bytes(f"plots/{name}.png", picture.getvalue())
            encoded = base64.b64encode(picture.getvalue()).decode()
            pictures.append({"png": encoded, "alt": name})

    def rows(study):
        return [
            {"number": t.number, "state": t.state.name, "accuracy": t.value, "settings": t.params}
            | t.user_attrs
            for t in (study.trials(*_DONE) if study else ())
        ]

    results = {
        "machine": folder.config["machine"], "best": folder.read_json("best.json"),
        "importances": importances, "trials": rows(search), "confirmation": rows(confirm),
    }  # fmt: skip
    folder.write_json("results.json", results)
    asked = {**folder.config["tune"], **search.given}
    page = report.PAGE.render(
        name=folder.path.name, machine=folder.config["machine"],
        sections=[{"title": "Search for settings", "tables": tables, "plots": pictures}],
        settings="\n".join(f"{name} = {value}" for name, value in asked.items()),
    )  # fmt: skip
    folder.write_bytes("report.html", page.encode())
    return tables
