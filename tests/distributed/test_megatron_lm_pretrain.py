"""The plug-in through the real ``megatron.training.pretrain``, from the example scripts.

Student and teacher differ in family, width, depth and tying, and their padded vocabularies differ
on two ranks. What every layout draws is recorded; our own trainer then gets the same texts, and
packs the same trajectories by itself.
"""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron_lm import (
    MICRO_BATCHES,
    PLAIN,
    ROWS,
    SEQUENCE,
    TROPD,
    Run,
    command_line,
    error_of,
    history,
    run_all,
)

from megatron_tropd.config.loss import preset
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.convert.to_megatron import ToMegatron, hf_to_megatron
from megatron_tropd.data.batch import MicroBatch
from megatron_tropd.data.packing import LossCounts
from megatron_tropd.data.recorded import training_item
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from tests.ranks import free_port, leave_layout, run_with_env
from tests.step_parts import BETA, build_parts

pytestmark = pytest.mark.slow

STEPS, HALF = 12, 6
LAYOUTS = {
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "tp2_sequence_parallel": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity selective "
        "--recompute-modules core_attn mlp --tropd-teacher-offload host_by_layer",
    ),
    "dp2_overlapped": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        "--ddp-bucket-size 3000",
    ),
    "cp2": (2, "--context-parallel-size 2"),
    "cp2_pp2": (4, "--context-parallel-size 2 --pipeline-model-parallel-size 2"),
    "tp2_pp2": (
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --overlap-grad-reduce "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
        "--tropd-teacher-offload host",
    ),
}
RESUMED = ("tp2-text", "pp2-text", "tp2_pp2-text", "tp2-trajectories")
EVALUATED = "tp2_pp2"
CLOSE_LOSS = {"rtol": 1e-4, "atol": 1e-5}
CLOSE_NORM = {"rtol": 1e-3, "atol": 6e-4}
METHODS = {"text": "gkd_jsd", "trajectories": "tropd"}
"""What the items are -> the method they are trained with."""
WHOLE_BATCH = {
    "dp2_overlapped": ("top_d", {}),
    "tp2_pp2": ("reopold", {"switch_step": 3}),
    "cp2_pp2": ("iw_opd", {}),
}
"""Layout -> a method that scores the student before the step, and its settings."""


def _write_text(prefix: Path) -> None:
    """Documents of random ids as Megatron's indexed dataset."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    generator = torch.Generator().manual_seed(3)
    for length in torch.randint(20, 90, (300,), generator=generator).tolist():
        builder.add_item(torch.randint(3, 259, (length,), generator=generator))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def _trajectory(index: int) -> TokenSequence:
    """Random ids: prompts, teacher prefixes and responses of differing lengths."""
    generator = torch.Generator().manual_seed(index)
    prompt, prefix, length = (
        int(torch.randint(low, high, (), generator=generator))
        for low, high in ((3, 8), (0, 6), (19, SEQUENCE + 2))
    )
    ids = torch.randint(3, 259, (length,), generator=generator).tolist()
    student = ids[prompt + prefix :]
    return TokenSequence.of_runs(
        SampleKey(index // (ROWS * MICRO_BATCHES), index // 3, index % 3),
        (Writer.CONTEXT, tuple(ids[:prompt])),
        (Writer.TEACHER, tuple(ids[prompt : prompt + prefix])),
        (Writer.STUDENT, tuple(student)),
        logprobs=(-5.0,) * len(student),
        version=0,
    )


class Trajectories(torch.utils.data.Dataset):
    """Items of the recorded kind: prompts, teacher prefixes, student tokens, padding."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return training_item(_trajectory(index), SEQUENCE)


def _live(student: torch.nn.Module, iteration: int) -> list[dict[str, torch.Tensor]]:
    """The items that the loader would deal in this iteration, made between the steps."""
    assert any(p.requires_grad for p in student.parameters()) and not hasattr(student, "module")
    size, items = ROWS * MICRO_BATCHES, Trajectories()
    return [items[iteration * size + i] for i in range(size)]


