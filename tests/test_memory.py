from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# How often the system has to give a page to what is made and freed again and again. PyTorch asks
# the same C library for its tensors, and takes seconds to import.
FAULTS = """
import resource
from gfnem.memory import keep_freed_memory
{setting}
for _ in range(50):
    b"1" * 40_000_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(setting: str) -> int:
    command = [sys.executable, "-c", FAULTS.format(setting=setting)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
def test_freed_memory_is_used_again():
    assert faults("keep_freed_memory()") < faults("") / 2


def test_other_libraries_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch):
    from gfnem import memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not memory.keep_freed_memory()
