"""What is in a model folder is read in one way, whoever asks: trainer, engine, converter, planner.

Folders as users have them: files that are not the model's, tensors that nobody needs, keys that are
left to transformers, and contradictions, of which each side is named.
"""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from megatron_tropd.base.errors import InputError
from megatron_tropd.cli import main as cli
from megatron_tropd.config import ParallelConfig, load_config
from megatron_tropd.convert.checks import check_parallel, check_tensors
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.hf_folder import EMBEDDING, HEAD, INDEX, SINGLE, HFFolder, read_config
from megatron_tropd.convert.linked_folder import link_folder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.convert.to_hf import ToHF, megatron_to_hf
from megatron_tropd.convert.to_megatron import ToMegatron, hf_to_megatron
from megatron_tropd.convert.torch_dist import TorchDistReader
from megatron_tropd.data.tokenizers import load_tokenizer, stop_token_ids
from megatron_tropd.distill.inputs import load_inputs
from megatron_tropd.planning.parameters import open_architecture
from megatron_tropd.rollout.engines.engine import RolloutEngine, context_length, engine_tensors
from megatron_tropd.tasks.sample_files import model_identity
from tests.convert_commands import main_to_hf, main_to_megatron

Tensors = dict[str, torch.Tensor]
Make = Callable[..., Path]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 4711\n"


