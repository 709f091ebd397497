"""Every field of Megatron's dataclasses is handed on (and checked), set by us, or refused.

After a change of the version: read what a new field does, then write it down.
"""

import dataclasses
import enum
import math
import re
import tomllib
import typing
from collections import Counter
from pathlib import Path
from typing import Any

import megatron.core
import pytest
import torch

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import (
    Config,
    MegatronConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from megatron_tropd.config.megatron_fields import Verdict, named_lists, verdicts
from megatron_tropd.mcore import models, options_check, platform, schedule
from megatron_tropd.mcore.options import ddp_config, optimizer_config, typed
from megatron_tropd.mcore.options_check import DATACLASSES

TABLES = ("model", "optimizer", "ddp")
PASSING = [
    (table, name)
    for table in (*TABLES, "teacher")
    for name, verdict in verdicts(table).items()
    if verdict.kind == "passes"
]
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
OVERLAP = {"overlap_grad_reduce": True}
PRECISE = {"use_precision_aware_optimizer": True}
OFFLOADED = PRECISE | {"optimizer_cpu_offload": True}
BLOCKWISE = {"fp8": "e4m3", "fp8_recipe": "blockwise"}


def config(parallel: ParallelConfig | None = None, **tables: dict[str, Any]) -> Config:
    """A config whose options are those of ``tables``."""
    return Config(
        model=ModelConfig(student="s", teacher="t"),
        rollout=RolloutConfig(prompts="p", max_new_tokens=8),
        train=TrainConfig(steps=4),
        run=RunConfig(dir="r"),
        parallel=parallel or ParallelConfig(),
        megatron=MegatronConfig(**tables),
    )


def check(parallel: ParallelConfig | None = None, **tables: dict[str, Any]) -> None:
    """What a run does with these options before anything is built."""
    options_check.check_options(config(parallel, **tables), student=LLAMA, teacher=LLAMA)


@pytest.fixture(autouse=True)
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without CUDA, whatever this one is."""
    monkeypatch.setattr(platform, "has_cuda", lambda: False)
    monkeypatch.setattr(models, "has_transformer_engine", lambda: False)


@pytest.fixture
def gpu(laptop: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has CUDA and Transformer Engine."""
    monkeypatch.setattr(platform, "has_cuda", lambda: True)
    monkeypatch.setattr(models, "has_transformer_engine", lambda: True)


@pytest.mark.parametrize("table", TABLES)
def test_every_field_of_the_installed_megatron_was_looked_at(table) -> None:
    listed = verdicts(table)
    installed = {f.name for f in dataclasses.fields(DATACLASSES[table])}
    assert not installed - listed.keys(), "nobody looked at these: megatron_fields.txt"
    assert not listed.keys() - installed, "these are gone: megatron_fields.txt"


def test_no_field_has_two_verdicts() -> None:
    names = Counter(
        (header.partition(":")[0], name)
        for header, some in named_lists("megatron_tropd.config", "megatron_fields.txt")
        for name in some
    )
    assert {table for table, _ in names} == set(TABLES)
    assert max(names.values()) == 1, names.most_common(3)


def test_what_governs_a_field_exists() -> None:
    known = {f"{section}.{key}" for section, table in _settings().items() for key in table}
    for table in TABLES:
        for name, verdict in verdicts(table).items():
            if verdict.kind == "set" and " " not in verdict.text:
                other = re.fullmatch(r"megatron\.(\w+)\.(\w+)", verdict.text)
                passes = other and verdicts(other[1])[other[2]].kind == "passes"
                assert passes or verdict.text in known, (name, verdict.text)


def _settings() -> dict[str, list[str]]:
    hints = typing.get_type_hints(Config)
    names = [f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(hints[f.name])]
    return {name: [f.name for f in dataclasses.fields(hints[name])] for name in names}


def test_a_switch_passes_and_may_be_off() -> None:
    for table in (*TABLES, "teacher"):
        for name, verdict in verdicts(table).items():
            if verdict.switch and verdict.kind == "passes":
                assert verdicts(table)[verdict.switch].kind == "passes", name
    MegatronConfig(model={"cpu_offloading": False, "cpu_offloading_num_layers": 2})


def test_experts_have_options_of_their_own() -> None:
    with pytest.raises(ConfigError, match="variable sequence length"):
        check_mixture(moe_token_dispatcher_type="allgather")
    check_mixture(moe_router_dtype="fp64")


def check_mixture(**options: Any) -> None:
    mixtral = LLAMA | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    mixtral |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    options_check.check_options(config(model=options), student=mixtral, teacher=LLAMA)


def test_what_passes_is_read_by_megatron_core() -> None:
    """An option that nothing reads would be a promise that is not kept."""
    root = Path(megatron.core.__file__).parent
    aside = ("fsdp", "hybrid", "inference", "ssm", "multimodal", "mimo", "export")
    words: set[str] = set()
    for path in root.rglob("*.py"):
        if not set(path.relative_to(root).parts) & set(aside) and "config" not in path.name:
            words |= set(re.findall(r"\w+", path.read_text()))
    # Megatron's configs make others of these.
    derived = {
        *("disable_bf16_reduced_precision_matmul", "moe_enable_deepep", "moe_deepep_num_sms"),
        *("moe_hybridep_num_sms", "moe_router_padding_for_fp8"),
    }
    assert {name for _, name in PASSING} - words == derived


FREE = {"param_name_patterns_for_fp32_local_accumulation"}
"""Words of the user's own."""


def test_words_that_megatron_gives_no_type_have_their_choices() -> None:
    """Else a misspelt one would pass, and a plan could not know it."""
    for table, name in PASSING:
        hint = typing.get_type_hints(DATACLASSES[table])[name]
        free = _is_word(hint) and name not in FREE
        assert bool(verdicts(table)[name].choices) == free, name


def _is_word(hint: Any) -> bool:
    return hint is str or any(map(_is_word, typing.get_args(hint)))


@pytest.mark.parametrize(("table", "name"), PASSING, ids=str)
def test_types_are_those_of_the_installed_dataclass(table, name) -> None:
    cls = DATACLASSES[table]
    (found,) = (f for f in dataclasses.fields(cls) if f.name == name)
    default = found.default
    if default is dataclasses.MISSING:
        default = found.default_factory()
    if default is not None and default != math.inf:
        value = typed(cls, {name: _plain(default)}, table=table)[name]
        assert (value == default and type(value) is type(default)) or type(default) is int
    for wrong in ({}, {"a": 1}, [{}], [None]):
        with pytest.raises(ConfigError, match=rf"megatron\.{table}\.{name}.* must be"):
            typed(cls, {name: wrong}, table=table)
    for other in (True, "no such value", 1, 1.5, ["x"]):
        hint = typing.get_type_hints(cls)[name]
        if not _fits(hint, other):
            with pytest.raises(ConfigError, match=rf"megatron\.{table}\.{name}.* must"):
                typed(cls, {name: other}, table=table)


def _plain(default: Any) -> Any:
    """A default as TOML has it."""
    if isinstance(default, torch.dtype):
        return str(default).removeprefix("torch.")
    if isinstance(default, enum.Enum):
        return default.name
    return list(default) if isinstance(default, tuple) else default


def _fits(hint: Any, value: Any) -> bool:
    """Whether a plain value fits an annotation, said another way than the package says it."""
    args = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return value in args and not isinstance(value, bool)
    if typing.get_origin(hint) in (list, tuple):
        return isinstance(value, list) and args[0] is str
    if args:
        return any(_fits(a, value) for a in args)
    if hint in (list, tuple):
        return isinstance(value, list)
    if isinstance(value, bool) or hint is bool:
        return hint is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if hint is float else hint)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"model": {"num_layers": 3}}, "megatron.model.num_layers is set by the model's folder"),
        ({"model": {"tensor_model_parallel_size": 2}}, "is set by parallel.tensor: remove it"),
        ({"optimizer": {"lr": 1.0}}, "megatron.optimizer.lr is set by train.lr"),
        ({"ddp": {"use_distributed_optimizer": True}}, "set by parallel.distributed_optimizer"),
        ({"model": {"mtp_num_layers": 1}}, "is refused: there is one loss per token"),
        ({"model": {"hidden_dropout": 0.1}}, "another model than the engine"),
        ({"ddp": {"num_buckets": 2}}, "bucket_size says the same"),
        ({"teacher": {"recompute_granularity": "full"}}, "teacher has no backward pass"),
        (
            {"model": {"recompute_modules": ["mlp"]}},
            "recompute_modules does nothing without megatron.model.recompute_granularity. Set that",
        ),
        ({"ddp": {"bucket_size": 9}}, "does nothing without megatron.ddp.overlap_grad_reduce"),
        # Megatron would go round in a loop of units of no layer.
        ({"model": FULL | {"recompute_num_layers": 0}}, "num_layers must be at least 1, found 0."),
        ({"ddp": OVERLAP | {"bucket_size": -5}}, "bucket_size must be at least 1, found -5."),
        ({"model": {"mlp_chunks_for_training": 0}}, "must be at least 1, found 0."),
        # It would skip every update.
        ({"optimizer": {"grad_norm_skip_threshold": 0.0}}, "must be above 0, found 0.0."),
        (
            {"optimizer": OFFLOADED | {"optimizer_offload_fraction": 1.5}},
            "optimizer_offload_fraction must be in [0, 1], found 1.5.",
        ),
    ],
)
def test_what_is_ours_or_refused_is_named_without_megatron(tables, message) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        MegatronConfig(**tables)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"model": {"recompute_granularty": "full"}},
            r"megatron\.model\.recompute_granularty: TransformerConfig of Megatron-Core [\d.]+ has "
            r"no such field\. Did you mean 'recompute_granularity'\?",
        ),
        ({"model": {"recompute_granularity": "ful"}}, r"one of \['full', .* Did you mean 'full'\?"),
        ({"model": FULL | {"recompute_num_layers": True}}, r"must be int, found True \(bool\)"),
        ({"model": FULL | {"recompute_modules": "mlp"}}, r"must be a list .* found 'mlp' \(str\)"),
        ({"model": FULL | {"recompute_modules": ["mlp", 3]}}, r"_modules\[1\] must be str"),
        (
            {"optimizer": PRECISE | {"exp_avg_dtype": "bfloat"}},
            r"must be a type of torch in quotes",
        ),
        ({"model": {"attention_backend": "flsh"}}, r"Did you mean 'flash'\?"),
        (
            {"model": {"recompute_granularity": "full"}},
            r"\[megatron\.model\]: Megatron refuses recompute_granularity = 'full': Using .* "
            r'recompute_method must be "block" or "uniform"',
        ),
        ({"model": {"moe_router_dtype": "fp64"}}, r"is for mixtures of experts, and this model"),
        ({"model": {"activation_func_fp8_input_store": True}}, "nothing without .*_fusion = true"),
        ({"model": {"fp8": "hybrid"}}, "needs Transformer Engine on CUDA, found no CUDA device"),
        (
            {"teacher": {"fp8": "hybrid"}},
            "megatron.teacher.fp8 = 'hybrid' needs Transformer Engine",
        ),
        (
            {"model": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}},
            "layernorm in megatron.model.recompute_modules needs Transformer Engine on CUDA",
        ),
        (
            {"model": {"recompute_granularity": "selective", "recompute_modules": []}},
            r"megatron\.model\.recompute_modules = \[\] recomputes nothing",
        ),
        ({"optimizer": {"apply_wd_to_qk_layernorm": True}}, "the student has no such norms"),
        (
            {"model": {"recompute_granularity": "selective", "recompute_modules": ["moe"]}},
            'moe is of mixtures of experts, and this model is dense. Say "mlp"',
        ),
        (
            {"model": FULL | {"recompute_modules": ["mlp"]}},
            "recompute_modules is for recompute_granularity = \"selective\", found 'full'",
        ),
        (
            {"ddp": {"pad_buckets_for_high_nccl_busbw": True}},
            "does nothing without parallel.distributed_optimizer = true",
        ),
        ({"optimizer": {"optimizer_cpu_offload": True}}, "needs Transformer Engine on CUDA"),
        (
            {"model": {"cp_comm_type": "a2a"}},
            r"cp_comm_type does nothing .* found parallel\.context = 1",
        ),
        ({"ddp": {"nccl_ub": True}}, "megatron.ddp.nccl_ub = True needs a CUDA device, found no"),
        (
            {"ddp": OVERLAP | {"overlap_param_gather": True}},
            "set parallel.distributed_optimizer = true",
        ),
    ],
)
def test_what_cannot_be_here_is_said_before_anything_is_built(tables, message) -> None:
    with pytest.raises(ConfigError, match=message):
        check(**tables)


