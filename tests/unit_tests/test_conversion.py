"""HF <-> Megatron: bit for bit, everything accounted for, damage and interruption noticed."""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import warm_commands
from safetensors.torch import load_file, save_file

from megatron_tropd.base.errors import InputError
from megatron_tropd.cli.main import main
from megatron_tropd.convert import publish, to_hf, to_megatron, torch_dist  # noqa: F401 (named by PHASES)
from megatron_tropd.convert.checkpoint_layout import checkpoint_layout, object_name
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.convert.megatron_folder import MegatronFolder
from megatron_tropd.convert.to_hf import ToHF, megatron_to_hf
from megatron_tropd.convert.to_megatron import ToMegatron, hf_to_megatron
from megatron_tropd.convert.torch_dist import TorchDistReader
from tests.convert_commands import main_to_hf, main_to_megatron
from tests.ranks import run_in_process
from tests.tiny_models import FAMILIES

REPOSITORY = Path(__file__).resolve().parents[2]
REAL = ("stories260K", "babyllama-tok105", "stories260K-hd32", "babyllama-tok105-hd32")


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an HF folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_weights(one: Path, other: Path) -> None:
    """Names, types, shapes and bits."""
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and tensor.shape == right[name].shape
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


def assert_same_files(one: Path, other: Path) -> None:
    """Everything that is not weights, byte for byte."""
    for path in one.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            assert (other / path.name).read_bytes() == path.read_bytes(), path.name


def there_and_back(source: Path, out: Path, **options) -> Path:
    """HF -> Megatron -> HF."""
    hf_to_megatron(ToMegatron(source, out / "megatron", **options))
    megatron_to_hf(ToHF(out / "megatron", out / "hf"))
    return out / "hf"


