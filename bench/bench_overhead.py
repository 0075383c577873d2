"""What a call costs where there is next to nothing to compute, beside calls that do nothing."""

import functools

import pytest
import torch
from torch.utils import cpp_extension

import kdkernels
from kdkernels.measuring import OURS, Comparison
from kdkernels.tools.comparisons import OPTIMIZERS, backward, dense, noise, optimizer, plain_loss

# As cheap as a C++ autograd Function with a gradient can be.
NOTHING = r"""
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

struct Nothing : torch::autograd::Function<Nothing> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& z,
                            const at::Tensor& t) {
    ctx->save_for_backward({at::empty_like(z)});
    return at::empty({}, z.options());
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list) {
    return {ctx->get_saved_variables()[0], at::Tensor()};
  }
};

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("nothing", [](const at::Tensor& z, const at::Tensor& t) { return Nothing::apply(z, t); });
}
"""


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, t):
        ctx.save_for_backward(torch.empty_like(z))
        return torch.empty((), dtype=z.dtype)

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0], None


@functools.cache
def nothing():
    return cpp_extension.load_inline(
        "kdkernels_nothing", NOTHING, no_implicit_headers=True, extra_cflags=["-O3"]
    ).nothing


def test_loss_and_gradient(compare):
    own = dense(64, 10)
    leaf, t = own.inputs["z"], own.inputs["t"]
    found = Comparison("overhead, loss and gradient 64x10 fp32", own.check)
    found.add("C++ Function, nothing", lambda: backward(nothing()(leaf, t), leaf), check=False)
    found.add(
        "Python Function, nothing", lambda: backward(Nothing.apply(leaf, t), leaf), check=False
    )
    for name, call in own.calls.items():
        found.add(name, call)
    compare(found)


def test_loss_alone(compare):
    own = dense(64, 10)
    z, t, options = own.inputs["z"].detach(), own.inputs["t"], own.inputs["options"]
    want = plain_loss(z, t, *options)
    found = Comparison(
        "overhead, loss without gradient 64x10 fp32",
        lambda call: torch.testing.assert_close(call(), want, rtol=1e-4, atol=1e-4),
    )
    found.add("eager", lambda: plain_loss(z, t, *options))
    found.add("an addition", lambda: z + t, check=False)
    found.add(OURS, lambda: kdkernels.distillation_loss(z, t, temperature=2.0))
    compare(found)


def test_noise(compare):
    found = noise("1k elements", [1000])
    found.title, found.bytes = "overhead, noise on 1k elements fp32", 0
    x = found.inputs["tensors"][0]
    found.add("an addition", lambda: x.add_(0.0), check=False)
    compare(found)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_step(compare, kind):
    """A step on 8 tensors of 100 elements."""
    found = optimizer(kind, "8 tensors of 100", [100] * 8)
    found.title, found.bytes = f"overhead, {found.title}", 0
    compare(found)
