"""Plans are arithmetic: what they say of published models, what they refuse, what is committed.

Bytes are compared with real tensors in ``tests/distributed/test_planned_bytes.py``.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.cli.main import main
from megatron_tropd.config import Config, NamedTeacher, ParallelConfig, load_config
from megatron_tropd.config.loss import preset
from megatron_tropd.config.megatron import MegatronConfig
from megatron_tropd.config.megatron_fields import verdicts
from megatron_tropd.distill.engines import MEMORY_ALONE
from megatron_tropd.losses import chunks, vocab_parallel
from megatron_tropd.losses.dense import DenseSpec
from megatron_tropd.losses.signals import HiddenStatesSignal
from megatron_tropd.losses.vocab_parallel import shard_of
from megatron_tropd.mcore.layout import CUDA_ROW_MULTIPLE
from megatron_tropd.planning import memory as planned_memory
from megatron_tropd.planning import recommend as recommending
from megatron_tropd.planning import report
from megatron_tropd.planning.activations import activations, in_flight, saved_per_position, widths
from megatron_tropd.planning.communication import communication, expert_bytes
from megatron_tropd.planning.estimate import estimate, layout_name
from megatron_tropd.planning.hardware import GPUS, Hardware, load_hardware
from megatron_tropd.planning.layouts import laid_out
from megatron_tropd.planning.options import COUNTED, Options, can_be_rehearsed, options
from megatron_tropd.planning.parameters import open_architecture
from megatron_tropd.planning.plan import make_plan
from megatron_tropd.planning.planned_run import PlannedRun, plan_run, row_multiple
from megatron_tropd.planning.recommend import Recommendation, recommend
from megatron_tropd.planning.report import SCHEMA, UNCALIBRATED, plan_table
from megatron_tropd.planning.seconds import (
    MOST_SEQUENCES,
    layer_flops,
    loss_flops,
    optimizer_seconds,
    pass_seconds,
    repeated_products,
)
from megatron_tropd.rollout.engines.child import CPU_SEQUENCES, _cache_bytes_of_a_token
from megatron_tropd.rollout.engines.settings import EngineSettings
from megatron_tropd.rollout.weights import mailbox

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "recipes"
TOMLS = sorted(RECIPES.glob("*.toml"))
H100 = GPUS["h100"]
ONE_GPU = ["parallel.data=1", "rollout.num_engines=1", "rollout.engine_tensor_parallel=1"]
BESIDE_32B = {"student": "Skywork-OR1-7B", "teacher": "Qwen3-32B"}
# Billions of parameters, as the models' pages say; the first two count a tied layer once.
PUBLISHED = {
    "Qwen3-1.7B": 1.72,
    "Qwen3-4B": 4.02,
    "Qwen3-8B": 8.19,
    "Qwen3-32B": 32.8,
    "Qwen3-30B-A3B": 30.5,
    "Qwen3-235B-A22B": 235,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1.78,
    "Skywork-OR1-7B": 7.62,
}


@pytest.fixture
def small() -> Config:
    """Qwen3-1.7B from Qwen3-4B on one GPU."""
    return load_config(RECIPES / "qwen3_1.7b.toml", ONE_GPU)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str):
    model = open_architecture(str(RECIPES / "models" / name), "student")
    assert model.parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.003)


def test_every_recipe_model_is_counted():
    assert {folder.name for folder in (RECIPES / "models").iterdir()} == PUBLISHED.keys()


@pytest.mark.parametrize(("name", "active"), [("Qwen3-30B-A3B", 3.3), ("Qwen3-235B-A22B", 22)])
def test_active_parameters_of_mixtures_are_the_published_ones(name: str, active: float):
    model = open_architecture(str(RECIPES / "models" / name), "student")
    vocabulary = 2 * model.shape.vocab * model.shape.hidden  # the pages count both
    assert (model.active + vocabulary) / 1e9 == pytest.approx(active, rel=0.02)


def test_the_shortened_config_describes_the_published_model(shared_data: Path):
    real = shared_data / "hf-meta" / "Qwen3-1.7B"
    assert (
        open_architecture(str(real), "student").shape
        == open_architecture(str(RECIPES / "models" / "Qwen3-1.7B"), "student").shape
    )


@pytest.mark.parametrize("path", TOMLS, ids=lambda path: path.stem)
def test_recipes_and_their_plans_agree(path: Path):
    """After a change: tropd plan configs/recipes/NAME.toml > configs/recipes/NAME.plan.txt."""
    plan = make_plan(load_config(path), H100)
    table = plan_table(plan)
    assert table + "\n" == (RECIPES / f"{path.stem}.plan.txt").read_text()
    assert max(map(len, table.splitlines())) <= 100
    assert path.read_text().startswith("# Planned, not run.")
    assert plan.asked.fits
    chosen, best = plan.asked.run, plan.recommended.best.run
    assert (chosen.parallel, chosen.rollout) == (best.parallel, best.rollout)
    assert chosen.options == best.options


@pytest.mark.parametrize("path", TOMLS, ids=lambda path: path.stem)
def test_recipes_have_the_settings_of_the_paper(path: Path):
    config = load_config(path)
    assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt) == (128, 4)
    longest = 16384 if path.stem.endswith("_16k") else 8096
    assert (config.rollout.max_new_tokens, config.rollout.temperature) == (longest, 1)
    assert (config.train.steps, config.train.lr, config.train.lr_schedule) == (
        200,
        5e-6,
        "constant",
    )
    assert (config.loss.region, config.loss.outlier, config.loss.top_k) == (
        "bernoulli",
        "forward_kl",
        64,
    )


def test_no_recipe_is_missing():
    worlds = {path.stem: load_config(path).parallel.world_size for path in TOMLS}
    assert worlds == {
        "qwen3_1.7b": 8,
        "qwen3_30b_a3b": 128,
        "qwen3_8b": 32,
        "qwen3_8b_one_node": 8,
        "qwen3_8b_one_node_16k": 8,
        "r1_distill_qwen_1.5b": 8,
    }


def test_sixteen_bytes_for_every_parameter_and_two_for_the_teacher(small: Config):
    """bfloat16 weights 2, float32 gradients 4, weights 4, moments 8; Qwen3-1.7B and 4B, tied."""
    (stage,) = estimate(plan_run(small, H100)).memory
    student, teacher = 1_720_574_976, 4_022_468_096
    assert stage.weights + stage.gradients + stage.optimizer == 18 * student
    assert stage.teacher_weights == 2 * teacher
    assert stage.teacher_hidden == 512 * 8096 * 2560 * 2


def test_a_reference_is_a_second_teacher_to_every_estimate(small: Config):
    """The teacher as its own reference: twice its weights, states, passes and traffic."""
    parallel = ParallelConfig(tensor=2)
    alone = dataclasses.replace(small, parallel=parallel, loss=preset("gkd_reverse_kl"))
    teacher = dataclasses.replace(small.teacher, reference=small.model.teacher)
    both = dataclasses.replace(alone, teacher=teacher, loss=preset("exopd_exact"))
    one, two = (estimate(plan_run(config, H100)) for config in (alone, both))
    (had,), (has,) = one.memory, two.memory
    assert has.teacher_weights == 2 * had.teacher_weights
    assert has.teacher_hidden == 2 * had.teacher_hidden
    assert has.teacher_forward == had.teacher_forward
    assert two.communication.tensor_teacher == 2 * one.communication.tensor_teacher
    assert two.seconds.teacher == pytest.approx(2 * one.seconds.teacher)
    assert two.seconds.student > one.seconds.student


@pytest.mark.parametrize("offload", ["host", "host_by_layer"])
def test_an_offloaded_teacher_is_on_the_gpu_only_while_it_scores(small: Config, offload: Any):
    """Qwen3-4B, tied: its embedding is the output layer, which the loss reads, and stays."""
    teacher = dataclasses.replace(small.teacher, offload=offload)
    runs = [plan_run(c, H100) for c in (small, dataclasses.replace(small, teacher=teacher))]
    (had,), (has,) = (estimate(run).memory for run in runs)
    stays = 2 * (151936 * 2560 + 2560)
    moved = had.teacher_weights - stays
    assert (has.teacher_weights, had.teacher_visiting) == (stays, 0)
    at_once = moved if offload == "host" else 2 * moved / 36
    assert has.teacher_visiting == at_once
    for phase, size in has.trainer.items():
        saved = moved - (at_once if phase == "teacher" else 0)
        assert size == had.trainer[phase] - saved, phase
    assert has.build == had.build
    on_host = [planned_memory.host_bytes(run) for run in runs]
    assert on_host[1] - on_host[0] == moved  # of its one GPU
    seconds = [estimate(run).seconds for run in runs]
    arrival = moved / H100.host_link
    if offload == "host":
        assert seconds[1].teacher == pytest.approx(seconds[0].teacher + arrival)
    else:
        each = runs[0].work.micro_batches * arrival
        assert seconds[1].teacher == pytest.approx(max(seconds[0].teacher, each))


@pytest.mark.parametrize("stage", [0, 1])
def test_what_an_offloaded_teacher_keeps_are_output_layer_and_last_norm(small: Config, stage: int):
    parallel = ParallelConfig(pipeline=2)
    run = plan_run(dataclasses.replace(small, parallel=parallel), H100)
    held = run.parameters_of(run.teacher, stage).total
    parts = run.teacher.parts_on_rank(parallel, stage, run.padded_vocab)
    assert len(parts) == (19, 18)[stage] and len(set(parts[-18:])) == 1
    assert held - sum(parts) == (0, 151936 * 2560 + 2560)[stage]


def test_memory_is_planned_for_micro_batches_full_of_any_lengths(small: Config):
    """Two rows of 8192 positions fill 16384, two of the longest kind do not fit."""
    full, twice = (
        dataclasses.replace(
            small, train=dataclasses.replace(small.train, tokens_per_micro_batch=tokens)
        )
        for tokens in (8704, 2 * 8192)
    )
    one, both = (estimate(plan_run(config, H100)).memory[0].activations for config in (full, twice))
    assert both == pytest.approx(one * 16384 / 8704, rel=0.01)


def test_short_responses_on_average_save_no_memory():
    config = load_config(RECIPES / "qwen3_8b.toml")
    longest, short = (plan_run(config, H100, response_tokens=n) for n in (None, 10))
    assert short.work.micro_batches < longest.work.micro_batches
    assert estimate(short).memory == estimate(longest).memory


@pytest.mark.parametrize("path", TOMLS, ids=lambda path: path.stem)
def test_no_stage_is_fuller_than_the_first_or_the_last(path: Path):
    overrides = ["parallel.pipeline=8", "parallel.tensor=1", "parallel.sequence_parallel=false"]
    engines = ["parallel.uneven_stages=true", "rollout.num_engines=1"]
    one = estimate(plan_run(load_config(path, overrides + engines), H100))
    assert len(one.memory) == 8
    assert one.peak == max(stage.peak for stage in one.memory)


def test_a_sleeping_engine_keeps_its_workspace_and_on_a_cpu_everything(small: Config):
    cpu = dataclasses.replace(H100, layers="cpu", memory_gb=512)
    for hardware, kept in ((H100, planned_memory.ENGINE_WORKSPACE), (cpu, 0.4 * 2**30)):
        run = plan_run(small, hardware)
        (stage,) = estimate(run).memory
        if hardware is cpu:
            kept += run.student.parameters * run.element
        assert stage.engine_asleep == pytest.approx(kept)
        without = stage.resident + stage.teacher_hidden + stage.teacher_forward
        assert stage.phases["teacher"] == pytest.approx(without + kept)


def test_an_engine_of_both_models_is_counted_and_refused_on_gpus(small: Config):
    rollout = dataclasses.replace(small.rollout, behaviour="blended")
    blended = dataclasses.replace(small, rollout=rollout)
    with pytest.raises(ConfigError, match="without CUDA"):
        plan_run(blended, H100)
    cpu = dataclasses.replace(H100, layers="cpu", memory_gb=512)
    one, other = (planned_memory.engine_memory(plan_run(c, cpu)) for c in (small, blended))
    both = sum(m.parameters for m in (plan_run(small, cpu).student, plan_run(small, cpu).teacher))
    more = both * plan_run(small, cpu).element + 0.4 * 2**30
    assert other.asleep - one.asleep == pytest.approx(more)
    assert other.total - one.total == pytest.approx(more)
    assert other.cache == one.cache


def test_a_loss_that_looks_at_the_student_first_costs_a_pass(small: Config):
    loss = preset("entropy_opd")
    looking = dataclasses.replace(small, loss=loss)
    plain, more = (estimate(plan_run(config, H100)) for config in (small, looking))
    assert plain.memory[0].student_hidden == 0
    assert more.memory[0].student_hidden == 512 * 8096 * 2048 * 2
    assert more.seconds.student > 1.2 * plain.seconds.student


def test_separate_engines_have_gpus_of_their_own(small: Config):
    rollout = dataclasses.replace(
        small.rollout, placement="separate", num_engines=3, engine_tensor_parallel=4
    )
    apart = dataclasses.replace(small, rollout=rollout)
    ahead = dataclasses.replace(apart, rollout=dataclasses.replace(rollout, steps_ahead=1))
    one, other = (estimate(plan_run(config, H100)) for config in (apart, ahead))
    assert (one.run.training_nodes, one.run.engine_nodes, one.run.gpus) == (1, 2, 13)
    (stage,) = one.memory
    assert stage.engine_weights == stage.kv_cache == stage.engine_asleep == 0
    assert stage.phases["rollout"] == stage.resident
    assert planned_memory.engine_memory(one.run).total == pytest.approx(0.65 * 80e9)
    assert one.seconds.total == one.seconds.rollout + one.seconds.training
    assert other.seconds.total == pytest.approx(max(other.seconds.rollout, other.seconds.training))
    # Written and read once each, at the rate of the folder that all nodes see.
    assert one.seconds.sync == pytest.approx(2 * 1_720_574_976 / 2e9)
    assert planned_memory.host_bytes(one.run) == 0


def test_a_separate_engine_must_leave_the_reserve():
    words = ["rollout.placement=separate", "rollout.engine_gpu_share=0.95"]
    one = estimate(plan_run(load_config(RECIPES / "qwen3_1.7b.toml", words), H100))
    assert one.obstacle.startswith("rollout.engine_gpu_share = 0.95 is 76.0 GB")


def test_the_teacher_must_fit_the_engines_that_evaluate_it():
    """They have most of their GPUs, for no model is there yet."""
    path, evaluated = RECIPES / "qwen3_30b_a3b.toml", "evaluation.problems=held_out.jsonl"
    large = ["rollout.num_engines=16", "rollout.engine_tensor_parallel=8"]
    assert estimate(plan_run(load_config(path, [evaluated, *large]), H100)).fits
    small = [evaluated, "rollout.num_engines=32", "rollout.engine_tensor_parallel=4"]
    one = estimate(plan_run(load_config(path, small), H100))
    assert "an engine of the teacher has room for 0 tokens" in one.obstacle
    for otherwise in ("evaluation.task=reverse_kl", "evaluation.teacher=false"):
        assert estimate(plan_run(load_config(path, [*small, otherwise]), H100)).fits


def test_activations_by_hand(small: Config):
    """One position of one layer of Qwen3-1.7B, bfloat16, Transformer Engine."""
    shape = plan_run(small, H100).student.shape
    norms = 2 * (2048 * 2 + 4 + 2048 * 2)
    queries_keys_values_output = (2048 + 1024 + (2048 + 2 * 1024) + 2048) * 2 + 16 * 4
    norms_of_heads = 2048 * 2 + (16 + 8) * 4
    mlp = 3 * 6144 * 2
    w = widths(shape, ParallelConfig(), 2, "transformer_engine")
    assert saved_per_position(w) == norms + queries_keys_values_output + norms_of_heads + mlp


def test_tensor_and_sequence_parallelism_divide_the_activations(small: Config):
    shape = plan_run(small, H100).student.shape
    one, both, tensor = (
        saved_per_position(widths(shape, ParallelConfig(**layout), 2, "transformer_engine"))
        for layout in ({}, {"tensor": 4, "sequence_parallel": True}, {"tensor": 4})
    )
    assert one / 4 < both < 1.01 * one / 4  # the norms' statistics stay whole
    assert both < tensor < one


def test_flops_by_hand(small: Config):
    """Two for each of the layer's parameters, and causal attention over half the length."""
    run = plan_run(small, H100)
    layer = (1_720_574_976 - 151_936 * 2048 - 2048) / 28
    attention = 4 * 16 * 128 * 1000 / 2
    assert layer_flops(run.student, 10, 1000) == pytest.approx(10 * (2 * layer + attention))


