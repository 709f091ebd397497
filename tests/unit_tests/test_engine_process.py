"""The processes of an engine: what it started has ended when it is closed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megatron_tropd.rollout.engines import process

PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""
CHILD = """
import os, time
parent = os.getppid()
print(os.getpid(), flush=True)
while os.getppid() == parent:
    time.sleep(0.02)
time.sleep({seconds})
"""


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process and the one it started, which outlives it by some seconds."""
    child = CHILD.format(seconds=request.param)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, child], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    yield parent, pid
    parent.kill()
    parent.wait()
    parent.stdout.close()


@pytest.mark.parametrize("family", [0.3], indirect=True)
def test_what_an_engine_started_is_waited_for(family: tuple[subprocess.Popen[str], int]) -> None:
    parent, child = family
    started = process.descendants(parent.pid)
    assert started == [child]
    parent.kill()
    parent.wait()
    assert process._is_alive(child)
    process.wait_gone(started, 30.0)
    assert not process._is_alive(child)
    assert process.descendants(parent.pid) == []


@pytest.mark.parametrize("family", [60], indirect=True)
def test_the_wait_for_what_does_not_end_is_bounded(
    family: tuple[subprocess.Popen[str], int],
) -> None:
    parent, child = family
    parent.kill()
    parent.wait()
    process.wait_gone([child], 0.1)
    assert process._is_alive(child)
    os.kill(child, signal.SIGKILL)  # the fixture's own


def test_a_process_that_nobody_waited_for_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process._is_alive(child.pid)
    child.wait()
