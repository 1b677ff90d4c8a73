"""Forests: how a parse tree is built bottom-up, one merge of two neighbouring roots at a time.

`Forest` does it for many sentences at once on the tensors that policies read; `ForestEnv` is the
same state space as a torchgfn environment.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from gfn.actions import Actions
from gfn.env import DiscreteEnv
from gfn.states import DiscreteStates, States
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gfnem.tasks.grammar.inference.messages import positive
from gfnem.tasks.grammar.rules.grammar import Potentials
from gfnem.tasks.grammar.trees.tree import Trees

LATER = torch.iinfo(torch.long).max


class Forest:
    """Forests over `samples` copies of each sentence, with the messages of all possible merges.

    Everything is indexed by gap. In an open gap two neighbouring roots meet, and its entries
    describe the node that would result from merging them; in a closed gap they describe the node
    that was made there. Behind the gaps there is one more slot, the exit: it is open when a row's
    tree is complete, and choosing it changes nothing.

    start, end: first word and one past the last word of the node.
    left, right: its children; -1 for a word. Kept with the messages alone.
    message: probability of its words given its label and its context, labels below summed (or, in
        labelled forests, given the labels below), scaled to maximum 1; log_scale is the factor's
        logarithm. In a labelled forest a node that was made has but its own label.
    time: the number of merges before the one that closed the gap.
    made: the number of merges of each row, those behind the end among them.
    """

    def __init__(
        self,
        potentials: Potentials,
        samples: int,
        labelled: bool,
        messages: bool = True,
    ):
        """messages: whether to keep them; policies that do not look at the grammar need none."""
        batch, length = potentials.log_scale.shape
        device = potentials.log_scale.device
        self.potentials = potentials
        self.samples = samples
        self.labelled = labelled
        self.sentence = torch.arange(batch, device=device).repeat_interleave(samples)
        self.lengths = potentials.lengths[self.sentence]
        self.rows = torch.arange(batch * samples, device=device)
        self.steps = length - 1
        self.exit = length - 1
        self.made = torch.zeros_like(self.rows)
        gap = torch.arange(length, device=device)
        self.start = gap.repeat(len(self.rows), 1)
        self.end = self.start + 2
        self.labels = torch.full_like(self.start, -1)
        self.time = torch.full_like(self.start, LATER)
        self.exists = gap < (self.lengths - 1)[:, None]
        self._messages = messages
        if not messages:
            return
        self.left = torch.full_like(self.start, -1)
        self.right = torch.full_like(self.start, -1)
        raw = potentials.two_words()
        largest = raw.amax((-2, -1))
        self.message = raw.new_zeros(batch, length, *raw.shape[2:])
        self.message[:, :-1] = raw / positive(largest)[..., None, None]
        self.log_scale = raw.new_zeros(batch, length)
        scale = potentials.log_scale
        self.log_scale[:, :-1] = largest.log() + scale[:, :-1] + scale[:, 1:]
        self.message = self.message[self.sentence]
        self.log_scale = self.log_scale[self.sentence]

    def begin_within(
        self,
        trees: Trees,
        time: Int[Tensor, "rows gaps"],
        made: Int[Tensor, "rows"],
    ) -> None:
        """Put each row after the first `made` merges of a tree; for forests without messages."""
        assert not self._messages
        closed = time < made[:, None]
        is_open = self.exists[:, :-1] & ~closed
        # A node of an open gap would reach to the next open gaps on both sides.
        boundary = torch.arange(1, self.steps + 1, device=time.device)
        last = torch.where(is_open, boundary, 0).cummax(-1).values
        following = torch.where(is_open, boundary, self.lengths[:, None])
        following = following.flip(-1).cummin(-1).values.flip(-1)
        self.start[:, 0] = 0
        self.start[:, 1:-1] = last[:, :-1]
        self.end[:, :-2] = following[:, 1:]
        self.end[:, -2] = self.lengths
        for kept, of_tree in ((self.start, trees.start), (self.end, trees.end)):
            kept[:, :-1] = torch.where(closed, of_tree.flatten(0, 1), kept[:, :-1])
        if trees.labels is not None:
            self.labels[:, :-1] = torch.where(closed, trees.labels.flatten(0, 1), -1)
        self.time[:, :-1] = torch.where(closed, time, LATER)
        self.made = made.clone()

    @property
    def open(self) -> Bool[Tensor, "rows slots"]:
        """The gaps that may be merged next, or the exit where there are none."""
        is_open = self.exists & (self.time == LATER)
        is_open[:, self.exit] = ~is_open.any(-1)
        return is_open

    def merge(
        self, gap: Int[Tensor, "rows"], label: Int[Tensor, "rows"] | None = None
    ) -> tuple[Int[Tensor, "rows"], Int[Tensor, "rows"]]:
        """Merge the two roots that meet in each row's gap, under a label in labelled forests.

        Returns the open gaps on the left and right of the new root, whose entries have changed;
        the exit slot where there is none.
        """
        rows, final = self.rows, gap == self.exit
        start, end = self.start[rows, gap], self.end[rows, gap]
        self.time[rows, gap] = torch.where(final, LATER, self.made)
        if label is not None:
            self.labels[rows, gap] = torch.where(final, -1, label)
        if label is not None and self._messages:
            self._choose(gap, label, final)
        self.made = self.made + 1
        before = torch.where(final | (start == 0), self.exit, start - 1)
        after = torch.where(final | (end >= self.lengths), self.exit, end - 1)
        self.end[rows, before] = end
        self.start[rows, after] = start
        if self._messages:
            self.right[rows, before] = gap
            self.left[rows, after] = gap
            self._send(gap, before, after)
        return before, after

    def average_message(
        self, row: Int[Tensor, "*nodes"], gap: Int[Tensor, "*nodes"]
    ) -> Float[Tensor, "*nodes nonterminals"]:
        """Messages of some gaps' nodes, averaged over contexts."""
        return self.potentials.average(self.message[row, gap], self.whole(row, gap))

    def whole(
        self, row: Int[Tensor, "*nodes"], gap: Int[Tensor, "*nodes"]
    ) -> Bool[Tensor, "*nodes"]:
        """Whether some gaps' nodes are over all words."""
        return (self.start[row, gap] == 0) & (self.end[row, gap] == self.lengths[row])

    def _choose(self, gap: Tensor, label: Tensor, final: Tensor) -> None:
        """Keep but one label of each row's node in a gap."""
        rows = self.rows
        kept = self.message[rows, gap, :, label]
        largest = kept.amax(-1)
        self.log_scale[rows, gap] += torch.where(final, 0.0, largest.log())
        kept = torch.where(largest[:, None] > 0, kept / positive(largest)[:, None], 1.0)
        only = torch.nn.functional.one_hot(label, self.message.shape[-1])
        self.message[rows, gap] = kept[..., None] * only[:, None].to(kept.dtype)

    def _send(self, gap: Tensor, before: Tensor, after: Tensor) -> None:
        """Messages of the nodes that would be made in the gaps beside a new root."""
        rows, table = self.rows, self.potentials
        new_message = self.message[rows, gap]
        inner_left, inner_right, inner_rows, inner_gap = [], [], [], []
        for side, other in ((before, self.left), (after, self.right)):
            child = other[rows, side]
            real = side != self.exit
            row = (real & (child < 0)).nonzero().squeeze(1)
            if len(row):
                at = side[row]
                sentence, word = self.sentence[row], at if side is before else at + 1
                merge = table.word_on_left if side is before else table.word_on_right
                raw, _ = merge(sentence, word, new_message[row])
                scale = table.log_scale[sentence, word] + self.log_scale[row, gap[row]]
                self._write(row, at, raw, scale)
            row = (real & (child >= 0)).nonzero().squeeze(1)
            sibling = child[row]
            pair = (sibling, gap[row]) if side is before else (gap[row], sibling)
            inner_rows.append(row)
            inner_gap.append(side[row])
            inner_left.append(pair[0])
            inner_right.append(pair[1])
        row, at = torch.cat(inner_rows), torch.cat(inner_gap)
        if len(row):
            left, right = torch.cat(inner_left), torch.cat(inner_right)
            scale = self.log_scale[row, left] + self.log_scale[row, right]
            raw, _ = table.two_nodes(self.message[row, left], self.message[row, right])
            self._write(row, at, raw, scale)

    def _write(self, row: Tensor, gap: Tensor, raw: Tensor, scale: Tensor) -> None:
        largest = raw.amax((-2, -1))
        self.message[row, gap] = raw / positive(largest)[:, None, None]
        self.log_scale[row, gap] = scale + largest.log()

    def trees(self) -> Trees:
        """The finished trees, labelled in labelled forests."""
        shape = (len(self.potentials.lengths), self.samples, self.steps)
        made = self.exists[:, :-1]
        return Trees(
            (self.start[:, :-1] * made).view(shape),
            (self.end[:, :-1] * made).view(shape),
            self.potentials.lengths,
            self.labels[:, :-1].view(shape) if self.labelled else None,
        )


