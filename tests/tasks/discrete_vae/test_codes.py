from __future__ import annotations

import pytest
import torch

from gfnem.tasks.discrete_vae.codes import distinct


@pytest.mark.parametrize("codes, positions", [(3, 4), (2, 62), (4, 32)])
def test_distinct_grids(codes, positions):
    """Few enough to number; 2^62, whose numbers need all bits but two; and too many."""
    torch.manual_seed(0)
    index = torch.randint(codes, (9, positions))
    index[4], index[5] = codes - 1, 0
    index[7] = index[2]
    grids, row = distinct(index, codes)
    assert torch.equal(grids[row], index)
    assert len(grids) == len({tuple(grid) for grid in index.tolist()}) == 8
