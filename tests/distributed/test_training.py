"""The same recorded trajectories give the same training under every layout.

A wrong factor in the gradient of one layout (tensor-parallel size, number of micro-batches,
replicas, a norm's gradient not summed under sequence parallelism) leaves the first loss right and
shows in the gradient norm of the first step and in every loss after it. Student and teacher differ
in family, width, depth and tying, and padding differs: 259 columns on two ranks.
"""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_with_env
from transformers import AutoModelForCausalLM

from megatron_tropd.config import LossConfig, ParallelConfig, TrainConfig
from megatron_tropd.data.packing import count_loss_tokens, pack
from megatron_tropd.data.types import Segment, Trajectory

STEPS = 10
LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "pp2": ParallelConfig(pipeline=2),
    "tp2_pp2": ParallelConfig(tensor=2, pipeline=2),
    "dp2": ParallelConfig(data=2),
    "dp2_distributed_optimizer": ParallelConfig(data=2, distributed_optimizer=True),
    "tp2_sequence_parallel": ParallelConfig(tensor=2, sequence_parallel=True),
}
TRAIN = TrainConfig(
    steps=STEPS, lr=1e-2, warmup_steps=1, lr_schedule="cosine", tokens_per_micro_batch=128
)
LOSS = LossConfig(denominator="separate")


def recorded_trajectories(step: int, count: int = 8) -> list[Trajectory]:
    """Random token ids; every fourth trajectory starts with a teacher prefix."""
    generator = torch.Generator().manual_seed(step)

    def ids(low: int, high: int) -> tuple[int, ...]:
        n = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(3, 259, (n,), generator=generator).tolist())

    trajectories = []
    for i in range(count):
        response = ids(4, 24)
        trajectories.append(
            Trajectory(
                step=step,
                prompt_index=i // 4,
                sample_index=i % 4,
                prompt_ids=ids(3, 9),
                prefix_ids=ids(2, 9) if i % 4 == 0 else (),
                response_ids=response,
                rollout_logprobs=(-1.0,) * len(response),
                finish_reason="stop",
                weights_version=step,
            )
        )
    return trajectories


