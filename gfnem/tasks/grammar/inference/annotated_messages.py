"""Messages along given trees where rules see the parent; see `messages`.

A node's message m[A | P] is the probability of the words under it given label A with P above it,
summed over the labels below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gfnem.categorical import sample_categorical
from gfnem.tasks.grammar.inference.messages import (
    NodeMessages,
    log,
    positive,
    root_score,
    rule_scores,
    scales_under,
    under,
)
from gfnem.tasks.grammar.rules.annotated import AnnotatedPotentials, ContextPotentials, DenseGrammar
from gfnem.tasks.grammar.rules.products import matrix_vector, times_narrow
from gfnem.tasks.grammar.rules.same_key import SameKey
from gfnem.tasks.grammar.trees.levels import INNER, LEAVES, WORD_LEFT, WORD_RIGHT, Levels
from gfnem.tasks.grammar.trees.tree import Trees


def log_joint_labelled(
    potentials: ContextPotentials, trees: Trees
) -> Float[Tensor, "batch samples"]:
    """log p(x, labelled tree), preterminals summed over each word, by gathers.

    Raises ValueError when the trees have no labels.
    """
    rules = rule_scores(potentials, trees, contexts(trees, len(potentials.root)))
    return rules.sum(-1) + root_score(potentials, trees) + potentials.total_log_scale[:, None]


def log_joint_by_gathers(
    grammar: DenseGrammar, words: Int[Tensor, "batch length"], trees: Trees
) -> Float[Tensor, "batch samples"]:
    """`log_joint_labelled` without tables of the words: of each rule just what it needs.

    Much less work for a few trees of each sentence.

    Raises ValueError when the trees have no labels.
    """
    context = contexts(trees, grammar.nonterminals)
    assert trees.labels is not None
    exists, nonterminals = trees.exists, grammar.nonterminals
    label = trees.labels[exists]
    rule_row = context[exists] * nonterminals + label
    symbols = nonterminals + grammar.preterminals
    preterminal = torch.arange(grammar.preterminals, device=words.device)
    left_label, right_label = (labels[exists] for labels in trees.child_labels())
    sentence = torch.arange(len(words), device=words.device)[:, None, None]
    sentence = sentence.expand_as(exists)[exists]
    first, last = words[sentence, trees.start[exists]], words[sentence, trees.end[exists] - 1]

    def emissions(is_word: bool, word: Tensor, nodes: Tensor) -> Tensor:
        """Where log p(T -> w | T, A) is of each T; nothing for a child that is no word."""
        if not is_word:
            return word.new_empty(len(nodes), 0)
        row = label[nodes, None] * grammar.preterminals + preterminal
        return row * grammar.emission.shape[-1] + word[nodes, None]

    # The nodes of each kind, their rules [node, left child, right child] and what words ask.
    kinds, rule_places, emission_places = [], [], []
    for word_left, word_right in product((True, False), repeat=2):
        kind = ((left_label < 0) == word_left) & ((right_label < 0) == word_right)
        nodes = kind.nonzero().squeeze(-1)
        left, right = (
            nonterminals + preterminal[None] if is_word else child[nodes, None]
            for is_word, child in ((word_left, left_label), (word_right, right_label))
        )
        above = rule_row[nodes, None, None] * symbols
        kinds.append(nodes)
        rule_places.append((above + left[:, :, None]) * symbols + right[:, None])
        emission_places.append(emissions(word_left, first, nodes))
        emission_places.append(emissions(word_right, last, nodes))
    # One look-up for all: the gradient of each is as large as the table.
    rules = _looked_up(grammar.binary, rule_places)
    emitted = _looked_up(grammar.emission, emission_places)
    score = grammar.root.new_zeros(len(label))
    for nodes, joint, on_left, on_right in zip(
        kinds, rules, emitted[::2], emitted[1::2], strict=True
    ):
        if on_left.shape[1]:
            joint = joint + on_left[:, :, None]
        if on_right.shape[1]:
            joint = joint + on_right[:, None]
        joint = joint.flatten(1)
        largest = joint.detach().amax(-1)
        largest = torch.where(largest.isfinite(), largest, 0.0)
        value = log((joint - largest[:, None]).exp().sum(-1)) + largest
        score = score.index_put((nodes,), value)
    by_node = score.new_zeros(exists.shape).masked_scatter(exists, score)
    return by_node.sum(-1) + grammar.root[trees.top_labels()]


def _looked_up(table: Tensor, places: Sequence[Int[Tensor, "..."]]) -> list[Tensor]:
    """Of a table's entries in their order those at some places."""
    values = table.flatten()[torch.cat([place.flatten() for place in places])]
    parts = values.split([place.numel() for place in places])
    return [part.view(place.shape) for part, place in zip(parts, places, strict=True)]