def test_bytes_sent_by_hand(small: Config):
    parallel = ParallelConfig(tensor=2, data=4, distributed_optimizer=True)
    sent = communication(plan_run(dataclasses.replace(small, parallel=parallel), H100))
    positions = 128 * (512 + 8096 - 1)
    one_sum = 2 * positions * 2560 * 2 / 2  # an all-reduce over two ranks sends all of it once
    assert sent.tensor_teacher == 36 * 2 * one_sum
    assert sent.pipeline_teacher == sent.expert_teacher == 0
    sharded = 1_720_574_976 - 28 * (2 * 2048 + 2 * 128) - 2048
    held = sharded / 2 + 28 * (2 * 2048 + 2 * 128) + 2048
    assert sent.data == pytest.approx(held * (4 + 2) * 3 / 4)


def test_context_parallelism_divides_rows_and_sends_keys_and_values(small: Config):
    runs = [
        plan_run(dataclasses.replace(small, parallel=ParallelConfig(context=c, data=8 // c)), H100)
        for c in (1, 2, 4)
    ]
    one, two, four = (activations(run, 0).kept for run in runs)
    assert two == pytest.approx(one / 2, rel=0.01) and four == pytest.approx(one / 4, rel=0.01)
    sent = [communication(run) for run in runs]
    assert sent[0].context_student == sent[0].context_teacher == 0
    # 4 times as long a step of a replica, of which a rank has a quarter and sends it to three.
    positions = 64 * (512 + 8096 - 1)
    assert sent[2].context_teacher == pytest.approx(36 * positions * 2 * 8 * 128 * 2 * 3)
    assert sent[2].context_student == pytest.approx(2 * 28 / 36 * sent[2].context_teacher)
    assert all(one.data == sent[0].data for one in sent), "as many replicas"


def test_the_fullest_rank_of_a_row_is_planned_for():
    """512 + 1,536 - 1 positions in 4 chunks of 512: prompt, then the response in three."""
    words = ["rollout.max_new_tokens=1536", "train.tokens_per_micro_batch=2048"]
    work = _with(*words, "parallel.context=2", "parallel.data=4").work
    assert (work.longest, work.rank_positions) == (2048, 1024)
    assert work.most_loss_tokens == 1024, "of the rank with the chunks in the middle"


def test_a_tied_embedding_is_summed_over_two_stages(small: Config):
    two = dataclasses.replace(small, parallel=ParallelConfig(pipeline=2))
    assert communication(plan_run(small, H100)).tied_embedding == 0
    assert communication(plan_run(two, H100)).tied_embedding == 4 * 151_936 * 2048


def test_experts_exchange_over_one_group_and_gather_over_the_other():
    """K copies of each position there and back; an all-to-all keeps 1 / e, a ring 1 / t."""
    recipe, copies = RECIPES / "qwen3_30b_a3b.toml", 32 * (512 + 8096 - 1) * 8 * 2048 * 2
    sharded = ["parallel.expert=2", "parallel.expert_tensor=4"]
    run = plan_run(load_config(recipe, sharded), H100)
    exchanged, gathered = expert_bytes(run, run.student, passes=1)
    assert exchanged == pytest.approx(24 * 2 * copies / 4 * (1 - 1 / 2))
    assert gathered == pytest.approx(24 * 2 * copies * (1 - 1 / 4))
    whole = plan_run(load_config(recipe), H100)
    assert whole.parallel.expert == 8
    exchanged, gathered = expert_bytes(whole, whole.student, passes=1)
    assert exchanged == pytest.approx(24 * 2 * copies / 4 * (1 - 1 / 8))
    assert gathered == 0
    assert whole.parameters_of(whole.student, 0) == run.parameters_of(run.student, 0)


def test_a_pipeline_waits_for_its_stages(small: Config):
    """(m + p - 1) slots of the slowest stage: with one micro-batch nothing is gained."""
    rollout = dataclasses.replace(small.rollout, prompts_per_step=1, samples_per_prompt=1)
    alone = dataclasses.replace(small, rollout=rollout)
    two = dataclasses.replace(alone, parallel=ParallelConfig(pipeline=2))
    free = dataclasses.replace(H100, intra_node_gb_s=1e9)
    one, both = (plan_run(config, free) for config in (alone, two))
    took = [pass_seconds(run, run.teacher, backward=False) for run in (one, both)]
    assert took[1] == pytest.approx(took[0])


def test_virtual_stages_wait_a_part_of_it(small: Config):
    """M + (p - 1) / v slots, and v times the sends."""
    rollout = dataclasses.replace(small.rollout, prompts_per_step=2, samples_per_prompt=1)
    alone, free = dataclasses.replace(small, rollout=rollout), {"intra_node_gb_s": 1e9}
    took, sent = [], []
    for virtual in (1, 2):
        parallel = ParallelConfig(pipeline=2, virtual_pipeline=virtual)
        run = plan_run(
            dataclasses.replace(alone, parallel=parallel), dataclasses.replace(H100, **free)
        )
        took.append(pass_seconds(run, run.teacher, backward=False))
        sent.append(communication(run).pipeline_student)
        assert run.work.micro_batches == 2
        assert ("(VPP " in layout_name(run)) == (virtual > 1)
    assert [t / took[0] for t in took] == pytest.approx([1, 2.5 / 3])
    assert [s / sent[0] for s in sent] == [1, 2]


@pytest.mark.parametrize(("stages", "virtual"), [(2, 2), (2, 5), (4, 2), (4, 3), (8, 2)])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_chunks_in_flight_are_those_of_megatrons_schedule(stages, virtual, groups):
    """Its table of passes, and its count of passes before the first backward one."""
    from megatron.core.pipeline_parallel import schedules

    micro_batches = groups * stages
    table = schedules.get_schedule_table(micro_batches, virtual, stages)
    for stage in range(stages):
        group = SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage)
        neighbours = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual)
        _, _, ahead, _ = schedules.get_pp_rank_microbatches(
            micro_batches, virtual, stages, p2p_communicator=neighbours
        )
        counts, moments = [0] * virtual, set()
        for number, (_, chunk) in enumerate(table):
            counts[chunk] += 1
            moments.add(tuple(counts))
            if number >= ahead:
                counts[virtual - 1 - table[number - ahead][1]] -= 1
        fullest = max(map(sum, moments))
        expected = {moment for moment in moments if sum(moment) == fullest}
        found = set(in_flight(stages, virtual, stage, micro_batches))
        assert found == expected if groups < 5 else found >= expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "columns"), [(50, 400), (3000, 700), (400, 700)])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("referenced", [False, True])
