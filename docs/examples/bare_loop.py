"""A bare PyTorch loop: a small network learns the digits from a larger one.

pip install kdkernels scikit-learn; python bare_loop.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import kdkernels


def network(width):
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def batches(images, labels, epochs=10):
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(64):
            yield images[index], labels[index]


def main():
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    train, test = slice(0, 1400), slice(1400, None)

    teacher = network(256)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for x, y in batches(images[train], labels[train]):
        F.cross_entropy(teacher(x), y).backward()
        optimizer.step(), optimizer.zero_grad()
    teacher.eval()

    student, losses = network(16), []
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    for x, y in batches(images[train], labels[train]):
        with torch.no_grad():
            taught = teacher(x)
        # inplace: the gradient is written where the student's logits were.
        loss = kdkernels.distillation_loss(
            student(x), taught, y, temperature=4.0, alpha=0.7, inplace=True
        )
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())

    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    for name, model in (("teacher", teacher), ("student", student)):
        right = model(images[test]).argmax(1) == labels[test]
        print(f"{name}: {right.double().mean():.1%} of the test digits")


if __name__ == "__main__":
    main()
