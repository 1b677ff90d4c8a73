from __future__ import annotations

import pytest
from kill_runs import main


def test_killed_runs_lose_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--kills", "2", "--only", "mixture"]) == 0
    assert capfd.readouterr().out.endswith("; 0 things wrong\n")
