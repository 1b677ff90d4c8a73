"""Optimizers with momentum that lengthens with time or waits for rows without gradients."""

from gfnem.optim.dana import DANA
from gfnem.optim.schedules import PowerLaw, dana_constant, dana_decaying
from gfnem.optim.sgd import SGD

__all__ = ["DANA", "SGD", "PowerLaw", "dana_constant", "dana_decaying"]
