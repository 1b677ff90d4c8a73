from __future__ import annotations

import pytest
import torch
from torch import nn

from gfnem.tasks.grammar.policies.jagged import Groups, JaggedTransformer
from tests.tasks.grammar.tiny import float64  # noqa: F401

pytestmark = pytest.mark.usefixtures("float64")

WIDTH, HEADS, LAYERS = 12, 3, 2


def torch_layers(network: JaggedTransformer) -> nn.TransformerEncoder:
    """The same network as torch has it."""
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
    )
    result = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
    for theirs, ours in zip(result.layers, network.layers, strict=True):
        names = {
            "self_attn.in_proj_": "attention.project.",
            "self_attn.out_proj.": "attention.out.",
            "linear1.": "network.0.",
            "linear2.": "network.2.",
            "norm1.": "attention_norm.",
            "norm2.": "network_norm.",
        }
        state = ours.state_dict()
        theirs.load_state_dict(
            {t + kind: state[o + kind] for t, o in names.items() for kind in ("weight", "bias")}
        )
    assert isinstance(result.norm, nn.LayerNorm)
    result.norm.load_state_dict(network.norm.state_dict())
    return result


@pytest.mark.parametrize("groups", [[(3, 5), (1, 4), (4, 1)], [(2, 3)]])
def test_every_sequence_is_encoded_as_torch_would_alone(groups: Groups) -> None:
    torch.manual_seed(0)
    network = JaggedTransformer(WIDTH, LAYERS, HEADS)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    expected_network = torch_layers(network)
    lengths = [length for count, length in groups for _ in range(count)]
    tokens = torch.randn(sum(lengths), WIDTH, requires_grad=True)
    found = network(tokens, groups)
    expected = torch.cat([expected_network(part[None])[0] for part in tokens.split(lengths)])
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    torch.testing.assert_close(
        *(torch.autograd.grad((weights * out).sum(), tokens)[0] for out in (found, expected))
    )