def test_the_loss_buffers_are_those_of_the_loss(
    tokens, columns, dtype, ranks, referenced, monkeypatch
):
    """Whole logits where they fit the budget, else as many rows as it holds. As with kernels.

    Two chunks share it where collectives hide behind products.
    """
    monkeypatch.setattr(chunks, "needs_scratch", lambda device: False)
    hidden_TH, weight_vH = torch.zeros(tokens, 8, dtype=dtype), torch.zeros(columns, 8, dtype=dtype)
    signal = HiddenStatesSignal(hidden_TH, weight_vH, columns)
    shard = shard_of(columns, vocab_size=columns, group=None, bounds=None)
    pair = chunks.Pair(
        student=signal,
        teacher=signal,
        ids_T=torch.zeros(tokens, dtype=torch.int64),
        k=0,
        spec=DenseSpec(),
        shard=shard,
        device=torch.device("meta"),
        memory_mib=4,
        reference=signal if referenced else None,
    )
    real = chunks._Buffers(pair, count=ranks)
    monkeypatch.setitem(planned_memory.LOSS_BUDGET, "gpu", 4 * 2**20)
    parallel = SimpleNamespace(tensor=ranks)
    run = SimpleNamespace(
        vocab_shard=columns,
        hardware=H100,
        element=dtype.itemsize,
        parallel=parallel,
        scored_beside=1 + referenced,
    )
    taken = real._logits.untyped_storage().nbytes()
    if real._rounded is not None:
        taken += real._rounded.untyped_storage().nbytes()
    assert planned_memory.chunk_bytes(run, tokens) == pytest.approx(taken, rel=0.03)