def parents_time(
    start: Int[Tensor, "*batch items"],
    end: Int[Tensor, "*batch items"],
    time: Int[Tensor, "*batch gaps"],
    lengths: Int[Tensor, "*batch"],
) -> Int[Tensor, "*batch items"]:
    """When the root over words start, ..., end - 1 was merged into a larger one.

    That is when the first of the gaps beside it was closed; LATER for a whole sentence.
    """
    before = time.gather(-1, (start - 1).clamp(min=0))
    behind = time.gather(-1, (end - 1).clamp(0, time.shape[-1] - 1))
    return torch.minimum(
        torch.where(start > 0, before, LATER),
        torch.where(end < lengths[..., None], behind, LATER),
    )


class ForestEnv(DiscreteEnv):
    """Forests over sentences of up to `length` words as a torchgfn environment.

    A state holds three numbers for each gap: start, end and label of the node that was made
    there, or -1 (labels are 0 in shapes). Actions are gap * symbols + label, and behind them exit,
    which is forced when the tree is complete and illegal before. `conditions` are
    (row of the sentence in its batch, number of words). The reward, log p(x, z), belongs to the
    trajectories that policies return; the environment alone knows no model.
    """

    is_conditional = True

    def __init__(self, length: int, symbols: int = 1, device: str | torch.device = "cpu"):
        self.length = length
        self.gaps = length - 1
        self.symbols = symbols
        s0 = torch.full((3 * self.gaps,), -1, dtype=torch.long, device=device)
        super().__init__(
            n_actions=self.gaps * symbols + 1, s0=s0, state_shape=(3 * self.gaps,), debug=False
        )

    def make_states_class(self) -> type[DiscreteStates]:
        env = self

        class ForestStates(DiscreteStates):
            state_shape = env.state_shape
            s0 = env.s0
            sf = env.sf
            n_actions = env.n_actions

            def spans(self) -> tuple[Tensor, Tensor, Tensor]:
                """Start, end and label of the node in each gap, [*batch, gaps]."""
                fields = self.tensor.unflatten(-1, (env.gaps, 3))
                return fields[..., 0], fields[..., 1], fields[..., 2]

            def lengths(self) -> Tensor:
                if self._conditions is None:
                    return torch.full(self.batch_shape, env.length, device=self.device)
                return self._conditions[..., 1].long()

            def _compute_forward_masks(self) -> Tensor:
                start, _, _ = self.spans()
                gap = torch.arange(env.gaps, device=start.device)
                is_open = (start < 0) & (gap < self.lengths()[..., None] - 1)
                merges = is_open.repeat_interleave(env.symbols, -1)
                return torch.cat([merges, ~is_open.any(-1, keepdim=True)], -1)

            def _compute_backward_masks(self) -> Tensor:
                start, end, label = self.spans()
                open_or_edge = torch.nn.functional.pad(start < 0, (1, 1), value=True)
                before = open_or_edge.gather(-1, start.clamp(min=0))
                behind = open_or_edge.gather(-1, end.clamp(min=0))
                is_root = (start >= 0) & before & behind
                made_as = torch.nn.functional.one_hot(label.clamp(min=0), env.symbols).bool()
                return (is_root[..., None] & made_as).flatten(-2)

            @classmethod
            def make_random_states(
                cls, batch_shape: tuple[int, ...], conditions: Any = None, **_: Any
            ) -> States:
                raise ValueError("a forest cannot be drawn without a policy; roll one out instead")

        return ForestStates

    def step(self, states: DiscreteStates, actions: Actions) -> DiscreteStates:
        gap, label = self._decode(actions)
        fields = states.tensor.unflatten(-1, (self.gaps, 3)).clone()
        start, end = self._span(fields, gap)
        new = torch.stack([start, end, label], -1)
        fields.scatter_(-2, gap[..., None, None].expand(*gap.shape, 1, 3), new[..., None, :])
        # Without conditions: torchgfn attaches them and would warn at every step otherwise.
        return cast(DiscreteStates, self.States(fields.flatten(-2)))

    def backward_step(self, states: DiscreteStates, actions: Actions) -> DiscreteStates:
        gap, _ = self._decode(actions)
        fields = states.tensor.unflatten(-1, (self.gaps, 3)).clone()
        fields.scatter_(-2, gap[..., None, None].expand(*gap.shape, 1, 3), -1)
        before = self.States(fields.flatten(-2), conditions=states.conditions)
        return cast(DiscreteStates, before)

    def _decode(self, actions: Actions) -> tuple[Tensor, Tensor]:
        action = actions.tensor.squeeze(-1)
        return action // self.symbols, action % self.symbols

    def _span(self, fields: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Where the roots on both sides of a gap begin and end."""
        start, end = fields[..., 0], fields[..., 1]
        here = gap[..., None]
        touching_left = (start >= 0) & (end == here + 1)
        touching_right = start == here + 1
        first = torch.where(touching_left, start, here).amin(-1)
        last = torch.where(touching_right, end, here + 2).amax(-1)
        return first, last

    def log_reward(self, states: DiscreteStates, conditions: Tensor | None = None) -> Tensor:
        raise ValueError("the reward of a forest is log p(x, z): it travels with the trajectories")
