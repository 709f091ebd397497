"""On-policy rounds driven from outside: rollouts, Megatron's own loop, conversion, rollouts.

Real vLLM, two gloo ranks of ``pretrain``, tiny models. The loop is started once by torchrun and
then on ranks that have done the imports; the tools are scripts of such processes.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import warm_commands
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from warm_engines import environment_of_commands

from megatron_tropd.cli.main import main
from megatron_tropd.data.recorded import RecordedTrajectories
from megatron_tropd.data.sequence import Writer
from megatron_tropd.data.tokenizers import load_tokenizer
from tests.ranks import run_with_env, save_without_manager

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("warm_engines"),
]
SCRIPT = REPOSITORY / "examples" / "megatron_lm" / "pretrain_gpt_tropd.py"
LR, STEPS_PER_ROUND = 1e-2, 2
ARGUMENTS = f"""
--tensor-model-parallel-size 2 --distributed-backend gloo
--micro-batch-size 2 --global-batch-size 8 --seq-length 32 --dataloader-type single --num-workers 0
--train-iters 4 --exit-interval {STEPS_PER_ROUND} --eval-iters 0 --eval-interval 100
--log-interval 1 --lr {LR} --lr-decay-style constant --seed 7
--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4
--group-query-attention --num-query-groups 2 --kv-channels 32 --max-position-embeddings 256
--swiglu --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6
--position-embedding-type rope --no-rope-fusion --untie-embeddings-and-output-weights
--attention-dropout 0 --hidden-dropout 0 --transformer-impl local --use-cpu-initialization
--no-gradient-accumulation-fusion --no-persist-layer-norm --no-bias-swiglu-fusion
--no-bias-dropout-fusion --no-masked-softmax-fusion
--make-vocab-size-divisible-by 64 --ckpt-format torch_dist --save-interval 1000
--tokenizer-type HuggingFaceTokenizer --tropd-method tropd
"""


def train(*arguments: str | Path) -> str:
    """Megatron's loop with the plug-in on two ranks, started by torchrun; what they print."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    script = ("-m", "megatron_tropd.integrations.on_cpu", SCRIPT, *arguments)
    done = subprocess.run(
        [sys.executable, *torchrun, *map(str, script)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def train_again(*arguments: str | Path) -> str:
    """The same on ranks that have done the imports."""
    with tempfile.TemporaryDirectory() as folder:
        run_with_env(2, _train, [str(SCRIPT), *map(str, arguments)], Path(folder, "log"))
        return "".join(log.read_text() for log in Path(folder).iterdir())


def _train(words: list[str], log: Path) -> None:
    from megatron_tropd.integrations import on_cpu
    from megatron_tropd.mcore import platform

    platform.prepare_training()
    save_without_manager()
    sys.argv = ["on_cpu", *words]
    with (
        log.with_suffix(f".{os.environ['RANK']}").open("w") as output,
        contextlib.redirect_stdout(output),
    ):
        try:
            on_cpu.main()
        except SystemExit as end:  # after --exit-interval
            assert not end.code


def write_prompts(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(count)))
    return path


def logprob_gap(model_folder: Path, data: RecordedTrajectories) -> float:
    """Largest difference between recorded log-probs and those of a model in transformers."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    gaps = []
    for item in data:
        with torch.no_grad():
            logprobs = model(item["tokens"][None]).logits[0].log_softmax(-1)
        of_labels = logprobs.gather(1, item["labels"][:, None])[:, 0]
        student = item["writers"] == Writer.STUDENT
        gaps.append((of_labels - item["behaviour_logprobs"])[student].abs().max().item())
    return max(gaps)


def test_a_cut_recording_ends_as_the_same_bytes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("megatron_tropd.tasks.sample_files._REQUESTS_PER_BATCH", 4)
    prompts = write_prompts(tmp_path / "prompts.jsonl", 5)

    def record(out: Path) -> str:
        options = f"--student {tiny_llama} --prompts {prompts} --out {out} --max-new-tokens 12"
        main(["rollouts", *options.split(), "--samples", "2", "--threads", "1"])
        return capsys.readouterr().out

    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert "10 rollouts added" in record(whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:7]) + lines[7][:40])
    assert "4 rollouts added" in record(cut)
    assert cut.read_bytes() == whole.read_bytes()
    tokenizer = load_tokenizer(tiny_llama)
    data = RecordedTrajectories(whole, seq_length=32, vocab_size=259, tokenizer=tokenizer)
    assert logprob_gap(tiny_llama, data) < 1e-4
    assert len({tuple(item["labels"].tolist()) for item in data}) == 10


def test_two_rounds_driven_from_outside(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama", num_hidden_layers=4)
    prompts = write_prompts(tmp_path / "prompts.jsonl", 6)
    megatron, saved, recorded = tmp_path / "megatron", tmp_path / "saved", tmp_path / "rounds"
    environment = environment_of_commands(tmp_path / "warm")

    def tropd(*words: str | Path | int) -> str:
        done = warm_commands.run(words, environment=environment, folder=REPOSITORY)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    tropd("convert", "to-megatron", "--hf", student, "--megatron", megatron)
    sampler, loop = student, train
    for number in range(2):
        recording = ["--student", sampler, "--prompts", prompts, "--round", number]
        recording += ["--prompts-per-round", 4, "--samples", 4, "--max-new-tokens", 12]
        out = recorded / f"round-{number:03d}.jsonl"
        assert "16 rollouts added" in tropd("rollouts", *recording, "--out", out)
        assert logprob_gap(sampler, RecordedTrajectories(out, seq_length=32, vocab_size=259)) < 1e-4
        training = ["--tokenizer-model", student, "--tropd-teacher-load", teacher]
        training += ["--pretrained-checkpoint", megatron, "--load", saved, "--save", saved]
        log = loop(*ARGUMENTS.split(), *training, "--tropd-trajectories", recorded)
        assert f"consumed samples: {16 * (number + 1):12d} |" in log
        trained = tmp_path / f"student-{number + 1}"
        options = ["--megatron", saved, "--hf", trained, "--hf-config", student]
        tropd("convert", "to-hf", *options)
        check_trained(sampler, trained)
        sampler, loop = trained, train_again


def check_trained(before: Path, after: Path) -> None:
    """Every weight is where it was, or moved by no more than Adam moves it in a round."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    moved = [(old[name] - new[name]).abs().max().item() for name in old]
    assert min(moved) > 0 and max(moved) < 2 * LR * STEPS_PER_ROUND
