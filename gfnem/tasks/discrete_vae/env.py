"""Grids that are filled code by code in raster order, as a torchgfn environment."""

from __future__ import annotations

from gfnem.gflownet.sequence_env import SequenceEnv


class GridEnv(SequenceEnv):
    """A state holds the code at each position, or -1 where there is none yet.

    Actions are the codes, for the first empty position. The state graph is a tree, so P_B = 1.
    """
