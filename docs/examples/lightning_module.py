"""Distillation as a LightningModule.

pip install kdkernels lightning scikit-learn; python lightning_module.py
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import kdkernels


class Distillation(lightning.LightningModule):
    """A student that learns from a teacher, which stays as it is and out of the checkpoints."""

    def __init__(self, teacher, student, temperature=4.0, alpha=0.7):
        super().__init__()
        self.student = student
        self.loss = kdkernels.DistillationLoss(temperature=temperature, alpha=alpha, inplace=True)
        self.hidden = [teacher.eval()]  # in a list: not a module of this one
        self.losses = []

    def on_fit_start(self):
        self.hidden[0].to(self.device)

    def training_step(self, batch, _):
        images, labels = batch
        with torch.no_grad():
            taught = self.hidden[0](images)
        loss = self.loss(self.student(images), taught, labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), lr=3e-3)


def network(width):
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def main():
    lightning.seed_everything(0, verbose=False)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    teacher = network(256)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for _ in range(50):
        F.cross_entropy(teacher(images), labels).backward()
        optimizer.step(), optimizer.zero_grad()

    module = Distillation(teacher, network(16))
    trainer = lightning.Trainer(
        max_epochs=5, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True))
    print(f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}")


if __name__ == "__main__":
    main()
