"""A transformer over sequences of different lengths, without padding.

Layers see one flat list of the tokens of all sequences. Only attention has to know which tokens
belong together: sequences of the same length lie side by side and attend as dense matrices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

# (number of sequences, their length), in the order in which the sequences lie in the list.
Groups = list[tuple[int, int]]


def with_round_rows(
    network: Callable[[Tensor], Tensor], rows: Float[Tensor, "rows width"]
) -> Float[Tensor, "rows out"]:
    """A network over each row, given a round number of them: the last ones are zeros, cut off.

    For every number of rows that it has not seen yet, torch makes new kernels for matrix products
    in bfloat16 on a CPU, which takes longer than the products. At most one row in 16 is added.
    """
    count = len(rows)
    multiple = max(1 << max(count.bit_length() - 5, 0), 16)
    return network(functional.pad(rows, (0, 0, 0, -count % multiple)))[:count]


class JaggedTransformer(nn.Module):
    """Pre-norm layers with ReLU, as torch's `nn.TransformerEncoder` with a final norm."""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, tokens: Float[Tensor, "tokens width"], groups: Groups
    ) -> Float[Tensor, "tokens width"]:
        """Tokens behind those of the groups belong to no sequence."""
        for layer in self.layers:
            tokens = layer(tokens, groups)
        return self.norm(tokens)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.network_norm = nn.LayerNorm(width)
        self.network = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(inplace=True), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor, groups: Groups) -> Tensor:
        tokens = tokens + self.attention(self.attention_norm(tokens), groups)
        return tokens + self.network(self.network_norm(tokens))


class _Attention(nn.Module):
    """Multi-head self-attention within each sequence, initialised as torch's."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor, groups: Groups) -> Tensor:
        sizes = [count * length for count, length in groups]
        rest = len(tokens) - sum(sizes)
        *projected, _ = self.project(tokens).split([*sizes, rest])
        mix = self._mix if torch.is_grad_enabled() else self._mix_fused
        mixed = [mix(part, *group) for part, group in zip(projected, groups, strict=True)]
        return self.out(torch.cat([*mixed, tokens.new_zeros(rest, tokens.shape[1])]))

    def _mix(self, part: Tensor, count: int, length: int) -> Tensor:
        # Contiguous matrices: on strided ones the backward pass takes several times as long, as
        # it does in torch's fused attention, which is made for long sequences.
        by_head = part.view(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = by_head.reshape(3, count * self.heads, length, -1)
        weight = (torch.bmm(key, query.mT) * self.scale).softmax(1)
        out = torch.bmm(weight.mT, value).view(count, self.heads, length, -1)
        return out.transpose(1, 2).reshape(count * length, -1)

    def _mix_fused(self, part: Tensor, count: int, length: int) -> Tensor:
        by_head = part.view(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = by_head
        out = functional.scaled_dot_product_attention(query, key, value)
        return out.transpose(1, 2).reshape(count * length, -1)
