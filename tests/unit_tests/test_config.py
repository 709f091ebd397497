"""Config: TOML in, checked once, JSON out; every mistake has a message that names the key."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
from loss_settings import config_of

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.config import (
    Config,
    EvaluationSet,
    NamedTeacher,
    TaskConfig,
    config_from_dict,
    config_to_dict,
    config_to_toml,
    load_config,
)
from megatron_tropd.config.loss import PRESETS, preset

REPOSITORY = Path(__file__).resolve().parents[2]
TOMLS = sorted(
    path
    for folder in ("configs", "examples", "slurm", "benchmarks")
    for path in (REPOSITORY / folder).rglob("*.toml")
    if not path.name.startswith("site.")  # of a cluster: test_slurm_job.py
    and path.parent.name != "evaluation"  # of no run: test_evaluate.py
)
SMALLEST = """
[model]
student = "student"
teacher = "teacher"
[rollout]
prompts = "prompts.jsonl"
max_new_tokens = 32
[train]
steps = 10
[run]
dir = "runs/x"
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """The smallest config that is complete."""
    path = tmp_path / "job" / "small.toml"
    path.parent.mkdir()
    path.write_text(SMALLEST)
    return path


@pytest.mark.parametrize("path", TOMLS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_toml_of_the_repository_loads(path: Path):
    config = load_config(path)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_defaults_are_the_published_method(toml: Path):
    config = load_config(toml)
    assert config.loss == config_of(
        region="bernoulli", outlier="forward_kl", top_k=64, tau=None, denominator="joint"
    )
    assert (config.guidance.beta, config.guidance.prefixed_per_prompt) == (0.001, 1)
    assert (config.train.lr, config.train.lr_schedule) == (5e-6, "constant")
    assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt) == (128, 4)
    assert config.rollout.temperature == config.rollout.top_p == 1.0


def test_every_setting_is_documented():
    methods = [type(preset(name)) for name in PRESETS]
    several = {"teachers": NamedTeacher, "tasks": TaskConfig}
    sections = [several.get(s.name, s.type) for s in dataclasses.fields(Config)]
    for kind in [*sections, EvaluationSet, *methods]:
        classes = [c for c in kind.__mro__ if dataclasses.is_dataclass(c)]
        body = "".join(inspect.getsource(c) for c in classes)
        for field in dataclasses.fields(kind):
            after = body.split(f"\n    {field.name}:")[1].split("\n    ")
            assert '"""' in after[1], f"{kind.__name__}.{field.name} has no docstring"


