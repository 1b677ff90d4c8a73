from __future__ import annotations

import pytest

from gfnem.errors import UserError
from gfnem.splits import named_split


def test_a_part_by_its_name():
    parts = {"train": [1, 2], "test": [3]}
    assert named_split(parts, "test") == [3]
    with pytest.raises(UserError, match="^split is 'tset'; use one of train, test$"):
        named_split(parts, "tset")