def test_keys_and_values_travel_as_asked_if_transformer_engine_sends_them(request) -> None:
    shared, asked = ParallelConfig(context=2), {"cp_comm_type": "a2a"}
    with pytest.raises(ConfigError, match="cp_comm_type = 'a2a' needs Transformer Engine on CUDA"):
        check(shared, model=asked)
    with pytest.raises(ConfigError, match=r"must be one of p2p, all_gather, a2a, found 'a2a\+p2p'"):
        check(shared, teacher={"cp_comm_type": "a2a+p2p"})
    request.getfixturevalue("gpu")
    check(shared, model=asked, teacher={"cp_comm_type": "p2p"})
    names = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    windows = LLAMA | names | {"sliding_window": 4}
    made = models.transformer_config(models.model_shape(windows), shared, torch.bfloat16)
    assert made.cp_comm_type == "all_gather", "Transformer Engine's ring has no windows"


def test_sums_in_float32_are_for_gradients_in_less() -> None:
    spread = ParallelConfig(data=2, distributed_optimizer=True)
    summed = {"reduce_scatter_with_fp32_accumulation": True}
    with pytest.raises(ConfigError, match=r"Set megatron\.ddp\.grad_reduce_in_fp32 = false"):
        check(spread, ddp=summed)
    check(spread, ddp=summed | {"grad_reduce_in_fp32": False})


