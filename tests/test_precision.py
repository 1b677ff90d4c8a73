from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from gfnem import precision
from gfnem.precision import Precision, in_precision, training_precision


def test_reduced_precision_is_for_training():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    cases: list[tuple[Precision, bool, torch.dtype]] = [
        ("bfloat16", True, torch.bfloat16),
        ("bfloat16", False, torch.float32),
        ("float32", True, torch.float32),
    ]
    for chosen, training, expected in cases:
        layer.train(training)
        with training_precision(layer, chosen):
            assert layer(x).dtype == expected


@pytest.mark.parametrize("supported", [True, False])
def test_a_cpu_without_bfloat16_is_named_once(supported, monkeypatch, caplog):
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: supported)
    precision._warn_once.cache_clear()
    layer = nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING, "gfnem"):
        in_precision(layer, "float32")
        assert not caplog.messages
        in_precision(layer, "bfloat16")
        in_precision(layer, "bfloat16")
    named = "this CPU has no instructions for bfloat16, which takes many times as long as float32"
    assert [named in message for message in caplog.messages] == [True] * (not supported)
