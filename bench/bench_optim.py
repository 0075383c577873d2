"""Optimizer steps with noise on the gradients, beside torch.optim after such noise and without."""

import pytest

from kdkernels.tools.comparisons import OPTIMIZERS, gpt2, optimizer, resnet18


@pytest.mark.parametrize(
    "name, sizes",
    [("ResNet-18", resnet18()), pytest.param("GPT-2", gpt2(), marks=pytest.mark.full)],
)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer(compare, kind, name, sizes):
    compare(optimizer(kind, name, sizes))