def test_gradients_in_float32_weights_travel_in_nothing_less() -> None:
    with pytest.raises(ConfigError, match=r"float32: it does nothing"):
        _check_dtype("float32", {"grad_reduce_in_fp32": False})
    _check_dtype("float32", {"grad_reduce_in_fp32": True})
    _check_dtype("bfloat16", {"grad_reduce_in_fp32": False})


def _check_dtype(dtype: str, ddp: dict[str, Any]) -> None:
    asked = config(ddp=ddp)
    asked = dataclasses.replace(asked, model=dataclasses.replace(asked.model, dtype=dtype))
    options_check.check_options(asked, student=LLAMA, teacher=LLAMA)


def test_gathers_need_buckets() -> None:
    spread = ParallelConfig(data=2, distributed_optimizer=True)
    with pytest.raises(ConfigError, match=r"needs megatron\.ddp\.overlap_grad_reduce = true"):
        check(spread, ddp={"overlap_param_gather": True, "overlap_grad_reduce": False})
    check(spread, ddp={"overlap_param_gather": True, "overlap_grad_reduce": True})


@pytest.mark.parametrize(
    "tables",
    [
        {"model": FULL},
        {"model": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}},
        {"teacher": {"bias_activation_fusion": True}},
        {"ddp": {"overlap_grad_reduce": True, "bucket_size": 1000}},
        {"optimizer": {"grad_norm_skip_threshold": 3}},
        {"optimizer": {"apply_wd_to_qk_layernorm": False}},
        # As Megatron has them: they ask for nothing that is not here.
        {"model": {"attention_backend": "auto"}, "ddp": {"nccl_ub": False}},
    ],
)
def test_what_this_machine_can_do_passes(tables) -> None:
    check(**tables)


