"""Fixtures of all tests of training."""

from tests.training.tiny import no_waiting_for_the_disk, own_random_numbers, run, told

__all__ = ["no_waiting_for_the_disk", "own_random_numbers", "run", "told"]
