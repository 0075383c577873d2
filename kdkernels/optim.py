"""Optimizers whose step adds noise, noise for any optimizer, and optimizers made of noise alone.

The noise is ``kdkernels.noise``'s: parameter i, counted over all groups, takes stream i, and the
optimizer's own count of steps is the noise's step. So a parameter without a gradient shifts nobody
else's noise, gradients that accumulate over micro-batches get it once, a shard of a DTensor takes
its own slice, and a run that is stopped and resumed gets the bits it would have got. Ranks agree
without communication if they have the same seed: give it, or call ``torch.manual_seed`` alike.

What several of these take:

std
    The noise's standard deviation, finite and 0 or more: a number, a one-element tensor, or a
    schedule, any callable from the step (0, 1, ...) to such a value. ``neelakantan``,
    ``cosine`` and ``exponential`` make some. Schedules are code: a state_dict leaves them out.
seed
    An int in [-2^63, 2^64). None draws one from torch's default generator, at construction.
distribution
    One of ``kdkernels.noise.DISTRIBUTIONS``, each of variance 1.
capturable
    Keep step counts on the device, so that a CUDA graph may capture ``step`` and that a GradScaler
    skips a step without a synchronisation. A schedule is then called with an int64 tensor, and lr
    and std should be tensors where they are to change between replays.
diagnostics
    Keep the norms of gradient and noise of every step, see ``norms``.

Bad values raise ValueError and bad types TypeError that name the argument. Under torch.compile a
step runs as it is, outside the graph.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from operator import is_
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from kdkernels import _C
from kdkernels.errors import BOOL, INT, NUMBER, check, fits
from kdkernels.noise import (
    _distribution,
    _fixed_seed,
    combine_noise_,
    perturbed_parameters,
    shard_of,
)

Std = float | Tensor | Callable[[Any], float | Tensor]

# ---- schedules -----------------------------------------------------------------------------------


def neelakantan(eta: float = 0.3, gamma: float = 0.55) -> Callable:
    """std at step t = sqrt(eta / (1 + t)^gamma) (Neelakantan et al., arXiv 1511.06807, eq. 1-2).

    Their etas are 0.01, 0.3 and 1, their gamma is 0.55.
    """
    _check_number("eta", eta)
    _check_number("gamma", gamma)
    return partial(_neelakantan, eta=float(eta), gamma=float(gamma))


def _neelakantan(t, eta, gamma):
    if isinstance(t, Tensor):
        return torch.sqrt(eta / (1 + t.double()) ** gamma)
    return math.sqrt(eta / (1 + t) ** gamma)


def cosine(std: float, steps: int, final: float = 0.0) -> Callable:
    """From std to final over so many steps along half a cosine, final from then on."""
    _check_number("std", std)
    _check_number("final", final)
    _check_count("steps", steps)
    return partial(_cosine, std=float(std), steps=int(steps), final=float(final))


def _cosine(t, std, steps, final):
    if isinstance(t, Tensor):
        turn = torch.cos(math.pi * (t.double() / steps).clamp(max=1))
    else:
        turn = math.cos(math.pi * min(t / steps, 1))
    return final + (std - final) * (1 + turn) / 2


def exponential(std: float, decay: float) -> Callable:
    """std * decay^t."""
    _check_number("std", std)
    _check_number("decay", decay)
    return partial(_exponential, std=float(std), decay=float(decay))


def _exponential(t, std, decay):
    return std * decay ** (t.double() if isinstance(t, Tensor) else t)


def _value_at(std: Std, step: int | Tensor) -> float | Tensor:
    """std at a step; a number is checked."""
    value = std(step) if callable(std) else std
    if isinstance(step, Tensor) and isinstance(value, Tensor):
        return value
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"std has shape {list(value.shape)}; it takes one element")
    if not fits(value, NUMBER):
        raise TypeError(f"std is a {type(value).__name__} at step {step}; it takes {NUMBER}")
    value = float(value)
    if not 0 <= value < math.inf:
        raise ValueError(f"std is {value} at step {step}; it takes a finite number of at least 0")
    return value


# ---- arguments -----------------------------------------------------------------------------------


def _check_number(name: str, value, low: float = 0.0, high: float = math.inf):
    """A finite number or one-element tensor of at least low and below high."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} has shape {list(value.shape)}; it takes one element")
    check(name, value, NUMBER)
    if not low <= float(value) < high:
        below = "" if high == math.inf else f" and below {high:g}"
        raise ValueError(
            f"{name} is {float(value):g}; it takes a finite number of at least {low:g}{below}"
        )


def _check_count(name: str, value):
    check(name, value, INT)
    if value < 1:
        raise ValueError(f"{name} is {value}; it takes at least 1")


def _check_std(std: Std):
    if not callable(std):
        _check_number("std", std)


