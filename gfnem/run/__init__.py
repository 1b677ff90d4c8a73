"""What a training run leaves behind: a directory, and whoever is told of it."""

from gfnem.run.directory import Run
from gfnem.run.progress import Progress
from gfnem.run.tracking import FilesTracker, Tracker, WandbTracker

__all__ = ["FilesTracker", "Progress", "Run", "Tracker", "WandbTracker"]
