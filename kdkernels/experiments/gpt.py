"""The models of experiment 4."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from kdkernels.experiments.text import Text


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // 64)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [b, c, width]
        b, c, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(b, c, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [b, heads, c, width / heads] each
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, c, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """A decoder of pre-norm blocks, with learned positions and without dropout, as GPT-2 has them
    (Radford et al., 2019), and its initial weights: normal with std 0.02, those of the layers that
    write to the residual stream divided by sqrt(2 layers).

    The head is the token embedding, transposed: with two matrices of V rows most of a small
    model's parameters would be spent twice. Attention heads have 64 each. With ``bare``,
    :meth:`forward` gives hidden states, for a loss that has the heads.
    """

    def __init__(self, vocabulary: int, context: int, width: int, layers: int):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.bare = False
        for name, weight in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers))
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    @property
    def head(self) -> torch.Tensor:
        """``[V, d]``."""
        return self.tokens.weight

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[b, c]`` int64 to ``[b, c, d]``."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.norm(self.blocks(self.tokens(tokens) + self.positions(places)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[b, c]`` int64 to logits ``[b, c, V]``, or hidden states ``[b, c, d]`` if ``bare``."""
        hidden = self.hidden(tokens)
        return hidden if self.bare else F.linear(hidden, self.head)


def held_out(model: GPT, windows: Text, batch: int) -> dict[str, float]:
    """``{"held_out_loss": cross-entropy a token in nats, "perplexity": its exponential}``.

    Logits are made of 256 tokens at a time.
    """
    model.eval()
    total = 0.0
    with torch.no_grad():
        for index in torch.arange(len(windows)).split(batch):
            tokens, labels = windows.batch(index)
            rows = model.hidden(tokens).flatten(0, 1).split(256)
            for hidden, label in zip(rows, labels.flatten().split(256), strict=True):
                logits = F.linear(hidden, model.head)
                total += F.cross_entropy(logits, label, reduction="sum").item()
    loss = total / (len(windows) * windows.context)
    return {"held_out_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
