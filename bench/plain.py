"""What people write in plain PyTorch, which benchmarks compare with, and the sizes of models."""

import math

import torch
from torch.nn import functional as F


def resnet18():
    """Elements of each of torchvision's resnet18's 62 parameters."""
    sizes = [9408, 64, 64]
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            narrows = stage > 0 and block == 0
            fan_in = width // 2 if narrows else width
            for channels in (fan_in, width):
                sizes += [9 * channels * width, width, width]
            sizes += [fan_in * width, width, width] if narrows else []
    return [*sizes, 512_000, 1000]


def gpt2():
    """Elements of each of GPT-2's 148 parameters, 124 million in all, its head tied."""
    sizes = [50257 * 768, 1024 * 768]
    for _ in range(12):
        sizes += [768, 768, 768 * 2304, 2304, 768 * 768, 768]
        sizes += [768, 768, 768 * 3072, 3072, 3072 * 768, 768]
    return [*sizes, 768, 768]


def plain_divergence(log_q, log_p, divergence):
    """KL(p || q), KL(q || p), or the mean of both sides' KL to their middle; summed over rows."""
    if divergence == "forward_kl":
        return F.kl_div(log_q, log_p.exp(), reduction="sum")
    if divergence == "reverse_kl":
        return F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    log_m = torch.logsumexp(torch.stack((log_p, log_q)), 0) - math.log(2)
    to_middle = (F.kl_div(log_m, x, reduction="sum", log_target=True) for x in (log_p, log_q))
    return sum(to_middle) / 2


def plain_loss(z, t, labels, temperature, alpha, divergence="forward_kl"):
    """The distillation loss, a mean over rows; "js" has beta 1/2."""
    log_q, log_p = (F.log_softmax(x / temperature, -1) for x in (z, t))
    loss = temperature**2 * plain_divergence(log_q, log_p, divergence) / z.shape[0]
    if labels is not None:
        loss = alpha * loss + (1 - alpha) * F.cross_entropy(z, labels)
    return loss