def contexts(trees: Trees, nonterminals: int) -> Int[Tensor, "batch samples nodes"]:
    """The label of each node's parent; that of S, `nonterminals`, for roots.

    Raises ValueError when the trees have no labels.
    """
    if trees.labels is None:
        raise ValueError("labelled trees are needed; these are shapes")
    # One place more takes what is written for words.
    nodes = trees.labels.shape[-1]
    above = trees.labels.new_full((*trees.labels.shape[:-1], nodes + 1), nonterminals)
    for child in trees.children():
        above.scatter_(-1, torch.where(child >= 0, child, nodes), trees.labels)
    return above[..., :nodes]


def log_joint_shape(
    potentials: AnnotatedPotentials, trees: Trees
) -> Float[Tensor, "batch samples"]:
    """log p(x, shape), labels summed exactly by messages along each tree.

    Its gradient costs about as much as the value and is exact; -inf, with gradient zero, where the
    grammar gives a shape no probability.
    """
    p = potentials
    value = _LogJointShape.apply(p.root, p.rules, p.left, p.right, p.both, p.word, Levels.of(trees))
    return value.view(trees.start.shape[:2]) + potentials.total_log_scale[:, None]


def labelled_scores(
    potentials: ContextPotentials, trees: Trees
) -> tuple[Float[Tensor, "batch samples nodes"], Float[Tensor, "batch samples"]]:
    """What the grammar says of the words under each node of labelled trees, and log p(x, tree).

    The former counts the rules whose context the node's own label completes: those of the nodes
    below it, without its own.
    """
    rules = rule_scores(potentials, trees, contexts(trees, len(potentials.root)))
    own = torch.eye(rules.shape[-1], dtype=torch.bool, device=rules.device)
    scores = torch.where(under(trees) & ~own, rules[..., None, :], 0.0).sum(-1)
    log_joint = rules.sum(-1) + root_score(potentials, trees) + potentials.total_log_scale[:, None]
    return scores + scales_under(potentials, trees), log_joint


def inside_scores(
    potentials: AnnotatedPotentials, trees: Trees
) -> tuple[Float[Tensor, "batch samples nodes"], Float[Tensor, "batch samples"]]:
    """What the grammar says of the words under each node of shapes, and log p(x, shape).

    The former is the logarithm of sum over A of p(words under the node, shape below it | A, P),
    averaged over the nonterminals P. No gradients.
    """
    levels = Levels.of(trees)
    return shape_scores(potentials, trees, levels, upward(potentials, levels))


def shape_scores(
    potentials: ContextPotentials,
    trees: Trees,
    levels: Levels,
    messages: NodeMessages,
) -> tuple[Float[Tensor, "batch samples nodes"], Float[Tensor, "batch samples"]]:
    """`inside_scores` of all nodes' messages."""
    inner = torch.zeros_like(levels.row, dtype=torch.bool)
    nodes = potentials.average(messages.message, inner).sum(-1).log() + messages.log_scale
    whole = messages.log_whole(levels, potentials.root).view(trees.start.shape[:2])
    log_joint = whole + potentials.total_log_scale[:, None]
    return levels.by_gap(nodes, trees) + scales_under(potentials, trees), log_joint


