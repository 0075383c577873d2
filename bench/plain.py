"""What bench/gpu.py takes from kdkernels.benchmark."""

from kdkernels.benchmark import gpt2, plain_loss, resnet18

__all__ = ["gpt2", "plain_loss", "resnet18"]