def test_a_token_takes_as_much_cache_as_the_engine_counts(small: Config):
    run = plan_run(small, H100)
    settings = EngineSettings(
        model_folder=small.model.student,
        dtype="bfloat16",
        max_model_len=128,
        gpu_share=0.4,
        cpu_kv_gib=1.0,
        tensor_parallel=1,
        max_num_seqs=1,
        max_num_batched_tokens=None,
        prefix_caching=True,
        cuda=False,
    )
    assert planned_memory.cache_bytes_per_token(run) == _cache_bytes_of_a_token(settings)


def test_constants_are_those_of_the_trainer():
    megabytes = {"cpu": chunks._MEMORY_MIB["cpu"], "gpu": chunks._MEMORY_MIB_ELSEWHERE}
    assert {k: v / 2**20 for k, v in planned_memory.LOSS_BUDGET.items()} == megabytes
    assert MOST_SEQUENCES["cpu"] == CPU_SEQUENCES
    assert planned_memory.TEACHER_SHARE == MEMORY_ALONE
    assert planned_memory._BUCKET == mailbox.BUCKET_BYTES
    assert planned_memory._GROUP == vocab_parallel._GROUP
    assert row_multiple(H100) == CUDA_ROW_MULTIPLE


def test_more_gpus_than_one_are_recommended_where_one_does_not_hold_the_models():
    config = load_config(RECIPES / "qwen3_8b.toml")
    run = plan_run(config, H100)
    one = recommend(run, 1)
    assert not one.best.fits and one.why.startswith("none of 1 layouts fits")
    sixteen, more = recommend(run, 16), recommend(run, 32)
    assert sixteen.best.fits and sixteen.best.run.parallel.world_size == 16
    assert sixteen.best.seconds.total > more.best.seconds.total


def test_the_recommended_layout_is_as_fast_as_any_that_fits(small: Config):
    best = recommend(plan_run(small, H100), 8).best
    for tensor in (1, 2, 4, 8):
        parallel = ParallelConfig(
            tensor=tensor,
            data=8 // tensor,
            sequence_parallel=tensor > 1,
            distributed_optimizer=tensor < 8,
        )
        other = estimate(best.run.laid_out(parallel, best.run.rollout))
        assert not other.fits or other.seconds.total > 0.95 * best.seconds.total


def test_one_step_ahead_is_named_beside_and_taken_where_asked_for():
    on_policy = recommend(plan_run(load_config(RECIPES / "qwen3_8b.toml"), H100), 32)
    assert on_policy.best.run.rollout.steps_ahead == 0
    assert on_policy.other is not None
    ahead = on_policy.other.run
    assert ahead.separate and ahead.rollout.steps_ahead == 1
    assert ahead.parallel.world_size + 8 * ahead.engine_nodes == 32
    again = recommend(ahead, 32)
    assert (again.best.run.parallel, again.best.run.rollout) == (ahead.parallel, ahead.rollout)
    assert again.other is not None and again.other.run.rollout == on_policy.best.run.rollout


def test_a_cpu_gets_engines_that_run_there(small: Config):
    cpu = dataclasses.replace(H100, layers="cpu", memory_gb=512, gpus_per_node=2)
    gib = dataclasses.replace(
        small, rollout=dataclasses.replace(small.rollout, engine_cpu_kv_gib=4)
    )
    best = recommend(plan_run(gib, cpu), 2).best
    assert best.fits
    assert best.run.rollout.engine_tensor_parallel == 1
    assert best.run.rollout.engine_cpu_kv_gib == 4


def test_no_layout_of_a_prime_number_of_gpus(small: Config):
    with pytest.raises(ConfigError, match="No layout of 37 GPUs divides"):
        recommend(plan_run(small, H100), 37)
    with pytest.raises(ConfigError, match="No layout of 1000000000 GPUs divides"):
        recommend(plan_run(small, H100), 10**9)


# Of schema 1, listed in docs/planning.md: nothing is renamed or removed without raising the number.
PLAN_KEYS = {
    *("schema", "seconds_and_recommendation", "student", "teacher", "trained_parameters"),
    *("hardware", "step", "asked", "recommended", "other_steps_ahead", "teacher_cache"),
    "teacher_served",
    *("choices", "with_adapters"),
}
ESTIMATE_KEYS = {
    *("parallel", "rollout", "training_nodes", "engine_nodes", "fits", "obstacle"),
    *(
        "megatron",
        "teacher_offload",
        "teacher_parallel",
        "memory_bytes",
        "engine_bytes",
        "host_bytes",
        "saving_host_bytes",
        "checkpoint_bytes",
        "sent_bytes",
    ),
    *("seconds", "warnings"),
}


