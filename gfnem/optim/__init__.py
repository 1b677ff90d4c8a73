"""Optimizers with momentum that lengthens with time or waits for rows without gradients."""

from gfnem.optim.dana import DANA
from gfnem.optim.lazy import WordTable, lazy_groups
from gfnem.optim.schedules import PowerLaw, dana_constant, dana_decaying
from gfnem.optim.sgd import SGD

__all__ = ["DANA", "SGD", "PowerLaw", "WordTable", "dana_constant", "dana_decaying", "lazy_groups"]
