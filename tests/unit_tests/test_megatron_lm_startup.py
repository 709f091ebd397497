"""What the plug-in for Megatron's training loop does and refuses, without running the loop."""

import argparse
import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loss_settings import config_of
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config.loss import preset
from megatron_tropd.data.packing import LossCounts, pack
from megatron_tropd.data.recorded import training_item
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.distill.token_choices import targets_of
from megatron_tropd.integrations import global_batch, megatron_lm, options, startup
from megatron_tropd.integrations.loop_student import Distilled
from megatron_tropd.integrations.loss_report import LossReport
from tests.host_syncs import host_syncs


def arguments(*options: str, **others: object) -> Namespace:
    """What Megatron's parser would leave of a command line."""
    parser = megatron_lm.add_arguments(argparse.ArgumentParser())
    parser.add_argument("--calculate-per-token-loss", action="store_true")
    args = parser.parse_args(options)
    settings = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "data_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "context_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "sequence_parallel": False,
        "use_distributed_optimizer": False,
        "tokenizer_type": "NullTokenizer",
        "tokenizer_model": None,
        "seq_length": 64,
        "rank": 0,
    }
    for name, value in (settings | others).items():
        setattr(args, name, value)
    return args


INTERLEAVED = {
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
    "data_parallel_size": 2,
    "micro_batch_size": 2,
    "global_batch_size": 16,
}
"""An interleaved pipeline and batches that it can take."""


def teach(folder: Path, *options: str, **others: object) -> Namespace:
    """Arguments with a teacher and a method."""
    return arguments(
        "--tropd-teacher-load", str(folder), "--tropd-method", "gkd_jsd", *options, **others
    )


def test_megatron_lm_teacher_turns_on_the_per_token_loss() -> None:
    assert not arguments().calculate_per_token_loss
    assert arguments("--tropd-teacher-load", "x").calculate_per_token_loss


