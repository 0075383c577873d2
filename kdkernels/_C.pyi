"""The extension module. `make stubs` writes this file."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

def _scaled_noise(
    tensors: Sequence[Tensor],
    scales: Tensor,
    noise: Sequence[int],
    noise_tensors: Sequence[Tensor | None],
    /,
) -> list[Tensor]: ...
def add_noise_(
    tensors: Sequence[Tensor],
    std: Sequence[float],
    std_tensor: Tensor | None,
    multiplicative: bool,
    noise: Sequence[int],
    noise_tensors: Sequence[Tensor | None],
    norms: Tensor | None,
    /,
) -> None: ...
def build_info() -> dict[str, Any]: ...
def combine_noise_(
    tensors: Sequence[Tensor],
    coefficients: Tensor,
    seeds: Tensor,
    noise: Sequence[int],
    noise_tensors: Sequence[Tensor | None],
    /,
) -> None: ...
def distillation_loss(
    call: dict[str, Any], teachers: list[Tensor], group: str, /
) -> list[Tensor] | None: ...
def divergences() -> list[Any]: ...
def dropout(
    x: Tensor, p: float, noise: Sequence[int], noise_tensors: Sequence[Tensor | None], /
) -> Tensor: ...
def elementary(arg0: str, arg1: Tensor, /) -> Tensor: ...
def gradient_noise(
    x: Tensor,
    std_tensor: Tensor | None,
    std: float,
    multiplicative: bool,
    noise: Sequence[int],
    noise_tensors: Sequence[Tensor | None],
    /,
) -> Tensor: ...
def input_noise(
    x: Tensor,
    std_tensor: Tensor | None,
    std: float,
    multiplicative: bool,
    noise: Sequence[int],
    noise_tensors: Sequence[Tensor | None],
    /,
) -> Tensor: ...
def linear_distillation_loss(
    call: dict[str, Any],
    teacher_name: str,
    teachers: list[Tensor],
    others: list[Tensor | None],
    group: str,
    /,
) -> list[Tensor] | None: ...
def loss_options() -> list[Any]: ...
def noise_dot(
    tensors: Sequence[Tensor], noise: Sequence[int], noise_tensors: Sequence[Tensor | None], /
) -> Tensor: ...
def noisy_linear_regression(
    arg0: Tensor,
    arg1: Tensor,
    arg2: Tensor,
    arg3: Tensor,
    arg4: Tensor,
    arg5: Tensor,
    arg6: Tensor,
    arg7: int,
    arg8: int,
    arg9: bool,
    arg10: bool,
    /,
) -> Tensor: ...
def noisy_update_(
    update: Sequence[int],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Tensor],
    rules: Sequence[dict[str, Any]],
    noise: Sequence[int],
    tensors: Sequence[Tensor | None],
    norms: Tensor | None,
    /,
) -> None: ...
def philox(arg0: Sequence[int], arg1: Sequence[int], /) -> list[int]: ...
def randn_like(
    x: Tensor, noise: Sequence[int], noise_tensors: Sequence[Tensor | None], /
) -> Tensor: ...

row_state: int

def set_differentiable_gradients(arg0: Callable[..., Any], /) -> None: ...
def set_isa(arg0: str, /) -> None: ...
def set_unwrap(arg0: Callable[..., Any], /) -> None: ...
def stochastic_round(
    x: Tensor, dtype: int, noise: Sequence[int], noise_tensors: Sequence[Tensor | None], /
) -> Tensor: ...