def _refuse_gradients(params: Sequence[Tensor], error: Exception) -> Exception:
    """What is wrong with a gradient if that is why a kernel refused a list, else the error."""
    for i, p in enumerate(params):
        g = p.grad
        if g is None:
            continue
        if g.layout != torch.strided:
            return TypeError(f"the gradient of parameter {i} is sparse; it takes a dense one")
        if g.dtype != p.dtype or g.is_complex():
            return TypeError(
                f"the gradient of parameter {i} is {g.dtype}, the parameter {p.dtype}; it takes "
                "one dtype of fp32, fp64, bf16 and fp16"
            )
    return error


# ---- a parameter list on its devices -------------------------------------------------------------


def _local(tensor: Any) -> Tensor:
    """What this rank holds of a DTensor, arrived."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return tensor.wait() if hasattr(tensor, "wait") else tensor


def _sharers(tensor: Any) -> tuple:
    """The process groups among which a DTensor's elements are divided."""
    if not hasattr(tensor, "placements"):
        return ()
    mesh = tensor.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(tensor.placements)
        if placement.is_shard() and mesh.size(dim) > 1
    )


class _Part:
    """Those parameters of one device that have a gradient, and where their noise stands."""

    def __init__(self, params: Sequence[Tensor], groups: Sequence[int], where: Sequence[int]):
        self.where = where  # places in the list of all parameters: their streams
        self.states: list[dict[str, Any]] = []
        self.groups = [groups[i] for i in where]
        shards = [shard_of(params[i]) for i in where]
        self.offsets = [offset for _, offset, _, _ in shards]
        self.runs = [number for _, _, run, stride in shards for number in (run, stride)]
        self.sharded = any(
            local is not params[i] for i, (local, *_) in zip(where, shards, strict=True)
        )
        if not any(self.offsets):
            self.offsets = [0]
        if not any(self.runs):
            self.runs = []
        self.sharers = [_sharers(params[i]) for i in where]
        self.device = shards[0][0].device
        self.empty = shards[0][0].new_empty(0)
        # On the device from the start: an index from the host could not be captured.
        self.group_index = torch.tensor(self.groups, device=self.device)

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This part's share of a list of all parameters' tensors."""
        mine = [tensors[i] for i in self.where]
        return [_local(t) for t in mine] if self.sharded else mine


class _Layout:
    """The parts of an optimizer's parameters, kept as long as nothing moves."""

    def __init__(self):
        self.params: list[Tensor] = []
        self.key: tuple = ()
        self.parts: list[_Part] = []

    def __call__(self, groups: list[dict]) -> tuple[list[Tensor], list[Tensor | None], bool]:
        """(all parameters, their gradients, whether the parts were made anew)."""
        params = [p for group in groups for p in group["params"]]
        grads = [p.grad for p in params]
        key = ([g is None for g in grads], [len(group["params"]) for group in groups])
        if key == self.key and all(map(is_, params, self.params)):
            return params, grads, False
        group_of = [k for k, group in enumerate(groups) for _ in group["params"]]
        devices: dict[torch.device, list[int]] = {}
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            if g is None:
                continue
            if getattr(g, "placements", None) != getattr(p, "placements", None):
                raise ValueError(
                    f"the gradient of parameter {i} is placed {getattr(g, 'placements', None)}, "
                    f"the parameter {getattr(p, 'placements', None)}; they take one placement"
                )
            devices.setdefault(p.device, []).append(i)
        self.parts = [_Part(params, group_of, where) for where in devices.values()]
        self.params, self.key = params, key
        return params, grads, True


class NoiseNorms(NamedTuple):
    """L2 norms over one parameter group, across all ranks that share it."""

    gradient: float
    noise: float

    @property
    def ratio(self) -> float:
        """noise / gradient; infinite where only the gradient is 0, NaN where both are."""
        if self.gradient == 0:
            return math.inf if self.noise > 0 else math.nan
        return self.noise / self.gradient


def _norms(parts: Sequence[_Part], squares: Sequence[Tensor], groups: int) -> list[NoiseNorms]:
    """One a group, of each part's [n, 2] sums of squares."""
    shared: dict[tuple, Tensor] = {}
    for part, rows in zip(parts, squares, strict=True):
        for sharers in dict.fromkeys(part.sharers):
            mine = [k for k, other in enumerate(part.sharers) if other == sharers]
            sums = rows.new_zeros(groups, 2).index_add_(0, part.group_index[mine], rows[mine])
            sums = sums if sharers else sums.cpu()
            shared[sharers] = shared[sharers] + sums if sharers in shared else sums
    total = torch.zeros(groups, 2, dtype=torch.float64)
    for sharers, sums in shared.items():
        for process_group in sharers:
            torch.distributed.all_reduce(sums, group=process_group)
        total += sums.cpu()
    return [NoiseNorms(*row) for row in total.sqrt().tolist()]


# ---- optimizers with noise -----------------------------------------------------------------------

