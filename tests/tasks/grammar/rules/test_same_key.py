from __future__ import annotations

import torch

from gfnem.tasks.grammar.rules import same_key
from gfnem.tasks.grammar.rules.same_key import SameKey


def test_entries_with_one_key_are_together(monkeypatch):
    monkeypatch.setattr(same_key, "SIZE", 2)
    keys = torch.tensor([5, 3, 5, 5, 9, 3])
    found = SameKey.of(keys)
    assert found.key.tolist() == [3, 5, 5, 9]
    padded = found.padded(torch.arange(1, 7))
    assert padded.tolist() == [[2, 6], [1, 3], [4, 0], [5, 0]]
    values = torch.rand(3, 6, 2)
    padded = found.padded(values, 1)
    assert padded.shape == (3, 4, 2, 2)
    assert torch.equal(padded[:, 2], torch.stack([values[:, 3], torch.zeros(3, 2)], 1))
    back = torch.empty_like(values)
    back[:, found.order] = padded[:, found.group, found.place]
    assert torch.equal(back, values)


def test_nothing_has_no_groups():
    found = SameKey.of(torch.empty(0, dtype=torch.long))
    assert len(found.key) == 0
    assert found.padded(torch.empty(0, 4)).shape == (0, same_key.SIZE, 4)
