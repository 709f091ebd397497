"""Fixtures every test may use: the optional real data and tiny models made on the fly."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def _data_folder() -> Path:
    """Folder of the optional real models and data sets; it may be absent."""
    return Path(os.environ.get("TROPD_TEST_DATA", REPOSITORY.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data; the test is skipped where it is absent."""
    folder = _data_folder()
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set TROPD_TEST_DATA to a folder that has it")
    return folder


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
