"""torchdistill's configured training with this library's loss in place of its KDLoss.

pip install kdkernels torchdistill scikit-learn; python torchdistill_config.py
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import DistillationBox
from torchdistill.losses.registry import register_mid_level_loss

import kdkernels.compat

CONFIG = Path(__file__).with_suffix(".yaml")

register_mid_level_loss(key="KDLoss")(kdkernels.compat.KDLoss)  # the configuration stays as it is


def network(width):
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def box():
    """A teacher that knows the digits, a student, and torchdistill's training of it."""
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    teacher, student = network(256), network(16)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for _ in range(50):
        F.cross_entropy(teacher(images), labels).backward()
        optimizer.step(), optimizer.zero_grad()
    data, config = {"digits": TensorDataset(images, labels)}, load_yaml_file(CONFIG)
    return DistillationBox(teacher, student, data, config, torch.device("cpu"), None, False, 1)


def main():
    made, losses = box(), []
    for epoch in range(made.num_epochs):
        made.pre_epoch_process(epoch=epoch)
        for images, labels, supplement in made.train_data_loader:
            loss = made.forward_process(images, targets=labels, supp_dict=supplement)
            made.post_forward_process(loss)
            losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