def _watch(out: Path, live: bool = False) -> Callable[[], None]:
    """Serve :class:`Trajectories` where asked; write down what rank 0 draws."""
    import torch.distributed as dist

    from megatron_tropd.integrations import megatron_lm

    draw, dataset = megatron_lm.draw, megatron_lm.recorded_trajectories
    distillation = megatron_lm.distillation
    drawn: list[Any] = []
    if live:
        megatron_lm.distillation = partial(distillation, rollouts=_live)

    def watched(*args: Any, **kwargs: Any) -> Any:
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    megatron_lm.draw = watched
    megatron_lm.recorded_trajectories = lambda args: Trajectories()

    def after() -> None:
        megatron_lm.draw, megatron_lm.recorded_trajectories = draw, dataset
        megatron_lm.distillation = distillation
        if dist.get_rank() == 0:
            torch.save(drawn, out)

    return after


class Setting:
    """Folders of the module's runs and what a distilling command line shares."""

    def __init__(self, root: Path, student: Path, teacher: Path) -> None:
        self.root, self.student, self.teacher = root, student, teacher
        self.logs = root / "logs"
        self.logs.mkdir()
        hf_to_megatron(ToMegatron(student, root / "student", tensor_parallel=2))
        _write_text(root / "text")

    def data(self, kind: str) -> str:
        text = f"--data-path {self.root / 'text'} --data-cache-path {self.root / 'cache'}"
        return text if kind == "text" else "--tropd-trajectories here"

    def arguments(
        self, kind: str = "text", *, method: str | None = None, steps: int = STEPS
    ) -> str:
        return (
            f"{self.data(kind)} --tropd-teacher-load {self.teacher} --tropd-beta {BETA} "
            f"--tropd-method {method or METHODS[kind]} --train-iters {steps} "
            f"--pretrained-checkpoint {self.root / 'student'}"
        )

    def run(self, name: str, arguments: str, **others: Any) -> Run:
        others.setdefault("before", partial(_watch, self.root / f"{name}.drawn"))
        return Run(name, arguments, **others)

    def save(self, name: str) -> Path:
        return self.root / f"save-{name}"


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_model: Callable[..., Path]) -> Setting:
    """A tied Llama of width 64 and an untied Qwen3 teacher of width 96 and 4 layers."""
    student = tiny_model("llama", tie_word_embeddings=True)
    teacher = tiny_model("qwen3", hidden_size=96, num_hidden_layers=4, seed=5)
    return Setting(tmp_path_factory.mktemp("megatron_lm"), student, teacher)


def _layout_runs(setting: Setting, layout: str) -> list[Run]:
    options = LAYOUTS[layout][1]
    runs = []
    for kind in METHODS:
        name = f"{layout}-{kind}"
        saved = f"--save {setting.save(name)} --save-interval {HALF}" if name in RESUMED else ""
        runs.append(setting.run(name, f"{setting.arguments(kind)} {options} {saved}"))
    for whole, kind in ((f"{layout}-{kind}", kind) for kind in METHODS):
        if whole in RESUMED:
            runs.append(
                setting.run(
                    f"{whole}-resumed",
                    f"{setting.arguments(kind)} {options} --load {setting.save(whole)} "
                    f"--ckpt-step {HALF} --save {setting.save(whole)}-resumed",
                )
            )
    for method, changes in [WHOLE_BATCH[layout]] if layout in WHOLE_BATCH else []:
        on_samples = setting.arguments("trajectories", method=method, steps=HALF)
        more = "".join(f"--tropd-set {name}={value}" for name, value in changes.items())
        runs.append(setting.run(method, f"{on_samples} {options} {more}"))
    if layout == "tp2":
        scores = f"--tropd-teacher-cache {setting.root / 'scores'}"
        kind = setting.arguments("trajectories", steps=HALF)
        runs.append(setting.run("cached", f"{kind} {options} {scores}"))
    if layout == EVALUATED:
        evaluation = "--split 80,20,0 --lr 0 --eval-iters 2 --eval-interval 2"
        on_text = setting.arguments("text", steps=2)
        runs.append(setting.run("evaluated", f"{on_text} {options} {evaluation}"))
    if layout == "dp2_overlapped":
        live = partial(_watch, setting.root / "live.drawn", live=True)
        on_text = setting.arguments("text", method="tropd", steps=5)
        runs.append(setting.run("live", f"{on_text} {options}", before=live))
    return runs