def test_paths_are_relative_to_the_file_and_overrides_to_the_shell(toml: Path, monkeypatch):
    monkeypatch.chdir(toml.parent.parent)
    config = load_config(toml, ["model.teacher=other/teacher"])
    assert config.model.student == str(toml.parent / "student")
    assert config.rollout.prompts == str(toml.parent / "prompts.jsonl")
    assert config.model.teacher == str(toml.parent.parent / "other" / "teacher")
    assert config.run.dir == "runs/x"
    assert load_config(toml, ["run.dir=~/runs/x"]).run.dir == str(Path.home() / "runs" / "x")


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("train.lr=1e-3", "train", "lr", 1e-3),
        ("train.lr=1", "train", "lr", 1.0),
        ("train.adam_betas=[0.8, 0.9]", "train", "adam_betas", (0.8, 0.9)),
        ("loss.region=expected", "loss", "region", "expected"),
        ('loss.region="expected"', "loss", "region", "expected"),
        ("loss.entropy_share=1", "loss", "entropy_share", 1.0),
        ("run.tensorboard=false", "run", "tensorboard", False),
        ("rollout.stop_token_ids=[5, 6]", "rollout", "stop_token_ids", (5, 6)),
        ("guidance.schedule=constant", "guidance", "schedule", "constant"),
        ("loss.mask_first_ids=[5]", "loss", "mask_first_ids", (5,)),
        ("run.wandb_project=name", "run", "wandb_project", "name"),
        ("rollout.chat_template_date='2026-01-31'", "rollout", "chat_template_date", "2026-01-31"),
    ],
)
def test_overrides(toml: Path, override: str, section: str, name: str, value: object):
    config = load_config(toml, ["loss.method=tropd", override])
    found = getattr(getattr(config, section), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.leaning_rate=1", r"Unknown config key train\.leaning_rate\..*Known here"),
        ("train.step=1", r"Did you mean train\.steps\?"),
        ("trian.steps=1", r"Unknown config key trian\. Did you mean train\?"),
        ("train.steps", r"must look like section\.key=value"),
        ("steps=3", r"must look like section\.key=value"),
        ("train.steps=ten", r"train\.steps must be int, found 'ten' \(str\)"),
        ("train.steps=1.5", r"train\.steps must be int, found 1\.5"),
        ("train.steps=true", r"train\.steps must be int, found True"),
        ("run.tensorboard=1", r"run\.tensorboard must be bool, found 1"),
        ("train.steps=0", r"train\.steps must be at least 1, found 0"),
        ("train.adam_betas=[0.9]", r"train\.adam_betas must have 2 elements"),
        ("train.adam_betas=0.9", r"train\.adam_betas must be a list"),
        ("train.lr=0", r"train\.lr must be above 0"),
        ("train.min_lr=1", r"train\.min_lr must be between"),
        ("train.warmup_steps=11", r"train\.warmup_steps must be in"),
        ("train.lr_schedule=step", r"train\.lr_schedule must be one of \['constant'"),
        ("model.dtype=float16", r"model\.dtype must be one of"),
        ("parallel.tensor=0", r"parallel\.tensor must be at least 1"),
        ("parallel.sequence_parallel=true", r"needs parallel\.tensor of at least 2"),
        (
            "parallel.virtual_pipeline=2",
            r"parallel\.virtual_pipeline = 2 needs parallel\.pipeline of at least 2, found 1",
        ),
        ("parallel.expert=2", r"parallel\.expert = 2 must divide parallel\.data, found 1"),
        ("parallel.expert_tensor=2", r"expert_tensor must be 1 or parallel\.tensor = 1, found 2"),
        ("parallel.data=3", r"= 512 must be divisible by parallel\.data = 3"),
        ("rollout.num_engines=2", r"rollout\.num_engines must divide the world size 1"),
        (
            "rollout.placement=remote",
            r"rollout\.placement must be one of \['colocated', 'separate'",
        ),
        (
            "rollout.weight_transport=direct",
            r'rollout\.weight_transport = "direct" is no longer there.*Remove the line',
        ),
        (
            "rollout.engine_memory=0.5",
            r"two settings.*rollout\.engine_gpu_share .*rollout\.engine_cpu_kv_gib",
        ),
        ("rollout.max_num_seqs=0", r"rollout\.max_num_seqs must be at least 1"),
        ("rollout.steps_ahead=2", r"rollout\.steps_ahead must be one of \[0, 1\], found 2"),
        ("rollout.temperature=0", r"rollout\.temperature must be above 0"),
        ("rollout.top_p=0", r"rollout\.top_p must be in"),
        ("rollout.chat_template_kwargs=3", r"must be a table such as \{key = value\}, found 3"),
        ('rollout.chat_template_kwargs={"a": 1}', r"must be a table such as .*found '\{\"a\""),
        ("rollout.chat_template_kwargs={a = 2026-01-31}", r"kwargs\.a must be a string.*in quotes"),
        (
            "rollout.chat_template_kwargs={a = [{b = nan}]}",
            r"kwargs\.a\[0\]\.b must be .* found nan",
        ),
        ("rollout.chat_template_date=2026-01-31", r"must be str, found .*Put it in quotes"),
        ("rollout.chat_template_date=today", r"must look like 2026-01-31, found 'today'"),
        ("rollout.chat_template_date='20260131'", r"must look like 2026-01-31, found '20260131'"),
        ("rollout.prompts.x=1", r"\[rollout\.prompts\] must be a table, found"),
        ("train.lr_schedule.x=1", r"train\.lr_schedule must be one of"),
        ("rollout.max_new_tokens=0", r"rollout\.max_new_tokens must be at least 1"),
        ("guidance.prefixed_per_prompt=5", r"exceeds rollout\.samples_per_prompt = 4"),
        ("guidance.beta=-1", r"guidance\.beta must be at least 0"),
        ("guidance.schedule=linear", r"guidance\.schedule must be one of \['cosine', 'constant'\]"),
        ("loss={method = 'tropd', top_k = -1}", r"Override .* must look like section\.key=value"),
        ("loss.method=static", r"needs loss\.tau"),
        ("loss.method=tropt", r"loss\.method must be one of .* Did you mean 'tropd'\?"),
        ("loss.method=7", r"loss\.method must be one of .* found 7"),
        (
            "loss.outlier=clip",
            r'(?s)form of version 0\.1.*\[loss\]\n +method = "tropd"\n +outlier = "clip"',
        ),
        ("run.keep_checkpoints=0", r"run\.keep_checkpoints must be at least 1"),
        ("run.dir=''", r"run\.dir must name a folder"),
        ("evaluation.num_problems=0", r"evaluation\.num_problems must be at least 1"),
    ],
)
def test_bad_values(toml: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(toml, [override])


def test_virtual_stages_want_a_multiple_of_the_stages_of_trajectories(toml: Path):
    chunks = ["parallel.pipeline=4", "parallel.virtual_pipeline=2", "parallel.data=2"]
    found = load_config(toml, [*chunks, "rollout.prompts_per_step=6"]).parallel
    assert (found.num_chunks, found.batch_multiple, found.world_size) == (8, 4, 8)
    wrong = "rollout.prompts_per_step=3"
    with pytest.raises(ConfigError, match=r"expected a multiple of 4 .* parallel\.data = 6\."):
        load_config(toml, [*chunks, wrong])
    assert load_config(toml, [chunks[0], chunks[2], wrong]).parallel.batch_multiple == 1


def test_a_pass_of_the_engine_holds_a_token_of_each_sequence(toml: Path):
    limits = ["rollout.max_num_seqs=64", "rollout.max_num_batched_tokens=63"]
    with pytest.raises(ConfigError, match=r"at least rollout\.max_num_seqs = 64.*found 63"):
        load_config(toml, limits)
    assert load_config(toml, limits[:1]).rollout.max_num_seqs == 64


def test_arguments_of_a_template_are_a_table_everywhere(toml: Path, tmp_path: Path):
    expected = {
        "enable_thinking": False,
        "effort": "low",
        "chat template": 1.5,
        "tools": [{"type": "function", "function": {"name": "f", "é\x7f": []}}],
    }
    lines = """
        [rollout.chat_template_kwargs]
        enable_thinking = false
        effort = "low"
        "chat template" = 1.5
        [[rollout.chat_template_kwargs.tools]]
        type = "function"
        function = { name = "f", "é\\u007f" = [] }
    """
    in_file = tmp_path / "job" / "table.toml"
    in_file.write_text(SMALLEST + lines)
    inline = (
        'rollout.chat_template_kwargs={"chat template" = 1.5, effort = "high", '
        'tools = [{type = "function", function = {name = "f", "é\\u007f" = []}}]}'
    )
    dotted = ("enable_thinking=false", "effort=low")
    for config in (
        load_config(in_file),
        load_config(toml, [inline, *(f"rollout.chat_template_kwargs.{text}" for text in dotted)]),
    ):
        assert config.rollout.chat_template_kwargs == expected
        saved = json.loads(json.dumps(config_to_dict(config)))
        assert config_from_dict(saved) == config
        copy = tmp_path / "copy.toml"
        copy.write_text(config_to_toml(config))
        assert load_config(copy) == config


def test_options_of_megatron_are_tables_everywhere(toml: Path, tmp_path: Path):
    text = """
        [megatron.model]
        recompute_granularity = "selective"
        recompute_modules = ["core_attn", "mlp"]
        [megatron.ddp]
        overlap_grad_reduce = true
        bucket_size = 1000
    """
    whole = tmp_path / "whole.toml"
    whole.write_text(SMALLEST + text)
    overrides = [
        "megatron.model.recompute_granularity=selective",
        'megatron.model.recompute_modules=["core_attn", "mlp"]',
        "megatron.ddp={overlap_grad_reduce = true, bucket_size = 1000}",
    ]
    for config in (load_config(whole), load_config(toml, overrides)):
        assert config.megatron.model == {
            "recompute_granularity": "selective",
            "recompute_modules": ["core_attn", "mlp"],
        }
        assert config.megatron.ddp == {"overlap_grad_reduce": True, "bucket_size": 1000}
        assert config.megatron.optimizer == config.megatron.teacher == {}
        assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    for override, message in (
        ("megatron.model=full", r"megatron\.model must be a table"),
        ("megatron.optimizer.optimizer_offload_fraction=inf", r"optimizer_offload_fraction .*inf"),
        ("megatron.modle.fp8=hybrid", r"Did you mean megatron\.model\?"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(toml, [override])


def test_there_may_be_any_number_of_servers(toml: Path):
    config = load_config(toml, ["rollout.placement=separate", "rollout.num_engines=3"])
    assert config.parallel.world_size == 1 and config.rollout.num_engines == 3


def test_a_method_knows_its_own_settings_only(toml: Path):
    message = (
        r"Unknown config key loss\.outlier of loss\.method = 'opd'\. .*Known here: .*proximal_alpha"
    )
    with pytest.raises(ConfigError, match=message):
        load_config(toml, ["loss.method=opd", "loss.outlier=clip"])


@pytest.mark.parametrize("name", PRESETS)
def test_any_method_survives_json_and_toml(name: str, toml: Path, tmp_path: Path):
    needs = preset(name).needs
    more = ["teacher.reference=student"] if needs.reference else []
    more += ["guidance.golden_field=solution"] if needs.golden else []
    config = load_config(toml, [f"loss.method={name}", "loss.mask_first_ids=[3, 4]", *more])
    assert config.loss == preset(name, mask_first_ids=(3, 4))
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    (tmp_path / "again.toml").write_text(config_to_toml(config))
    assert load_config(tmp_path / "again.toml").loss == config.loss


def test_a_reference_is_a_folder_or_the_student(toml: Path):
    toml.write_text(SMALLEST + '[loss]\nmethod = "delta"\n[teacher]\nreference = "student"\n')
    itself = load_config(toml)
    assert itself.teacher.reference == "student" and itself.reference == itself.model.student
    toml.write_text(toml.read_text().replace('"student"\n', '"base"\n'))
    folder = str(toml.parent.resolve() / "base")
    assert load_config(toml).reference == load_config(toml).teacher.reference == folder
    named = load_config(toml, ["teacher.reference=./student"])
    assert named.reference == str(Path("student").resolve())


STABLE_OPD = ("loss.method=stable_opd", "teacher.reference=student")
GOLDEN = "guidance.golden_field=solution"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.method=exopd"], "'exopd' compares with a reference model and needs teacher.ref"),
        (["loss.method=stable_opd"], "'stable_opd' compares with a reference model and needs"),
        ([*STABLE_OPD], "'stable_opd' reads golden answers and needs guidance.golden_field"),
        (["guidance.golden_field=solution"], "would be read for nothing: loss.method = 'tropd'"),
        ([*STABLE_OPD, GOLDEN, "rollout.samples_per_prompt=1"], "1 more must be left .* found 1"),
        (
            [*STABLE_OPD, GOLDEN, "guidance.responses=a.jsonl", "guidance.prefixed_per_prompt=4"],
            "and 4 more must be left",
        ),
        ([*STABLE_OPD, GOLDEN, "rollout.mode=a:B"], 'needs rollout.mode = "single_turn", found'),
        ([*STABLE_OPD, GOLDEN, "rollout.recorded=a.jsonl"], "does not read guidance.golden_field"),
        (["teacher.reference=student"], "would be loaded for nothing: loss.method = 'tropd'"),
        (["loss.method=erpd_teacher"], "'erpd_teacher' fits the outcomes of recorded rollouts"),
        (
            ["rollout.recorded=a.jsonl", "guidance.responses=b.jsonl"],
            "does not read guidance.responses",
        ),
        (["rollout.recorded=a.jsonl", "rollout.mode=a:B"], "does not read rollout.mode"),
        (["rollout.recorded=a.jsonl", "rollout.behaviour=cooled"], "not read rollout.behaviour"),
        (
            ["rollout.recorded=a.jsonl", "rollout.first_new_tokens=1", "rollout.growth_steps=1"],
            "does not read rollout.first_new_tokens",
        ),
        (
            ["teacher.offload=host", 'megatron.teacher={fp8="hybrid", fp8_recipe="tensorwise"}'],
            r"beside megatron\.teacher\.fp8: Transformer Engine keeps copies",
        ),
        (["teacher.offload=disk"], "teacher.offload must be one of"),
    ],
)
def test_models_and_rollouts_that_the_loss_lacks_or_ignores(overrides, message, toml: Path):
    with pytest.raises(ConfigError, match=message):
        load_config(toml, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALLEST.replace("steps = 10", ""), r"train\.steps is missing"),
        (SMALLEST.replace('[run]\ndir = "runs/x"', ""), "Config key run is missing"),
        (SMALLEST + "[extra]\n", "Unknown config key extra"),
        (SMALLEST.replace("[train]", "[train"), "is not valid TOML"),
        (
            SMALLEST.replace("[train]\nsteps = 10", "").replace("[model]", "train = 3\n[model]"),
            r"\[train\] must be a table, found 3",
        ),
    ],
)
def test_bad_files(toml: Path, text: str, message: str):
    toml.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(toml)