# math::Update's order; and a rule's numbers after lr and std, in UpdateRule's.
_SGD, _ADAMW, _SGLD, _PSGLD = range(4)
_RULE = (
    ("weight_decay", 0.0),
    ("momentum", 0.0),
    ("dampening", 0.0),
    ("beta1", 0.0),
    ("beta2", 0.0),
    ("eps", 0.0),
    ("num_data", 1.0),
    ("temperature", 0.0),
    ("nesterov", False),
    ("maximize", False),
)


class NoiseOptions(TypedDict, total=False):
    """What all optimizers here take, with defaults False, None and "normal"."""

    maximize: bool
    capturable: bool
    seed: int | None
    distribution: str
    diagnostics: bool


class _NoisyOptimizer(torch.optim.Optimizer):
    """Noise, moments and update in one pass over memory, one call a device."""

    _update: int
    _first: str | None = None  # the moments' names in a parameter's state
    _second: str | None = None

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
    ):
        check("capturable", capturable, BOOL)
        check("diagnostics", diagnostics, BOOL)
        _distribution(distribution)
        self.distribution, self.diagnostics = distribution, diagnostics
        self._forget()
        # Seed and steps done stand in the groups, where every kind of checkpoint finds them.
        seed = _fixed_seed(seed)
        defaults |= {"maximize": maximize, "capturable": capturable}
        super().__init__(params, defaults | {"seed": seed, "noise_step": 0})
        self._place_counts()

    def _forget(self):
        self._layout, self._states, self._kept = _Layout(), [], []

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return self.param_groups[0]["capturable"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of torch.optim.Optimizer. The parameters' streams follow those that are there."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            group["seed"] = _fixed_seed(group["seed"])
            for name in ("seed", "capturable"):
                if group[name] != self.param_groups[0][name]:
                    raise ValueError(
                        f"{name} is {group[name]} in a parameter group and "
                        f"{self.param_groups[0][name]} in another; all share one"
                    )
        except Exception:
            self.param_groups.pop()
            raise
        group["noise_step"] = self.param_groups[0]["noise_step"]

    def _check_group(self, group: dict[str, Any]):
        _check_number("lr", group["lr"])
        if "std" in group:
            _check_std(group["std"])
        if "betas" in group:
            if not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2:
                raise ValueError(f"betas is {group['betas']!r}; it takes two numbers")
            for k, beta in enumerate(group["betas"]):
                _check_number(f"betas[{k}]", beta, high=1.0)
        if "beta2" in group:
            _check_number("beta2", group["beta2"], high=1.0)
        for name in ("momentum", "weight_decay", "eps", "num_data", "temperature"):
            if name in group:
                _check_number(name, group[name])
        if "dampening" in group:
            _check_number("dampening", group["dampening"], low=-math.inf)
        for name in ("nesterov", "maximize", "capturable"):
            if name in group:
                check(name, group[name], BOOL)
        if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov is True with momentum {group['momentum']} and dampening "
                f"{group['dampening']}; it takes a momentum above 0 and no dampening"
            )
        for k, p in enumerate(group["params"]):
            if p.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                raise TypeError(
                    f"params holds {p.dtype} at {k}; it takes fp32, fp64, bf16 and fp16"
                )

    # -- state

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state, with the moments that its group needs."""
        state = self.state[p]
        for name in (self._first, self._second):
            needed = name is not None and (name != "momentum_buffer" or group["momentum"] != 0)
            if needed and state.get(name) is None:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state.pop("step", None)
        if "step" not in state:
            state["step"] = (
                torch.zeros((), dtype=torch.float32, device=p.device) if group["capturable"] else 0
            )
        return state

    def _place_counts(self):
        """Step counts as capturable wants them, whatever they were."""
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
        """As of torch.optim.Optimizer; std is None where a group has a schedule."""
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            if callable(group.get("std")):
                group["std"] = None
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of torch.optim.Optimizer; takes those of torch.optim.SGD and AdamW, too.

        Schedules and ``capturable`` stay as constructed, and so does what a group does not hold.
        """
        saved = state_dict["param_groups"]
        if len(saved) == len(self.param_groups):
            pairs = zip(self.param_groups, saved, strict=True)
            saved = [self._resumed(own, group) for own, group in pairs]
        schedules = [group.get("std") for group in self.param_groups]
        super().load_state_dict({**state_dict, "param_groups": saved})
        for group, std in zip(self.param_groups, schedules, strict=True):
            if callable(std):
                group["std"] = std

    def _resumed(self, own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        group = {**{k: v for k, v in own.items() if k != "params"}, **saved}
        group["capturable"] = own["capturable"]
        if saved.get("std", 0.0) is None:
            group["std"] = 0.0 if callable(own["std"]) else own["std"]
        return group

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
        """One step with the gradients that there are; what the closure gave, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        params, grads = self._prepared()
        step = groups[0]["noise_step"]
        lrs = [group["lr"] if isinstance(step, Tensor) else float(group["lr"]) for group in groups]
        stds = [_value_at(group.get("std", 0.0), step) for group in groups]
        update = self._update_on_device if isinstance(step, Tensor) else self._update_on_host
        self._kept = []
        try:
            for part in self._layout.parts:
                if self.diagnostics:
                    kind = {"dtype": torch.float64, "device": part.device}
                    self._kept.append(torch.empty(len(part.where), 2, **kind))
                update(part, params, grads, lrs, stds)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _refuse_gradients(params, error) from None
        if isinstance(step, Tensor):
            step += self._counted(step)
        else:
            for group in groups:
                group["noise_step"] = step + 1
        return loss

    def _prepared(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """All parameters and gradients; the layout and the states of its parts are up to date."""
        params, grads, anew = self._layout(self.param_groups)
        momentum = [group["momentum"] != 0 for group in self.param_groups if "momentum" in group]
        seen = [momentum, *self.state.values()]
        if (
            anew
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
        """1, but 0 in a step that a GradScaler skips."""
        found_inf = getattr(self, "found_inf", None)
        return 1 if found_inf is None else (found_inf == 0).to(like)

    def _update_on_host(self, part, params, grads, lrs, stds):
        counts = [state["step"] + 1 for state in part.states]
        self._call(part, params, grads, lrs, stds, counts, [], self.param_groups[0]["noise_step"])
        for state, count in zip(part.states, counts, strict=True):
            state["step"] = count

    def _update_on_device(self, part, params, grads, lrs, stds):
        counts = [state["step"] for state in part.states]
        step = self.param_groups[0]["noise_step"].to(part.device)
        scaler = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        scaler = [None if x is None else x.to(part.device).reshape(1) for x in scaler]
        lr, std = _on_device(lrs, part.device), _on_device(stds, part.device)
        counted: Any = self._counted(counts[0])
        torch._foreach_add_(counts, counted)
        try:
            self._call(part, params, grads, lrs, stds, [], counts, 0, step, lr, std, *scaler)
        except BaseException:
            torch._foreach_sub_(counts, [counted] * len(counts) if scaler[1] is not None else 1)
            raise

    def _call(
        self,
        part,
        params,
        grads,
        lrs,
        stds,
        counts,
        count_tensors,
        step,
        step_tensor=None,
        lr_tensor=None,
        std_tensor=None,
        grad_scale=None,
        found_inf=None,
    ):
        rules = list(chain.from_iterable(map(_rule, self.param_groups, lrs, stds)))
        _C.noisy_update_(
            self._update,
            part.of(params),
            part.of(grads),
            _moments(part, self._first),
            _moments(part, self._second),
            counts,
            count_tensors,
            part.groups,
            rules,
            self.param_groups[0]["seed"],
            step,
            part.where,
            part.offsets,
            part.runs,
            None,
            step_tensor,
            _distribution(self.distribution),
            lr_tensor,
            std_tensor,
            grad_scale,
            found_inf,
            self._kept[-1] if self.diagnostics else None,
        )

    def norms(self) -> list[NoiseNorms]:
        """Of the last step, one a parameter group, if ``diagnostics`` was True; else empty.

        Norms of the gradient as the noise found it, unscaled and clipped, and of the noise that was
        added to it; with SGLD and pSGLD of what drift and noise added to the parameters. DTensors
        count whole: all ranks that share them must then call this. It waits for the device.
        """
        if not self._kept:
            return []
        return _norms(self._layout.parts, self._kept, len(self.param_groups))


def _rule(group: dict[str, Any], lr: float | Tensor, std: float | Tensor) -> list[float]:
    """The kernel's UpdateRule; tensors go beside it."""
    if "betas" in group:
        group = group | dict(zip(("beta1", "beta2"), group["betas"], strict=True))
    rule = [0.0 if isinstance(x, Tensor) else x for x in (lr, std)]
    return rule + [group.get(name, default) for name, default in _RULE]


def _on_device(values: Sequence[float | Tensor], device: torch.device) -> Tensor | None:
    """fp64 [groups] if there is a tensor among them."""
    if not any(isinstance(v, Tensor) for v in values):
        return None
    kind = {"dtype": torch.float64, "device": device}
    # A fill, unlike a copy of a host's number, may be captured.
    return torch.stack(
        [v.to(**kind).reshape(()) if isinstance(v, Tensor) else torch.full((), v, **kind)
         for v in values]
    )  # fmt: skip


def _moments(part: _Part, name: str | None) -> list[Tensor]:
    if name is None:
        return []
    moments = [state.get(name) for state in part.states]
    if part.sharded:
        moments = [None if m is None else _local(m) for m in moments]
    return [part.empty if m is None else m for m in moments]


class NoisySGD(_NoisyOptimizer):
    """torch.optim.SGD on gradients with noise, in one pass over memory.

    Args:
        params: as of torch.optim.SGD, parameters or groups; each group may have its own value of
            every number below.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as of torch.optim.SGD.
        std, seed, distribution, capturable, diagnostics: see the module.

    Example:
        >>> optimizer = kdkernels.NoisySGD(
        ...     model.parameters(), lr=0.1, momentum=0.9, std=kdkernels.neelakantan(0.01), seed=0
        ... )
    """

    _update, _first = _SGD, "momentum_buffer"

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        std: Std = 0.0,
        **options: Unpack[NoiseOptions],
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "std": std,
        }
        super().__init__(params, defaults, **options)