def sample_labels(
    potentials: AnnotatedPotentials, trees: Trees, generator: torch.Generator | None = None
) -> Trees:
    """The same trees with nonterminals drawn from the exact p(labels | shape, x), top-down."""
    levels = Levels.of(trees)
    nonterminals = len(potentials.root)
    p = potentials
    message = upward(potentials, levels).message
    label = torch.zeros_like(levels.row)
    context = torch.full_like(label, nonterminals)
    top = potentials.root * message[levels.root, -1]
    label[levels.root] = sample_categorical(top, generator)
    for kind, first, behind in reversed(levels.slices):
        nodes = slice(first, behind)
        sentence, above, parent = levels.sentence[nodes], label[nodes], context[nodes]
        left, right = levels.left[nodes], levels.right[nodes]
        if kind == WORD_LEFT:
            table = p.left[p.word[sentence, levels.start[nodes]], above, parent]
            label[right] = sample_categorical(table * message[right, above], generator)
            context[right] = above
        elif kind == WORD_RIGHT:
            table = p.right[p.word[sentence, levels.end[nodes] - 1], above, parent]
            label[left] = sample_categorical(table * message[left, above], generator)
            context[left] = above
        elif kind == INNER:
            pairs = message[left, above][:, :, None] * message[right, above][:, None]
            weights = (potentials.rules[above, parent] * pairs).flatten(1)
            drawn = sample_categorical(weights, generator)
            label[left], label[right] = drawn // nonterminals, drawn % nonterminals
            context[left] = context[right] = above
    return levels.labelled(trees, label)


@dataclass(frozen=True)
class _Messages:
    """Of all nodes of some trees.

    message: scaled to maximum 1, [context, label].
    factor: the maxima that the raw messages were divided by.
    log_scale: a message's total logarithmic scale.
    tables: what rules with one word below them look up, by (kind, first node): [label, context,
        label of the other child].
    """

    message: Float[Tensor, "total contexts nonterminals"]
    factor: Float[Tensor, "total"]
    log_scale: Float[Tensor, "total"]
    tables: dict[tuple[int, int], Float[Tensor, "nodes nonterminals contexts nonterminals"]]


def upward(
    potentials: AnnotatedPotentials, levels: Levels, known: NodeMessages | None = None
) -> NodeMessages:
    """Messages [context, label] of all nodes, given those that `levels` says are known."""
    p = potentials
    up = _upward(levels, p.rules, p.left, p.right, p.both, p.word, known)
    return NodeMessages(up.message, up.log_scale)


def _upward(
    levels: Levels,
    rules: Tensor,
    left: Tensor,
    right: Tensor,
    both: Tensor,
    word: Tensor,
    known: NodeMessages | None = None,
) -> _Messages:
    nonterminals, contexts = rules.shape[:2]
    by_pair = rules.flatten(2).mT
    message = rules.new_empty(len(levels.row), contexts, nonterminals)
    factor, log_scale = rules.new_empty(len(levels.row)), rules.new_zeros(len(levels.row))
    tables = {}
    if known is not None:
        message[: levels.known], log_scale[: levels.known] = known
    for kind, first, behind in levels.slices:
        nodes = slice(first, behind)
        sentence = levels.sentence[nodes]
        a, b = levels.left[nodes], levels.right[nodes]
        if kind == LEAVES:
            raw = both[sentence, levels.gap[nodes]]
        elif kind == INNER:
            pairs = _pairs(message[a, :nonterminals], message[b, :nonterminals])
            raw = times_narrow(pairs, by_pair).transpose(0, 1)
            log_scale[nodes] = log_scale[a] + log_scale[b]
        else:
            if kind == WORD_LEFT:
                child, table = b, left[word[sentence, levels.start[nodes]]]
            else:
                child, table = a, right[word[sentence, levels.end[nodes] - 1]]
            tables[kind, first] = table
            raw = matrix_vector(table, message[child, :nonterminals])
            log_scale[nodes] = log_scale[child]
        largest = raw.amax((1, 2))
        factor[nodes] = positive(largest)
        message[nodes] = raw.mT / factor[nodes, None, None]
        log_scale[nodes] += largest.log()
    return _Messages(message, factor, log_scale, tables)


def _pairs(
    left: Float[Tensor, "nodes nonterminals nonterminals"],
    right: Float[Tensor, "nodes nonterminals nonterminals"],
) -> Float[Tensor, "nonterminals nodes nonterminals*nonterminals"]:
    """Messages of two children under each label of their parent, which comes first."""
    left, right = left.transpose(0, 1), right.transpose(0, 1)
    return (left[..., None] * right[..., None, :]).flatten(2)