def _refused_runs(setting: Setting) -> list[Run]:
    base = setting.arguments()
    without_teacher = f"{setting.data('text')} --train-iters 2 --tropd-method tropd"
    return [
        setting.run("lone", without_teacher),
        setting.run("sampled_on_text", setting.arguments(method="tropd")),
        setting.run("no_method", re.sub("--tropd-method [a-z_]+", "", base)),
        setting.run("bigger_vocabulary", base.replace("--tropd", "--vocab-size 300 --tropd", 1)),
    ]


@pytest.fixture(scope="module")
def logs(setting: Setting) -> dict[str, str]:
    """Name of a run -> its log."""
    found = {}
    run_with_env(1, _score, setting)
    for world_size in (2, 4):
        layouts = [name for name, (size, _) in LAYOUTS.items() if size == world_size]
        runs = [run for layout in layouts for run in _layout_runs(setting, layout)]
        if world_size == 2:
            runs += _refused_runs(setting)
        found |= run_all(world_size, runs, setting.logs)
    return found


def _score(setting: Setting) -> None:
    """Write what the teacher says of the first half's trajectories, as ``tropd score`` does."""
    from megatron_tropd.config import ParallelConfig, TrainConfig
    from megatron_tropd.convert.hf_folder import HFFolder
    from megatron_tropd.distill.score import Scorer
    from megatron_tropd.teacher.cached.digest import model_digest, num_scored
    from megatron_tropd.teacher.cached.files import (
        CacheHeader,
        shard_path,
        write_header,
        write_shard,
    )

    train, layout = TrainConfig(steps=1, tokens_per_micro_batch=128), ParallelConfig()
    parts = build_parts(setting.student, setting.teacher, layout, train, preset("tropd"))
    trajectories = [_trajectory(n) for n in range(HALF * ROWS * MICRO_BATCHES)]
    columns = Scorer(parts.teacher, parts.layout, 64, torch.float32, 128).score(trajectories)
    assert columns is not None
    digest, folder = model_digest(HFFolder(setting.teacher)), setting.root / "scores"
    names = (digest, None, "not compared", 259, "float32", 64, "float32", "not compared")
    folder.mkdir()
    write_header(folder, CacheHeader(*names, len(trajectories), num_scored(trajectories), 1))
    write_shard(shard_path(folder, 0), trajectories, columns)


@pytest.fixture(scope="module")
def own(setting: Setting, logs: dict[str, str]) -> dict[str, torch.Tensor]:
    """Kind of items -> [steps, 2] loss and gradient norm of our own trainer on one rank."""
    run_with_env(1, _own_trainer, setting)
    read = json.loads((setting.root / "own.json").read_text())
    return {kind: torch.tensor(values, dtype=torch.float64) for kind, values in read.items()}


def _own_trainer(setting: Setting) -> None:
    histories = {kind: _train(setting, kind, f"tp2-{kind}") for kind in METHODS}
    for method, changes in WHOLE_BATCH.values():
        loss = preset(method, **changes)
        histories[method] = _train(setting, "trajectories", "tp2-trajectories", loss=loss)
    # After two steps that change nothing, Megatron evaluates twice.
    histories["evaluated"] = _train(setting, "text", "evaluated", lr=1e-9)[2:]
    (setting.root / "own.json").write_text(json.dumps(histories))


