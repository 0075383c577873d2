"""What the optimizers with noise share: their groups, their state, and the step."""

import math
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, TypedDict

import torch
from torch import Tensor

from kdkernels import _C
from kdkernels.errors import BOOL, check, check_number
from kdkernels.noise.arguments import distribution_index, fixed_seed
from kdkernels.optim.parts import (
    Layout,
    NoiseNorms,
    Part,
    local_of,
    norms_of,
    on_device,
    refuse_gradients,
)
from kdkernels.optim.schedules import check_std, value_at

UPDATES = ("sgd", "adamw", "sgld", "psgld")  # in the order of math::Update


class NoiseOptions(TypedDict, total=False):
    """Arguments of all optimizers here; their defaults are False, None and "normal"."""

    maximize: bool
    capturable: bool
    seed: int | None
    distribution: str
    diagnostics: bool
    stochastic_rounding: bool


class NoisyOptimizer(torch.optim.Optimizer):
    """Noise, moments and update in one pass over memory, in one call per device."""

    _update: int
    _moments: tuple[str, ...] = ()  # their names in a parameter's state

    def __init__(
        self,
        params,
        defaults,
        *,
        maximize=False,
        capturable=False,
        seed=None,
        distribution="normal",
        diagnostics=False,
        stochastic_rounding=False,
    ):
        check("capturable", capturable, BOOL)
        check("diagnostics", diagnostics, BOOL)
        distribution_index(distribution)
        self.distribution, self.diagnostics = distribution, diagnostics
        self._forget()
        # Seed and step are kept in the groups, which every kind of checkpoint saves.
        seed = fixed_seed(seed)
        defaults |= {"maximize": maximize, "capturable": capturable}
        defaults["stochastic_rounding"] = stochastic_rounding
        if not isinstance(params, Tensor):  # which torch.optim refuses by name
            if not hasattr(params, "__iter__"):
                kind = type(params).__name__
                raise TypeError(f"params is a {kind}; it must be an iterable of tensors or groups")
            params = list(params)
            if not params:
                raise ValueError("params is empty")
        super().__init__(params, defaults | {"seed": seed, "noise_step": 0})
        self._place_counts()

    def _forget(self):
        self._layout, self._states, self._kept = Layout(), [], []

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return self.param_groups[0]["capturable"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim.Optimizer; the new parameters' streams follow the existing ones."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            group["seed"] = fixed_seed(group["seed"])
            for name in ("seed", "capturable"):
                if group[name] != self.param_groups[0][name]:
                    raise ValueError(
                        f"{name} is {group[name]} in a parameter group and "
                        f"{self.param_groups[0][name]} in another; all must have the same"
                    )
        except Exception:
            self.param_groups.pop()
            raise
        group["noise_step"] = self.param_groups[0]["noise_step"]

    def _check_group(self, group: dict[str, Any]):
        check_number("lr", group["lr"])
        if "std" in group:
            check_std(group["std"])
        if "betas" in group:
            if not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2:
                raise ValueError(f"betas is {group['betas']!r}; it must have two numbers")
            for k, beta in enumerate(group["betas"]):
                check_number(f"betas[{k}]", beta, high=1.0)
        if "beta2" in group:
            check_number("beta2", group["beta2"], high=1.0)
        for name in ("momentum", "weight_decay", "eps", "num_data", "temperature"):
            if name in group:
                check_number(name, group[name])
        if "dampening" in group:
            check_number("dampening", group["dampening"], low=-math.inf)
        for name in ("nesterov", "maximize", "capturable", "stochastic_rounding"):
            if name in group:
                check(name, group[name], BOOL)
        if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov is True with momentum {group['momentum']} and dampening "
                f"{group['dampening']}; nesterov requires a momentum above 0 and no dampening"
            )
        for k, p in enumerate(group["params"]):
            if p.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                raise TypeError(
                    f"params holds {p.dtype} at {k}; it must hold fp32, fp64, bf16 or fp16"
                )

    # -- state

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state, with the moments that its group needs."""
        state = self.state[p]
        for name in self._moments:
            needed = name != "momentum_buffer" or group["momentum"] != 0
            if needed and state.get(name) is None:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state.pop("step", None)
        if "step" not in state:
            state["step"] = (
                torch.zeros((), dtype=torch.float32, device=p.device) if group["capturable"] else 0
            )
        return state

    def _place_counts(self):
        """Make step counts tensors for capturable, and numbers otherwise."""
        capturable, step = (self.param_groups[0][k] for k in ("capturable", "noise_step"))
        if capturable:
            devices = [p.device for group in self.param_groups for p in group["params"]]
            step = torch.as_tensor(step, dtype=torch.int64, device=(devices or ["cpu"])[0])
        else:
            step = int(step)
        for group in self.param_groups:
            group["noise_step"] = step
        for p, state in self.state.items():
            if not isinstance(p, Tensor):
                continue
            if state.get("momentum_buffer") is not None:
                state.setdefault("step", 1)  # torch.optim.SGD's
            if "step" in state and capturable:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)
            elif "step" in state:
                state["step"] = int(state["step"])

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim.Optimizer; std is None where a group has a schedule."""
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            if callable(group.get("std")):
                group["std"] = None
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim.Optimizer; also loads those of torch.optim.SGD and AdamW.

        Schedules, ``capturable`` and what a saved group lacks stay as constructed.
        """
        saved = state_dict["param_groups"]
        if len(saved) == len(self.param_groups):
            pairs = zip(self.param_groups, saved, strict=True)
            saved = [self._resumed(group, state) for group, state in pairs]
        schedules = [group.get("std") for group in self.param_groups]
        super().load_state_dict({**state_dict, "param_groups": saved})
        for group, std in zip(self.param_groups, schedules, strict=True):
            if callable(std):
                group["std"] = std

    def _resumed(self, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        resumed = {**{k: v for k, v in group.items() if k != "params"}, **saved}
        resumed["capturable"] = group["capturable"]
        if saved.get("std", 0.0) is None:
            resumed["std"] = 0.0 if callable(group["std"]) else group["std"]
        return resumed

    def __getstate__(self) -> dict[str, Any]:
        more = {"distribution": self.distribution, "diagnostics": self.diagnostics}
        return super().__getstate__() | more

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        self._place_counts()

    # -- the step

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None):
        """Perform one step and return the closure's value, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        params, grads = self._prepared()
        step = groups[0]["noise_step"]
        on_device = isinstance(step, Tensor)
        lrs = [group["lr"] if on_device else float(group["lr"]) for group in groups]
        stds = [value_at(group.get("std", 0.0), step) for group in groups]
        update = self._update_on_device if on_device else self._update_on_host
        self._kept = []
        try:
            for part in self._layout.parts:
                if self.diagnostics:
                    kind = {"dtype": torch.float64, "device": part.device}
                    self._kept.append(torch.empty(len(part.where), 2, **kind))
                update(part, params, grads, lrs, stds)
        except (TypeError, ValueError, RuntimeError) as error:
            raise refuse_gradients(params, error) from None
        if on_device:
            step += self._counted(step)
        else:
            for group in groups:
                group["noise_step"] = step + 1
        return loss

    def _prepared(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """All parameters and gradients; the layout and the states of its parts are up to date."""
        params, grads, changed = self._layout(self.param_groups)
        momentum = [group["momentum"] != 0 for group in self.param_groups if "momentum" in group]
        seen = [momentum, *self.state.values()]
        if (
            changed
            or len(seen) != len(self._states)
            or not (momentum == self._states[0] and all(map(is_, seen[1:], self._states[1:])))
        ):
            for part in self._layout.parts:
                part.states = [
                    self._state_of(params[i], self.param_groups[k])
                    for i, k in zip(part.where, part.groups, strict=True)
                ]
            self._states = [momentum, *self.state.values()]
        return params, grads

    def _counted(self, like: Tensor) -> int | Tensor:
        """1, or 0 in a step that a GradScaler skips."""
        found_inf = getattr(self, "found_inf", None)
        return 1 if found_inf is None else (found_inf == 0).to(like)

    def _update_on_host(self, part, params, grads, lrs, stds):
        counts = [state["step"] + 1 for state in part.states]
        self._call(part, params, grads, lrs, stds, counts, self.param_groups[0]["noise_step"])
        for state, count in zip(part.states, counts, strict=True):
            state["step"] = count

    def _update_on_device(self, part, params, grads, lrs, stds):
        counts = [state["step"] for state in part.states]
        step = self.param_groups[0]["noise_step"].to(part.device)
        scaler = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        scaler = [None if x is None else x.to(part.device).reshape(1) for x in scaler]
        lr, std = on_device(lrs, part.device), on_device(stds, part.device)
        counted: Any = self._counted(counts[0])
        torch._foreach_add_(counts, counted)
        tensors = [None, step, lr, std, *scaler, *counts]
        try:
            self._call(part, params, grads, lrs, stds, (), 0, tensors)
        except BaseException:
            torch._foreach_sub_(counts, [counted] * len(counts) if scaler[1] is not None else 1)
            raise

    def _call(self, part, params, grads, lrs, stds, counts, step, tensors=()):
        """noisy_update_ with as many `tensors` as there are, see csrc/ops/update.h."""
        _C.noisy_update_(
            [self._update, *part.groups, *counts],
            part.of(params),
            part.of(grads),
            _moments_of(part, self._moments),
            list(map(_rule, self.param_groups, lrs, stds)),
            part.noise(self.param_groups[0]["seed"], step, self.distribution),
            tensors,
            self._kept[-1] if self.diagnostics else None,
        )

    def norms(self) -> list[NoiseNorms]:
        """Of the last step, one per parameter group, if ``diagnostics`` is True; else empty.

        Norms of the gradient before the noise, unscaled and clipped, and of the noise; with SGLD
        and pSGLD, of what drift and noise added to the parameters. They are norms over whole
        DTensors: all ranks that share one must call this. It waits for the device.
        """
        if not self._kept:
            return []
        return norms_of(self._layout.parts, self._kept, len(self.param_groups))


def _rule(group: dict[str, Any], lr: float | Tensor, std: float | Tensor) -> dict[str, Any]:
    """A group's numbers by their names in math::UpdateRule; lr and std 0 where they are tensors."""
    lr, std = (0.0 if isinstance(x, Tensor) else x for x in (lr, std))
    rule = group | {"lr": lr, "std": std}
    if "betas" in group:
        rule["beta1"], rule["beta2"] = group["betas"]
    return rule


def _moments_of(part: Part, names: Sequence[str]) -> list[Tensor]:
    """All first moments, then all second ones; an empty tensor where a parameter has none."""
    moments = [state.get(name) for name in names for state in part.states]
    if part.sharded:
        moments = [None if m is None else local_of(m) for m in moments]
    return [part.empty if m is None else m for m in moments]
