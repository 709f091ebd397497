"""A method that lives outside of the package: one file, named in the config, nothing edited."""

import json
from pathlib import Path

import pytest
import torch

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import config_from_dict, config_to_dict, load_config
from megatron_tropd.losses import (
    HiddenStatesSignal,
    LossTargets,
    required_signal,
    tropd_loss_from_hidden,
)

TOML = """
[model]
student = "student"
teacher = "teacher"
[rollout]
prompts = "prompts.jsonl"
max_new_tokens = 8
[loss]
method = "own_method:Squared"
share = 0.25
mask_truncated = true
[train]
steps = 1
lr = 1e-3
[run]
dir = "run"
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """A config with the method of examples/own_parts."""
    (tmp_path / "run.toml").write_text(TOML)
    return tmp_path / "run.toml"


def test_a_config_names_it_and_gives_its_settings(toml: Path):
    config = load_config(toml)
    assert (config.loss.share, config.loss.mask_truncated) == (0.25, True)
    assert config.loss.method_name() == "own_method:Squared"
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    with pytest.raises(ConfigError, match=r"loss\.share must be at least 0, found -1"):
        load_config(toml, ["loss.share=-1.0"])
    with pytest.raises(ConfigError, match=r"Unknown config key loss\.top_k.*Known here: .*share"):
        load_config(toml, ["loss.top_k=8"])
    with pytest.raises(ConfigError, match=r"'own_method:Cubed' cannot be imported.*no attribute"):
        load_config(toml, ["loss.method=own_method:Cubed"])


def test_it_trains_with_the_gradient_of_its_formula(toml: Path):
    method = load_config(toml).loss
    draw = torch.Generator().manual_seed(0)
    hidden, near = (torch.randn(9, 8, generator=draw) for _ in range(2))
    weight, other = (torch.randn(12, 8, generator=draw) for _ in range(2))
    ids = torch.randint(12, (9,), generator=draw)
    is_teacher = torch.arange(9) < 3
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    signal = HiddenStatesSignal(near, other, 12)
    assert required_signal(method) == {"sampled", "full"}
    output = tropd_loss_from_hidden(
        *leaves,
        LossTargets(ids, is_teacher, torch.zeros(9)),
        signal,
        config=method,
        vocab_size=12,
        group=None,
        beta=0.3,
    )
    output.loss.backward()

    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    log_q = (exact[0] @ exact[1].t()).log_softmax(-1)
    log_p = (near.double() @ other.double().t()).log_softmax(-1)
    at = ids.unsqueeze(-1)
    log_q_x, log_p_x = log_q.gather(-1, at)[:, 0], log_p.gather(-1, at)[:, 0]
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    wanted = torch.where(is_teacher, -0.3 * log_q_x, (log_p_x - log_q_x) ** 2 / 2 + 0.25 * kl)
    wanted.sum().backward()
    torch.testing.assert_close(
        output.values["loss"].double(), wanted.detach(), rtol=1e-5, atol=1e-5
    )
    for found, leaf in zip(leaves, exact, strict=True):
        torch.testing.assert_close(found.grad.double(), leaf.grad, rtol=1e-4, atol=1e-5)


def test_a_method_without_its_loss_is_refused_before_anything_starts(toml: Path, monkeypatch):
    source = (
        "from megatron_tropd.losses.method import Method\nclass Half(Method):\n    needs = None\n"
    )
    (toml.parent / "half_method.py").write_text(source)
    monkeypatch.syspath_prepend(str(toml.parent))
    with pytest.raises(ConfigError, match=r"'half_method:Half' must define term, which every"):
        load_config(toml, ["loss.method=half_method:Half"])