def test_missing_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        load_config(tmp_path)
    other = tmp_path / "latin.toml"
    other.write_bytes(b"# caf\xe9")
    with pytest.raises(ConfigError, match=r"is not UTF-8, as TOML is: byte 5 is 0xe9"):
        load_config(other)


def test_override_of_a_section_that_is_not_a_table(toml: Path):
    toml.write_text(
        SMALLEST.replace("[train]\nsteps = 10", "").replace("[model]", "train = 3\n[model]")
    )
    with pytest.raises(ConfigError, match=r"\[train\] must be a table"):
        load_config(toml, ["train.lr=1e-3"])


def test_settings_as_toml_are_read_back_from_anywhere(toml: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / "copy.toml"
    for config in (
        load_config(toml),
        load_config(toml, ['rollout.prompts="é \\"x\\".jsonl"', "rollout.stop_token_ids=[1, 2]"]),
        *map(load_config, (*METHODS, *RECIPES)),
    ):
        copy.write_text(config_to_toml(config))
        assert load_config(copy) == config


METHODS = sorted((REPOSITORY / "configs" / "methods").glob("*.toml"))
SAME_LOSS = {"tropd_aopd": "aopd"}
"""Config -> the preset that its loss is; other sections make it a method."""
RECIPES = sorted((REPOSITORY / "configs" / "recipes").glob("*.toml"))


def test_every_preset_has_a_config():
    assert {path.stem for path in METHODS} == {*PRESETS, *SAME_LOSS}


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_method_config_is_its_preset_on_the_arithmetic_pair(path: Path):
    config = load_config(path)
    assert config.loss == preset(SAME_LOSS.get(path.stem, path.stem))
    assert config.run.dir == f"runs/methods/{path.stem}"
    example = load_config(REPOSITORY / "examples" / "arithmetic" / "tropd.toml")
    for section in ("model", "parallel", "train", "evaluation"):
        found, expected = (getattr(c, section) for c in (config, example))
        assert _resolved(found) == _resolved(expected), section
    is_gkd, is_guided = path.stem.startswith("gkd"), path.stem.startswith(("gkd", "tropd"))
    assert (config.guidance.responses is not None) == is_guided
    assert config.guidance.schedule == ("constant" if is_gkd else "cosine")
    half = config.rollout.samples_per_prompt // 2
    assert config.guidance.prefixed_per_prompt == (half if is_gkd else 1)
    assert config.rollout.top_p == (0.9 if path.stem == "local_support" else 1.0)


def _resolved(section: object) -> dict[str, object]:
    """The section with its files as one path each, however they were written."""
    return {
        f.name: Path(value).resolve() if f.metadata.get("path") else value
        for f in dataclasses.fields(section)
        if (value := getattr(section, f.name)) is not None
    }
