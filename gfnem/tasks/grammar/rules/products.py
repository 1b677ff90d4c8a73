"""Products of matrices of shapes that CPUs are slow at, written as others."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def matrix_vector(
    matrix: Float[Tensor, "*#batch m n"], vector: Float[Tensor, "*#batch n"]
) -> Float[Tensor, "*batch m"]:
    """matrix @ vector.

    With the vector as a row: batches of columns take three to eight times as long.
    """
    return (vector[..., None, :] @ matrix.mT).squeeze(-2)


def times_narrow(
    matrix: Float[Tensor, "*#batch m k"], narrow: Float[Tensor, "*#batch k n"]
) -> Float[Tensor, "*batch m n"]:
    """matrix @ narrow, where n is small beside m and k.

    The transposed product, whose columns are many: few columns take up to twice as long.
    """
    return (narrow.mT @ matrix.mT).mT