class NoisyAdamW(_NoisyOptimizer):
    """torch.optim.AdamW on gradients with noise, in one pass over memory.

    Args:
        params: as of torch.optim.AdamW, parameters or groups; each group may have its own value of
            every number below.
        lr, betas, eps, weight_decay, maximize: as of torch.optim.AdamW; betas are numbers.
        std, seed, distribution, capturable, diagnostics: see the module.

    Example:
        >>> optimizer = kdkernels.NoisyAdamW(model.parameters(), lr=1e-3, std=0.01, seed=0)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()
    """

    _update, _first, _second = _ADAMW, "exp_avg", "exp_avg_sq"

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        std: Std = 0.0,
        **options: Unpack[NoiseOptions],
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "std": std,
        }
        super().__init__(params, defaults, **options)


class SGLD(_NoisyOptimizer):
    """Stochastic gradient Langevin dynamics (Welling and Teh, ICML 2011).

    With ``U = num_data * loss + weight_decay / 2 |theta|^2``, whose gradient backward estimates on
    a mini-batch, a step is::

        theta <- theta - lr / 2 * dU + sqrt(lr * temperature) * eps

    and samples theta from the density exp(-U / temperature), as lr tends to 0. ``loss`` is the mean
    negative log-likelihood of a datum; weight_decay is the precision of a Gaussian prior.

    Args:
        params: parameters or groups; each group may have its own value of every number below.
        lr: the step size, epsilon in the paper.
        num_data: how many data the mean stands for; 1 where the loss is their sum.
        temperature: 1 samples the posterior, 0 is gradient descent.
        weight_decay: at least 0.
        maximize: the loss is a log-likelihood.
        seed, distribution, capturable, diagnostics: see the module.
    """

    _update = _SGLD

    def __init__(
        self,
        params,
        lr: float | Tensor,
        *,
        num_data: float = 1,
        temperature: float = 1.0,
        weight_decay: float = 0.0,
        **options: Unpack[NoiseOptions],
    ):
        defaults = {
            "lr": lr,
            "num_data": num_data,
            "temperature": temperature,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, **options)


