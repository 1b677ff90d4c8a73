from __future__ import annotations

import pytest
import torch

from gfnem.tasks.grammar.rules.products import matrix_vector, times_narrow


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_products_are_those_of_matrices(batch: tuple[int, ...]):
    matrix, narrow = torch.randn(*batch, 5, 4), torch.randn(*batch, 4, 2)
    torch.testing.assert_close(times_narrow(matrix, narrow), matrix @ narrow)
    column = narrow[..., 0]
    torch.testing.assert_close(matrix_vector(matrix, column), (matrix @ column[..., None])[..., 0])


def test_one_vector_for_many_matrices():
    matrix, vector = torch.randn(6, 5, 4), torch.randn(4)
    torch.testing.assert_close(matrix_vector(matrix, vector), matrix @ vector)