def _train_all(student: str, teacher: str, runs: list[tuple[str, str]], out: str) -> None:
    """Every (layout, dtype) of one world size in one spawn: a spawn costs more than a run."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo")
    for layout, dtype in runs:
        history = _train(student, teacher, LAYOUTS[layout], dtype)
        parallel_state.destroy_model_parallel()
        if dist.get_rank() == 0:
            Path(out, f"{layout}-{dtype}.json").write_text(json.dumps(history))


def _train(student: str, teacher: str, layout: ParallelConfig, dtype: str) -> list[list[float]]:
    from megatron_tropd.convert.hf_folder import HFFolder
    from megatron_tropd.mcore import models, parallel
    from megatron_tropd.mcore.step import Student, Teacher
    from megatron_tropd.objective import StepObjective

    ranks = parallel.initialize(layout, seed=1)
    folders = HFFolder(Path(student)), HFFolder(Path(teacher))
    kind = models.resolve_dtype(dtype)
    build = {
        "ranks": ranks,
        "parallel": layout,
        "dtype": kind,
        "padded_vocab_size": models.padded_vocab_size(
            *(f.config for f in folders), tensor=layout.tensor
        ),
    }
    learner = Student(
        models.build_model(folders[0], **build),
        train=TRAIN,
        parallel=layout,
        ranks=ranks,
        dtype=kind,
    )
    scorer = Teacher(models.build_model(folders[1], **build), ranks=ranks, vocab_size=259)
    history = []
    for step in range(STEPS):
        trajectories = recorded_trajectories(step)
        batches = pack(
            trajectories,
            dp_rank=ranks.dp_rank,
            dp_size=ranks.dp_size,
            tokens_per_micro_batch=TRAIN.tokens_per_micro_batch,
            pad_multiple=ranks.tp_size,
            seed=7,
            step=step,
        )
        objective = StepObjective(
            scorer.score(batches),
            config=LOSS,
            beta=0.5,
            vocab_size=259,
            group=ranks.tp_group,
            counts=count_loss_tokens(trajectories),
            counted=ranks.is_last_stage and ranks.tp_rank == 0,
            device=torch.device("cpu"),
        )
        result = learner.train_step(batches, objective)
        metrics = objective.sums.reduce().metrics()
        history.append([metrics["loss"], result.grad_norm, metrics["tv"], metrics["reverse_kl"]])
    return history


@pytest.fixture(scope="module")
def pair(tiny_model) -> tuple[Path, Path]:
    """A tied Llama student of width 64 and an untied Qwen3 teacher of width 96 and 4 layers."""
    student = tiny_model("llama", tie_word_embeddings=True)
    return student, tiny_model("qwen3", hidden_size=96, num_hidden_layers=4, seed=5)


RUNS = {
    1: [("tp1", "float32"), ("tp1", "bfloat16")],
    2: [
        ("tp2", "float32"),
        ("pp2", "float32"),
        ("dp2", "float32"),
        ("dp2_distributed_optimizer", "float32"),
        ("tp2_sequence_parallel", "float32"),
        ("tp2_sequence_parallel", "bfloat16"),
        ("dp2_distributed_optimizer", "bfloat16"),
    ],
    4: [("tp2_pp2", "float32")],
}


@pytest.fixture(scope="module")
def histories(tmp_path_factory, pair) -> dict[tuple[str, str], torch.Tensor]:
    """(layout, dtype) -> [steps, 4] loss, gradient norm, TV, reverse KL of every step."""
    folder = tmp_path_factory.mktemp("histories")
    for world_size, runs in RUNS.items():
        run_with_env(world_size, _train_all, str(pair[0]), str(pair[1]), runs, str(folder))
    return {
        run: torch.tensor(
            json.loads((folder / f"{run[0]}-{run[1]}.json").read_text()), dtype=torch.float64
        )
        for runs in RUNS.values()
        for run in runs
    }


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp1"])
def test_losses_and_grad_norms_do_not_depend_on_the_layout(layout, histories):
    one_rank = histories["tp1", "float32"]
    torch.testing.assert_close(histories[layout, "float32"], one_rank, rtol=1e-4, atol=1e-6)


def test_first_gradient_is_that_of_transformers_autograd(pair, histories):
    """The published formula, written as loops over transformers' float64 log-probs."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in pair)
    trajectories = recorded_trajectories(0)
    (batch,) = pack(
        trajectories, dp_rank=0, dp_size=1, tokens_per_micro_batch=10_000, seed=7, step=0
    )
    log_q = student(batch.tokens).logits[..., :259].log_softmax(-1)
    with torch.no_grad():
        log_p = teacher(batch.tokens).logits[..., :259].log_softmax(-1)
    counts = dict(
        zip((Segment.TEACHER, Segment.STUDENT), count_loss_tokens(trajectories), strict=True)
    )
    loss = torch.zeros((), dtype=torch.float64)
    for place in batch.loss_mask.nonzero():
        b, s = place.tolist()
        x, segment = batch.labels[b, s], Segment(int(batch.segments[b, s]))
        reward = (log_p[b, s, x] - log_q[b, s, x]).detach()
        if segment == Segment.TEACHER:
            term = -0.5 * log_q[b, s, x]
        elif batch.uniforms[b, s] < reward.exp().clamp(max=1):
            term = -reward * log_q[b, s, x]
        else:
            top, ids = log_p[b, s].topk(LOSS.top_k)
            term = (top.exp() * (top - log_q[b, s, ids])).sum()
        loss = loss + term / counts[segment]
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in student.parameters()))
    torch.testing.assert_close(histories["tp1", "float32"][0, 1], norm, rtol=1e-5, atol=0)


def test_training_brings_the_student_closer_to_the_teacher(histories):
    reverse_kl = histories["tp1", "float32"][:, 3]
    assert reverse_kl[-3:].mean() < 0.95 * reverse_kl[:1].mean()


@pytest.mark.parametrize("layout", ["tp1", "tp2_sequence_parallel", "dp2_distributed_optimizer"])
def test_bfloat16_with_fp32_main_gradients_follows_float32(layout, histories):
    # bfloat16 keeps 8 bits: the mask draws of a few tokens flip, the means stay close.
    torch.testing.assert_close(
        histories[layout, "bfloat16"], histories["tp1", "float32"], rtol=0.15, atol=0.05
    )