class pSGLD(_NoisyOptimizer):  # noqa: N801
    """SGLD with RMSprop's preconditioner (Li et al., arXiv 1512.07666, algorithm 1).

    With g the gradient of the loss and U as of ``SGLD``::

        V <- beta2 V + (1 - beta2) g^2,  G = 1 / (eps + sqrt(V))
        theta <- theta - lr / 2 * G dU + sqrt(lr * temperature * G) * eps

    The curvature term Gamma is left out, as the paper does in practice: what it costs in bias
    falls with 1 - beta2.

    Args:
        params, lr, num_data, temperature, weight_decay, maximize: as of ``SGLD``.
        beta2: V's decay, alpha in the paper.
        eps: the paper's lambda.
        seed, distribution, capturable, diagnostics: see the module.
    """

    _update, _second = _PSGLD, "square_avg"

    def __init__(
        self,
        params,
        lr: float | Tensor,
        *,
        num_data: float = 1,
        temperature: float = 1.0,
        weight_decay: float = 0.0,
        beta2: float = 0.99,
        eps: float = 1e-5,
        **options: Unpack[NoiseOptions],
    ):
        defaults = {
            "lr": lr,
            "num_data": num_data,
            "temperature": temperature,
            "weight_decay": weight_decay,
            "beta2": beta2,
            "eps": eps,
        }
        super().__init__(params, defaults, **options)


# ---- noise for any optimizer ---------------------------------------------------------------------


class NoiseDominatesWarning(UserWarning):
    """A group's noise is far larger than its gradient."""


