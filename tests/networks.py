"""Networks for runs whose own size does not matter: a step takes milliseconds."""

from torch import nn


class Block(nn.Module):
    """Two convolutions beside a skip, the second one depthwise."""

    def __init__(self, width):
        super().__init__()
        self.one = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.two = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
        self.act = nn.ReLU6()

    def forward(self, x):
        y = self.act(self.norms[0](self.one(x)))
        return self.act(x + self.norms[1](self.two(y)))


class Residual(nn.Module):
    """What MobileNets are made of."""

    def __init__(self, num_classes=10, width=64):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=4, padding=1, bias=False), nn.BatchNorm2d(width)
        )
        self.blocks = nn.Sequential(*(Block(width) for _ in range(4)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.blocks(self.stem(x).relu())
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


# The command-line arguments for a run of it.
ARGUMENTS = ["--teacher=networks:Residual", "--student=networks:Residual"]
