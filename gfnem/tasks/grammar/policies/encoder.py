"""One pass over a sentence that scores all its spans."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gfnem.errors import UserError


@dataclass(frozen=True)
class SpanEncoding:
    """What the encoder says of the words and of all spans of at least two words.

    index: position of span (start, end) among the spans.
    spans, words: hidden vectors.
    scores: one score for each label of each span.
    flow: the share of log F of each span as a root, under each label that a root may have.
    backward: the share of P_B's logits of each span as a root.
    word_score, word_flow: the same for single words.
    """

    index: Int[Tensor, "ends ends"]
    spans: Float[Tensor, "batch spans width"]
    words: Float[Tensor, "batch length width"]
    scores: Float[Tensor, "batch spans labels"]
    flow: Float[Tensor, "batch spans symbols"]
    backward: Float[Tensor, "batch spans"]
    word_score: Float[Tensor, "batch length"]
    word_flow: Float[Tensor, "batch length"]

    def select(self, rows: Int[Tensor, "rows"]) -> SpanEncoding:
        """The same of chosen sentences, which may repeat."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        index = fields.pop("index")
        return SpanEncoding(index, **{name: value[rows] for name, value in fields.items()})


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that starts as zero, so that what it is added to comes first."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class SpanEncoder(nn.Module):
    """A bidirectional GRU over words, and a small network on differences of its states.

    A word enters as its probabilities under the grammar's preterminals, which is all that the
    posterior over trees depends on; words that the grammar takes for alike are alike, and rare
    ones need nothing learned of them. A span is the difference of the states at its two
    boundaries, forward and backward.

    preterminals: of the grammar.
    labels: scores for each span.
    symbols: labels that a root may have; 1 where roots have none.
    max_length: the longest sentence in words. Spans of longer ones, which are parsed but not
        learned from, are taken to be as wide at most.
    width: of the words' embeddings, of each direction of the GRU and of the hidden layers.
    dropout: of word embeddings and hidden units, in training.
    symbol_dropout: with this probability a symbol is hidden from a sentence, in training: a
        preterminal from all its words, and a score from all its spans, which is 0
        there, as if there were nothing to correct. What other parts of a policy take of the
        grammar is as it was. What is hidden is the same for all trajectories of an E-step, and, as
        with dropout, for the draws among them that the M-step learns from. With nothing hidden the
        policy is what was learned with something hidden, so it is a little off the posterior.
    """

    def __init__(
        self,
        preterminals: int,
        labels: int,
        symbols: int,
        max_length: int,
        width: int = 128,
        dropout: float = 0.0,
        symbol_dropout: float = 0.0,
    ):
        super().__init__()
        if width < 1:
            raise UserError(f"the width of the policy's encoder is {width}; it must be at least 1")
        for name, value in (("dropout", dropout), ("symbol_dropout", symbol_dropout)):
            if not 0 <= value < 1:
                raise UserError(f"policy.{name} is {value}; it must be at least 0 and below 1")
        self.symbol_dropout = symbol_dropout
        self.embedding = nn.Linear(preterminals, width)
        # Probabilities over many preterminals are small; this gives the layer's input unit scale.
        self.scale = preterminals**0.5
        self.recurrent = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.boundary = nn.Linear(2 * width, width)
        self.length_embedding = nn.Embedding(max_length + 1, width)
        self.hidden = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.score = zero_linear(width, labels)
        self.word_score = zero_linear(width, 1)
        self.backward_score = zero_linear(width, 1)
        self.flow = nn.ModuleDict(
            {"span": zero_linear(width, symbols), "word": zero_linear(width, 1)}
        )

    def states(
        self,
        words: Float[Tensor, "batch length preterminals"],
        lengths: Int[Tensor, "batch"],
    ) -> Float[Tensor, "batch ends features"]:
        """A vector for each boundary, such that a span is the difference of two of them."""
        # Scaled so that as much is seen as without dropout.
        words = self._hide(words) / (1 - self.symbol_dropout if self.training else 1)
        embedded = self.dropout(self.embedding(self.scale * words))
        packed = pack_padded_sequence(
            embedded, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        states, _ = pad_packed_sequence(
            self.recurrent(packed)[0], batch_first=True, total_length=words.shape[1]
        )
        forward, backward = states.chunk(2, -1)
        none = forward.new_zeros(len(words), 1, forward.shape[-1])
        return torch.cat([torch.cat([none, forward], 1), torch.cat([-backward, none], 1)], -1)

    def forward(
        self,
        words: Float[Tensor, "batch length preterminals"],
        lengths: Int[Tensor, "batch"],
    ) -> SpanEncoding:
        length = words.shape[1]
        boundary = self.states(words, lengths) @ self.boundary.weight.t()
        start, end = torch.triu_indices(length + 1, length + 1, 2, device=words.device)
        index = torch.zeros(length + 1, length + 1, dtype=torch.long, device=words.device)
        index[start, end] = torch.arange(len(start), device=words.device)
        width = (end - start).clamp(max=self.length_embedding.num_embeddings - 1)
        bias = self.boundary.bias + self.length_embedding(width)
        spans = self._hidden(boundary[:, end] - boundary[:, start] + bias)
        one = self.boundary.bias + self.length_embedding.weight[1]
        single = self._hidden(boundary[:, 1:] - boundary[:, :-1] + one)
        return SpanEncoding(
            index=index,
            spans=spans,
            words=single,
            scores=self._hide(self.score(spans)),
            flow=self.flow["span"](spans),
            backward=self.backward_score(spans).squeeze(-1),
            word_score=self.word_score(single).squeeze(-1),
            word_flow=self.flow["word"](single).squeeze(-1),
        )

    def _hidden(self, spans: Tensor) -> Tensor:
        return self.dropout(self.hidden(spans.relu()).relu())

    def _hide(
        self, values: Float[Tensor, "batch positions symbols"]
    ) -> Float[Tensor, "batch positions symbols"]:
        """0 for symbols that are hidden from a sentence."""
        if not self.training or self.symbol_dropout == 0:
            return values
        seen = torch.rand_like(values[:, :1]) >= self.symbol_dropout
        return values * seen