class GradientNoise:
    """Adds std * eps to the gradients of any optimizer, once a step (arXiv 1511.06807).

    It hooks the optimizer's ``step``: the noise comes after what the loop does to the gradients,
    clipping, unscaling, accumulation, all-reduce. Optimizers that call a closure get the noise
    after each evaluation's backward, the same in all evaluations of a step. Where a GradScaler lets
    a fused optimizer unscale, that is done here, before the noise, and a step with infinities adds
    none and does not count.

    Args:
        optimizer: any torch.optim.Optimizer; dense floating-point gradients.
        std: see the module; or a list, one a parameter group.
        seed, distribution, capturable, diagnostics: see the module.
        warn_above: a ratio of the noise's norm to the gradient's in a group; above it
            ``NoiseDominatesWarning`` is given, once. Never with ``capturable``.
        check_every: it is looked at on each such step (the first among them), or on every one with
            diagnostics, until it has warned. To look waits for the device and, where parameters
            are sharded, adds up the squares of all ranks.

    Example:
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> noise = kdkernels.GradientNoise(optimizer, kdkernels.neelakantan(0.01), seed=0)
        >>> loss_fn(model(x), y).backward()
        >>> norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        >>> optimizer.step()
        >>> torch.save([optimizer.state_dict(), noise.state_dict()], "checkpoint.pt")
    """

    step: Any  # an int, or with capturable a tensor
    _kept: Any

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        std: Std | Sequence[Std],
        *,
        seed: int | None = None,
        distribution: str = "normal",
        capturable: bool = False,
        diagnostics: bool = False,
        warn_above: float = 10.0,
        check_every: int = 100,
    ):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}; it takes a torch.optim.Optimizer"
            )
        while not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            # A wrapper without Optimizer's own __init__, such as accelerate's: its steps are those
            # of the optimizer inside.
            inside = next(
                (v for v in vars(optimizer).values() if isinstance(v, torch.optim.Optimizer)), None
            )
            if inside is None:
                raise TypeError(
                    f"optimizer is a {type(optimizer).__name__} without hooks; it takes a "
                    "torch.optim.Optimizer, or a wrapper that holds one"
                )
            optimizer = inside
        self.optimizer, self.std = optimizer, std
        for value in self._stds(optimizer.param_groups):
            _check_std(value)
        check("capturable", capturable, BOOL)
        check("diagnostics", diagnostics, BOOL)
        _check_number("warn_above", warn_above)
        _check_count("check_every", check_every)
        _distribution(distribution)
        self.distribution, self.capturable, self.diagnostics = distribution, capturable, diagnostics
        self.warn_above, self.check_every = warn_above, check_every
        self.seed = _fixed_seed(seed)
        self._set_step(0)
        self._warned = False
        self._attach()

    def _attach(self):
        self._layout, self._kept, self._counts = _Layout(), [], 1
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

    def _set_step(self, step: int | Tensor):
        """Steps done: an int, or with capturable an int64 tensor on the parameters' device."""
        if self.capturable:
            devices = [p.device for g in self.optimizer.param_groups for p in g["params"]]
            step = torch.as_tensor(step, dtype=torch.int64, device=(devices or ["cpu"])[0]).clone()
        self.step = step if self.capturable else int(step)

    def _stds(self, groups: list[dict]) -> Sequence[Any]:
        """One a group."""
        if not isinstance(self.std, (list, tuple)):
            return [self.std] * len(groups)
        if len(self.std) != len(groups):
            raise ValueError(
                f"std holds {len(self.std)}; it takes one, or one a parameter group: {len(groups)}"
            )
        return self.std

    def remove(self) -> None:
        """Take the noise off the optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Any]:
        """Seed and steps done.

        torch.distributed.checkpoint steps an optimizer that has no state, to make room for it: take
        this after its ``get_state_dict``, and load it after its ``set_state_dict``.
        """
        step = self.step.clone() if self.capturable else self.step
        return {"seed": self.seed, "step": step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a ``state_dict`` was taken."""
        seed, step = _fixed_seed(state_dict["seed"]), state_dict["step"]
        self._set_step(step)
        self.seed = seed

    def __getstate__(self) -> dict[str, Any]:
        own = ("_hooks", "_layout", "_kept", "_counts")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()

    def norms(self) -> list[NoiseNorms]:
        """Of the last step that was looked at, one a parameter group: the gradient as the noise
        found it, and the noise. Empty before. DTensors count whole: all ranks that share them must
        then call this. It waits for the device.
        """
        if not self._kept:
            return []
        return _norms(*self._kept)

    # -- hooks

    @torch._disable_dynamo
    def _before_step(self, optimizer, args, kwargs):
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        self._counts = 1
        if closure is None:
            self._add(optimizer)
            return None

        def noisy_closure():
            loss = closure()
            self._add(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], noisy_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": noisy_closure}

    @torch._disable_dynamo
    def _after_step(self, optimizer, args, kwargs):
        self.step += self._counts

    @torch.no_grad()
    def _add(self, optimizer):
        params, grads, _ = self._layout(optimizer.param_groups)
        try:
            if not self._unscaled(optimizer, grads):
                return
            self._add_to(grads, optimizer.param_groups)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _refuse_gradients(params, error) from None

    def _unscaled(self, optimizer, grads) -> bool:
        """Do a GradScaler's part that it left to the optimizer; False if the step is skipped."""
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            if self.capturable:
                self._counts = (found_inf == 0).to(self.step)
            elif found_inf.item() != 0:
                self._counts = 0
                return False
        grad_scale = getattr(optimizer, "grad_scale", None)
        if grad_scale is not None:
            for part in self._layout.parts:
                factor = grad_scale.to(part.device, torch.float64).reciprocal().float()
                # Not _foreach_mul_: it would round the factor to a 16-bit gradient's dtype.
                torch._amp_foreach_non_finite_check_and_unscale_(
                    part.of(grads), torch.zeros_like(factor), factor
                )
            optimizer.grad_scale = None
        return True

    def _add_to(self, grads, groups):
        stds = [_value_at(std, self.step) for std in self._stds(groups)]
        look = not self.capturable and self.step % self.check_every == 0 and not self._warned
        kept = []
        for part in self._layout.parts:
            squares = None
            if look or self.diagnostics:
                kind = {"dtype": torch.float64, "device": part.device}
                squares = torch.empty(len(part.where), 2, **kind)
            of_group = _on_device(stds, part.device)
            host = not self.capturable
            _C.add_noise_(
                part.of(grads),
                [0.0] if of_group is not None else [float(stds[k]) for k in part.groups],
                self.seed,
                self.step if host else 0,
                part.where,
                part.offsets,
                part.runs,
                None,
                None if host else self.step.to(part.device),
                _distribution(self.distribution),
                False,
                None if of_group is None else of_group[part.group_index],
                squares,
            )
            kept.append(squares)
        if look or self.diagnostics:
            self._kept = (self._layout.parts, kept, len(groups))
            if not self.capturable and not self._warned:
                self._warn()

    def _warn(self):
        for k, norms in enumerate(self.norms()):
            # Of a gradient of 0, as where a checkpoint steps with such, there is nothing to say.
            if norms.gradient > 0 and norms.ratio > self.warn_above:
                self._warned = True
                warnings.warn(
                    f"parameter group {k} has noise of norm {norms.noise:.3g} on a gradient of "
                    f"norm {norms.gradient:.3g} at step {self.step}, {norms.ratio:.3g} times: "
                    "training may diverge. Noise is added after clipping: std times the square "
                    "root of the number of parameters should not exceed the clipped norm by far",
                    NoiseDominatesWarning,
                    stacklevel=2,
                )
                return


