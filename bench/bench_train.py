"""The experiments' own loops: what the ops save where they are used."""

import torch

import kdkernels
from kdkernels.measuring import OURS, Comparison
from kdkernels.tools.comparisons import experiment_1
from kdkernels.train import models
from kdkernels.train.distillation import plain_loss


def test_experiment_1(compare):
    compare(experiment_1(replicas=4096))


def test_experiment_2_step(compare):
    """A step of ResNet-18 to MobileNetV2 on 64 images of 32x32, 10 classes."""
    torch.manual_seed(0)
    expert = models.build("resnet18", 10, 32)[0].eval()
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    soft = {"temperature": 4.0, "alpha": 0.5}

    def ask():
        with torch.no_grad():
            return expert(images)

    kept = ask()

    def step(loss, predictions):
        torch.manual_seed(0)
        learner = models.build("mobilenet_v2", 10, 32)[0]
        optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)

        def call():
            optimizer.zero_grad()
            made = loss(learner(images), predictions(), labels, **soft)
            made.backward()
            optimizer.step()
            return made.detach()

        return call

    def first(call):
        torch.manual_seed(0)  # of the dropout
        return call()

    want = first(step(plain_loss, ask))

    def check(call):
        torch.testing.assert_close(first(call), want, rtol=1e-3, atol=0)

    found = Comparison("a step of experiment 2", check)
    found.add("eager", step(plain_loss, ask))
    found.add(f"{OURS}' loss", step(kdkernels.distillation_loss, ask))
    found.add(f"{OURS}' loss, predictions kept", step(kdkernels.distillation_loss, lambda: kept))
    compare(found)