def retyped(source: Path, out: Path, dtype: torch.dtype) -> Path:
    """The folder with weights of another type and an honest config."""
    shutil.copytree(source, out)
    save_file(
        {name: t.to(dtype) for name, t in tensors(source).items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture
def llama(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny llama with a chat template and a generation config, to be damaged."""
    folder = tmp_path / "llama"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}\n")
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family: str, tied: bool, tiny_model: Callable[..., Path], tmp_path: Path):
    source = tiny_model(family, tie_word_embeddings=tied)
    back = there_and_back(source, tmp_path)
    assert_same_weights(source, back)
    assert_same_files(source, back)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_survives(dtype: torch.dtype, llama: Path, tmp_path: Path):
    source = retyped(llama, tmp_path / "half", dtype)
    back = there_and_back(source, tmp_path, tensor_parallel=2, workers=1)
    assert_same_weights(source, back)
    assert_same_files(source, back)
    templates = "additional_chat_templates/tools.jinja"
    assert (back / templates).read_bytes() == (source / templates).read_bytes()


def test_only_known_kinds_of_files_are_copied_and_the_others_named(
    llama: Path, tmp_path: Path, capsys
):
    kept = ("LICENSE", "NOTICE.txt", "README.md", "merges.txt", "tokenizer.model", "qwen.tiktoken")
    dropped = (
        "model.onnx",
        "modeling_llama.py",
        "rust_model.ot",
        "tokens.pkl",
        "training_args.bin",
    )
    for name in (*kept, *dropped, "pytorch_model.bin", "pytorch_model.bin.index.json"):
        (llama / name).write_text("x")
    config = json.loads((llama / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_llama.Model"}
    (llama / "config.json").write_text(json.dumps(config))
    command = ["--hf", str(llama), "--megatron", str(tmp_path / "m")]
    assert main_to_megatron(command) == 0
    copied = {path.name for path in (tmp_path / "m" / "hf").iterdir()}
    assert copied >= {*kept, "config.json", "tokenizer.json", "chat_template.jinja"}
    assert not copied & {*dropped, "pytorch_model.bin", "pytorch_model.bin.index.json"}
    notes = capsys.readouterr().err
    assert re.findall(r"note: (\S+) \| not copied", notes) == sorted(dropped)
    assert "(auto_map), which is not run: the model is taken for transformers' llama" in notes


@pytest.mark.parametrize("name", REAL)
def test_real_models_there_and_back(name: str, shared_data: Path, tmp_path: Path):
    source = shared_data / "models" / name
    back = there_and_back(source, tmp_path)
    assert_same_weights(source, back)
    assert_same_files(source, back)


def test_special_numbers_survive(llama: Path, tmp_path: Path):
    """NaN with a payload, infinities, negative zero, subnormals."""
    content = tensors(llama)
    bits = torch.tensor([0x7FC00123, 0x7F800000, -0x800000, -0x80000000, 1], dtype=torch.int32)
    content["model.norm.weight"][:5] = bits.view(torch.float32)
    save_file(content, llama / "model.safetensors", metadata={"format": "pt"})
    assert_same_weights(llama, there_and_back(llama, tmp_path))


def test_conversion_of_type(llama: Path, tmp_path: Path):
    hf_to_megatron(ToMegatron(llama, tmp_path / "m", dtype=torch.bfloat16))
    megatron_to_hf(ToHF(tmp_path / "m", tmp_path / "hf"))
    assert_same_weights(retyped(llama, tmp_path / "expected", torch.bfloat16), tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    megatron_to_hf(ToHF(tmp_path / "m", tmp_path / "wide", dtype=torch.float32))
    wide = retyped(tmp_path / "hf", tmp_path / "expected32", torch.float32)
    assert_same_weights(wide, tmp_path / "wide")


def test_float16_must_hold_the_weights(llama: Path, tmp_path: Path):
    content = tensors(llama)
    content["model.norm.weight"][:2] = torch.tensor([1e6, float("inf")])
    save_file(content, llama / "model.safetensors", metadata={"format": "pt"})
    refuse(
        llama,
        tmp_path / "out" / "m",
        r"model\.norm\.weight holds 1e\+06.*65504",
        dtype=torch.float16,
    )
    hf_to_megatron(ToMegatron(llama, tmp_path / "m"))
    with pytest.raises(InputError, match="65504"):
        megatron_to_hf(ToHF(tmp_path / "m", tmp_path / "hf", dtype=torch.float16))
    content["model.norm.weight"][0] = float("nan")
    save_file(content, llama / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(ToMegatron(llama, tmp_path / "infinite", dtype=torch.float16))


def test_a_config_that_names_its_type_twice(llama: Path, tmp_path: Path):
    config = json.loads((llama / "config.json").read_text())
    both = {"dtype": "float32", "torch_dtype": "float32"}
    (llama / "config.json").write_text(json.dumps(config | both))
    hf_to_megatron(ToMegatron(llama, tmp_path / "m", dtype=torch.bfloat16))
    written = json.loads((tmp_path / "m" / "hf" / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


def test_a_read_only_source_gives_an_output_that_can_be_removed(llama: Path, tmp_path: Path):
    templates = "additional_chat_templates"
    (llama / templates).chmod(0o555)
    hf_to_megatron(ToMegatron(llama, tmp_path / "m"))
    assert (tmp_path / "m" / "hf" / templates).stat().st_mode & 0o200


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_progress_ends_at_the_announced_size(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
):
    from megatron_tropd.convert.preview import preview_to_megatron

    job = ToMegatron(tiny_model(family), tmp_path / "m")
    told: list[int] = []
    hf_to_megatron(job, lambda name, size: told.append(size))
    assert sum(told) == preview_to_megatron(job).total_bytes


def test_mixed_types_need_a_decision(llama: Path, tmp_path: Path):
    content = tensors(llama)
    content["model.norm.weight"] = content["model.norm.weight"].bfloat16()
    save_file(content, llama / "model.safetensors")
    assert_same_weights(llama, there_and_back(llama, tmp_path))
    content["model.layers.1.input_layernorm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    save_file(content, llama / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.0\.input_layernorm.*--dtype"):
        hf_to_megatron(ToMegatron(llama, tmp_path / "mixed"))


def test_a_tied_model_may_carry_its_output_layer(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys
):
    source = tmp_path / "tied"
    shutil.copytree(tiny_model("qwen3", tie_word_embeddings=True), source)
    content = tensors(source)
    content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
    save_file(content, source / "model.safetensors")
    assert_same_weights(source, there_and_back(source, tmp_path))
    arguments = ["--hf", str(source), "--megatron", str(tmp_path / "megatron"), "--dry-run"]
    assert main_to_megatron(arguments) == 0
    assert "lm_head.weight | compared with the embedding" in capsys.readouterr().out
    assert main_to_hf(arguments) == 0
    assert "lm_head.weight | copy of model.embed_tokens.weight" in capsys.readouterr().out
    content["lm_head.weight"][3, 3] += 1
    save_file(content, source / "model.safetensors")
    with pytest.raises(InputError, match="tie_word_embeddings"):
        hf_to_megatron(ToMegatron(source, tmp_path / "again"))


def test_weight_files_are_split(llama: Path, tmp_path: Path):
    hf_to_megatron(ToMegatron(llama, tmp_path / "m"))
    megatron_to_hf(ToHF(tmp_path / "m", tmp_path / "hf", max_shard_bytes=100_000))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(llama).values())
    assert len(set(index["weight_map"].values())) > 2
    assert_same_weights(llama, tmp_path / "hf")
    assert_same_weights(llama, there_and_back(tmp_path / "hf", tmp_path / "again"))


def test_no_path_or_identity_is_written(llama: Path, tmp_path: Path):
    """The same model gives the same bytes, wherever and whenever it is converted."""
    for name in ("one", "two"):
        hf_to_megatron(ToMegatron(llama, tmp_path / name, workers=1))
    files = [p for p in sorted((tmp_path / "one").rglob("*")) if p.is_file()]
    for path in files:
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content
        assert content == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


# What the commands print.


def test_dry_run_of_a_published_model(shared_data: Path, tmp_path: Path, capsys):
    """From config.json and the index alone: every tensor and the exact size."""
    source = tmp_path / "meta"
    source.mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(shared_data / "hf-meta" / "Qwen3-1.7B" / name, source)
    arguments = ["--hf", str(source), "--megatron", str(tmp_path / "out"), "--dry-run"]
    assert main_to_megatron(arguments) == 0
    text = capsys.readouterr().out
    index = json.loads((source / "model.safetensors.index.json").read_text())
    lines = [line for line in text.splitlines() if " | " in line]
    assert {line.split()[0] for line in lines} == set(index["weight_map"])
    assert len(lines) == 310
    assert "310 HF tensors, 3,441,149,952 bytes" in text and "as planned" in text
    assert "linear_qkv.weight[27] of [28, 4096, 2048]" in text
    assert not (tmp_path / "out").exists()


def test_commands(llama: Path, tmp_path: Path, capsys):
    megatron, hf = str(tmp_path / "m"), str(tmp_path / "hf")
    there = ["--hf", str(llama), "--megatron", megatron]
    back = ["--megatron", megatron, "--hf", hf, "--max-shard-size", "100KB"]
    assert main_to_megatron(there) == 0
    assert main_to_hf([*back, "--dry-run"]) == 0
    assert "decoder.layers.mlp.linear_fc1.weight[1] of [2, 192, 64]" in capsys.readouterr().out
    assert not Path(hf).exists()
    assert main_to_hf(back) == 0
    assert_same_weights(llama, Path(hf))
    assert main_to_hf(back) == 2
    assert "exists already. Give --force" in capsys.readouterr().err
    assert main_to_hf([*back, "--force"]) == 0
    with pytest.raises(SystemExit):
        main_to_hf([*back, "--max-shard-size", "0"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [[], ["--dtype", "bfloat16"]])
def test_verify(dtype: list[str], llama: Path, tmp_path: Path):
    """The command in processes of their own; a wrong tensor is found."""
    hf, megatron, back = str(llama), str(tmp_path / "m"), str(tmp_path / "hf")
    there = ["convert", "to-megatron", "--hf", hf, "--megatron", megatron, "--verify", *dtype]
    said = warm_commands.run(there, folder=REPOSITORY)
    assert said.returncode == 0, said.stderr
    assert "21 of 21 tensors are equal bit for bit" in said.stdout
    assert "logits differ by at most" in said.stdout and "verify: passed" in said.stdout
    if dtype:
        return
    other = tensors(llama)
    other["model.norm.weight"][0] += 1
    save_file(other, llama / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(llama, back)
    from megatron_tropd.mcore.verify import verify

    result = verify(Path(back), Path(megatron), prompts=[[1, 2, 3]])
    assert not result.passed and result.differing == ["model.norm.weight"]
    assert result.max_difference > 0.01, "the logits show it too"


@pytest.mark.slow
@pytest.mark.parametrize("source", ["float16", "bfloat16", "pickled"])
def test_verify_of_other_types(source: str, llama: Path, tmp_path: Path):
    """Half precision to the other half, whose bits differ; weights that were pickled."""
    options = ["--allow-pickle"]
    if source == "pickled":
        torch.save(tensors(llama), llama / "pytorch_model.bin")
        (llama / "model.safetensors").unlink()
    else:
        llama = retyped(llama, tmp_path / "half", getattr(torch, source))
        options = ["--dtype", "bfloat16" if source == "float16" else "float16"]
    hf, megatron, back = str(llama), str(tmp_path / "m"), str(tmp_path / "back")
    commands = [["to-megatron", "--hf", hf, "--megatron", megatron, *options]]
    if source != "pickled":
        commands += [["to-hf", "--megatron", megatron, "--hf", back, "--dtype", source]]
    for command in commands:
        code = run_in_process(_convert, ["convert", *command, "--verify"], tmp_path / "said")
        said = (tmp_path / "said").read_text()
        assert code == 0, said
        assert "21 of 21 tensors are equal" in said and "verify: passed" in said


def _convert(arguments: list[str], said: Path) -> None:
    with said.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        sys.exit(main(arguments))


def test_verify_is_refused_before_the_conversion(llama: Path, tmp_path: Path, capsys):
    arguments = ["--hf", str(llama), "--megatron", str(tmp_path / "m"), "--verify"]
    assert main_to_megatron([*arguments, "--prompt", ""]) == 2
    for path in llama.glob("tokenizer*"):
        path.unlink()
    assert main_to_megatron(arguments) == 2
    assert "holds no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


# What is refused before anything is written.


def refuse(source: Path, out: Path, match: str, **options) -> None:
    """The conversion says ``match`` and leaves nothing."""
    with pytest.raises(InputError, match=match):
        hf_to_megatron(ToMegatron(source, out, **options))
    assert not out.exists() and not list(out.parent.glob(".*"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": 3}, r"misses 9 tensors: model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"unexpected 9 tensors: model\.layers\.1\."),
        ({"num_attention_heads": 8, "head_dim": 32}, r"q_proj\.weight must be \[256, 64\]"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight must be \[128, 64\], found \[64, 64\]"),
        ({"vocab_size": 300}, r"embed_tokens\.weight must be \[300, 64\], found \[259, 64\]"),
        ({"tie_word_embeddings": True}, "differs from model.embed_tokens"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised.*gptq"),
    ],
)
def test_a_config_that_does_not_fit(change: dict, named: str, llama: Path, tmp_path: Path):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | change))
    refuse(llama, tmp_path / "out" / "m", named)


def test_left_over_and_missing_tensors_are_listed(llama: Path, tmp_path: Path):
    content = tensors(llama)
    content["model.extra.weight"] = content.pop("model.norm.weight")
    save_file(content, llama / "model.safetensors")
    names = r"misses 1 tensors: model\.norm\.weight; it has unexpected 1 tensors: model\.extra"
    refuse(llama, tmp_path / "out" / "m", names)


def test_tensors_that_the_index_leaves_out_count(llama: Path, tmp_path: Path):
    content = tensors(llama)
    listed = dict.fromkeys(content, "model.safetensors")
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    content["model.layers.0.self_attn.surprise.weight"] = torch.ones(3)
    save_file(content, llama / "model.safetensors")
    refuse(llama, tmp_path / "out" / "m", r"unexpected 1 tensors: model\.layers\.0\.self_attn\.sur")


@pytest.mark.parametrize("file", [3, "/etc/model.safetensors", "../model.safetensors"])
def test_an_index_names_files_of_its_folder(file: object, llama: Path, tmp_path: Path):
    index = {"weight_map": dict.fromkeys(tensors(llama), file)}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(llama, tmp_path / "out" / "m", "must name files of its own folder")


@pytest.mark.parametrize("metadata", [None, {}, {"total_size": "7"}, [7]])
def test_dry_run_of_an_index_without_a_size(metadata: object, llama: Path, capsys):
    index = {"metadata": metadata, "weight_map": dict.fromkeys(tensors(llama), "absent")}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main_to_megatron(["--hf", str(llama), "--megatron", "nowhere", "--dry-run"]) == 0
    assert "lists 21 tensors and no total size" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "qweight", "weight_packed", "SCB"])
def test_quantised_tensors_are_named(suffix: str, llama: Path, tmp_path: Path):
    content = tensors(llama)
    content[f"model.layers.0.self_attn.q_proj.{suffix}"] = torch.ones(2)
    save_file(content, llama / "model.safetensors")
    refuse(llama, tmp_path / "out" / "m", rf"quantised weights: .*q_proj\.{suffix}")


def test_integer_weights_are_refused(llama: Path, tmp_path: Path):
    content = tensors(llama)
    name = "model.layers.0.self_attn.q_proj.weight"
    content[name] = content[name].to(torch.int8)
    save_file(content, llama / "model.safetensors")
    refuse(llama, tmp_path / "out" / "m", r"q_proj\.weight \(torch\.int8\)")


def test_damaged_and_missing_files(llama: Path, tmp_path: Path):
    hf_to_megatron(ToMegatron(llama, tmp_path / "m"))
    megatron_to_hf(ToHF(tmp_path / "m", tmp_path / "split", max_shard_bytes=100_000))
    shard = sorted((tmp_path / "split").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refuse(tmp_path / "split", tmp_path / "out" / "m", "truncated")
    shard.write_bytes(whole + b"x")
    refuse(tmp_path / "split", tmp_path / "out" / "m", "not a readable safetensors")
    shard.unlink()
    refuse(tmp_path / "split", tmp_path / "out" / "m", "missing")


def test_pickled_weights_only_when_asked(llama: Path, tmp_path: Path):
    source = tmp_path / "pickled"
    shutil.copytree(llama, source)
    content = tensors(source)
    (source / "model.safetensors").unlink()
    torch.save(content, source / "pytorch_model.bin")
    refuse(source, tmp_path / "out" / "m", "convert it to safetensors")
    hf_to_megatron(ToMegatron(source, tmp_path / "m", allow_pickle=True))
    megatron_to_hf(ToHF(tmp_path / "m", tmp_path / "hf"))
    assert_same_weights(llama, tmp_path / "hf")
    torch.save({"a": Attack(tmp_path / "executed")}, source / "pytorch_model.bin")
    refuse(source, tmp_path / "out" / "m", "not a readable file of tensors", allow_pickle=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("where", ["cache", "folder"])
def test_a_flipped_byte_of_a_download(where: str, llama: Path, tmp_path: Path):
    """A shard has no checksum of its own, but its download leaves one beside it."""
    import hashlib

    weights = llama / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if where == "cache":
        (tmp_path / "blobs").mkdir()
        weights.rename(tmp_path / "blobs" / digest)
        weights.symlink_to(tmp_path / "blobs" / digest)
    else:
        record = llama / ".cache/huggingface/download/model.safetensors.metadata"
        record.parent.mkdir(parents=True)
        record.write_text(f"{'0' * 40}\n{digest}\n1700000000.0\n")
    hf_to_megatron(ToMegatron(llama, tmp_path / "whole"))
    flip(weights, -5)
    refuse(llama, tmp_path / "out" / "m", r"damaged: its download recorded SHA-256")


def flip(path: Path, position: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


# The Megatron side.


@pytest.fixture
def megatron(llama: Path, tmp_path: Path) -> Path:
    """The tiny llama, converted."""
    hf_to_megatron(ToMegatron(llama, tmp_path / "megatron", workers=1))
    return tmp_path / "megatron"


def test_a_flipped_byte_in_a_checkpoint(megatron: Path, llama: Path, tmp_path: Path):
    (data,) = (megatron / "release").glob("*.distcp")
    content = data.read_bytes()
    weights = tensors(llama)["model.layers.1.mlp.down_proj.weight"]
    flip(data, content.index(weights.numpy().tobytes()) + 77)
    with pytest.raises(InputError, match=r"damaged.*linear_fc2\.weight.*checksum is wrong"):
        megatron_to_hf(ToHF(megatron, tmp_path / "hf"))
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".hf*"))
    folder, noticed = MegatronFolder(megatron), 0
    for part in range(2):  # the trainer's ranks share the work
        try:
            folder.check_data(part=part, parts=2)
        except InputError:
            noticed += 1
    assert noticed == 1


def test_a_weight_that_changed_consistently(megatron: Path, llama: Path, tmp_path: Path):
    """A checkpoint whose tensors are whole but not those that were converted."""
    records = json.loads((megatron / "release" / "tensors.json").read_text())
    records["tensors"]["model.norm.weight"]["crc32"] = "00000000"
    (megatron / "release" / "tensors.json").write_text(json.dumps(records))
    with pytest.raises(InputError, match=r"model\.norm\.weight is not what was converted"):
        megatron_to_hf(ToHF(megatron, tmp_path / "hf"))


def test_truncated_and_missing_files_of_a_checkpoint(megatron: Path, tmp_path: Path):
    (data,) = (megatron / "release").glob("*.distcp")
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    with pytest.raises(InputError, match="truncated copy"):
        MegatronFolder(megatron)
    data.unlink()
    with pytest.raises(InputError, match=r"distcp is missing"):
        MegatronFolder(megatron)
    data.write_bytes(content)
    (megatron / "release" / ".metadata").unlink()
    with pytest.raises(InputError, match="no torch_dist checkpoint"):
        MegatronFolder(megatron)


def test_a_checkpoint_executes_nothing(megatron: Path, tmp_path: Path):
    """Both pickles of a checkpoint, as an attacker would write them."""
    metadata = megatron / "release" / ".metadata"
    whole = metadata.read_bytes()
    metadata.write_bytes(pickle.dumps(Attack(tmp_path / "executed")))
    with pytest.raises(InputError, match="mkdir, which is not data"):
        MegatronFolder(megatron)
    metadata.write_bytes(whole)
    torch.save({"args": Attack(tmp_path / "executed")}, megatron / "release" / "common.pt")
    with pytest.raises(InputError, match="plain data"):
        MegatronFolder(megatron).reader.common()
    assert not (tmp_path / "executed").exists()


def test_a_config_that_does_not_fit_the_checkpoint(megatron: Path, tmp_path: Path):
    path = megatron / "hf" / "config.json"
    config = json.loads(path.read_text())
    for change, named in (
        ({"num_hidden_layers": 3}, r"must be \[3, 64\], found \[2, 64\]"),
        ({"vocab_size": 999}, "384 embedding rows"),
        ({"tie_word_embeddings": True}, r"unexpected 1: output_layer\.weight"),
        ({"num_key_value_heads": 1}, r"linear_qkv\.weight must be"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=named):
            megatron_to_hf(ToHF(megatron, tmp_path / "hf"))
    path.unlink()
    with pytest.raises(InputError, match=r"Copy config\.json.*megatron/hf") as error:
        MegatronFolder(megatron)
    assert "--hf-config" not in str(error.value)  # not every command has it


def test_the_stored_arguments(megatron: Path):
    """What Megatron's --use-checkpoint-args reads."""
    common = TorchDistReader(megatron / "release").common()
    assert common["checkpoint_version"] == 3.0 and common["iteration"] == 0
    args = common["args"]
    assert (args.num_layers, args.hidden_size, args.padded_vocab_size) == (2, 64, 384)
    assert args.swiglu and args.normalization == "RMSNorm" and args.rotary_base == 10000


def _arguments(llama: Path, out: Path, **change):
    config = json.loads((llama / "config.json").read_text())
    for key in ("rope_parameters", "rope_theta"):
        config.pop(key, None)
    (llama / "config.json").write_text(json.dumps(config | change))
    hf_to_megatron(ToMegatron(llama, out))
    return TorchDistReader(out / "release").common()["args"]


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_linear_scaling_is_in_the_arguments(key: str, llama: Path, tmp_path: Path):
    args = _arguments(llama, tmp_path / "m", rope_scaling={key: "linear", "factor": 4.0})
    assert args.rotary_seq_len_interpolation_factor == 4 and not args.use_rope_scaling


def test_the_rotary_base_is_the_familys_default(tiny_model: Callable[..., Path], tmp_path: Path):
    shutil.copytree(tiny_model("mixtral"), tmp_path / "hf")
    assert _arguments(tmp_path / "hf", tmp_path / "m").rotary_base == 1_000_000


def test_a_run_whose_student_is_gone(megatron: Path, tmp_path: Path):
    step = tmp_path / "run" / "checkpoints" / "step_000003"
    shutil.copytree(megatron / "release", step)
    (tmp_path / "run" / "config.json").write_text('{"model": {"student": "gone"}}')
    with pytest.raises(InputError, match=r"started from gone.*Copy config\.json"):
        MegatronFolder(step)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        MegatronFolder(step)


# Which names are written.


def test_te_layers_find_every_key(tiny_model: Callable[..., Path]):
    """Keys of Megatron's Transformer-Engine spec, listed by hand: TE does not run here."""
    config = HFFolder(tiny_model("qwen3")).config
    stored = checkpoint_layout(config, 384)
    attention, mlp = "decoder.layers.self_attention", "decoder.layers.mlp"
    with_state = [
        f"{attention}.linear_qkv",
        f"{attention}.linear_proj",
        f"{attention}.core_attention",
        f"{attention}.q_layernorm",
        f"{attention}.k_layernorm",
        f"{mlp}.linear_fc1",
        f"{mlp}.linear_fc2",
    ]
    expected = {object_name(f"{m}._extra_state", (n,), (2,)) for m in with_state for n in (0, 1)}
    expected.add("decoder.final_layernorm._extra_state/shard_0_1")
    assert set(stored.objects) == expected
    assert set(stored.shapes()) == {
        "embedding.word_embeddings.weight",
        f"{attention}.linear_qkv.layer_norm_weight",
        f"{attention}.linear_qkv.weight",
        f"{attention}.linear_proj.weight",
        f"{attention}.q_layernorm.weight",
        f"{attention}.k_layernorm.weight",
        f"{mlp}.linear_fc1.layer_norm_weight",
        f"{mlp}.linear_fc1.weight",
        f"{mlp}.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    }


def test_te_layers_of_a_mixture_find_every_key(tiny_model: Callable[..., Path]):
    """TEGroupedMLP stacks experts after layers, its norm stands apart; the local name is a copy."""
    config = HFFolder(tiny_model("qwen3_moe")).config
    stored = checkpoint_layout(config, 384)
    experts = "decoder.layers.mlp.experts.experts"
    expected = {
        f"{experts}.{linear}._extra_state/shard_{n}.{e}_2.6"
        for linear in ("linear_fc1", "linear_fc2")
        for n in (0, 1)
        for e in range(6)
    }
    expected |= {f"decoder.layers.pre_mlp_layernorm._extra_state/shard_{n}_2" for n in (0, 1)}
    assert expected <= set(stored.objects)
    shapes = stored.shapes()
    assert shapes[f"{experts}.linear_fc1.weight"] == (2, 6, 80, 64)
    assert shapes["decoder.layers.mlp.router.weight"] == (2, 6, 64)
    local = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    assert stored.copies == {local: "decoder.layers.pre_mlp_layernorm.weight"}
    assert not any("mlp.linear_fc1" in name for name in shapes)


# Interruption.


def _convert_and_die(owner: str, name: str, call: int, direction: str, command: list[str]) -> None:
    """Convert in this process, which ends at the ``call``-th call of ``owner.name``."""
    place = eval(owner)
    original, calls = getattr(place, name), []

    def replacement(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(place, name, replacement)
    raise SystemExit({"there": main_to_megatron, "back": main_to_hf}[direction](command))


INTERRUPTER = """
import os, signal, sys, time
from megatron_tropd.cli.main import main
from megatron_tropd.convert import to_hf, to_megatron

# A shell's background jobs ignore Ctrl-C, and so would we.
signal.signal(signal.SIGINT, signal.default_int_handler)
calls = []
def count(checksum):
    def replacement(tensor):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        return checksum(tensor)
    return replacement
owner = {"there": to_megatron, "back": to_hf}[sys.argv[1]]
owner.checksum = count(owner.checksum)
code = main(['convert', *sys.argv[2:]])
print(len(calls))
raise SystemExit(code)
"""
PHASES = {
    "first tensor": ("to_megatron._Checked", "read", 1, "there"),
    "middle": ("to_megatron._Checked", "read", 9, "there"),
    "metadata": ("torch_dist._Writer", "finish", 1, "there"),
    "common": ("torch_dist.json", "dumps", 1, "there"),
    "companions": ("to_megatron", "copy_companions", 1, "there"),
    "sync": ("publish", "_sync", 1, "there"),
    "rename": ("publish", "_swap", 1, "there"),
    "back, middle": ("to_hf", "checksum", 9, "back"),
    "back, rename": ("publish", "_swap", 1, "back"),
    "old moved away": ("Path", "rename", 2, "there"),
    "old not yet removed": ("publish.shutil", "rmtree", 1, "there"),
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_killed(phase: str, llama: Path, tmp_path: Path):
    """Nothing that looks finished is left, the old output survives, and the next try cleans up."""
    owner, name, call, direction = PHASES[phase]
    megatron, hf = tmp_path / "work" / "m", tmp_path / "work" / "hf"
    hf_to_megatron(ToMegatron(llama, megatron, tensor_parallel=2))
    there = ["--hf", str(llama), "--megatron", str(megatron), "--force", "--workers", "1"]
    back = ["--megatron", str(megatron), "--hf", str(hf), "--workers", "1"]
    command = there if direction == "there" else back
    ended = run_in_process(_convert_and_die, owner, name, call, direction, command)
    assert ended == -signal.SIGKILL
    if direction == "back":
        assert not hf.exists()
        assert main_to_hf(back) == 0
        assert_same_weights(llama, hf)
    else:
        rows = {"old not yet removed": 384, "old moved away": None}.get(phase, 512)
        assert rows is None or MegatronFolder(megatron).padded_vocab == rows
        assert megatron.exists() or rows is None
        assert main_to_megatron(there) == 0
        assert MegatronFolder(megatron).padded_vocab == 384
    assert not list(megatron.parent.glob(".*")), "left-overs are gone"


def test_an_old_output_whose_successor_never_came_is_put_back(llama: Path, tmp_path: Path):
    out = tmp_path / "m"
    hf_to_megatron(ToMegatron(llama, out))
    out.rename(tmp_path / ".m.old-1")
    (tmp_path / ".m.partial-1").mkdir()
    (llama / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError):
        hf_to_megatron(ToMegatron(llama, out, force=True))
    assert MegatronFolder(out).padded_vocab == 384
    assert not list(tmp_path.glob(".m.*"))


@pytest.mark.parametrize("direction", ["there", "back"])
@pytest.mark.parametrize("workers", [1, 2])
def test_disk_full(direction: str, workers: int, llama: Path, tmp_path: Path, capsys):
    """Every file over 64 KiB fails, as on a full disk; the old output survives."""
    megatron, hf = tmp_path / "m", tmp_path / "hf"
    hf_to_megatron(ToMegatron(llama, megatron, tensor_parallel=2))
    megatron_to_hf(ToHF(megatron, hf))
    there = ["--hf", str(llama), "--megatron", str(megatron)]
    back = ["--megatron", str(megatron), "--hf", str(hf)]
    run, arguments = (main_to_megatron, there) if direction == "there" else (main_to_hf, back)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, unlimited[1]))
    try:
        assert run([*arguments, "--force", "--workers", str(workers)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, old)
    assert "could not be written" in capsys.readouterr().err
    assert MegatronFolder(megatron).padded_vocab == 512
    assert_same_weights(llama, hf)
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_fails_is_named(llama: Path, tmp_path: Path, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "m"
    assert main_to_megatron(["--hf", str(llama), "--megatron", str(out)]) == 1
    assert re.search(rf"error: {tmp_path}/file: File exists", capsys.readouterr().err)


def test_two_at_once(llama: Path, tmp_path: Path):
    from megatron_tropd.convert.publish import publishing

    with publishing(tmp_path / "m", force=False):
        with pytest.raises(InputError, match="Another process is writing"):
            hf_to_megatron(ToMegatron(llama, tmp_path / "m"))
        assert not (tmp_path / "m").exists()
    assert (tmp_path / "m").is_dir()


def test_force_replaces_models_only(llama: Path, tmp_path: Path, capsys):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.tex").write_text("years of work")
    assert main_to_megatron(["--hf", str(llama), "--megatron", str(out), "--force"]) == 2
    assert "holds other things than a model" in capsys.readouterr().err
    assert (out / "chapter.tex").read_text() == "years of work"


@pytest.mark.parametrize("out", ["llama", "."])
def test_the_input_is_never_replaced(out: str, llama: Path, tmp_path: Path, capsys):
    """--force on the input itself, or on a folder that holds it."""
    hf_to_megatron(ToMegatron(llama, llama / "m"))
    place = str(llama if out == "llama" else tmp_path)
    commands = (
        (main_to_megatron, ["--hf", str(llama), "--megatron", place]),
        (main_to_hf, ["--megatron", str(llama / "m"), "--hf", place]),
        (main_to_hf, ["--megatron", str(llama / "m"), "--hf", str(llama / "m" / "hf")]),
    )
    for run, arguments in commands:
        assert run([*arguments, "--force"]) == 2
        assert "must not be or hold the input" in capsys.readouterr().err
    assert (llama / "model.safetensors").exists() and MegatronFolder(llama / "m")


def test_an_output_that_appears_meanwhile_is_kept(llama: Path, tmp_path: Path):
    out = tmp_path / "m"

    def somebody_else(name: str, size: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "precious").write_text("work")

    with pytest.raises(InputError, match="appeared while it was being made"):
        hf_to_megatron(ToMegatron(llama, out), somebody_else)
    assert (out / "precious").read_text() == "work" and not list(tmp_path.glob(".m*"))


def test_left_overs_of_a_name_with_brackets_are_found(llama: Path, tmp_path: Path):
    (tmp_path / ".m[1].partial-1").mkdir()
    hf_to_megatron(ToMegatron(llama, tmp_path / "m[1]"))
    assert not list(tmp_path.glob(".m*"))


@pytest.mark.parametrize("direction", ["there", "back"])
def test_interrupted(direction: str, llama: Path, tmp_path: Path):
    """Ctrl-C ends a conversion after the tensors in hand, and says so."""
    if direction == "back":
        hf_to_megatron(ToMegatron(llama, tmp_path / "m"))
    out, given = ("m", "--hf") if direction == "there" else ("hf", "--megatron")
    source = llama if direction == "there" else tmp_path / "m"
    command = "to-megatron" if direction == "there" else "to-hf"
    other = "--megatron" if direction == "there" else "--hf"
    arguments = [given, str(source), other, str(tmp_path / out), "--workers", "1"]
    script = tmp_path / "interrupter.py"
    script.write_text(INTERRUPTER)
    stopped = warm_commands.run([script, direction, command, *arguments], folder=REPOSITORY)
    assert stopped.returncode == 130, stopped.stderr
    assert "interrupted" in stopped.stderr and "Traceback" not in stopped.stderr
    assert int(stopped.stdout) < 15, "of 21 tensors and more"
    assert not (tmp_path / out).exists() and not list(tmp_path.glob(f".{out}.*"))
