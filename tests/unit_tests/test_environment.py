"""Variables of the environment: set to nothing is not set; what is no number is named."""

import re
import time
from pathlib import Path

import pytest

import megatron_tropd
from megatron_tropd.base.environment import number, variable
from megatron_tropd.base.errors import ConfigError
from megatron_tropd.cli.distill import is_rank
from megatron_tropd.config.run_folder import patience, started_at
from megatron_tropd.launch import launcher as launch
from megatron_tropd.launch.nodes import Nodes
from megatron_tropd.mcore.platform import check_device


@pytest.mark.parametrize(
    ("environment", "value"), [({}, None), ({"X": ""}, None), ({"X": " "}, None), ({"X": "7"}, 7)]
)
def test_nothing_is_not_set(environment, value):
    assert variable("X", environment) == (value and str(value))
    assert number("X", 3, environment=environment) == (value or 3)


@pytest.mark.parametrize("text", ["four", "-1", "4.0", "4(x2)", "٤"])
def test_what_is_no_number_is_named(text):
    with pytest.raises(ConfigError, match=r"variable X must be a number, found '.*'\. Unset it\."):
        number("X", 3, environment={"X": text}, advice="Unset it.")


def test_a_number_that_must_be_there_is_missed():
    with pytest.raises(ConfigError, match="variable X must be a number, found nothing"):
        number("X", environment={"X": ""})


def test_readers_take_nothing_for_not_set(monkeypatch):
    names = ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "TROPD_STARTED"]
    names += ["RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TROPD_GPUS_PER_NODE"]
    for name in names:
        monkeypatch.setenv(name, "")
    assert patience() == 0.0
    assert started_at() == pytest.approx(time.monotonic(), abs=60)
    assert not is_rank()
    ranks = launch.rank_environment(1, Nodes())
    assert int(ranks["OMP_NUM_THREADS"]) >= 1 and ranks["OMP_WAIT_POLICY"] == "PASSIVE"
    check_device()


def test_segments_of_the_trainers_memory_grow_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    assert launch.rank_environment(1, Nodes())["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert launch.rank_environment(1, Nodes())["PYTORCH_ALLOC_CONF"] == ""


def test_numbers_are_read_in_one_place():
    """``int("")`` is a traceback, and ``in os.environ`` takes nothing for something."""
    reads = re.compile(r"(?:int|float)\(os\.environ|in os\.environ\b|\bos\.environ\[[^]]*\] ==")
    package = Path(megatron_tropd.__file__).parent
    found = [path.name for path in package.rglob("*.py") if reads.search(path.read_text())]
    assert not found
