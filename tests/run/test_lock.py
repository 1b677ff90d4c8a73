from __future__ import annotations

from pathlib import Path

import pytest

from gfnem.errors import UserError
from gfnem.run.lock import alone


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with alone(tmp_path):
        message = f"another process is training {tmp_path}: wait until it ends, or stop it"
        with pytest.raises(UserError, match=f"^{message}$"), alone(tmp_path):
            pass
    with alone(tmp_path):
        pass


def test_what_a_killed_process_left_is_swept_up(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in (".config.yaml.17.tmp", "checkpoints/.last.pt.17.tmp", "checkpoints/last.pt"):
        (tmp_path / name).touch()
    with alone(tmp_path):
        assert [path.name for path in tmp_path.rglob("*.*")] == [".lock", "last.pt"]