def _train(
    setting: Setting, kind: str, drawn_by: str, *, loss: Any = None, lr: float = 1e-2
) -> list[list[float]]:
    from megatron_tropd.config import ParallelConfig, TrainConfig
    from megatron_tropd.distill.step import forward_backward, learn
    from megatron_tropd.distill.step_records import StepRecords

    parts = build_parts(
        setting.student,
        setting.teacher,
        ParallelConfig(),
        TrainConfig(steps=STEPS, lr=lr, tokens_per_micro_batch=ROWS * SEQUENCE),
        loss or preset(METHODS[kind]),
        seed=1234,  # Megatron's own --seed
    )
    rows = []
    for step, drawn in enumerate(_drawn(setting, drawn_by)):
        if kind == "trajectories":
            size = ROWS * MICRO_BATCHES
            found = learn(parts, [_trajectory(step * size + i) for i in range(size)], step).metrics
            rows.append([found["loss"], found["grad_norm"]])
            continue
        records = StepRecords(torch.device("cpu"), counted=True)
        counts = LossCounts(0, sum(len(batch.loss_at) for batch in drawn), 0)
        forward_backward(parts, drawn, counts, step, record=records)
        loss = records.sums.reduce().metrics()["loss"]
        rows.append([loss, parts.student.update().grad_norm])
    leave_layout()
    return rows


def _drawn(setting: Setting, name: str) -> list[list[MicroBatch]]:
    """What the plug-in drew in each step of a run."""
    return torch.load(setting.root / f"{name}.drawn", weights_only=False)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_lm_trains_as_our_own_trainer(layout, kind, logs, own):
    log = logs[f"{layout}-{kind}"]
    expected = own[kind]
    torch.testing.assert_close(history(log, "tropd loss"), expected[:, 0], **CLOSE_LOSS)
    torch.testing.assert_close(history(log, "grad norm"), expected[:, 1], **CLOSE_NORM)


@pytest.mark.parametrize("method", [method for method, _ in WHOLE_BATCH.values()])
def test_megatron_lm_looks_at_the_whole_batch_as_our_own_trainer(method, logs, own):
    # Rounding decides which tokens are chosen in the end; six steps it does not. Rewards of both
    # signs cancel in the loss, so that its last digits are those of larger numbers.
    expected, close = own[method][:HALF], CLOSE_LOSS | {"atol": 1e-4}
    torch.testing.assert_close(history(logs[method], "tropd loss"), expected[:, 0], **close)
    torch.testing.assert_close(history(logs[method], "grad norm"), expected[:, 1], **CLOSE_NORM)