@pytest.fixture
def make(tiny_qwen3: Path, tmp_path: Path) -> Make:
    """``make(tensors=..., drop=..., **config)``: a changed copy of a tiny tied Qwen3."""

    def copy(
        tensors: Callable[[Tensors], Tensors] = lambda found: found,
        drop: str = "",
        source: Path = tiny_qwen3,
        **config: Any,
    ) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(source, folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        found = json.loads((folder / "config.json").read_text()) | config
        found.pop(drop, None)
        (folder / "config.json").write_text(json.dumps(found))
        changed = tensors(load_file(folder / SINGLE))
        save_file(changed, folder / SINGLE, {"format": "pt"})
        return folder

    return copy


@pytest.fixture
def settings(tiny_qwen3: Path, tmp_path: Path) -> Path:
    """A config of a run of the tiny Qwen3 with itself."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i} + {i} ="}) + "\n" for i in range(4)))
    path = tmp_path / "tropd.toml"
    path.write_text(f"""
        [model]
        student = "{tiny_qwen3}"
        teacher = "{tiny_qwen3}"
        [rollout]
        prompts = "{prompts}"
        max_new_tokens = 8
        prompts_per_step = 4
        samples_per_prompt = 1
        [train]
        steps = 1
        [run]
        dir = "{tmp_path / "run"}"
    """)
    return path


@pytest.fixture
def command(settings: Path, capsys) -> Callable[..., tuple[int, str]]:
    """``command(name, *arguments)``: exit code and text of a command that starts nothing."""

    def run(name: str, *arguments: str) -> tuple[int, str]:
        dry = ["--dry-run"] if name == "distill" else ["--prompt-tokens", "16"]
        code = cli.main([name, str(settings), *dry, *arguments])
        out, err = capsys.readouterr()
        return code, out + err

    return run


def head_only(tensors: Tensors) -> Tensors:
    """The matrix of a tied model under the name of its output layer."""
    return {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}


def with_head(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    """A tied model with an output layer beside its embedding."""
    return lambda tensors: tensors | {HEAD: change(tensors[EMBEDDING].clone())}


def logits(folder: Path) -> torch.Tensor:
    """Of transformers, for a few ids."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([[1, 40, 7, 200]])).logits


# Files.


def test_files_that_are_not_the_models_are_named_and_not_read(
    make: Make, command, tiny_qwen3: Path, tmp_path: Path
):
    folder = make()
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    save_file({"base.q_proj.lora_A.weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    found = HFFolder(folder)
    assert found.unread == ["adapter_model.safetensors", "consolidated.safetensors"]
    assert found.names == HFFolder(tiny_qwen3).names
    assert engine_tensors(found.config) == engine_tensors(HFFolder(tiny_qwen3).config)
    for who in ("student", "teacher"):
        code, text = command("distill", f"model.{who}={folder}")
        assert code == 0 and f"consolidated.safetensors ({who}" in text
    identities = [model_identity(folder), model_identity(folder, whole=True)]
    (folder / "consolidated.safetensors").unlink()
    assert identities == [model_identity(folder), model_identity(folder, whole=True)]
    link_folder(found, _new(tmp_path / "linked"))
    assert sorted(p.name for p in (tmp_path / "linked").iterdir()) == ["config.json", SINGLE, INDEX]
    hf_to_megatron(ToMegatron(folder, tmp_path / "m"))
    copied = {path.name for path in (tmp_path / "m" / "hf").iterdir()}
    assert "config.json" in copied and "adapter_config.json" not in copied


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _in_two_files(folder: Path, twice: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """One norm lies in both files, as ``twice`` makes it in the second."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file_name, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file_name, {"format": "pt"})
    again = {names[0]: twice(tensors[names[0]].clone())} | {n: tensors[n] for n in names[3:]}
    save_file(again, folder / "b.safetensors", {"format": "pt"})
    weight_map = {name: file_name for file_name, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_tensor_in_two_files_must_be_the_same(make: Make):
    folder = make()
    _in_two_files(folder, lambda tensor: tensor)
    check_tensors(HFFolder(folder))


def test_a_tensor_that_differs_between_files_is_refused(make: Make, command):
    folder = make()
    _in_two_files(folder, lambda tensor: tensor + 1)
    for who in ("student", "teacher"):
        code, text = command("distill", f"model.{who}={folder}")
        assert code == 2 and "a.safetensors and in b.safetensors" in text and str(folder) in text


def test_a_config_that_names_its_weights_is_honoured_or_refused(make: Make):
    assert HFFolder(make(transformers_weights=SINGLE)).files == [SINGLE]


def test_other_weights_in_the_config_are_refused(make: Make):
    with pytest.raises(InputError, match=r"transformers_weights = 'other\..*load model"):
        HFFolder(make(transformers_weights="other.safetensors"))


# Tensors.


@pytest.mark.parametrize("middle", ["", "_pos"])
@pytest.mark.parametrize("kind", ["inv_freq", "cos_cached", "sin_cached"])
def test_tensors_that_every_reader_computes_do_not_count(kind: str, middle: str, make: Make):
    name = f"model.layers.0.self_attn.rotary{middle}_emb.{kind}"
    folder = HFFolder(make(lambda tensors: tensors | {name: torch.ones(16)}))
    check_tensors(folder)
    assert name not in engine_tensors(folder.config)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_an_output_layer_that_differs_from_a_tied_embedding(who: str, make: Make, command):
    folder = make(with_head(lambda head: 2 * head))
    code, text = command("distill", f"model.{who}={folder}")
    assert code == 2 and str(folder) in text
    assert "tie_word_embeddings = true" in text and f"{HEAD} differs from {EMBEDDING}" in text


def test_an_engine_refuses_it_before_it_starts(make: Make, tmp_path: Path):
    folder = make(with_head(lambda head: 2 * head))
    with pytest.raises(InputError, match=f"{folder}.*differs"):
        RolloutEngine(folder, max_model_len=16, log_file=tmp_path / "engine.log")
    assert not list(tmp_path.glob(".engine-*"))


@pytest.mark.parametrize("value", [lambda t: t, lambda t: t.double()], ids=["same", "wider"])
def test_an_output_layer_that_is_the_tied_embedding(value: Callable, make: Make):
    check_tensors(HFFolder(make(with_head(value))))


def test_an_output_layer_with_a_nan_is_compared_by_its_bits(make: Make):
    def nan(tensors: Tensors) -> Tensors:
        tensors[EMBEDDING][0, 0] = float("nan")
        return tensors | {HEAD: tensors[EMBEDDING].clone()}

    check_tensors(HFFolder(make(nan)))


def test_an_output_layer_that_is_missing_says_what_the_config_says(make: Make):
    with pytest.raises(InputError, match=r"misses 1 .*lm_head.*is false \(by default\)"):
        check_tensors(HFFolder(make(drop="tie_word_embeddings")))


def test_a_tied_model_stored_as_its_output_layer(make: Make, command, tiny_qwen3: Path, tmp_path):
    folder = make(head_only)
    found, plain = HFFolder(folder), HFFolder(tiny_qwen3)
    assert found.names == plain.names and found.stored_name(EMBEDDING) == HEAD
    assert torch.equal(found.read(EMBEDDING), plain.read(EMBEDDING))
    for dim in (0, 1):
        part = found.read(EMBEDDING, dim=dim, start=3, stop=9)
        assert torch.equal(part, plain.read(EMBEDDING, dim=dim, start=3, stop=9))
    assert engine_tensors(found.config) == engine_tensors(plain.config)
    for who in ("student", "teacher"):
        assert command("distill", f"model.{who}={folder}")[0] == 0
    linked = link_folder(found, _new(tmp_path / "linked"))
    files = set(json.loads((linked / INDEX).read_text())["weight_map"].values())
    assert files == {path.name for path in linked.glob("*.safetensors")} and len(files) == 2
    held = {name for file_name in files for name in load_file(linked / file_name)}
    assert EMBEDDING in held  # which is what vLLM looks for
    assert torch.equal(logits(linked), logits(tiny_qwen3))


def test_it_gets_its_own_name_back_from_a_conversion(make: Make, tmp_path: Path, capsys):
    folder = make(head_only)
    dry = ["--hf", str(folder), "--megatron", str(tmp_path / "m"), "--dry-run"]
    assert main_to_megatron(dry) == 0
    assert f"{EMBEDDING} | stored as {HEAD}" in capsys.readouterr().out
    hf_to_megatron(ToMegatron(folder, tmp_path / "m"))
    assert MegatronFolder(tmp_path / "m").stored_name(EMBEDDING) == HEAD
    megatron_to_hf(ToHF(tmp_path / "m", tmp_path / "hf"))
    before, after = load_file(folder / SINGLE), load_file(tmp_path / "hf" / SINGLE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("limit", [10**9, 20_000], ids=["one file", "files"])
def test_it_gets_its_own_name_back_from_a_run(limit: int, make: Make, tmp_path: Path):
    from megatron_tropd.mcore.export import write_folder

    source, out = HFFolder(make(head_only)), tmp_path / "out"
    names = [name for name in engine_tensors(source.config) if name != HEAD]
    stream = iter([(name, source.read(name)) for name in names])
    write_folder(stream, source, out, torch.float32, limit)
    again = HFFolder(out)
    assert len(again.files) == (1 if limit == 10**9 else len(again.files)) and again.files
    assert again.stored_name(EMBEDDING) == HEAD and again.names == source.names
    assert all(again.equal(name, name) for name in names)


def test_an_index_alone_may_hold_it_too(make: Make, capsys, tmp_path: Path):
    folder = make(head_only)
    weight_map = dict.fromkeys(load_file(folder / SINGLE), "absent.safetensors")
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    dry = ["--hf", str(folder), "--megatron", str(tmp_path / "m"), "--dry-run"]
    assert main_to_megatron(dry) == 0
    for option in ("--tensor-parallel", "--pipeline-parallel"):
        assert main_to_megatron([*dry, option, "3"]) == 2
        assert "must divide the model's" in capsys.readouterr().err


# config.json.


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_no_key_left_to_its_default_is_a_traceback(who: str, make: Make, command, tmp_path: Path):
    folder = make()
    config = json.loads((folder / "config.json").read_text())
    for key in config:
        left = {name: value for name, value in config.items() if name != key}
        (folder / "config.json").write_text(json.dumps(left))
        for name in ("distill", "plan"):
            code, text = command(name, f"model.{who}={folder}")
            assert code in (0, 2) and "Traceback" not in text, (key, text)
            assert code == 0 or str(folder) in text, (key, text)
    left = {name: value for name, value in config.items() if name != "max_position_embeddings"}
    (folder / "config.json").write_text(json.dumps(left))
    assert command("distill", f"model.{who}={folder}")[0] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_of_any_key_is_a_traceback(
    family: str, make: Make, tiny_model: Callable[..., Path]
):
    folder = make(source=tiny_model(family, tie_word_embeddings=True))
    config = json.loads((folder / "config.json").read_text())
    others = {"rope_scaling", "sliding_window", "layer_types", "head_dim", "num_local_experts"}
    for key in config.keys() | others:
        for value in (..., None, "8", 8.0, -1, [1], {"a": 1}):
            changed = {name: v for name, v in (config | {key: value}).items() if v is not ...}
            (folder / "config.json").write_text(json.dumps(changed))
            try:
                open_architecture(str(folder), "student")
            except InputError as error:
                assert str(folder) in str(error), (key, value)


def test_a_size_left_to_its_default_is_named_beside_the_shape(make: Make):
    with pytest.raises(
        InputError, match=r"\[259, 64\]\. config\.json leaves out vocab_size \(151936\)"
    ):
        check_tensors(HFFolder(make(drop="vocab_size")))


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 1024),
        ({"type": "linear", "factor": 1.5}, 384),
        (
            {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            256,
        ),
        ({"rope_type": "default"}, 256),
    ],
)
def test_everybody_counts_the_same_context(
    rope: dict, context: int, make: Make, settings: Path, command, tmp_path: Path
):
    folder = make(drop="rope_parameters", rope_scaling=rope, rope_theta=10000.0)
    assert model_shape(read_config(folder)).context == context_length(folder) == context
    models = [f"model.student={folder}", f"model.teacher={folder}"]
    assert load_inputs(load_config(settings, models)).context == context
    for name, room in (("distill", []), ("plan", [])):
        fits = command(name, *models, f"rollout.max_new_tokens={context - 16}", *room)
        assert fits[0] == 0 or "tokens_per_micro_batch" in fits[1]
        code, text = command(name, *models, f"rollout.max_new_tokens={context}")
        assert code == 2 and f"context of {context} tokens" in text
    hf_to_megatron(ToMegatron(folder, tmp_path / "m"))
    args: Namespace = TorchDistReader(tmp_path / "m" / "release").common()["args"]
    assert args.max_position_embeddings == args.seq_length == context


@pytest.mark.parametrize("factor", [None, "4", 0.0, True])
def test_a_factor_that_stretches_nothing_is_refused(factor: Any, make: Make):
    rope = {"rope_type": "linear", "factor": factor, "rope_theta": 10000.0}
    with pytest.raises(InputError, match=r"factor"):
        model_shape(read_config(make(rope_parameters=rope)))


@pytest.mark.parametrize(
    ("family", "field", "read"),
    [
        ("qwen2", "attention_bias", False),
        ("mixtral", "attention_bias", False),
        ("qwen3", "mlp_bias", False),
        ("qwen3_moe", "mlp_bias", False),
        ("llama", "attention_bias", True),
        ("mistral", "attention_bias", True),  # not read by transformers, but by vLLM
        ("llama", "mlp_bias", True),
        ("qwen3", "attention_bias", True),
        ("qwen3_moe", "attention_bias", True),
    ],
)
def test_a_field_is_refused_only_where_somebody_reads_it(
    family: str, field: str, read: bool, make: Make, tiny_model: Callable[..., Path], tmp_path: Path
):
    folder = make(source=tiny_model(family), **{field: True})
    if read:
        with pytest.raises(InputError, match=f"{field} = True"):
            model_shape(read_config(folder))
        return
    check_parallel(read_config(folder), ParallelConfig(), who="student")
    linked = link_folder(HFFolder(folder), _new(tmp_path / "linked"))
    assert field not in json.loads((linked / "config.json").read_text())  # vLLM might read it
    assert torch.equal(logits(folder), logits(tiny_model(family)))


# EOS ids.


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        (5, {5}),
        ([5, 7], {5, 7}),
        ([[5], [7, [9]]], {5, 7, 9}),
        ("5", {5}),
        (["5", 7, None], {5, 7}),
        ("<unk>", {0}),
        (["<s>", "7"], {1, 7}),
        (None, set()),
        ([], set()),
    ],
)
@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_eos_ids_of_any_place_and_form_end_a_response(
    place: str, value: Any, ids: set[int], make: Make, command
):
    folder = make()
    path = folder / place
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | {"eos_token_id": value}))
    assert set(stop_token_ids(folder)) == ids | {2}
    code, text = command("distill", f"model.student={folder}")
    assert code == 0 and f"stop ids:   {', '.join(map(str, sorted(ids | {2})))}" in text


@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [259, -1, 2.5, True, "<none>", {"id": 2}])
def test_an_eos_that_is_no_token_names_the_file(place: str, value: Any, make: Make, command):
    folder = make()
    path = folder / place
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | {"eos_token_id": value}))
    code, text = command("distill", f"model.student={folder}")
    assert code == 2 and str(path) in text and "eos_token_id" in text


def test_class_defaults_are_no_eos_ids(make: Make):
    assert stop_token_ids(make(drop="eos_token_id")) == (2,)  # the tokenizer's


# Files that are not what they seem.


@pytest.mark.parametrize(
    "name", ["config.json", SINGLE, INDEX, "tokenizer.json", "generation_config.json"]
)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_git_lfs_pointer_is_called_one(name: str, who: str, make: Make, command):
    folder = make()
    (folder / name).write_text(POINTER)
    code, text = command("distill", f"model.{who}={folder}")
    if (who, name) == ("teacher", "generation_config.json"):
        assert code == 0  # nobody reads it
        return
    assert code == 2 and str(folder / name) in text
    assert "4711 bytes" in text and "git lfs pull" in text


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\xef\xbb\xbf{}", "byte order mark"), (b'{"a": ' + b"[" * 200_000, "as JSON: maximum rec")],
)
def test_json_that_nobody_reads_names_its_file(
    name: str, content: bytes, said: str, make: Make, command
):
    folder = make()
    (folder / name).write_bytes(content)
    code, text = command("distill", f"model.student={folder}")
    assert code == 2 and f"{folder / name} " in text and said in text


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(dtype: torch.dtype, make: Make, command):
    folder = make(lambda found: found | {"model.norm.weight": found["model.norm.weight"].to(dtype)})
    code, text = command("distill", f"model.student={folder}")
    assert code == 2 and f"model.norm.weight ({dtype})" in text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model-00001-of-00001.safetensors", f"name it {SINGLE}"),
        ("model.gguf", "GGUF is not read"),
        ("pytorch_model.bin", "--allow-pickle"),
    ],
)
def test_weights_under_another_name_are_named(name: str, said: str, make: Make):
    folder = make()
    (folder / SINGLE).rename(folder / name)
    with pytest.raises(InputError, match=f"Found {name}: .*{said}"):
        HFFolder(folder)


def test_a_link_to_nothing_is_called_one(make: Make):
    folder = make()
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("../blobs/12ab")
    with pytest.raises(InputError, match=r"model\.safetensors is a link to \.\./blobs/12ab"):
        HFFolder(folder)


def test_a_pickled_git_lfs_pointer_is_called_one(make: Make, tmp_path: Path):
    folder = make()
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_text(POINTER)
    with pytest.raises(InputError, match="git lfs pull"):
        hf_to_megatron(ToMegatron(folder, tmp_path / "m", allow_pickle=True))


def _entry(**change: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | change
    entry = {key: value for key, value in entry.items() if value is not ...}
    return json.dumps({"a.weight": entry}).encode()


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (_entry(data_offsets=...), "missing field `data_offsets`"),
        (_entry(dtype=..., shape=...), "missing field `dtype`"),
        (_entry(dtype="F33"), "unknown variant `F33`"),
        (_entry(dtype="F4", shape=[8]), "no type for these tensors: {'a.weight': 'F4'}"),
        (_entry(dtype=4), "damaged"),
        (_entry(shape=4), "invalid type: integer `4`"),
        (_entry(shape=[-1]), "invalid value: integer `-1`"),
        (_entry(shape=[True]), "invalid type: boolean `true`"),
        (_entry(data_offsets=[0]), "invalid length 1"),
        (_entry(data_offsets=["0", "4"]), 'invalid type: string "0"'),
        (_entry(data_offsets=[4, 8]), "invalid offset for tensor `a.weight`"),
        (_entry(shape=[2]), "invalid shape, data type, or offset"),
        (b'{"a.weight": 1}', "invalid type: integer `1`"),
        (b"[1]", "invalid type: sequence"),
        (b"{", "invalid JSON"),
        (b"\xc3\x28\xff", "invalid UTF-8"),
        (b"[" * 100_000, "damaged"),
    ],
)
def test_a_damaged_header_says_what_is_damaged(header: bytes, said: str, make: Make):
    folder = make()
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    (folder / SINGLE).write_bytes(content)
    with pytest.raises(InputError) as error:
        HFFolder(folder)
    assert str(folder / SINGLE) in str(error.value) and said in str(error.value)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_checkpoint_of_git_lfs_pointers_is_called_one(name: str, make: Make, tmp_path: Path):
    hf_to_megatron(ToMegatron(make(), tmp_path / "m"))
    release = tmp_path / "m" / "release"
    (release / name).write_text(POINTER)
    with pytest.raises(InputError, match=f"{name} is a Git LFS pointer"):
        MegatronFolder(tmp_path / "m").reader.common()


@pytest.mark.parametrize("content", ['{"tensors": []}', '{"tensors": {"a": {"dtype": "F32"}}}'])
def test_damaged_checksums_of_a_checkpoint(content: str, make: Make, tmp_path: Path):
    hf_to_megatron(ToMegatron(make(), tmp_path / "m"))
    (tmp_path / "m" / "release" / "tensors.json").write_text(content)
    with pytest.raises(InputError, match=r"tensors\.json is damaged"):
        MegatronFolder(tmp_path / "m")


# Options.


def test_only_commands_that_have_it_name_the_option(make: Make, command, tmp_path: Path, capsys):
    """A checkpoint without companions: the remedy works for every command that says it."""
    from megatron_tropd.integrations.startup import open_teachers
    from tests.unit_tests.test_megatron_lm_startup import teach

    folder, checkpoint = make(), tmp_path / "m"
    hf_to_megatron(ToMegatron(folder, checkpoint))
    companions = shutil.move(checkpoint / "hf", tmp_path / "moved")
    for name in ("distill", "plan"):
        code, text = command(name, f"model.student={checkpoint}")
        assert code == 2 and "--hf-config" not in text and f"into {checkpoint / 'hf'}" in text
    arguments = ["--megatron", str(checkpoint), "--hf", str(tmp_path / "out")]
    assert main_to_hf(arguments) == 2
    assert "Or give --hf-config" in capsys.readouterr().err
    with pytest.raises(InputError, match="Or give --tropd-teacher-hf-config"):
        open_teachers(teach(checkpoint), 259)
    shutil.copytree(companions, checkpoint / "hf")
    assert command("distill", f"model.student={checkpoint}")[0] == 0


def test_a_pair_begins_its_texts_alike(make: Make, settings: Path, command):
    """Here one tokenizer writes BOS before a text and the other does not."""
    folder = make()
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path))
    for who in ("student", "teacher"):
        code, text = command("distill", f"model.{who}={folder}")
        assert code == 2 and "prompts.jsonl, line 1: the tokenizers begin a text" in text
        assert f"the {who}'s with '<s>'" in text and "'s with ''" in text


def test_odd_forms_hinder_no_tokenizer(make: Make):
    assert len(load_tokenizer(make(eos_token_id=[["2"]]))) == 259
