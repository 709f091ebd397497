"""The example that uses the loss alone: short, and the divergence falls."""

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "examples" / "loss_only.py"


def test_the_divergence_falls() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    command = [sys.executable, str(EXAMPLE)]
    run = subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    values = [float(value) for value in re.findall(r"reverse KL (\S+) nats", run.stdout)]
    assert len(values) == 6
    assert values[0] > 1 and values[-1] < values[0] / 10, run.stdout
