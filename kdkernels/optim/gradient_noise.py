"""Noise in the gradients of any optimizer."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels import _C
from kdkernels.errors import BOOL, check, check_count, check_number
from kdkernels.noise.arguments import distribution_index, fixed_seed
from kdkernels.optim.parts import Layout, NoiseNorms, norms_of, on_device, refuse_gradients
from kdkernels.optim.schedules import Std, check_std, value_at


class NoiseDominatesWarning(UserWarning):
    """A group's noise is far larger than its gradient."""


class GradientNoise:
    """Adds std * eps to the gradients of any optimizer, once per step (arXiv 1511.06807).

    It hooks the optimizer's ``step``: the noise comes after what the loop does to the gradients,
    clipping, unscaling, accumulation, all-reduce. Optimizers that call a closure get the noise
    after each evaluation's backward, the same in all evaluations of a step. Where a GradScaler lets
    a fused optimizer unscale, that is done here, before the noise; a step with infinities adds no
    noise and is not counted.

    Args:
        optimizer: any torch.optim.Optimizer; dense floating-point gradients.
        std: see the module; or a list, one per parameter group.
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
                f"optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer"
            )
        while not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            # A wrapper without Optimizer's own __init__, such as accelerate's: its steps are those
            # of the optimizer inside.
            inside = next(
                (v for v in vars(optimizer).values() if isinstance(v, torch.optim.Optimizer)), None
            )
            if inside is None:
                raise TypeError(
                    f"optimizer is a {type(optimizer).__name__} without hooks; it must be a "
                    "torch.optim.Optimizer, or a wrapper that holds one"
                )
            optimizer = inside
        self.optimizer, self.std = optimizer, std
        for value in self._stds(optimizer.param_groups):
            check_std(value)
        check("capturable", capturable, BOOL)
        check("diagnostics", diagnostics, BOOL)
        check_number("warn_above", warn_above)
        check_count("check_every", check_every)
        distribution_index(distribution)
        self.distribution, self.capturable, self.diagnostics = distribution, capturable, diagnostics
        self.warn_above, self.check_every = warn_above, check_every
        self.seed = fixed_seed(seed)
        self._set_step(0)
        self._warned = False
        self._attach()

    def _attach(self):
        self._layout, self._kept, self._counts = Layout(), [], 1
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
        """One per group."""
        if not isinstance(self.std, (list, tuple)):
            return [self.std] * len(groups)
        if len(self.std) != len(groups):
            raise ValueError(
                f"std holds {len(self.std)}; it must hold one, or one per parameter "
                f"group: {len(groups)}"
            )
        return self.std

    def remove(self) -> None:
        """Remove the hooks: the optimizer then has no noise."""
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
        """Continue from a ``state_dict``."""
        seed, step = fixed_seed(state_dict["seed"]), state_dict["step"]
        self._set_step(step)
        self.seed = seed

    def __getstate__(self) -> dict[str, Any]:
        rebuilt = ("_hooks", "_layout", "_kept", "_counts")
        return {k: v for k, v in self.__dict__.items() if k not in rebuilt}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()

    def norms(self) -> list[NoiseNorms]:
        """Of the last step that was looked at, one per parameter group: the gradient as the noise
        found it, and the noise. Empty before. DTensors count whole: all ranks that share them must
        then call this. It waits for the device.
        """
        if not self._kept:
            return []
        return norms_of(*self._kept)

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
            raise refuse_gradients(params, error) from None

    def _unscaled(self, optimizer, grads) -> bool:
        """Unscale as a GradScaler asks fused optimizers to; False if the step is skipped."""
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
                # _foreach_mul_ would round the factor to the dtype of 16-bit gradients.
                torch._amp_foreach_non_finite_check_and_unscale_(
                    part.of(grads), torch.zeros_like(factor), factor
                )
            optimizer.grad_scale = None
        return True

    def _add_to(self, grads, groups):
        stds = [value_at(std, self.step) for std in self._stds(groups)]
        look = not self.capturable and self.step % self.check_every == 0 and not self._warned
        kept = []
        for part in self._layout.parts:
            squares = None
            if look or self.diagnostics:
                kind = {"dtype": torch.float64, "device": part.device}
                squares = torch.empty(len(part.where), 2, **kind)
            of_group = on_device(stds, part.device)
            host = not self.capturable
            _C.add_noise_(
                part.of(grads),
                [0.0] if of_group is not None else [float(stds[k]) for k in part.groups],
                None if of_group is None else of_group[part.group_index],
                False,
                part.noise(self.seed, self.step if host else 0, self.distribution),
                [] if host else [None, self.step.to(part.device)],
                squares,
            )
            kept.append(squares)
        if look or self.diagnostics:
            self._kept = (self._layout.parts, kept, len(groups))
            if not self.capturable and not self._warned:
                self._warn()

    def _warn(self):
        for k, norms in enumerate(self.norms()):
            # A gradient of 0 is not judged: checkpoints step with such gradients.
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
