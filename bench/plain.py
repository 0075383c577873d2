"""What people write in plain PyTorch, which benchmarks compare with."""

import math

import torch
from torch.nn import functional as F


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
