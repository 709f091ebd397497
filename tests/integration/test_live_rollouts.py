"""Live rollouts in Megatron's own ``pretrain``: real vLLM, two gloo ranks, a tiny model.

Whether the engine has the weights of the step is seen where it matters: the log-probs of the
rollouts are those of Megatron's forward pass, in every step, though the learning rate is large.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm_engines
from transformers import AutoModelForCausalLM

from megatron_tropd.base.errors import ConfigError, TrainingError
from megatron_tropd.config import RolloutConfig
from megatron_tropd.data.prompts import load_prompts
from megatron_tropd.data.responses import TeacherResponse, header_record, response_record
from megatron_tropd.data.sequence import Writer
from megatron_tropd.data.tokenizers import load_tokenizer
from megatron_tropd.integrations.on_policy_data import (
    OnPolicyData,
    OnPolicySettings,
    check_arguments,
)
from megatron_tropd.integrations.on_policy_iterator import OnPolicyIterator
from tests.ranks import run_with_env, save_without_manager

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "tests" / "live_pretrain.py"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
VOCAB = 384  # what Megatron pads 259 to at TP 2: its cross entropy counts padding columns
ARGUMENTS = """
--distributed-backend gloo --dataloader-type external --num-workers 0
--micro-batch-size 2 --global-batch-size 8 --seq-length 32 --train-iters 3
--eval-iters 0 --eval-interval 100 --lr 3e-2 --lr-decay-style constant --clip-grad 0 --seed 7
--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4
--group-query-attention --num-query-groups 2 --kv-channels 32 --max-position-embeddings 256
--swiglu --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6
--position-embedding-type rope --no-rope-fusion --untie-embeddings-and-output-weights
--attention-dropout 0 --hidden-dropout 0 --transformer-impl local --use-cpu-initialization
--no-gradient-accumulation-fusion --no-persist-layer-norm --no-bias-swiglu-fusion
--no-bias-dropout-fusion --no-masked-softmax-fusion --calculate-per-token-loss
--tokenizer-type NullTokenizer --vocab-size 383 --make-vocab-size-divisible-by 64
--ckpt-format torch_dist
"""
LAYOUTS = {
    "tp2": "--tensor-model-parallel-size 2",
    "pp2": "--pipeline-model-parallel-size 2",
    "dp2": "",
}


def prepare(folder: Path, student: Path) -> dict:
    """Prompts, teacher responses and the folder of a run."""
    prompts, responses = folder / "prompts.jsonl", folder / "responses.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(4)))
    tokenizer = load_tokenizer(student)
    records = [header_record(tokenizer, {})]
    for prompt in load_prompts(prompts, tokenizer):
        response = TeacherResponse(prompt.index, 0, (50, 51, 52, 53, 54, 55, 56, 2), "stop")
        records.append(response_record(prompt, response, text="", seed=0))
    responses.write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "out").mkdir()
    return {
        "student": str(student),
        "prompts": str(prompts),
        "responses": str(responses),
        "out": str(folder / "out"),
    }


def pretrain(live: dict, arguments: str) -> str:
    """Two ranks of ``pretrain``; what the last one printed. Nothing of theirs is left then."""
    run_with_env(2, _pretrain, live, arguments, warm_engines.address())
    assert not engines_of(Path(live["out"]))
    return _printed(live, 1).read_text()


def _printed(live: dict, rank: int) -> Path:
    return Path(live["out"]) / f"printed_{rank}.log"


def _pretrain(live: dict, arguments: str, engines: dict[str, str]) -> None:
    """What ``torchrun -m megatron_tropd.integrations.on_cpu`` does on a rank."""
    from megatron_tropd.integrations import on_cpu
    from megatron_tropd.mcore import platform

    platform.prepare_training()
    save_without_manager()
    os.environ.update(engines, LIVE=json.dumps(live))
    sys.argv = ["on_cpu", str(SCRIPT), *ARGUMENTS.split(), *arguments.split()]
    with (
        _printed(live, int(os.environ["RANK"])).open("a") as log,
        redirect_stdout(log),
        warm_engines.use(),
    ):
        on_cpu.main()


def pretrain_by_torchrun(live: dict, arguments: str) -> subprocess.CompletedProcess[str]:
    """The same from the command line."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "megatron_tropd.integrations.on_cpu"]
    command += [str(SCRIPT), *ARGUMENTS.split(), *arguments.split()]
    environment = warm_engines.environment_of_commands(Path(live["out"], "warm"), REPOSITORY)
    environment |= {"LIVE": json.dumps(live), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert not engines_of(Path(live["out"]))
    return run


def engines_of(log_folder: Path) -> list[str]:
    """Processes that are alive and log into the folder; one just told to end gets a moment."""
    for _ in range(300):
        alive = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if str(log_folder) in os.readlink(process / "fd" / "1"):
                    alive.append(process.name)
        if not alive:
            break
        time.sleep(0.1)
    return alive


def records(live: dict, rank: int) -> list[dict]:
    """What a last stage wrote, step by step."""
    return list(
        map(json.loads, (Path(live["out"]) / f"rank_{rank}.jsonl").read_text().splitlines())
    )


def check_records(found: list[dict], micro_batches: int) -> None:
    """Three steps of rollouts by the weights of each, with prefixes that fall to nothing."""
    assert [record["step"] for record in found] == [
        s for s in range(3) for _ in range(micro_batches)
    ]
    assert all(record["gap"] < 2e-4 for record in found), [record["gap"] for record in found]
    assert len({tuple(record["labels"]) for record in found}) == len(found)


@pytest.fixture
def run_folder(tiny_model: Callable[..., Path], tmp_path: Path) -> dict:
    """Settings of the script, for a student whose vocabulary needs no padding."""
    return prepare(tmp_path, tiny_model("llama", vocab_size=VOCAB))


@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_every_step_trains_on_rollouts_of_its_own_weights(name: str, run_folder: dict) -> None:
    pretrain(run_folder, LAYOUTS[name])
    last = records(run_folder, 1)
    check_records(last, micro_batches=4)
    if name == "tp2":
        assert records(run_folder, 0) == last
    teacher = [sum(r["teacher"] for r in last if r["step"] == s) for s in range(3)]
    assert teacher == [2 * 7, 2 * 6, 2 * 2]  # two prompts a step; floor(alpha x 8), no stop token


def test_replicas_have_their_own_share_and_a_resumed_run_goes_on_alike(run_folder: dict) -> None:
    out = Path(run_folder["out"])
    saving = f"{LAYOUTS['dp2']} --save {out / 'checkpoints'} --save-interval 2"
    pretrain(run_folder, saving)
    whole = [records(run_folder, rank) for rank in range(2)]
    for found in whole:
        check_records(found, micro_batches=2)
    ids = [tuple(i) for found in whole for record in found[:2] for i in record["ids"]]
    assert len(set(ids)) == 8
    for rank in range(2):
        (out / f"rank_{rank}.jsonl").unlink()
    (out / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    pretrain(run_folder, f"{LAYOUTS['dp2']} --load {out / 'checkpoints'}")
    for rank in range(2):
        again = records(run_folder, rank)
        assert [r["labels"] for r in again] == [r["labels"] for r in whole[rank][-2:]]


def test_an_error_in_the_loop_ends_the_engines(run_folder: dict) -> None:
    run = pretrain_by_torchrun(run_folder | {"fail": 2, "engines": 2}, LAYOUTS["tp2"])
    assert run.returncode != 0 and "told to fail" in run.stderr
    assert {record["step"] for record in records(run_folder, 0)} == {0}


def test_the_plug_in_distils_on_live_rollouts(
    run_folder: dict, tiny_model: Callable[..., Path]
) -> None:
    teacher = tiny_model("llama", vocab_size=VOCAB, num_hidden_layers=4)
    printed = pretrain(
        run_folder | {"distil": True},
        f"{LAYOUTS['pp2']} --tropd-teacher-load {teacher} --tropd-method tropd --log-interval 1",
    )
    assert len(re.findall(r"tropd loss: \d", printed)) == 3
    seen = set()
    for step in range(3):
        folder = Path(run_folder["out"])
        items = torch.load(folder / f"items_{step}.pt")
        assert len(items) == 8
        model = AutoModelForCausalLM.from_pretrained(folder / f"step_{step}", dtype=torch.float32)
        for item in items:
            with torch.no_grad():
                logits = model(item["tokens"][None]).logits[0, :, : VOCAB - 1]  # the tokenizer's
            of_labels = logits.log_softmax(-1).gather(1, item["labels"][:, None])[:, 0]
            student = item["writers"] == Writer.STUDENT
            assert (of_labels - item["behaviour_logprobs"])[student].abs().max() < 1e-4
            seen.add(tuple(item["labels"].tolist()))
    assert len(seen) == 24


def settings(folder: Path) -> OnPolicySettings:
    rollout = RolloutConfig(prompts="p", max_new_tokens=4, prompts_per_step=2, samples_per_prompt=4)
    return OnPolicySettings(student=folder, rollout=rollout, log_folder=folder)


def test_megatrons_arguments_are_checked(tmp_path: Path) -> None:
    good = SimpleNamespace(
        global_batch_size=8,
        rampup_batch_size=None,
        overlap_param_gather=False,
        context_parallel_size=1,
        train_iters=3,
    )
    rollout = settings(tmp_path).rollout
    check_arguments(good, rollout)
    for name, value, message in (
        ("global_batch_size", 16, r"--global-batch-size 8 \(prompts x samples\)"),
        ("overlap_param_gather", True, "no --overlap-param-gather"),
        ("virtual_pipeline_model_parallel_size", 2, "no virtual pipeline stages"),
        ("iterations_to_skip", [3], "no --iterations-to-skip"),
        ("step_batch_size_schedule", "0:8 1K:16", "no --step-batch-size-schedule"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_arguments(SimpleNamespace(**vars(good) | {name: value}), rollout)
    with pytest.raises(ConfigError, match="need --dataloader-type external; no --rampup"):
        good.rampup_batch_size = [2, 2, 8]
        check_arguments(good, rollout, [(True, "--dataloader-type external")])


def test_an_iterator_nobody_fills_says_so(tmp_path: Path) -> None:
    live = OnPolicyIterator(OnPolicyData(settings(tmp_path)))
    with pytest.raises(TrainingError, match="call refill"):
        next(iter(live))


class Model:
    """Counts how often its gradients were cleared."""

    cleared = 0

    def zero_grad_buffer(self) -> None:
        self.cleared += 1


class Counting(OnPolicyIterator):
    """Counts the refills."""

    refills = 0

    def refill(self) -> None:
        self.refills += 1
        self._source = None


def test_rollouts_are_renewed_once_per_used_batch(tmp_path: Path) -> None:
    """Not for evaluation, and not for a repeated step."""
    model, live = Model(), Counting(OnPolicyData(settings(tmp_path)))
    wrapped = SimpleNamespace(iterable=live, replaying=False)
    step = live.watch_steps(lambda data_iterator, model: None)
    step(iter([]), model)
    model.zero_grad_buffer()
    assert live.refills == 0
    for expected in (1, 2):
        step(wrapped, model)
        step(wrapped, model)
        model.zero_grad_buffer()
        model.zero_grad_buffer()
        assert live.refills == expected
    step(wrapped, model)
    wrapped.replaying = True
    model.zero_grad_buffer()
    assert live.refills == 2
    wrapped.replaying = False
    model.zero_grad_buffer()
    assert (live.refills, model.cleared) == (3, 7)