def test_megatron_lm_learns_from_scores_as_from_the_teacher(logs):
    assert "no model of it is loaded" in logs["cached"]
    for name in ("tropd loss", "grad norm", "k1"):
        read, said = (history(logs[run], name)[:HALF] for run in ("cached", "tp2-trajectories"))
        torch.testing.assert_close(read, said, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_lm_loss_falls(layout, logs):
    loss = history(logs[f"{layout}-text"], "tropd loss")
    assert len(loss) == STEPS and loss[-5:].mean() < 0.8 * loss[0]


def test_megatron_lm_draws_the_same_batches_in_every_layout(setting, logs):
    for kind in METHODS:
        drawn = {
            layout: _drawn(setting, f"{layout}-{kind}")
            for layout in LAYOUTS
            if not layout.startswith("dp2")
        }
        first = drawn["tp2"]
        assert len(first) == STEPS and len(first[0]) == MICRO_BATCHES
        for other in drawn.values():
            for mine, theirs in zip(first, other, strict=True):
                for a, b in zip(mine, theirs, strict=True):
                    torch.testing.assert_close(vars(a), vars(b), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("run", RESUMED)
def test_megatron_lm_resumes_as_if_nothing_had_happened(run, setting, logs):
    whole, resumed = logs[run], logs[f"{run}-resumed"]
    expected, found = history(whole, "tropd loss")[HALF:], history(resumed, "tropd loss")
    assert torch.equal(expected[2:], found[2:])
    torch.testing.assert_close(expected, found, rtol=0, atol=3e-7)
    assert torch.equal(history(whole, "grad norm")[HALF:], history(resumed, "grad norm"))
    one, other = (
        MegatronFolder(setting.save(f"{run}{end}"), setting.student) for end in ("", "-resumed")
    )
    for entry in one.entries:
        mine, theirs = one.read(entry), other.read(entry)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_megatron_lm_checkpoint_holds_the_student_only(setting, logs):
    # Opening accounts for every tensor; the optimizer has as many moments as there are weights.
    folder = MegatronFolder(setting.save("tp2-text"), setting.student)
    names = folder.reader.names
    weights = {n for n in names if not n.startswith("optimizer.")}
    moments = {n for n in names if n.startswith("optimizer.state.exp_avg.")}
    assert len(moments) == len(weights)
    assert not any("teacher" in n for n in names)


def test_megatron_lm_evaluates_as_it_trains(logs, own):
    """The loss on validation text, which the teacher scores as well."""
    found = re.findall(
        r"validation loss at iteration 2 .*?tropd loss value: (\S+)", logs["evaluated"]
    )
    expected = own["evaluated"][:, 0].view(2, 2).mean(1)
    torch.testing.assert_close(
        torch.tensor([float(value) for value in found]).double(), expected, rtol=1e-4, atol=0
    )


def test_megatron_lm_takes_live_rollouts_between_steps(logs):
    recorded = logs["dp2_overlapped-trajectories"]
    for name in ("tropd loss", "grad norm"):
        assert torch.equal(history(logs["live"], name), history(recorded, name)[:5])


def _plain_run(setting: Setting, name: str, script: Path, first: str = "") -> MegatronFolder:
    """Ten steps of plain pretraining in a process of its own; ``first`` comes before all else."""
    arguments = f"{setting.data('text')} --train-iters 10 --save {setting.save(name)}"
    code = f"""
{first}
import queue, runpy, sys
from megatron_tropd.mcore import platform
platform.prepare_training()
from megatron.core.dist_checkpointing.strategies import filesystem_async
filesystem_async._results_queue = queue.Queue()
sys.argv = {command_line(script, arguments)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
print("plug-in imported:", "megatron_tropd.integrations.megatron_lm" in sys.modules)
"""
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"plug-in imported: {bool(first) or script == TROPD}" in done.stdout
    return MegatronFolder(setting.save(name), setting.student)


def test_megatron_lm_changes_nothing_where_it_was_not_asked_to_distil(setting):
    plain = _plain_run(setting, "plain", PLAIN)
    imported = "import megatron_tropd.integrations.megatron_lm"
    others = [
        _plain_run(setting, "imported", PLAIN, imported),
        _plain_run(setting, "without-arguments", TROPD),
    ]
    for other in others:
        for name in sorted(plain.reader.names):
            mine, theirs = plain.reader.read(name), other.reader.read(name)
            assert torch.equal(mine, theirs), name


def _old_reduce(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """Megatron's all-reduce before 0.19, lost on tensors that are not contiguous."""
    torch.distributed.all_reduce(tensor.contiguous(), group=group)
    return tensor


def _text(tokens: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> MicroBatch:
    """A micro-batch of given text; labels of weight 0 carry no loss."""
    nothing, loss_at = torch.zeros(ROWS, SEQUENCE), weights.flatten().nonzero()[:, 0]
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        writers=torch.where(weights != 0, Writer.STUDENT, Writer.CONTEXT),
        position_ids=torch.arange(SEQUENCE).expand(ROWS, -1),
        response_positions=nothing.long(),
        engine_logprobs=nothing,
        behaviour_logprobs=nothing,
        uniforms=nothing,
        weights=weights,
        loss_at=loss_at,
        loss_rows=loss_at // SEQUENCE,
        student_at=torch.arange(len(loss_at)),
        rows=tuple(range(ROWS)),
        keys=tuple(SampleKey(0, row, 0) for row in range(ROWS)),
        loss_counts=tuple((weights != 0).sum(dim=1).tolist()),
    )


def _one_hot_teacher(student: str, sequence_parallel: bool, out: str) -> None:
    """Gradients of Megatron's cross entropy and of the forward KL from the labels themselves."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    from megatron_tropd.config import ParallelConfig, TrainConfig
    from megatron_tropd.convert.hf_folder import HFFolder
    from megatron_tropd.distill.step_loss import StepLoss
    from megatron_tropd.distill.step_parts import LossParts
    from megatron_tropd.distill.token_choices import BatchChoices
    from megatron_tropd.integrations.loss_report import LossReport
    from megatron_tropd.losses import HiddenStatesSignal
    from megatron_tropd.mcore import models, parallel
    from megatron_tropd.mcore.schedule import student_forward
    from megatron_tropd.mcore.student import Student

    mappings._reduce = _old_reduce
    layout, vocab = ParallelConfig(tensor=2, sequence_parallel=sequence_parallel), 384
    ranks = parallel.initialize(layout, seed=1)
    model = models.build_model(
        HFFolder(Path(student)),
        layout=ranks,
        parallel=layout,
        dtype=torch.float32,
        padded_vocab_size=vocab,
    )
    student = Student(model, train=TrainConfig(steps=1), parallel=layout, dtype=torch.float32)
    (chunk,) = student.chunks
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(0, 259, (2, ROWS, SEQUENCE), generator=generator)
    weights = (torch.rand(ROWS, SEQUENCE, generator=generator) < 0.7).float()
    positions = torch.arange(SEQUENCE).expand(ROWS, -1)

    losses = chunk(tokens, positions, None, labels=labels)
    expected = (losses * weights).sum()
    expected.backward()
    mine = {name: p.main_grad.clone() for name, p in model.trainable().items()}
    chunk.zero_grad_buffer()

    # Logits of 200 at the label and 0 elsewhere: exactly one-hot in float32.
    one_hot_TV = 200 * torch.nn.functional.one_hot(labels[weights != 0], vocab).float()
    half = vocab // 2
    identity_vV = torch.eye(vocab)[ranks.tp_rank * half : (ranks.tp_rank + 1) * half]
    batch = _text(tokens, labels, weights)
    signal = HiddenStatesSignal(one_hot_TV, identity_vV.contiguous(), vocab)
    args = Namespace(check_for_nan_in_loss_and_grad=False, tropd_metrics=False)
    config = preset("gkd_forward_kl")
    # Megatron's cross entropy counts padding columns as real ones.
    parts = LossParts(
        student=None,
        teacher=None,
        loss=config,
        beta=1.0,
        vocab_size=vocab,
        layout=ranks,
        tokens_per_micro_batch=tokens.numel(),
    )
    record = LossReport(args, config, iteration=0)
    counts = LossCounts(0, len(batch.loss_at), 0)
    step_loss = StepLoss(parts, config, [signal], counts, BatchChoices(), record)
    states, loss_of = student_forward(enumerate([batch]), chunk, loss_fn=step_loss)
    loss, count, report = loss_of(states)
    loss.backward()
    assert count == weights.sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(report["lm loss"][0], expected.detach())
    for name, parameter in model.trainable().items():
        torch.testing.assert_close(parameter.main_grad, mine[name], rtol=1e-4, atol=1e-5)
    norm = torch.stack([g.norm() for g in mine.values()]).norm()
    assert norm > 1 and len(mine) == 14
    if dist.get_rank() == 0:
        Path(out).write_text("checked")


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_megatron_lm_with_a_one_hot_teacher_is_megatrons_cross_entropy(sequence_parallel, setting):
    out = setting.root / f"one-hot-{sequence_parallel}"
    run_with_env(2, _one_hot_teacher, str(setting.student), sequence_parallel, str(out))
    assert out.read_text() == "checked"


REFUSED = {
    "lone": "--tropd-method given without --tropd-teacher-load",
    "sampled_on_text": "the dataset has given text",
    "no_method": "--tropd-teacher-load needs --tropd-method",
    "bigger_vocabulary": "at least the 300 ids of the student's tokenizer",
}


@pytest.mark.parametrize("name", REFUSED)
def test_megatron_lm_refuses_before_the_first_step(name, logs):
    assert "iteration        1/" not in logs[name]
    assert REFUSED[name] in error_of(logs[name])
