"""torchgfn's view of the policy that draws trees top-down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gfn.states import DiscreteStates
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Distribution

from gfnem.gflownet.estimator import PolicyEstimator
from gfnem.gflownet.sequence_env import SequenceEnv
from gfnem.tasks.grammar.policies.choices import Choices
from gfnem.tasks.grammar.policies.splits import Spans
from gfnem.tasks.grammar.trees.tree import Trees


class ChartEnv(SequenceEnv):
    """As many choices as a sentence has words: its root's label and a split for each node.

    `conditions` are the row of the sentence in its batch and its number of words.
    """

    def choices_due(self, states: DiscreteStates) -> int | Tensor:
        conditions = states.conditions
        return self.steps if conditions is None else conditions[..., 1].long()


class ChartEstimator(PolicyEstimator):
    """P_F or P_B at given states, which hold the choices made: a labelled tree in the end."""

    @property
    def choices(self) -> Choices:
        return self.policy.choices

    def forward(
        self, states: DiscreteStates, conditions: Float[Tensor, "*batch 2"]
    ) -> Float[Tensor, "*batch actions"]:
        condition = self.condition
        shape, actions = states.batch_shape, states.n_actions
        if self.is_backward:
            return conditions.new_zeros(*shape, actions - 1)
        sentence = conditions[..., 0].long().flatten()
        choices = states.tensor.reshape(len(sentence), -1)
        spans, _ = self._follow(choices, sentence)
        logits = condition.potentials.root.new_full((len(sentence), actions), -torch.inf)
        # Where there is nothing to choose: two words, or a complete tree, which is left.
        logits[:, 0] = logits[:, -1] = 0.0
        begins = choices[:, 0] < 0
        logits[begins, : self.choices.labels] = condition.root_logits()[sentence[begins]]
        wide = (~begins & (spans.width > 2)).nonzero().squeeze(1)
        if len(wide):
            open_ = Spans(*(field[wide] for field in spans))
            joint = condition.splits(open_).joint(open_.width).log()
            logits[wide, : joint.shape[1]] = joint
        return logits.view(*shape, actions)

    def to_probability_distribution(
        self, states: DiscreteStates, module_output: Tensor, **options: Any
    ) -> Distribution:
        distribution = super().to_probability_distribution(states, module_output, **options)
        if self.is_backward and self.policy.latent == "shape":
            return WithLabels(distribution, self._log_labels(states))
        return distribution

    @torch.no_grad()
    def _log_labels(self, states: DiscreteStates) -> Float[Tensor, "*batch"]:
        """log p(labels | shape, x) of the complete trees among the states; 0 for the others."""
        condition = self.condition
        conditions = states.conditions
        assert conditions is not None
        sentence = conditions[..., 0].long().flatten()
        choices = states.tensor.reshape(len(sentence), -1)
        complete = (choices >= 0).sum(1) == condition.lengths[sentence]
        row = complete.nonzero().squeeze(1)
        _, trees = self._follow(choices[row], sentence[row])
        log_labels = condition.log_labels(sentence[row], trees).squeeze(1)
        every = log_labels.new_zeros(len(sentence)).index_put((row,), log_labels)
        return every.view(states.batch_shape)

    def _follow(
        self, choices: Int[Tensor, "rows steps"], sentence: Int[Tensor, "rows"]
    ) -> tuple[Spans, Trees]:
        """The span that is split next, and the tree so far.

        The next is the widest, of those the leftmost; one word for none.
        """
        lengths, steps = self.condition.lengths, choices.shape[1]
        row = torch.arange(len(choices), device=choices.device)
        width = choices.new_zeros(len(row), steps)
        label, above = torch.zeros_like(width), torch.full_like(width, self.choices.labels)
        width[:, 0], label[:, 0] = lengths[sentence], choices[:, 0].clamp(min=0)
        node_start = choices.new_zeros(len(row), steps - 1)
        node_end, node_label = torch.zeros_like(node_start), torch.full_like(node_start, -1)
        for step in range(1, steps):
            start = width.argmax(-1)
            split, left, right = self.choices.decoded(choices[:, step].clamp(min=0))
            made = (choices[:, step] >= 0) & (width[row, start] > 1)
            at, begin, size = row[made], start[made], split[made]
            middle, own = begin + size, label[at, begin]
            node_start[at, middle - 1], node_end[at, middle - 1] = begin, begin + width[at, begin]
            node_label[at, middle - 1] = own
            width[at, middle] = width[at, begin] - size
            width[at, begin] = size
            label[at, begin], label[at, middle] = left[made], right[made]
            above[at, begin] = above[at, middle] = own
        start = width.argmax(-1)
        at = row, start
        open_ = Spans(sentence, start, width[at], label[at], above[at])
        start, end, labels = (node[:, None] for node in (node_start, node_end, node_label))
        return open_, Trees(start, end, lengths[sentence], labels)


class WithLabels(Distribution):
    """P_B where the last choice of a shape's trajectory is undone, which brings back the labels.

    An action tells the choice alone: the labels are those that the state remembers.

    choices: P_B of the actions.
    log_labels: log p(labels | shape, x).
    """

    def __init__(self, choices: Distribution, log_labels: Float[Tensor, "*batch"]):
        super().__init__(choices.batch_shape, choices.event_shape, validate_args=False)
        self.choices = choices
        self.log_labels = log_labels

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.choices.sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.choices.log_prob(value) + self.log_labels