class _LogJointShape(torch.autograd.Function):
    """log p(x, shape) up to the words' scales, with an outside pass as its backward pass.

    As in `messages`, the gradient with respect to a rule is its expected count; outside[v, P, A] is
    kept such that it and the node's message have the inner product 1.
    """

    @staticmethod
    def forward(ctx, root, rules, left, right, both, word, levels: Levels):  # pyright: ignore
        up = _upward(levels, rules, left, right, both, word)
        ctx.save_for_backward(root, rules, word)
        ctx.levels, ctx.up, ctx.words = levels, up, len(left)
        return NodeMessages(up.message, up.log_scale).log_whole(levels, root)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore
        root, rules, word = ctx.saved_tensors
        levels: Levels = ctx.levels
        up: _Messages = ctx.up
        message, nonterminals = up.message, len(root)
        top = message[levels.root, -1]
        probability = top @ root
        # A tree of probability zero has no gradient.
        weight = torch.where(probability > 0, grad, 0.0)
        outside = torch.zeros_like(message)
        outside[levels.root, -1] = root / positive(probability)[:, None]
        share = weight[levels.row] / up.factor
        flat_rules = rules.flatten(2)
        grad_rules = torch.zeros_like(flat_rules)

        def descend(child: Tensor, value: Tensor) -> None:
            """Give a node what it receives as a child: [parent's label, own label]."""
            inner = (value * message[child, :nonterminals]).sum((1, 2))
            outside[child, :nonterminals] = value / positive(inner)[:, None, None]

        for kind, first, behind in reversed(levels.slices):
            nodes = slice(first, behind)
            a, b = levels.left[nodes], levels.right[nodes]
            out = outside[nodes].mT
            if kind == INNER:
                on_left, on_right = message[a, :nonterminals], message[b, :nonterminals]
                by_label = out.transpose(0, 1)
                pair = torch.bmm(by_label, flat_rules).unflatten(2, (nonterminals, -1))
                descend(a, matrix_vector(pair, on_right.transpose(0, 1)).transpose(0, 1))
                descend(b, matrix_vector(pair.mT, on_left.transpose(0, 1)).transpose(0, 1))
                shared = by_label * share[nodes, None]
                grad_rules.baddbmm_(shared.mT, _pairs(on_left, on_right))
            elif kind != LEAVES:
                child = b if kind == WORD_LEFT else a
                descend(child, matrix_vector(up.tables[kind, first].mT, out))

        outside *= share[:, None, None]

        def of_words(kind: int, position: Tensor, child: Tensor) -> Tensor:
            """The gradient of a table of words."""
            nodes = levels.of_kind(kind)
            tables = word[levels.sentence[nodes], position[nodes]]
            above, below = outside[nodes], message[child[nodes], :nonterminals]
            return _summed_products(above, below, tables, ctx.words)

        leaves = levels.of_kind(LEAVES)
        batch, gaps = len(word), word.shape[1] - 1
        grad_both = message.new_zeros(batch * gaps, nonterminals, message.shape[1])
        at = levels.sentence[leaves] * gaps + levels.gap[leaves]
        grad_both.index_add_(0, at, outside[leaves].mT)
        return (
            (weight / positive(probability)) @ top,
            grad_rules.view_as(rules),
            of_words(WORD_LEFT, levels.start, levels.right),
            of_words(WORD_RIGHT, levels.end - 1, levels.left),
            grad_both.unflatten(0, (batch, gaps)),
            None,
            None,
        )


def _summed_products(
    above: Float[Tensor, "nodes contexts nonterminals"],
    below: Float[Tensor, "nodes nonterminals nonterminals"],
    table: Int[Tensor, "nodes"],
    tables: int,
) -> Float[Tensor, "tables nonterminals contexts nonterminals"]:
    """Sum over the nodes of each table of above[P, A] below[A, C], indexed [A, P, C].

    The nodes of a table are taken together in groups, each a product of two matrices.
    """
    groups = SameKey.of(table)
    # Labels come first, as in the tables' memory.
    left, right = groups.padded(above).permute(3, 0, 2, 1), groups.padded(below).permute(2, 0, 1, 3)
    products = left @ right
    total = above.new_zeros(below.shape[-1], tables, *products.shape[2:])
    return total.index_add_(1, groups.key, products).transpose(0, 1)
