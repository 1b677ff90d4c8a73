from __future__ import annotations

import pytest
from kill_runs import main


def test_killed_runs_lose_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--kills", "1"]) == 0
    assert capfd.readouterr().out.count("0 things wrong") == 5