def test_command_prints_a_table_or_json(capsys):
    path = str(RECIPES / "qwen3_1.7b.toml")
    assert main(["plan", path, "--hardware", "h200", "--response-tokens", "4000"]) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert table.count(UNCALIBRATED) >= 5 and "1 x 8 h200 of 141 GB" in table
    assert "x 0.4 achieved" in table and "response 4000 tokens" in table
    assert main(["plan", path, "--json", "--gpus", "16"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["seconds_and_recommendation"] == UNCALIBRATED
    assert plan["asked"]["fits"] is True
    assert plan.keys() == PLAN_KEYS and plan["schema"] == SCHEMA == 1
    assert plan["asked"].keys() == ESTIMATE_KEYS
    recommended = plan["recommended"]["parallel"]
    assert recommended["tensor"] * recommended["pipeline"] * recommended["data"] == 16


def _named(name: str, model: str, **settings: Any) -> NamedTeacher:
    return NamedTeacher(name=name, model=str(RECIPES / "models" / model), **settings)


def _with_teachers(config: Config, *teachers: NamedTeacher) -> Config:
    model = dataclasses.replace(config.model, teacher="")
    return dataclasses.replace(config, model=model, teachers=teachers)


def test_of_several_teachers_the_largest_is_on_the_gpu_and_all_are_on_the_host(small: Config):
    models = ("Qwen3-4B", "Qwen3-8B")
    both = _with_teachers(small, *(_named(name.lower(), name) for name in models))
    run = plan_run(both, H100)
    alone = [
        plan_run(load_config(RECIPES / "qwen3_1.7b.toml", [*ONE_GPU, *words]), H100)
        for words in (
            [f"model.teacher={RECIPES / 'models' / name}", "teacher.offload=host"]
            for name in models
        )
    ]
    together, apart = estimate(run), [estimate(one) for one in alone]
    memories = [one.memory[0] for one in apart]
    found = together.memory[0]
    for item in ("teacher_hidden", "teacher_forward", "teacher_visiting"):
        assert getattr(found, item) == max(getattr(one, item) for one in memories), item
    assert found.teacher_weights == sum(one.teacher_weights for one in memories)
    assert found.teacher_copies == found.teacher_hidden, "its states, sorted anew"
    away = [planned_memory.host_bytes(one) for one in (run, *alone)]
    assert away[0] == pytest.approx(sum(away[1:]))
    passes = sum(pass_seconds(run, model, backward=False) for model in run.frozen) / 2
    moved = together.seconds.teacher - passes
    assert moved == pytest.approx(away[0] / H100.host_link)


def test_beside_a_served_teacher_only_the_likeliest_ids_stay(small: Config):
    """Hidden states of the other are reduced to them, and are on the GPU until then."""
    served = _named("served", "Qwen3-8B", placement="served", address=("http://a:1",))
    run = plan_run(_with_teachers(small, served, _named("here", "Qwen3-4B")), H100)
    found = estimate(run).memory[0]
    tokens = run.work.step_loss_tokens
    assert found.teacher_hidden == tokens * (64 * 12 + 4)
    assert found.teacher_copies == 2 * tokens * 2560 * 2
    assert [model.who for model in run.frozen] == ["teacher here"]


def test_an_average_is_a_float32_copy_and_scores_as_one_of_the_students_type(small: Config):
    average = ["teacher.placement=self", 'model.teacher=""', "teacher.ema_decay=0.9"]
    averaged, adapted = (
        plan_run(load_config(RECIPES / "qwen3_1.7b.toml", [*ONE_GPU, *average, *words]), H100)
        for words in ([], ["model.lora.rank=8"])
    )
    found, trained = estimate(averaged).memory[0], averaged.trained_of(0).total
    assert (found.teacher_weights, found.teacher_visiting) == (4 * trained, 2 * trained)
    assert found.teacher_output == 2 * averaged.vocab_shard * averaged.student.shape.hidden
    assert found.teacher_hidden > 0 and averaged.frozen == ()
    few = estimate(adapted).memory[0]
    assert few.teacher_weights == 4 * adapted.trained_of(0).total and few.teacher_output == 0
    text = plan_table(make_plan(averaged.config, H100))
    assert "the student scores, an average of its trained weights" in text


def test_a_teacher_with_longer_prompts_takes_longer(small: Config):
    words = ['teacher.context="{prompt} {solution}"', "train.tokens_per_micro_batch=17408"]
    config = load_config(RECIPES / "qwen3_1.7b.toml", [*ONE_GPU, *words])
    plain = load_config(RECIPES / "qwen3_1.7b.toml", [*ONE_GPU, words[1]])
    alike, longer, longest = (
        plan_run(config, H100, context_tokens=tokens) for tokens in (512, 4096, None)
    )
    assert longest.context_tokens == 17408 + 1 - 8096
    took = [estimate(one).seconds.teacher for one in (alike, longer, longest)]
    assert took == sorted(took) and took[0] < took[2]
    assert took[0] == pytest.approx(estimate(plan_run(plain, H100)).seconds.teacher)
    assert estimate(longer).seconds.student == estimate(alike).seconds.student
    with pytest.raises(ConfigError, match="found no teacher"):
        plan_run(plain, H100, context_tokens=600)
    with pytest.raises(ConfigError, match="less than the longest possible trajectory"):
        estimate(plan_run(config, H100, context_tokens=17408))


def test_a_layout_of_the_teachers_own_shards_it_beyond_the_students_heads():
    """A student with 4 heads of keys and values, of which 8 GPUs cannot have parts."""
    models = [f"model.{who}={RECIPES / 'models' / name}" for who, name in BESIDE_32B.items()]
    engines = ["rollout.num_engines=8", "rollout.engine_tensor_parallel=4"]
    run = plan_run(load_config(RECIPES / "qwen3_8b.toml", [*models, *engines]), H100)
    two = dataclasses.replace(run.rollout, num_engines=2)
    tried = list(laid_out(run, 8, two))
    assert max(one.parallel.tensor for one in tried) == 4
    elsewhere = [one for one in tried if one.elsewhere]
    assert max(one.scoring.parallel.tensor for one in elsewhere) == 8
    for one in elsewhere:
        same = next(s for s in tried if not s.elsewhere and s.parallel == one.parallel)
        held = [run.frozen_on(run.teacher, 0) for run in (one, same)]
        assert one.parallel.pipeline == 1 or held[0] < held[1]
    words = report._overrides(elsewhere[0])
    assert (
        "teacher.parallel.tensor=" in words and "teacher.parallel.sequence_parallel=true" in words
    )


def test_what_the_config_refuses_together_is_not_recommended():
    """A way of keys and values between ranks that share rows, which nobody does with CP 1."""
    words = ["parallel.context=2", "parallel.data=4", "megatron.model.cp_comm_type=a2a"]
    run = plan_run(load_config(RECIPES / "qwen3_1.7b.toml", words), H100)
    assert {one.parallel.context for one in laid_out(run, 8, run.rollout)} == {2, 4, 8}


def test_a_teacher_on_ranks_of_its_own_is_not_planned():
    words = ["teacher.placement=separate", "teacher.ranks=8", "evaluation.teacher=false"]
    with pytest.raises(ConfigError, match="not planned"):
        plan_run(load_config(RECIPES / "qwen3_1.7b.toml", words), H100)


def test_a_copy_of_the_student_is_planned_on_the_host_too(capsys):
    own = ["teacher.placement=self", 'model.teacher=""', "teacher.offload=host"]
    words = [str(RECIPES / "qwen3_1.7b.toml"), *own, "evaluation.teacher=false"]
    assert main(["plan", *words, "--json", "--gpus", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["with_adapters"] is None


def test_a_served_teacher_takes_no_memory_and_its_server_a_stated_size(capsys):
    served = ["teacher.placement=served", 'teacher.address=["http://a:1", "http://b:1"]']
    served += ["loss.top_k=16", "evaluation.teacher=false"]
    words = [str(RECIPES / "qwen3_1.7b.toml"), *served]
    assert main(["plan", *words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    first, step = plan["asked"]["memory_bytes"][0], plan["step"]
    assert first["teacher_weights"] == first["teacher_forward"] == 0
    assert first["teacher_hidden"] == step["rows"] * step["longest_response"] * (16 * 12 + 4)
    logits = 1024 * 151936 * 2
    assert plan["teacher_served"] == {"top_k": 16, "requests": 32, "logits_bytes": logits}
    assert plan["teacher_cache"] is None
    assert main(["plan", *words]) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "served at 2 addresses, k = 16" in table and "teacher's served top-k" in table


def test_a_cached_teacher_takes_no_memory_and_a_stated_size_on_disk(capsys):
    cached = ["teacher.placement=cached", "teacher.cache=c", "rollout.recorded=r"]
    cached += ["teacher.cache_top_k=16", "loss.top_k=16", "evaluation.teacher=false"]
    plans = {}
    for name, settings in {"cached": cached, "resident": []}.items():
        words = [str(RECIPES / "qwen3_1.7b.toml"), *settings]
        assert main(["plan", *words, "--json"]) == 0
        plans[name] = json.loads(capsys.readouterr().out)
    first, last = plans["cached"]["asked"]["memory_bytes"][0], plans["cached"]["step"]
    assert first["teacher_weights"] == first["teacher_forward"] == 0
    tokens = last["rows"] * last["longest_response"]
    assert first["teacher_hidden"] == tokens * (16 * 12 + 4)
    assert first["peak"] < plans["resident"]["asked"]["memory_bytes"][0]["peak"]
    assert plans["cached"]["asked"]["seconds"]["teacher"] == 0
    kept = {"top_k": 16, "dtype": "float32", "bytes_per_token": 12 + 16 * 8}
    assert plans["cached"]["teacher_cache"] == kept and plans["resident"]["teacher_cache"] is None
    assert main(["plan", str(RECIPES / "qwen3_1.7b.toml"), *cached]) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "140 bytes a token (k = 16, float32)" in table and "no teacher is loaded" in table
    assert "teacher's cached top-k" in table and "teacher weights" not in table
    runs = [
        plan_run(load_config(RECIPES / "qwen3_1.7b.toml", settings), H100)
        for settings in (cached, [])
    ]
    assert runs[0].config.loss.needs.top_k, "else nothing is searched for"
    searches = [planned_memory.candidate_bytes(run, 4096) for run in runs]
    assert searches[0] == 0 < searches[1]


ERRORS = {
    "--hardware=b900": "neither one of a100, h100, h200 nor a TOML file",
    "--gpus=0": "--gpus must be at least 1, found 0",
    "--gpus-per-node=0": "gpus_per_node must be at least 1, found 0",
    "--prompt-tokens=0": "--prompt-tokens must be at least 1",
    "--prompt-tokens=2000": "train.tokens_per_micro_batch = 8704 is less than",
    "--response-tokens=9000": "between 1 and rollout.max_new_tokens = 8096",
    "parallel.tensor=3": "must divide the student's attention heads",
    "parallel.data=3": "must be divisible by parallel.data = 3",
    "rollout.engine_tensor_parallel=8": "exceeds the 4 GPUs",
    "rollout.engine_tensor_parallel=0": "must be at least 1, found 0",
    "rollout.engine_tensor_parallel=3": "must divide the attention heads of the student, found 16",
    "rollout.steps_ahead=1": 'needs rollout.placement = "separate"',
    "rollout.engine_gpu_share=1.5": "strictly between 0 and 1, found 1.5",
    "parallel.expert=2": "laid out so is dense",
    "model.teacher=nowhere": "does not exist. Give a folder that holds config.json",
    "teacher.placement=residnet": "teacher.placement = 'residnet': expected one of",
    "rollout.mode=two_turns": "rollout.mode = 'two_turns': expected one of multi_turn, single_turn",
    "megatron.model.cp_comm_type=p2q": "must be one of p2p, all_gather, a2a, found 'p2q'",
    'megatron.teacher.cp_comm_type=["a2a+p2p"]': "must be one of p2p, all_gather, a2a",
    "megatron.model.cp_comm_type=a2a": "does nothing without context parallelism",
}


@pytest.mark.parametrize("argument", ERRORS)
def test_bad_input_is_refused(argument: str, capsys):
    engines = "rollout.num_engines=1" if argument == "parallel.data=3" else ""
    words = [word for word in (argument, engines) if word]
    assert main(["plan", str(RECIPES / "qwen3_1.7b.toml"), *words]) == 2
    assert ERRORS[argument] in capsys.readouterr().err


def test_a_mixture_is_refused_as_the_trainer_refuses_it(capsys):
    path = str(RECIPES / "qwen3_30b_a3b.toml")
    assert main(["plan", path, "parallel.sequence_parallel=false"]) == 2
    assert "needs parallel.sequence_parallel = true" in capsys.readouterr().err


def test_every_stage_needs_a_layer(small: Config):
    deep = ParallelConfig(pipeline=29, uneven_stages=True)
    with pytest.raises(ConfigError, match="exceeds the student's layers, found 28"):
        plan_run(dataclasses.replace(small, parallel=deep), H100)


def test_an_engine_does_not_cross_nodes(capsys):
    path = str(RECIPES / "qwen3_1.7b.toml")
    words = ["parallel.pipeline=3", "parallel.uneven_stages=true"]
    assert main(["plan", path, *words, "rollout.engine_tensor_parallel=8"]) == 2
    assert "Engine 1 starts at GPU 4 of a node of 8" in capsys.readouterr().err


def test_a_folder_without_config_or_with_another_architecture(tmp_path: Path, capsys):
    path = str(RECIPES / "qwen3_1.7b.toml")
    (tmp_path / "empty").mkdir()
    assert main(["plan", path, f"model.student={tmp_path / 'empty'}"]) == 2
    assert "config.json is missing" in capsys.readouterr().err
    shutil.copytree(RECIPES / "models" / "Qwen3-4B", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    assert main(["plan", path, f"model.student={tmp_path / 'other'}"]) == 2
    assert "is not supported" in capsys.readouterr().err


def test_hardware_from_a_file(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('like = "h100"\nnetwork_gb_s = 25\ngpus_per_node = 4\n')
    mine = load_hardware(str(path))
    assert (mine.name, mine.network_gb_s, mine.gpus_per_node) == ("h100", 25, 4)
    assert mine.link(4) == pytest.approx(450e9 * 0.6)
    assert mine.link(5) == pytest.approx(25e9 * 0.6)


def test_a_phase_longer_than_the_timeout_is_warned_of(capsys):
    """The run would end itself as hanging in its first rollout."""
    recipe = [str(RECIPES / "qwen3_8b.toml")]
    assert main(["plan", *recipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["asked"]["warnings"] == []
    assert main(["plan", *recipe, "run.timeout_minutes=0.5"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "WARNING: the rollout is estimated, not calibrated, to last" in " ".join(text.split())
    assert "after run.timeout_minutes = 0.5. Set that to" in text


def test_a_hardware_file_that_is_none(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"Hardware file .* cannot be read \(Is a directory\)"):
        load_hardware(str(tmp_path))
    with pytest.raises(ConfigError, match="neither one of a100, h100, h200 nor a TOML file"):
        load_hardware(str(tmp_path / "absent.toml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed = 3", "Unknown config key speed. Known here: name, memory_gb"),
        ("memory_gb = 80", "Config key tflops is missing"),
        ('like = "tpu"', "like must be one of a100, h100, h200, found 'tpu'"),
        ('like = ["h100"]', "like must be one of a100, h100, h200, found ['h100']"),
        ('like = "h100"\nreserve = 1', "reserve = 1 leaves no memory"),
        ('like = "h100"\ntflops = "many"', "tflops must be float, found 'many' (str)"),
        ('like = "h100"\nlayers = "mine"', "layers must be one of ['transformer_engine'"),
        ('like = "h100"\ngpus_per_node = 2.5', "gpus_per_node must be int, found 2.5"),
        ('like = "h100"\nachieved_flops = 40', "achieved_flops must be in (0, 1], found 40"),
        ('like = "h100"\ntflops = nan', "tflops must be above 0 and finite, found nan"),
        ('like = "h100"\nmemory_gb = inf', "memory_gb must be above 0 and finite, found inf"),
        ("like = ", "is not valid TOML"),
    ],
)
def test_bad_hardware_is_refused(text: str, message: str, tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_hardware(str(path))
    assert message in str(error.value)


KEPT = [
    "teacher.offload=none",
    "rollout.engine_gpu_share=0.4",
    "megatron.model.recompute_granularity=full",
    "megatron.model.recompute_method=block",
    "megatron.model.recompute_num_layers=14",
]
"""What fits a node if the teacher stays on the GPU."""
UNIFORM = [
    "megatron.model.recompute_granularity=full",
    "megatron.model.recompute_method=uniform",
    "megatron.model.recompute_num_layers=1",
]
HYBRID = [
    "megatron.optimizer.optimizer_cpu_offload=true",
    "megatron.optimizer.optimizer_offload_fraction=0.25",
]


def _with(*words: str, hardware: Hardware = H100) -> PlannedRun:
    """Qwen3-1.7B from Qwen3-4B on 8 GPUs, DP 8, with options."""
    return plan_run(load_config(RECIPES / "qwen3_1.7b.toml", words), hardware)


def test_a_recomputed_layer_keeps_its_input_alone():
    """And while one is computed again, all that it saves otherwise."""
    (plain,), (whole,) = (estimate(_with(*words)).memory for words in ([], UNIFORM))
    positions, final = 8704, 8704 * (2048 * 2 + 4 + 1)
    one = positions * saved_per_position(
        widths(_with().student.shape, ParallelConfig(), 2, "transformer_engine")
    )
    rotary, angles = 8704 * 4 * 128 * 2, 8704 * 128 * 4
    assert plain.recomputed == 0
    assert whole.activations == 8 * positions + final + 28 * positions * 2048 * 2 + angles
    assert whole.recomputed == one + rotary - positions * 2048 * 2 - final
    assert whole.phases["student"] < plain.phases["student"]


def test_selective_recomputation_as_megatron_means_it():
    """Its default, core attention, is next to nothing with kernels that keep no scores."""
    selective = "megatron.model.recompute_granularity=selective"
    modules = 'megatron.model.recompute_modules=["mlp"]'
    plain, attention, mlp = (_with(*w) for w in ([], [selective], [selective, modules]))
    kept = [estimate(run).memory[0].activations for run in (plain, attention, mlp)]
    assert kept[0] - kept[1] == 28 * 8704 * 16 * 4
    # Transformer Engine's norm is part of the MLP: its output and statistic go, too.
    assert kept[0] - kept[2] == 28 * 8704 * (2048 * 2 + 4 + 3 * 6144 * 2)


def test_recomputation_costs_what_it_computes_again():
    free = dataclasses.replace(H100, intra_node_gb_s=1e9)
    plain, whole = (_with(*words, hardware=free) for words in ([], UNIFORM))
    took = [pass_seconds(run, run.student, backward=True) for run in (plain, whole)]
    loss = loss_flops(plain, plain.work.loss_tokens) / free.flops
    assert took[1] - loss == pytest.approx(4 / 3 * (took[0] - loss))
    assert pass_seconds(whole, whole.teacher, backward=False) == pytest.approx(
        pass_seconds(plain, plain.teacher, backward=False)
    )
    sums = [_with("parallel.tensor=2", "parallel.data=4", *words) for words in ([], UNIFORM)]
    sent = [communication(run).tensor_student for run in sums]
    assert sent[1] == pytest.approx(1.5 * sent[0])


def test_some_layers_of_a_stage_are_recomputed():
    words = [*UNIFORM[:1], "megatron.model.recompute_method=block"]
    seven, all_of_them = (
        _with(*words, f"megatron.model.recompute_num_layers={n}") for n in (7, 100)
    )
    assert repeated_products(seven) == 1 / 4
    assert repeated_products(all_of_them) == 1
    (stage,), (every,) = (estimate(run).memory for run in (seven, all_of_them))
    assert stage.recomputed == 0, "the other layers are through by then"
    assert every.activations == estimate(_with(*UNIFORM)).memory[0].activations


def test_the_hybrid_optimizer_leaves_what_megatron_leaves_on_the_gpu():
    """Main weights stay where it copies them; being precision-aware, they are the copies."""
    aware = "megatron.optimizer.use_precision_aware_optimizer=true"
    shard = 1_720_574_976 / 8
    run = [_with(*words) for words in ([], HYBRID, [*HYBRID, aware])]
    held = [estimate(one).memory[0].optimizer for one in run]
    assert held == pytest.approx([12 * shard, (4 + 8 * 3 / 4) * shard, 12 * 3 / 4 * shard])
    host = [planned_memory.host_bytes(one) for one in run]
    assert host[1] - host[0] == pytest.approx(8 * 16 * shard / 4)
    assert optimizer_seconds(run[1]) > optimizer_seconds(run[0])


def test_a_cpu_has_no_host_to_offload_to():
    cpu = dataclasses.replace(H100, layers="cpu", memory_gb=512)
    one = "rollout.engine_tensor_parallel=1"
    plain, hybrid = (_with(one, *words, hardware=cpu) for words in ([], HYBRID))
    assert estimate(plain).memory == estimate(hybrid).memory


def test_states_and_gradients_of_lower_precision():
    words = [
        "megatron.optimizer.use_precision_aware_optimizer=true",
        "megatron.optimizer.exp_avg_dtype=bfloat16",
        "megatron.optimizer.exp_avg_sq_dtype=bfloat16",
    ]
    shard = 1_720_574_976 / 8
    low = estimate(_with(*words, "megatron.ddp.grad_reduce_in_fp32=false")).memory[0]
    whole = estimate(_with(*words, "megatron.optimizer.store_param_remainders=false")).memory[0]
    assert low.gradients == 2 * 1_720_574_976
    assert low.optimizer == pytest.approx((2 + 2 + 2) * shard)
    assert whole.optimizer == pytest.approx((4 + 2 + 2) * shard)


def test_offloaded_activations_wait_on_the_host():
    """Two layers are on the GPU: the one in use and the one on its way."""
    words = [
        "megatron.model.fine_grained_activation_offloading=true",
        'megatron.model.offload_modules=["core_attn","attn_proj","qkv_linear"]',
    ]
    plain, away = _with(), _with(*words)
    # Two outputs of the norm, queries and keys after rotation, the output of attention.
    moved = 26 * 8704 * (2 * 2048 + 2048 + 1024 + 2048) * 2
    first, second = (estimate(run).memory[0].activations for run in (plain, away))
    assert first - second == moved
    engines = planned_memory.engine_host_bytes(away)
    assert planned_memory.host_bytes(away) - engines == 8 * moved
    slow = dataclasses.replace(H100, host_link_gb_s=1)
    assert pass_seconds(_with(*words, hardware=slow), away.student, backward=True) == pytest.approx(
        2 * away.work.micro_batches * moved / slow.host_link
    )


def test_gradients_beside_the_last_backward_pass_are_not_waited_for():
    overlap = "megatron.ddp.overlap_grad_reduce=true"
    waiting, beside = (estimate(_with(*words)).seconds.student for words in ([], [overlap]))
    assert beside < waiting


def test_nothing_is_saved_where_it_is_not_needed():
    run = plan_run(load_config(RECIPES / "qwen3_8b.toml"), H100)
    assert recommend(run, 32).best.run.options == Options()


@pytest.fixture(scope="module")
def one_node() -> Recommendation:
    """Of Qwen3-8B <- Qwen3-32B on 8 H100."""
    return recommend(plan_run(load_config(RECIPES / "qwen3_8b.toml"), H100), 8)


def test_what_saves_memory_is_searched_together(one_node):
    """A teacher on the host leaves an engine more room, which is worth more than it costs."""
    best = one_node.best
    assert best.fits and best.run.options == Options(teacher="host")
    on_gpu = estimate(plan_run(load_config(RECIPES / "qwen3_8b_one_node.toml", KEPT), H100))
    assert on_gpu.fits and on_gpu.seconds.total > 1.1 * best.seconds.total
    assert "teacher on the host" in layout_name(best.run)


def test_what_was_tried_is_said(one_node):
    choices = {choice.name: choice for choice in one_node.choices}
    assert {"TP", "CP", "PP", "VPP", "recomputed", "teacher", "optimizer"} <= choices.keys()
    assert choices["CP"].seconds.keys() == {"1", "2", "4", "8"}
    total = one_node.best.seconds.total
    for choice in one_node.choices:
        took = choice.seconds[choice.taken]
        assert took is not None and took <= total, choice.name
    others = [s for choice in one_node.choices for s in choice.seconds.values() if s]
    assert max(others) <= 2 * total


def test_adapters_are_named_beside_and_never_taken(one_node):
    assert one_node.best.run.lora is None
    assert one_node.adapters is not None and one_node.adapters.run.lora is not None
    assert one_node.adapters.seconds.total < one_node.best.seconds.total
    adapted = load_config(RECIPES / "qwen3_8b.toml", ["model.lora.rank=8"])
    asked = recommend(plan_run(adapted, H100), 8)
    assert asked.best.run.lora == adapted.model.lora and asked.adapters is None


def test_the_command_says_what_to_set_and_what_to_leave_out(capsys):
    recipe = str(RECIPES / "qwen3_8b_one_node.toml")
    assert main(["plan", recipe, *KEPT]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert 'teacher.offload="host" without megatron.model.recompute_granularity' in text
    assert "fastest that fits with each choice" in text and "with [model.lora] rank = 16" in text


def test_what_no_rehearsal_confirms_is_taken_if_nothing_else_fits():
    """An optimizer on the host needs Transformer Engine."""
    run = plan_run(load_config(RECIPES / "qwen3_8b.toml"), H100)
    for memory, away in ((64, False), (50, True)):
        less = dataclasses.replace(run, hardware=dataclasses.replace(H100, memory_gb=memory))
        best = recommend(less, 8).best
        assert best.fits and (best.run.options.states.on_host > 0) == away, memory


def test_the_search_finds_what_looking_at_everything_finds(small: Config):
    """Every layout and way to save memory of 4 GPUs, none left out."""
    run = plan_run(small, dataclasses.replace(H100, memory_gb=40))
    everything = [
        candidate.estimate(number)
        for candidate in recommending._in_order(run, 4, 0)
        for number in range(len(candidate.ways))
    ]
    fitting = [one.seconds.total for one in everything if one.fits]
    found = recommend(run, 4)
    rehearsed = [
        one.seconds.total for one in everything if one.fits and can_be_rehearsed(one.run.options)
    ]
    assert min(rehearsed) <= found.best.seconds.total <= 1.05 * min(rehearsed)
    for choice in found.choices:
        assert min(s for s in choice.seconds.values() if s) == min(fitting), choice.name


def test_options_that_the_plan_does_not_count_are_named(capsys):
    recipe = str(RECIPES / "qwen3_1.7b.toml")
    assert main(["plan", recipe, "megatron.model.mlp_chunks_for_training=2"]) == 0
    assert "not counted below: model.mlp_chunks_for_training" in capsys.readouterr().out


def test_counted_options_are_megatrons():
    for table, names in COUNTED.items():
        assert names <= verdicts(table).keys()


FULL, SELECTIVE = {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}
OPTION_ERRORS = [
    ({"recompute_granularity": "half"}, "must be one of full, selective, found 'half'"),
    (FULL, "recompute_method must be one of uniform, block, found None"),
    (FULL | {"recompute_method": "block"}, "needs megatron.model.recompute_num_layers"),
    (
        FULL | {"recompute_method": "block", "recompute_num_layers": True},
        "recompute_num_layers must be int, found True",
    ),
    (
        {
            "fine_grained_activation_offloading": True,
            "offload_modules": [],
            "activation_offload_fraction": "half",
        },
        "activation_offload_fraction must be float, found 'half'",
    ),
    (SELECTIVE | {"recompute_modules": "mlp"}, "recompute_modules must be a list of names"),
    (
        SELECTIVE | {"recompute_modules": ["mpl"]},
        "core_attn, mlp, moe, moe_act.* Did you mean 'mlp'",
    ),
]


@pytest.mark.parametrize(("model", "message"), OPTION_ERRORS)
def test_bad_options_are_refused_without_megatron(model: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        options(MegatronConfig(model=model))


def test_a_save_takes_what_the_trainer_counts_on_each_rank():
    """Of 8 ranks, DP 8: all with the distributed optimizer, else the first replica alone."""
    from megatron_tropd.mcore.checkpoint import saving_bytes
    from megatron_tropd.mcore.layout import Layout

    for sharded, form in ((True, "fully_reshardable"), (False, None)):
        run = _with(f"parallel.distributed_optimizer={str(sharded).lower()}")
        held = torch.nn.Parameter(
            torch.empty(run.student.parameters, dtype=torch.bfloat16, device="meta")
        )
        student: Any = SimpleNamespace(
            model=SimpleNamespace(trainable=lambda p=held: {"all": p}), average=None
        )
        sizes: dict[str, Any] = dict(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, dp_size=8)
        ranks = [Layout(rank=r, world_size=8, groups=None, dp_rank=r, **sizes) for r in range(8)]
        counted = sum(saving_bytes(student, rank, form) for rank in ranks)
        assert planned_memory.saving_host_bytes(run) == counted > 0


def test_what_a_node_has_not_is_no_plan():
    small = dataclasses.replace(H100, host_memory_gb=150)
    words = ["teacher.offload=host"]
    assert estimate(_with(*words)).fits
    assert (
        "a node needs 251 GB of memory of its own"
        in estimate(_with(*words, hardware=small)).obstacle
    )


def test_bad_options_end_the_command(capsys):
    recipe = str(RECIPES / "qwen3_1.7b.toml")
    assert main(["plan", recipe, "megatron.model.recompute_granularity=full"]) == 2
    assert "recompute_method must be one of" in capsys.readouterr().err
