"""What every test may use: optional parts of a machine, real data, tiny models made on the fly."""

import gc
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import machine
import pytest

_surroundings = machine.Surroundings()


gc.disable()  # until all is imported and collected


def pytest_configure() -> None:
    """Refuse a wrong TROPD_TEST_HIDE before anything runs; hear Ctrl-C.

    A shell starts what runs in the background with SIGINT ignored, which all commands of all tests
    would inherit: those that are to end by it never would.
    """
    machine.hidden_names()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who uses the real data need not say so twice."""
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.needs("data"))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported and collected: it stays."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Share the files among workers, if there are any."""
    from side_by_side import LongestFirst

    config.option.loadscopereorder = False
    return LongestFirst(config, log)


def _needs(item: pytest.Item) -> list[str]:
    return [name for mark in item.iter_markers("needs") for name in mark.args]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Show the test what it needs. Around its fixtures too, of whatever scope."""
    with _surroundings.of(_needs(item)):
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test if the machine lacks what it needs."""
    for name in _needs(item):
        if reason := machine.why_not(name):
            pytest.skip(reason)


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    _surroundings.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data; the test is skipped where it is absent."""
    return machine.data_folder()


@pytest.fixture(scope="module")
def warm_engines() -> Generator[None, None, None]:
    """Engines that this process starts have imported vLLM before (tests/warm_engines.py)."""
    import warm_engines

    with warm_engines.use():
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model(family, **overrides)``: a cached HF folder; treat it as read-only."""
    from tiny_models import write_tiny_model

    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def make(family: str, **overrides: Any) -> Path:
        key = repr((family, sorted(overrides.items())))
        if key not in made:
            made[key] = write_tiny_model(root / str(len(made)), family, **overrides)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[..., Path]) -> Path:
    """A tiny untied Llama."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tiny_qwen2(tiny_model: Callable[..., Path]) -> Path:
    """A tiny tied Qwen2 (64 / 2 heads of 32, for transformers ignores its head_dim)."""
    return tiny_model(
        "qwen2", tie_word_embeddings=True, num_attention_heads=2, num_key_value_heads=2
    )


@pytest.fixture(scope="session")
def tiny_qwen3(tiny_model: Callable[..., Path]) -> Path:
    """A tiny tied Qwen3 whose heads are wider than hidden_size / heads."""
    return tiny_model("qwen3", tie_word_embeddings=True)
