from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# How often the system has to give a page to tensors that are made and freed again and again, before
# freed memory is kept and after.
FAULTS = """
import resource
import torch
from gfnem.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
def test_freed_memory_is_used_again():
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    before, is_set, after = done.stdout.split()
    assert is_set == "True"
    assert int(after) < int(before) / 2


def test_other_libraries_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch):
    from gfnem import memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not memory.keep_freed_memory()
