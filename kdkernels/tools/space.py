"""What ``kdkernels tune`` searches: ranges and values of distill's settings."""

import contextlib
import dataclasses
import sys
from typing import Any

import numpy as np
import optuna

import kdkernels
from kdkernels.train import TrainError
from kdkernels.train.settings import NOISE_STD, Distil, divergences


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, on a logarithmic scale with ``log``; a grid has ``count``
    of them, evenly spaced on that scale, both ends among them.
    """

    low: float
    high: float
    log: bool = False
    count: int = 4

    def __contains__(self, value) -> bool:
        return self.low <= value <= self.high

    def __iter__(self):
        spaced = np.geomspace if self.log else np.linspace
        inner = spaced(self.low, self.high, self.count)[1:-1]
        return iter([self.low, *(float(f"{value:.4g}") for value in inner), self.high])


SPACE = {
    "temperature": Range(1.0, 16.0, log=True),
    "alpha": Range(0.0, 1.0),
    "lr": Range(1e-4, 1e-2, log=True),
    "divergence": divergences(),
    "beta": Range(0.05, 0.95),
    "noise": ("none", *NOISE_STD),
    "input_std": Range(0.01, 1.0, log=True),
    "gradient_std": Range(0.001, 0.1, log=True),
    "parameter_std": Range(0.001, 0.1, log=True),
    "regularizer_lam": Range(0.001, 0.1, log=True),
}
"""What can be searched, and where it is unless the search says otherwise: a range, or a tuple."""

_LIMITS = {"alpha": (0.0, 1.0), "beta": (0.0, 1.0)}  # others are above 0 and at most 1e6
NOISE = {
    "input_std": "input",
    "gradient_std": "gradient",
    "parameter_std": "parameter",
    "regularizer_lam": "regularizer",
}
"""Which noise a standard deviation or lambda is of."""


def _dimension(name: str, text: str) -> Range | tuple:
    """What ``--search name=text`` asks for."""
    usual = SPACE[name]
    parts = text.split(":" if ":" in text else "|")
    if isinstance(usual, tuple):
        if set(parts) <= set(usual) and len(set(parts)) == len(parts):
            return tuple(parts)
        known = ", ".join(usual)
        raise TrainError(f"search {name}={text}: give some of {known}, separated by |")
    least, most = _LIMITS.get(name, (sys.float_info.min, 1e6))
    with contextlib.suppress(ValueError):  # whatever float() and int() do not read
        numbers = [float(part) for part in (parts[:2] if ":" in text else parts)]
        fits = all(least <= number <= most for number in numbers)
        if fits and ":" not in text and len(set(numbers)) == len(numbers):
            return tuple(numbers)
        count = int(parts[2]) if len(parts) > 2 else usual.count
        a_range = ":" in text and len(parts) <= 3 and count > 1
        if fits and a_range and numbers[0] < numbers[1]:
            return Range(numbers[0], numbers[1], usual.log, count)
    raise TrainError(
        f"search {name}={text}: give low:high, such as {usual.low:g}:{usual.high:g}, or numbers "
        f"separated by |, each {f'in {least:g}..{most:g}' if name in _LIMITS else 'above 0'}"
    )


class Space:
    """What is searched: ``dimensions``, in the order of ``SPACE``.

    Args:
        search: names from ``SPACE``, separated by commas: ``name`` alone takes its place there,
            ``name=low:high`` a range, ``name=low:high:count`` one of which a grid has ``count``
            points, ``name=a|b|c`` some values. With divergence comes beta for those of which it is
            a parameter in 0..1, with noise each one's standard deviation or lambda.
        given: options of ``kdkernels distill`` that all trials have.
    """

    def __init__(self, search: str, given: dict):
        self.fixed = dataclasses.asdict(Distil(**given))
        self.fixed["noise"] = self.fixed["noise"] or "none"
        named = {}
        for item in search.split(","):
            name, equals, text = (part.strip() for part in item.partition("="))
            if name not in SPACE:
                raise TrainError(f"search {item}: {name!r} is not one of {', '.join(SPACE)}")
            if name in named:
                raise TrainError(f"search has {name} twice")
            named[name] = _dimension(name, text) if equals else SPACE[name]
        for name in ("beta", *NOISE):
            parent = "divergence" if name == "beta" else "noise"
            values = named.get(parent, (self.fixed[parent],))
            taken = any(self.needs(name, {parent: value}) for value in values)
            if taken and parent in named:
                named.setdefault(name, SPACE[name])
            elif name in named and not taken:
                raise TrainError(
                    f"search has {name}, which no {parent} that is tried takes: {', '.join(values)}"
                )
        self.dimensions = {name: named[name] for name in SPACE if name in named}
        for name in self.dimensions:
            option = "noise_std" if name in NOISE else name
            if option in given:
                raise TrainError(
                    f"search tries {name}, and {option} is given: leave it "
                    f"out, or write {name}={given[option]} in search"
                )

    def needs(self, name: str, chosen: dict) -> bool:
        """Whether a trial that has these values has one of this name too."""
        chosen = self.fixed | chosen
        if name == "beta":
            parameters = kdkernels.divergences()[chosen["divergence"]].parameters
            return parameters.get("beta", 2.0) <= 1.0
        return name not in NOISE or NOISE[name] == chosen["noise"]

    def suggest(self, trial: optuna.Trial) -> dict:
        """A trial's values."""
        chosen = {}
        for name, dimension in self.dimensions.items():
            if not self.needs(name, chosen):
                continue
            if isinstance(dimension, tuple):
                chosen[name] = trial.suggest_categorical(name, dimension)
            else:
                low, high = dimension.low, dimension.high
                chosen[name] = trial.suggest_float(name, low, high, log=dimension.log)
        return chosen

    def grid(self) -> list[dict]:
        """The values of all of a grid's trials."""
        points = [{}]
        for name, dimension in self.dimensions.items():
            steps = [{name: value} for value in dimension]
            points = [
                point | step
                for point in points
                for step in (steps if self.needs(name, point) else [{}])
            ]
        return points

    def defaults(self) -> list[dict]:
        """The values of the trial with the defaults; an empty list where they are outside."""
        own: dict[str, Any] = dict(self.fixed)
        own |= {name: NOISE_STD[place] for name, place in NOISE.items()}
        own |= kdkernels.divergences()[own["divergence"]].parameters
        chosen = {name: own[name] for name in self.dimensions if self.needs(name, {})}
        return [chosen] if all(v in self.dimensions[n] for n, v in chosen.items()) else []