@pytest.mark.parametrize(
    "tables",
    [
        {"model": {"fp8": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": True}},
        {"model": BLOCKWISE, "teacher": BLOCKWISE},
        {"model": {"attention_backend": "flash", "flash_attention_version": 3}},
        {"model": {"cpu_offloading": True, "cpu_offloading_num_layers": 2}},
        {"model": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}},
    ],
)
def test_what_a_gpu_can_do_passes_where_there_is_one(gpu, tables) -> None:
    check(**tables)


def test_fine_grained_offloading_wants_its_environment(gpu, monkeypatch) -> None:
    asked = {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn"]}
    monkeypatch.setattr("megatron.core.utils.is_te_min_version", lambda version: True)
    monkeypatch.delenv("NVTE_CPU_OFFLOAD_V1", raising=False)
    with pytest.raises(ConfigError, match=r"NVTE_CPU_OFFLOAD_V1=1.*weights are offloaded"):
        check(model=asked)
    monkeypatch.setenv("NVTE_CPU_OFFLOAD_V1", "1")
    check(model=asked)


def test_a_teacher_in_fp8_has_no_delayed_scaling(gpu) -> None:
    with pytest.raises(ConfigError, match=r"delayed scaling takes its factors from training"):
        check(teacher={"fp8": "hybrid"})
    check(teacher={"fp8": "hybrid", "fp8_recipe": "tensorwise"})
    check(model={"fp8": "hybrid"})


def test_offloading_of_the_optimizer_wants_its_path_and_bfloat16(gpu) -> None:
    asked = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
    with pytest.raises(ConfigError, match=r"needs megatron\.optimizer\.use_precision_aware"):
        check(optimizer=asked)
    asked["use_precision_aware_optimizer"] = True
    with pytest.raises(ConfigError, match="so exp_avg_dtype beside it would do nothing"):
        check(optimizer=asked | {"exp_avg_dtype": "bfloat16"})
    made = config(optimizer=asked)
    whole = dataclasses.replace(made.model, dtype="float32")
    with pytest.raises(ConfigError, match=r'needs model\.dtype = "bfloat16", found torch\.float32'):
        options_check.check_options(
            dataclasses.replace(made, model=whole), student=LLAMA, teacher=LLAMA
        )


def test_a_field_that_nobody_has_looked_at_passes_and_is_named(monkeypatch) -> None:
    """Of a Megatron that is newer than the list."""
    shorter = {n: v for n, v in verdicts("model").items() if n != "recompute_granularity"}
    monkeypatch.setattr(options_check, "verdicts", lambda table: shorter)
    new = MegatronConfig(model={"recompute_granularity": "selective", "recompute_modules": []})
    assert options_check.unreviewed(new) == ["megatron.model.recompute_granularity"]


def test_options_reach_the_models_and_the_optimizer() -> None:
    made = config(
        model=FULL,
        ddp={"bucket_size": 1000, "overlap_grad_reduce": True},
        optimizer={"decoupled_weight_decay": False},
        teacher={"bias_activation_fusion": True},
    )
    shape = models.model_shape(LLAMA)
    built = [
        models.transformer_config(shape, made.parallel, torch.float32, options)
        for options in (made.megatron.model, made.megatron.teacher)
    ]
    assert [c.recompute_granularity for c in built] == ["full", None]
    assert [c.bias_activation_fusion for c in built] == [False, True]
    ddp = ddp_config(made.parallel, made.megatron)
    assert (ddp.bucket_size, ddp.overlap_grad_reduce, ddp.grad_reduce_in_fp32) == (1000, True, True)
    optimizer = optimizer_config(
        made.train, made.parallel, torch.float32, made.megatron, model=built[0]
    )
    assert not optimizer.decoupled_weight_decay and optimizer.lr == made.train.lr


def _snippet(number: int) -> dict[str, Any]:
    text = Path(__file__).parents[2].joinpath("docs", "megatron_options.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    return tomllib.loads(blocks[number])["megatron"]


def test_the_first_snippet_of_the_docs_is_good_here() -> None:
    check(**_snippet(0))


def test_the_second_snippet_of_the_docs_is_good_on_a_gpu(gpu, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="only supported with distributed optimizer"):
        check(**_snippet(1))
    # What is left of Megatron's own checks looks for Transformer Engine, which is not here.
    monkeypatch.setattr(options_check, "optimizer_config", lambda *args, **kwargs: None)
    check(ParallelConfig(data=8, distributed_optimizer=True), **_snippet(1))


def test_rows_are_padded_as_products_in_few_bits_want_them() -> None:
    shared = ParallelConfig(tensor=4, sequence_parallel=True)
    assert config().pad_multiple == 1 and config(shared).pad_multiple == 4
    assert config(teacher={"fp8": "hybrid"}).pad_multiple == 32
    assert config(ParallelConfig(context=2)).pad_multiple == 4
    both = ParallelConfig(context=2, tensor=4, sequence_parallel=True)
    assert config(both).pad_multiple == 16
    assert config(shared, model={"fp4": "e2m1"}).pad_multiple == 128


def test_passes_without_gradients_do_not_teach_the_offloading(monkeypatch) -> None:
    """Megatron's fine-grained offloading records its first pass and expects others to be alike."""
    seen = []
    offloading = schedule.FineGrainedActivationOffloadingInterface
    for name in ("disable_offload", "enable_offload"):
        monkeypatch.setattr(offloading, name, lambda name=name: seen.append(name))
    made = models.transformer_config(models.model_shape(LLAMA), ParallelConfig(), torch.float32)
    with schedule._nothing_offloaded(made):
        seen.append(made.fine_grained_activation_offloading)
    made.fine_grained_activation_offloading = True
    with schedule._nothing_offloaded(made):
        seen.append(made.fine_grained_activation_offloading)
    assert seen == [False, "disable_offload", False, "enable_offload"]
    assert made.fine_grained_activation_offloading


def test_a_verdict_that_is_none_is_noticed() -> None:
    from megatron_tropd.config.megatron_fields import _verdict

    assert _verdict("passes, CUDA, student") == Verdict("passes", student=True, needs="CUDA")
    assert _verdict("passes, with fp8") == Verdict("passes", switch="fp8")
    assert _verdict("passes, one of a b_c") == Verdict("passes", choices=("a", "b_c"))
    for rule in ("passes, sometimes", "allowed", "passes, CUDA, Transformer Engine"):
        with pytest.raises(ValueError, match="is no verdict"):
            _verdict(rule)