# ---- optimizers without gradients ----------------------------------------------------------------


def _member_seeds(seed: int | None, step: int, count: int) -> list[int]:
    """Seeds of a step's directions: 64 bits of Philox under the seed, each at its own counter."""
    seed = _fixed_seed(seed)
    check("step", step, INT)
    if not 0 <= step < 2**32:
        raise ValueError(f"step is {step}; it takes an int in [0, 2^32)")
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    words = (_C.philox([k, 0, 0, int(step)], key) for k in range(count))
    return [_fixed_seed(low | high << 32) for low, high, *_ in words]


@torch.no_grad()
def evolution_step(
    params: Iterable[Tensor],
    score_fn: Callable[[], float | Tensor],
    *,
    population: int,
    std: float,
    lr: float,
    seed: int,
    step: int,
    antithetic: bool = True,
    shaping: str = "standardize",
    distribution: str = "normal",
) -> Tensor:
    """One step of evolution strategies towards higher scores (Salimans et al., arXiv 1703.03864).

    With s_i the shaped score of theta + std * eps_i (and -eps_i as a member of its own if
    antithetic)::

        theta <- theta + lr / (population * std) * sum_i s_i eps_i

    No gradients, no moments and no noise are kept: a member's noise is made from its seed, again
    for the update, which is one pass over the parameters for any population (as of "Evolution
    strategies at scale", arXiv 2509.24372, which standardizes and counts 1 / std into lr).

    Args:
        params: what score_fn depends on; one copy of it is held.
        score_fn: gives the score of the parameters as they are: a number, or a tensor of one
            element. It is called once a member, without autograd.
        population: how many members; even if antithetic.
        std: how far the members stand from theta, above 0.
        lr: at least 0.
        seed, step: where the noise stands, an int in [-2^63, 2^64) and one in [0, 2^32).
        antithetic: members in pairs theta +- std * eps_i.
        shaping: "standardize" (mean 0, standard deviation 1), or "ranks" (evenly from -1/2 to 1/2,
            whatever the scores' scale, as OpenAI's; equal scores share a rank).
        distribution: of eps, see the module.

    Returns:
        The members' scores, fp64 ``[population]``; of a pair + and - in turn.

    Raises:
        ValueError: a score is not finite; the parameters are then as they were.

    Example:
        >>> x, y = sklearn.datasets.load_digits(return_X_y=True)
        >>> x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
        >>> model = torch.nn.Linear(64, 10)
        >>> def score():
        ...     return -torch.nn.functional.cross_entropy(model(x), y)
        >>> for step in range(80):
        ...     scores = kdkernels.evolution_step(
        ...         model.parameters(), score, population=32, std=0.05, lr=0.02, seed=0, step=step
        ...     )
        >>> (model(x).argmax(1) == y).float().mean() > 0.85
        tensor(True)
    """
    params = list(params)
    _check_count("population", population)
    _check_number("lr", lr)
    _check_above_0("std", std)
    check("antithetic", antithetic, BOOL)
    if antithetic and population % 2 != 0:
        raise ValueError(f"population is {population}; antithetic members come in pairs")
    if shaping not in ("standardize", "ranks"):
        raise ValueError(f'shaping is {shaping!r}; it takes "standardize" or "ranks"')
    signs = (1, -1) if antithetic else (1,)
    seeds = _member_seeds(seed, step, population // len(signs))
    noise = {"step": step, "distribution": distribution}
    scores = []
    for member in seeds:
        for sign in signs:
            with perturbed_parameters(params, sign * std, seed=member, **noise):
                scores.append(_scalar("score_fn", score_fn(), params))
    scores = torch.stack(scores)
    if not torch.isfinite(scores).all():
        raise ValueError(f"score_fn gave {scores[~torch.isfinite(scores)][0].item()}")
    _, place, equals = scores.unique(return_inverse=True, return_counts=True)
    if len(equals) == 1:  # whose mean may be off by a rounding
        shaped = torch.zeros_like(scores)
    elif shaping == "ranks":  # equal scores share the mean of their ranks
        ranks = equals.cumsum(0) - (equals + 1) / 2
        shaped = ranks.to(scores)[place] / (population - 1) - 0.5
    else:
        shaped = (scores - scores.mean()) / scores.std(correction=0)
    weights = (shaped.reshape(-1, len(signs)) * shaped.new_tensor(signs)).sum(1)
    combine_noise_(params, weights * (lr / (population * std)), seeds, **noise)
    return scores


@torch.no_grad()
def mezo_step(
    params: Iterable[Tensor],
    loss_fn: Callable[[], float | Tensor],
    *,
    lr: float,
    scale: float = 1e-3,
    directions: int = 1,
    seed: int,
    step: int,
    weight_decay: float = 0.0,
    distribution: str = "normal",
    restore: str = "copy",
) -> Tensor:
    """One step of zeroth-order SGD towards lower loss (MeZO: Malladi et al., arXiv 2305.17333).

    With L(x) the loss and n directions::

        g_i = (L(theta + scale * eps_i) - L(theta - scale * eps_i)) / (2 * scale)
        theta <- (1 - lr * weight_decay) * theta - lr / n * sum_i g_i eps_i

    Args:
        params: what loss_fn depends on.
        loss_fn: gives the loss of the parameters as they are, a number or a tensor of one element,
            on the same data in all 2 * directions calls of a step; without autograd.
        lr, weight_decay: at least 0.
        scale: how far to look, above 0.
        directions: n; the update is one pass over the parameters for any.
        seed, step: where the noise stands, an int in [-2^63, 2^64) and one in [0, 2^32).
        distribution: of eps, see the module.
        restore: how the parameters come back after a look, see ``perturbed_parameters``:
            "regenerate" needs no memory, as MeZO itself.

    Returns:
        The mean of the losses seen, a fp64 scalar. No check: a loss that is not finite makes the
        parameters NaN.

    Example:
        >>> x, y = sklearn.datasets.load_digits(return_X_y=True)
        >>> x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
        >>> model = torch.nn.Linear(64, 10)
        >>> def loss():
        ...     return torch.nn.functional.cross_entropy(model(x), y)
        >>> for step in range(200):
        ...     mean = kdkernels.mezo_step(
        ...         model.parameters(), loss, lr=0.1, directions=8, seed=0, step=step
        ...     )
        >>> (model(x).argmax(1) == y).float().mean() > 0.85
        tensor(True)
    """
    params = list(params)
    _check_count("directions", directions)
    _check_number("lr", lr)
    _check_number("weight_decay", weight_decay)
    _check_above_0("scale", scale)
    seeds = _member_seeds(seed, step, directions)
    noise = {"step": step, "distribution": distribution}
    losses = []
    for direction in seeds:
        for sign in (1, -1):
            with perturbed_parameters(
                params, sign * scale, seed=direction, restore=restore, **noise
            ):
                losses.append(_scalar("loss_fn", loss_fn(), params))
    losses = torch.stack(losses)
    slopes = (losses[::2] - losses[1::2]) / (2 * scale)
    if weight_decay != 0 and params:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    combine_noise_(params, slopes * (-lr / directions), seeds, **noise)
    return losses.mean()


def _check_above_0(name: str, value):
    _check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} is {value}; it takes a number above 0")


def _scalar(name: str, value, params: Sequence[Tensor]) -> Tensor:
    """What a function gave, as a fp64 scalar where the parameters are."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} gave shape {list(value.shape)}; it takes one element")
    if not fits(value, NUMBER):
        raise TypeError(f"{name} gave a {type(value).__name__}; it takes {NUMBER}")
    device = params[0].device if params else "cpu"
    return torch.as_tensor(value, dtype=torch.float64, device=device).reshape(())