def test_megatron_lm_settings_have_the_names_of_the_config() -> None:
    args = arguments(
        *["--tropd-teacher-load", "x", "--tropd-method", "tropd_clip", "--tropd-tau", "-1.5"],
        *["--tropd-importance", "truncated"],
    )
    config = startup.loss_config(args)
    assert (config.outlier, config.tau, config.importance) == ("clip", -1.5, "truncated")
    method = ["--tropd-method", "tropd", "--tropd-top-k", "8"]
    assert startup.loss_config(arguments("--tropd-teacher-load", "x", *method)).top_k == 8
    options = ["--tropd-set", "region=expected", "importance_low=1", "--tropd-importance", "band"]
    config = startup.loss_config(arguments("--tropd-teacher-load", "x", *method, *options))
    assert (config.region, config.importance_low, config.importance) == ("expected", 1.0, "band")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--tropd-method exopd", "--tropd-method exopd needs a second frozen model"),
        ("--tropd-method erpd_teacher", "erpd_teacher needs graded rollouts"),
        ("--tropd-method stable_opd", "stable_opd needs a second frozen model and golden answers"),
        ("--tropd-method gkd_jsd --tropd-jsd-beta 1.0", "--tropd-jsd-beta must be strictly"),
        ("--tropd-method tropd_clip --tropd-tau nan", "--tropd-tau must be a number and finite"),
        ("--tropd-method tropd --tropd-beta nan", "--tropd-beta must be at least 0 and finite"),
        ("--tropd-method tropd --tropd-top-k 600", "vocabulary of 259 tokens, found 600"),
        ("--tropd-method opd --tropd-set mask_first_ids=[3]", "--tropd-set mask_first_ids: which"),
        ("--tropd-method opd --tropd-set mask_truncated=true", "--tropd-set mask_truncated: which"),
        ("--tropd-method opd --tropd-tau -2", "Unknown config key --tropd-tau"),
        ("--tropd-method tropt", "--tropd-method must be one of .* Did you mean 'tropd'"),
        ("--tropd-method opd --tropd-set regoin=x", "Unknown config key --tropd-set regoin"),
        ("--tropd-method tropd --tropd-set region=x", "--tropd-set region must be one of"),
        ("--tropd-method tropd_mask --tropd-top-k 8", "tropd_mask does not read --tropd-top-k"),
        ("--tropd-method tropd --tropd-jsd-beta 0.2", "Unknown config key --tropd-jsd-beta"),
    ],
)
def test_megatron_lm_refuses_losses(options: str, named: str, tiny_model) -> None:
    folder = tiny_model("qwen3")
    with pytest.raises(ConfigError, match=named):
        args = arguments("--tropd-teacher-load", str(folder), *options.split())
        startup.check_arguments(args)
        startup.open_teachers(args, 259)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (INTERLEAVED | {"global_batch_size": 12}, r"12 / \(--micro-batch-size 2 x 2 .* = 3"),
        (INTERLEAVED | {"rampup_batch_size": [8, 8, 100]}, "--rampup-batch-size and an interl"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers"),
        ({"fp16": True}, "--fp16"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2"),
        ({"hybrid_layer_pattern": "M*M-"}, "--hybrid-layer-pattern"),
        ({"use_mup": True}, "--use-mup"),
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm"),
        ({"defer_embedding_wgrad_compute": True}, "--defer-embedding-wgrad-compute"),
        ({"cuda_graph_impl": "full_iteration"}, "CUDA graphs"),
        ({"calculate_per_token_loss": False}, "--calculate-per-token-loss"),
        ({"tropd_teacher_cache": "c", "tropd_teacher_offload": "host"}, "none is loaded"),
        ({"tropd_teacher_cache": "c", "tropd_metrics": True}, "most likely ids alone"),
        ({"tropd_teacher_address": ["a"], "tropd_metrics": True}, "most likely ids alone"),
        ({"tropd_teacher_address": ["a"], "tropd_teacher_cache": "c"}, "is at one place"),
        (
            {"tropd_teacher_address": ["a"], "reset_attention_mask": True},
            "read the row as one text",
        ),
    ],
)
def test_megatron_lm_refuses_what_it_was_not_made_for(settings, named, tiny_model) -> None:
    folder = tiny_model("qwen3")
    startup.check_arguments(teach(folder))
    startup.check_arguments(teach(folder, **INTERLEAVED))
    with pytest.raises(ConfigError, match=named):
        startup.check_arguments(teach(folder, **settings))


@pytest.mark.parametrize("refusal", options.BESIDE_ROLLOUTS, ids=lambda refusal: refusal.name)
def test_megatron_lm_refuses_what_fresh_trajectories_would_ignore(refusal, tiny_model) -> None:
    args = teach(tiny_model("qwen3"), masked_softmax_fusion=False, transformer_impl="local")
    vars(args)[refusal.name] = [3]
    plugin = megatron_lm._Plugin(None, lambda student, iteration: [])
    with pytest.raises(ConfigError, match=rf"^distillation\(rollouts\) does not go with {refusal}"):
        plugin.check(args)


def test_megatron_lm_refuses_teachers_that_do_not_fit(tiny_model, tmp_path: Path) -> None:
    folder = tiny_model("qwen3")
    assert startup.open_teachers(teach(folder), 259)["teacher"].config["vocab_size"] == 259
    for settings, vocab, named in (
        ({}, 260, "at least the 260 ids"),
        ({"tensor_model_parallel_size": 4}, 259, "--tensor-model-parallel-size = 4 must divide"),
        ({"pipeline_model_parallel_size": 3}, 259, "--pipeline-model-parallel-size = 3"),
        (INTERLEAVED, 259, "size x --num-virtual-stages-per-pipeline-rank = 2 x 2 = 4 exceeds"),
        ({"seq_length": 1024}, 259, "the teacher's context of 256 tokens, found 1024"),
    ):
        with pytest.raises(ConfigError, match=named):
            startup.open_teachers(teach(folder, **settings), vocab)
    with pytest.raises(InputError, match="config"):
        startup.open_teachers(teach(tmp_path), 259)


