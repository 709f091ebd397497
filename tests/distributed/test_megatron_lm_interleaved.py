"""The plug-in through the real ``pretrain`` with virtual pipeline stages, beside itself without."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron_lm import history, run_all
from test_megatron_lm_pretrain import HALF, Setting

from megatron_tropd.convert.megatron_folder import MegatronFolder

pytestmark = pytest.mark.slow

LAYERS = "--num-layers 4 --pipeline-model-parallel-size 2"
CHUNKS = f"{LAYERS} --num-virtual-stages-per-pipeline-rank 2"
METHODS = {"text": "gkd_jsd", "trajectories": "reopold"}
"""The second one looks at the whole batch first."""
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_model: Callable[..., Path]) -> Setting:
    """A tied Llama of 4 layers and an untied, wider Qwen3 teacher of 5: its chunks are uneven."""
    student = tiny_model("llama", tie_word_embeddings=True, num_hidden_layers=4)
    teacher = tiny_model("qwen3", hidden_size=96, num_hidden_layers=5, seed=5)
    return Setting(tmp_path_factory.mktemp("interleaved"), student, teacher)


@pytest.fixture(scope="module")
def logs(setting: Setting) -> dict[str, str]:
    """Name of a run -> its log."""
    runs = []
    for kind, method in METHODS.items():
        arguments = setting.arguments(kind, method=method, steps=HALF)
        runs += [setting.run(f"{kind}-without", f"{arguments} {LAYERS}")]
        saved = f"--save {setting.save(kind)} --save-interval {HALF // 2}"
        runs += [setting.run(f"{kind}-chunks", f"{arguments} {CHUNKS} {saved}")]
    text = setting.arguments("text", steps=HALF)
    resumed = (
        f"{text} {CHUNKS} --load {setting.save('text')} --ckpt-step {HALF // 2} "
        f"--save {setting.save('text')}-resumed"
    )
    evaluation = "--split 80,20,0 --lr 0 --eval-iters 2 --eval-interval 2"
    short = setting.arguments("text", steps=2)
    runs += [
        setting.run("resumed", resumed),
        setting.run("evaluated-without", f"{short} {LAYERS} {evaluation}"),
        setting.run("evaluated-chunks", f"{short} {CHUNKS} {evaluation}"),
    ]
    return run_all(2, runs, setting.logs)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", ["tropd loss", "grad norm"])
def test_megatron_lm_trains_alike_with_virtual_stages(name, kind, logs) -> None:
    found, expected = (history(logs[f"{kind}-{how}"], name) for how in ("chunks", "without"))
    assert len(found) == HALF
    torch.testing.assert_close(found, expected, **CLOSE)


def test_megatron_lm_evaluates_with_virtual_stages(logs) -> None:
    pattern = r"validation loss at iteration 2 .*?tropd loss value: (\S+)"
    found, expected = (
        [float(x) for x in re.findall(pattern, logs[f"evaluated-{how}"])]
        for how in ("chunks", "without")
    )
    assert found and found == pytest.approx(expected, rel=1e-5)


def test_megatron_lm_resumes_with_virtual_stages(setting, logs) -> None:
    for name in ("tropd loss", "grad norm"):
        whole, resumed = (history(logs[run], name) for run in ("text-chunks", "resumed"))
        torch.testing.assert_close(whole[HALF // 2 :], resumed, rtol=0, atol=3e-7)
    one, other = (
        MegatronFolder(setting.save(f"text{end}"), setting.student) for end in ("", "-resumed")
    )
    for entry in one.entries:
        mine, theirs = one.read(entry), other.read(entry)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