def test_megatron_lm_reads_the_teachers_folder_as_a_run_does(tiny_qwen3: Path, tmp_path) -> None:
    """Keys left to transformers, a stretched context, the output layer of a tied model."""
    config = json.loads((tiny_qwen3 / "config.json").read_text())
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    left = {key: value for key, value in config.items() if key != "max_position_embeddings"}
    tensors = load_file(tiny_qwen3 / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    head_only = tensors | {"lm_head.weight": embedding}
    both = head_only | {"model.embed_tokens.weight": embedding.clone()}
    for n, (settings, weights) in enumerate(
        [(left, both), (config | {"rope_parameters": rope}, both), (left, head_only)]
    ):
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(settings))
        save_file(weights, folder / "model.safetensors")
        startup.open_teachers(teach(folder, seq_length=1024), 259)
    save_file(both | {"lm_head.weight": 2 * embedding}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        startup.open_teachers(teach(folder), 259)


def test_megatron_lm_refuses_teachers_that_do_not_read_a_mask(tiny_model) -> None:
    dense, windows = tiny_model("qwen3"), tiny_model("mistral")
    startup.open_teachers(teach(dense, reset_attention_mask=True), 259)
    startup.open_teachers(teach(windows), 259)
    with pytest.raises(ConfigError, match="a teacher without sliding windows"):
        startup.open_teachers(teach(windows, reset_attention_mask=True), 259)


def test_megatron_lm_lays_out_experts_where_the_teacher_has_some(tiny_model) -> None:
    # Valid for a student whose experts are whole on each rank: 4 expert ranks, 2 replicas.
    shared = {"expert_model_parallel_size": 4, "data_parallel_size": 2}
    shared |= {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    dense, mixture = tiny_model("qwen3"), tiny_model("qwen3_moe")
    startup.open_teachers(teach(dense, **shared), 259)
    shared |= {"data_parallel_size": 4, "expert_model_parallel_size": 2, "sequence_parallel": True}
    with pytest.raises(ConfigError, match="expected --expert-tensor-parallel-size 2"):
        startup.open_teachers(teach(mixture, **shared), 259)
    startup.open_teachers(teach(mixture, **shared | {"expert_tensor_parallel_size": 2}), 259)


def test_megatron_lm_evaluates_where_nobody_counts_iterations() -> None:
    """As with --skip-train, which never sets ``curr_iteration``."""
    plugin = megatron_lm._Plugin(None, None)
    plugin._layout = Namespace(tp_group=None, dp_rank=0, dp_size=1)
    sizes = {"num_microbatches": 1, "micro_batch_size": 2, "seq_length": 4}
    args = teach(Path("x"), seed=1, iteration=7)
    assert plugin._share(args, sizes).step == 7
    args.curr_iteration = 9
    assert plugin._share(args, sizes).step == 9


@pytest.mark.parametrize(
    ("loss", "collectives"),
    [({}, 0), ({"denominator": "separate"}, 1), ({"entropy_share": 0.5}, 2)],
)
def test_megatron_lm_asks_the_other_replicas_what_the_loss_must_know(
    loss, collectives, group, monkeypatch
) -> None:
    """Segments that are counted by themselves were taken and did nothing."""
    (batch,) = _draw(_items(loss_mask=torch.tensor([[0.0, 1, 1, 0], [0, 0, 1, 0]])), group)
    writers = torch.tensor([[0, 1, 2, 0], [0, 0, 2, 0]])
    batch = replace(batch, writers=writers, student_at=torch.tensor([1, 2]))
    asked = []
    for name in ("all_reduce", "all_gather_object"):
        original = getattr(torch.distributed, name)
        monkeypatch.setattr(
            torch.distributed,
            name,
            lambda *args, original=original, **kwargs: (
                asked.append(original),
                original(*args, **kwargs),
            ),
        )
    found = global_batch.whole_batch([batch], preset("opd", **loss), group, torch.device("cpu"))
    assert found == (LossCounts(1, 2, 0), [0, 1] if collectives == 2 else [])
    assert len(asked) == collectives


def test_megatron_lm_loss_can_be_freed_by_a_pipelines_last_stage() -> None:
    """With --overlap-grad-reduce; Megatron refuses to free views."""
    from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor

    from megatron_tropd.mcore.hidden import SomeGradient

    weight = torch.nn.Parameter(torch.ones(3, 2))
    hidden = torch.ones(4, 2, requires_grad=True)
    loss = SomeGradient.apply((2 * hidden).sum(), weight)
    assert loss.item() == 16
    deallocate_output_tensor(loss, deallocate_pipeline_outputs=True)
    custom_backward(loss, None)
    assert torch.equal(hidden.grad, torch.full((4, 2), 2.0))
    assert torch.equal(weight.grad, torch.zeros(3, 2))


def test_megatron_lm_compares_tokenizers(tiny_model, tmp_path: Path, capsys) -> None:
    teacher = tiny_model("qwen3")
    same = tiny_model("llama")
    hf = {"tokenizer_type": "HuggingFaceTokenizer"}
    startup.open_teachers(teach(teacher, tokenizer_model=str(same), **hf), 259)
    assert "cannot be compared" not in capsys.readouterr().out
    for file in same.glob("*token*"):
        text = file.read_text()
        (tmp_path / file.name).write_text(text.replace('"a"', '"%"').replace('"b"', '"a"'))
    with pytest.raises(InputError, match="must share one tokenizer"):
        startup.open_teachers(teach(teacher, tokenizer_model=str(tmp_path), **hf), 259)
    startup.open_teachers(teach(teacher), 259)
    assert "ids of --tokenizer-type NullTokenizer cannot be compared" in capsys.readouterr().out


def test_megatron_lm_refuses_arguments_without_a_teacher() -> None:
    startup.check_lone_arguments(arguments())
    with pytest.raises(ConfigError, match="--tropd-metrics, --tropd-top-k given without"):
        startup.check_lone_arguments(arguments("--tropd-top-k", "0", "--tropd-metrics"))


def test_megatron_lm_names_the_version_and_what_is_missing(monkeypatch) -> None:
    import megatron.core

    startup.check_version()
    monkeypatch.setattr(megatron.core, "__version__", "0.16.1")
    monkeypatch.setattr(startup, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"found 0\.16\.1, which lacks megatron\.training"):
        startup.check_version()


def test_megatron_lm_refuses_a_forward_step_that_does_not_distil() -> None:
    with pytest.raises(ConfigError, match="Pass megatron_lm"):
        next(Distilled([], None))


def test_megatron_lm_refuses_to_train_plainly_with_a_teacher(monkeypatch) -> None:
    import megatron.training

    step = megatron_lm.distilling(lambda iterator, model: "plain")
    monkeypatch.setattr(megatron.training, "get_args", lambda: arguments())
    assert step(None, None) == "plain"
    monkeypatch.setattr(megatron.training, "get_args", lambda: teach(Path("x")))
    with pytest.raises(ConfigError, match="outside of megatron_lm"):
        step(None, None)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A group of one rank."""
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def _items(**changes: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    ids = torch.arange(8).view(2, 4)
    return [
        {"tokens": ids, "labels": ids + 1, "position_ids": ids, "loss_mask": torch.ones(2, 4)}
        | changes
    ]


def _share(count, group, **settings):
    how = {"shape": (2, 4), "step": 0, "seed": 0, "masked": False, "must_be_sampled": False}
    return global_batch.BatchShare(
        count, group=group, device=torch.device("cpu"), **(how | settings)
    )


def _draw(items, group, **settings):
    return global_batch.draw(iter(items), _share(len(items), group, **settings))


def test_megatron_lm_takes_text_with_its_mask(group) -> None:
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.bool).triu(1)
    items = _items(loss_mask=torch.eye(2, 4), attention_mask=mask, dataset_id=torch.zeros(2))
    (batch,) = _draw(items, group)
    assert batch.attention_mask is None
    assert [key.prompt for key in batch.keys] == [0, 1]
    assert torch.equal(batch.loss_mask, torch.eye(2, 4).bool())
    (batch,) = _draw(items, group, masked=True)
    assert torch.equal(batch.attention_mask, mask)
    assert not _draw([], group)


def test_megatron_lm_says_that_the_data_ended(group) -> None:
    with pytest.raises(InputError, match=r"Expected 2 micro-batches .* the data at its end"):
        global_batch.draw(iter(_items()), _share(2, group))


def test_megatron_lm_wants_masks_on_stages_without_data(group) -> None:
    """Where none are, a mask of nothing hidden would show the future."""
    (batch,) = global_batch.draw(None, _share(1, group, must_be_sampled=True))
    assert batch.attention_mask is None and not batch.loss_mask.any()
    with pytest.raises(InputError, match="Expected data on every pipeline stage"):
        global_batch.draw(None, _share(1, group, masked=True))


@pytest.mark.parametrize(
    ("items", "settings", "named"),
    [
        ([{"text": torch.ones(2, 5)}], {}, "tokens, labels, loss_mask, position_ids missing"),
        (_items(writers=torch.ones(2, 4)), {}, "response_positions, sample_key missing"),
        (_items(), {"shape": (2, 6)}, r"micro-batches of \[2, 6\] tokens .* found \[2, 4\]"),
        (_items(), {"masked": True}, "attention_mask in every item"),
        # Of --sft and --dataloader-inter-document-masking; never to be dropped unused.
        (_items(cu_seqlens=torch.zeros(2, 5)), {}, "found cu_seqlens besides, which the plug-in"),
        (_items(prompt_length=torch.ones(2)), {}, "found prompt_length besides"),
    ],
)
def test_megatron_lm_refuses_other_items(items, settings, named, group) -> None:
    with pytest.raises(InputError, match=named):
        _draw(items, group, **settings)


SHARED = (
    *("labels", "writers", "weights", "response_positions"),
    *("uniforms", "engine_logprobs", "behaviour_logprobs"),
)
"""What a micro-batch says of a token, wherever the token lies in it."""


def test_megatron_lm_makes_the_micro_batches_of_the_trainer(group) -> None:
    """The same numbers for the same tokens, the draws of the mask included."""
    trajectories = [
        TokenSequence.of_runs(
            SampleKey(5, n // 2, n % 2),
            (Writer.CONTEXT, (9,) * (n + 1)),
            (Writer.TEACHER, (8,) * n),
            (Writer.STUDENT, (7,) * (6 - n)),
            logprobs=(-1.0,) * (6 - n),
            version=5,
        )
        for n in range(4)
    ]
    items = [training_item(t, 12) for t in trajectories]
    batches = _draw(
        [default_collate(items[n : n + 2]) for n in (0, 2)], group, shape=(2, 12), seed=11, step=5
    )
    (packed,) = pack(trajectories, dp_rank=0, dp_size=1, tokens_per_micro_batch=99, seed=11, step=5)
    in_order = sorted(range(4), key=packed.rows.__getitem__)
    assert [row for batch in batches for row in batch.rows] == [0, 1, 2, 3]
    assert [key for batch in batches for key in batch.keys] == [packed.keys[b] for b in in_order]
    for name in SHARED:
        found = torch.cat([batch.of_loss_tokens(getattr(batch, name)) for batch in batches])
        expected = [getattr(packed, name)[b][packed.loss_mask[b]] for b in in_order]
        assert torch.equal(found, torch.cat(expected)), name
    assert len(torch.cat([b.of_loss_tokens(b.uniforms) for b in batches]).unique()) == 4 * 6
    rows = torch.cat([batch.loss_rows for batch in batches])
    assert torch.equal(rows, packed.loss_rows.sort().values)
    for batch in batches:
        at_student = batch.of_loss_tokens(batch.writers) == Writer.STUDENT
        assert torch.equal(batch.student_at, at_student.nonzero()[:, 0])


def test_megatron_lm_does_not_wait_for_the_device(group) -> None:
    args = teach(Path("x"), check_for_nan_in_loss_and_grad=False)
    report = LossReport(args, config_of(), iteration=5)
    sequence = TokenSequence.of_runs(
        SampleKey(5, 0, 0), (Writer.CONTEXT, (9, 9)), (Writer.STUDENT, (7,) * 5), logprobs=(-1,) * 5
    )
    batches = _draw([default_collate([training_item(sequence, 12)])], group, shape=(1, 12))
    with host_syncs() as found:
        for batch in batches:
            targets = targets_of(batch)
            names = ("loss", "student_logprob", "k1", "outlier")
            report(dict.fromkeys(names, targets.uniforms_T), targets.uniforms_T, batch)
    assert not found


def test_megatron_lm_deals_live_samples_as_megatron_does() -> None:
    items = [{"labels": torch.tensor(i)} for i in range(8)]
    share = _share(2, None, dp_size=2, dp_rank=1)
    mine = global_batch.own_share(items, share)
    assert [batch["labels"].tolist() for batch in mine] == [[2, 3], [6, 7]]
    with pytest.raises(ConfigError, match="Expected 8 items per step"):
        global_batch.own_share(items[:5], share)


IMPORT = """
import torch
torch.cuda.is_available = lambda: True  # as on a machine with a GPU
import megatron.core.optimizer.distrib_optimizer as optimizer
import megatron.core.pipeline_parallel.schedules as schedules
from megatron.core.models.gpt import GPTModel
from megatron.core import parallel_state

def fingerprint():
    places = [torch, torch.cuda, torch.Tensor, torch.nn.Module, optimizer, schedules, GPTModel,
              optimizer.DistributedOptimizer, parallel_state]
    return {(i, k): id(v) for i, p in enumerate(places) for k, v in vars(p).items()
            if not k.startswith("__")}

before = fingerprint()
import megatron_tropd.integrations.megatron_lm
after = fingerprint()
changed = {k for k, v in before.items() if after.get(k) != v}
assert not changed, changed
"""


def test_megatron_lm_import_changes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("loss", "broken", "says"),
    [
        (float("nan"), "student_logprob", "the student's log-prob of it is nan"),
        (float("nan"), "teacher_logprob", "the teacher's log-prob of it is nan"),
        (float("inf"), None, "its loss is infinite"),
    ],
)
def test_megatron_lm_names_the_token_whose_loss_is_no_number(
    loss, broken, says, capsys, monkeypatch, group
) -> None:
    from megatron.core import rerun_state_machine

    class Machine:
        """Megatron's, as far as it is asked here."""

        def validate_result(self, result, rejection_func, message, **_: object) -> None:
            if rejection_func(result):
                raise RuntimeError(message)

    monkeypatch.setattr(rerun_state_machine, "get_rerun_state_machine", Machine)
    item = _items(
        labels=torch.tensor([[5, 6, 7, 0], [8, 9, 10, 0]]),
        loss_mask=torch.tensor([[0.0, 1, 1, 0], [0, 0, 1, 0]]),
    )
    (batch,) = _draw(item, group, step=4)
    args = teach(Path("x"), check_for_nan_in_loss_and_grad=True)
    report = LossReport(args, config_of(region="bernoulli"), iteration=4)
    names = ("loss", "student_logprob", "teacher_logprob", "k1", "outlier")
    values = {name: torch.zeros(3) for name in names}
    report(values, values["loss"], batch)
    assert capsys.readouterr().out == ""
    for name in ("loss", broken):
        if name:
            values[name][1:] = loss
    with pytest.raises(RuntimeError, match=r"found (NaN|Inf) in the distillation loss"):
        report(values, values["loss"], batch)
    said = capsys.readouterr().out
    assert "iteration 5, row 0 of the micro-batch (prompt 0, sample 0), position 2" in said
    assert "predicts token 7" in said and says in said
