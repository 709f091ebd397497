"""The rollout engine: real vLLM in a child process, on tiny random models and real ones."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_tropd.base.errors import ConfigError, InputError, TrainingError
from megatron_tropd.cli.main import main
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.data.prompts import load_prompts
from megatron_tropd.data.responses import load_responses
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.data.tokenizers import load_tokenizer
from megatron_tropd.rollout.engines import process
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.rollout.engines.engine_model import check_engine, write_engine_folder
from megatron_tropd.rollout.weights.mailbox import WeightMailbox

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("warm_engines")]
REQUESTS = [
    SampleRequest(tuple(3 + (5 * i + j) % 90 for j in range(1 + i % 7)), 40, 10**17 * i + 7)
    for i in range(12)
]
SAMPLING = Sampling(stop_token_ids=(2, 50))


def start(folder: Path, log_folder: Path) -> RolloutEngine:
    """An engine for sequences of up to 128 tokens on one thread."""
    return RolloutEngine(
        folder, max_model_len=128, log_file=log_folder / "engine.log", cpu_kv_gib=0.25, threads=1
    )


def reference_logprobs(
    folder: Path,
    requests: list[SampleRequest],
    samples: list[Sample],
    columns: int | None = None,
):
    """Per request, transformers' log-probs of the sampled tokens over the first ``columns``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for request, sample in zip(requests, samples, strict=True):
        ids = torch.tensor([request.token_ids + sample.token_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1, :columns].log_softmax(-1)
        of_tokens = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        yield of_tokens[len(request.token_ids) - 1 :]


def largest_gap(
    folder: Path,
    requests: list[SampleRequest],
    samples: list[Sample],
    columns: int | None = None,
) -> float:
    """Largest difference between the engine's and transformers' log-probs."""
    wanted = reference_logprobs(folder, requests, samples, columns)
    return max(
        (torch.tensor(sample.logprobs) - logprobs).abs().max().item()
        for sample, logprobs in zip(samples, wanted, strict=True)
    )


def updated_weights(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """The folder's tensors, changed at random, ``lm_head.weight`` explicit."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    return tensors


def save_as_model(folder: Path, like: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """An HF folder with the config of ``like`` and other tensors."""
    folder.mkdir()
    (folder / "config.json").write_bytes((like / "config.json").read_bytes())
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(copies, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def engine(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutEngine]:
    """One engine for the tests that leave it as they found it."""
    with start(tiny_qwen3, tmp_path_factory.mktemp("engine")) as engine:
        engine.wait_ready()
        yield engine


def test_samples_are_repeatable_and_end_where_told(engine: RolloutEngine, tiny_qwen3: Path) -> None:
    samples = engine.generate(REQUESTS, SAMPLING)
    assert engine.generate(REQUESTS, SAMPLING) == samples
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        stopped = sample.token_ids[-1] in SAMPLING.stop_token_ids
        assert sample.finish_reason == ("stop" if stopped else "length")
        assert not set(sample.token_ids[:-1]) & set(SAMPLING.stop_token_ids)
        assert stopped or len(sample.token_ids) == 40
        assert len(sample.logprobs) == len(sample.token_ids)
    assert largest_gap(tiny_qwen3, REQUESTS, samples) < 1e-4


def test_eos_is_a_token_like_others_unless_listed(engine: RolloutEngine) -> None:
    many = [SampleRequest((5, 6), 100, seed) for seed in range(40)]
    samples = engine.generate(many, Sampling())
    assert {sample.finish_reason for sample in samples} == {"length"}
    assert any(2 in sample.token_ids for sample in samples)


def test_a_sample_depends_on_its_own_seed_only(engine: RolloutEngine) -> None:
    same = [SampleRequest((5, 6, 7), 20, seed) for seed in (1, 2, 2**63 - 1, 1)]
    samples = engine.generate(same, SAMPLING)
    assert samples[0].token_ids == samples[3].token_ids
    assert len({sample.token_ids for sample in samples}) == 3
    alone = engine.generate([same[1]], SAMPLING)[0]
    assert alone.token_ids == samples[1].token_ids


def test_logprobs_are_of_the_whole_distribution_at_temperature_1(
    engine: RolloutEngine, tiny_qwen3: Path
) -> None:
    for sampling in (Sampling(temperature=0.0), Sampling(temperature=0.5, top_p=0.7)):
        samples = engine.generate(REQUESTS, sampling)
        assert largest_gap(tiny_qwen3, REQUESTS, samples) < 1e-4
    greedy = engine.generate(REQUESTS[:2], Sampling(temperature=0.0))
    other_seeds = [dataclasses.replace(request, seed=99) for request in REQUESTS[:2]]
    assert engine.generate(other_seeds, Sampling(temperature=0.0)) == greedy


def test_continuing_a_prefix_continues_the_greedy_text(engine: RolloutEngine) -> None:
    greedy = Sampling(temperature=0.0)
    whole = engine.generate([SampleRequest((5, 6, 7), 30, 0)], greedy)[0]
    prefixed = SampleRequest((5, 6, 7, *whole.token_ids[:13]), 17, 0)
    assert engine.generate([prefixed], greedy)[0].token_ids == whole.token_ids[13:]


def test_no_requests_give_no_samples(engine: RolloutEngine) -> None:
    assert engine.generate([], SAMPLING) == []


def test_requests_that_do_not_fit_are_refused(engine: RolloutEngine) -> None:
    with pytest.raises(InputError, match=r"Request 1 needs 100 \+ 29 tokens.*built for 128"):
        engine.generate([SampleRequest((5,), 3, 0), SampleRequest((5,) * 100, 29, 0)], SAMPLING)
    with pytest.raises(InputError, match="at least 1"):
        engine.generate([SampleRequest((), 3, 0)], SAMPLING)
    assert len(engine.generate([SampleRequest((5,) * 100, 28, 0)], SAMPLING)) == 1


def test_incomplete_weights_are_refused_and_change_nothing(
    engine: RolloutEngine, tiny_qwen3: Path, tmp_path: Path
) -> None:
    before = engine.generate(REQUESTS, SAMPLING)
    complete = updated_weights(tiny_qwen3, seed=1)
    without_head = {k: v for k, v in complete.items() if k != "lm_head.weight"}
    misshapen = complete | {"model.norm.weight": torch.zeros(3)}
    unknown = complete | {"model.layers.9.mlp.up_proj.weight": torch.zeros(3)}
    cases = (
        (without_head, r"missing 1 \(lm_head.weight\)"),
        (misshapen, r"misshapen 1 \(model.norm.weight is \[3\], expected \[64\]\)"),
        (unknown, r"unknown 1 \(model.layers.9.mlp.up_proj.weight\)"),
    )
    for tensors, message in cases:
        with WeightMailbox(tmp_path) as mailbox, pytest.raises(InputError, match=message):
            engine.load_weights(mailbox.write(tensors.items()))
    assert engine.generate(REQUESTS, SAMPLING) == before


def check_updates(engine: RolloutEngine, folder: Path, scratch: Path) -> Path:
    """New weights twice, then the first ones again; returns the folder of the new ones."""
    new = updated_weights(folder, seed=2)
    changed = save_as_model(scratch / "changed", folder, new)
    with WeightMailbox(scratch, bucket_bytes=30_000) as mailbox:
        first = engine.generate(REQUESTS, SAMPLING)
        assert largest_gap(folder, REQUESTS, first) < 1e-4
        for _ in range(2):
            engine.load_weights(mailbox.write(new.items()))
            second = engine.generate(REQUESTS, SAMPLING)
            assert largest_gap(changed, REQUESTS, second) < 1e-4
        back = load_file(folder / "model.safetensors")
        back.setdefault("lm_head.weight", back["model.embed_tokens.weight"])
        engine.load_weights(mailbox.write(back.items()))
        assert engine.generate(REQUESTS, SAMPLING) == first
    return changed


def test_new_weights_take_effect(engine: RolloutEngine, tiny_qwen3: Path, tmp_path: Path) -> None:
    check_updates(engine, tiny_qwen3, tmp_path)


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen3_moe"])
def test_new_weights_take_effect_in_an_untied_model(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model(family)
    with start(folder, tmp_path) as engine:
        check_updates(engine, folder, tmp_path)


FROM_GPU_TO_GPU = """
import json, sys
from types import SimpleNamespace
import torch
from safetensors.torch import load_file
from vllm import LLM
from megatron_tropd.rollout.engines import child
from megatron_tropd.rollout.engines.transports import DeviceTransport
from megatron_tropd.rollout.engines.settings import EngineSettings
from megatron_tropd.data.samples import SampleRequest, Sampling

folder, new, requests = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
settings = EngineSettings(
    model_folder=folder, max_model_len=128, gpu_share=0.4, cpu_kv_gib=0.25, cuda=False
)
transfer = {"weight_transfer_config": {"backend": "ipc"}}
llm = LLM(**child.engine_arguments(settings) | transfer)

# A handle that is opened gives the buffer; the engine's GPU is the CPU. All else is vLLM's.
buffers = []
torch.multiprocessing.reductions.rebuild_cuda_tensor = lambda *handle: buffers[handle[7]]
torch.cuda.get_device_properties = lambda _: SimpleNamespace(uuid="GPU-0")
torch.accelerator.synchronize = lambda *_: None

def export(buffer):
    buffers.append(buffer)
    return (*range(7), len(buffers) - 1)

engine = SimpleNamespace(
    begin_weights=lambda: child.begin_weights(llm),
    take_weights=lambda update: llm.update_weights({"update_info": update}),
    finish_weights=lambda: child.finish_weights(llm),
)
channel = DeviceTransport(
    {0: (0,)}, rank=0, uuid="GPU-0", device=torch.device("cpu"), export=export, bucket_bytes=30_000
)
weights = load_file(new + "/model.safetensors")
for _ in range(2):
    channel.send(iter(weights.items()), engine)
samples = child.generate(llm, [SampleRequest(*r) for r in requests], Sampling())
print(json.dumps([[s.token_ids, s.logprobs, s.finish_reason] for s in samples]), flush=True)
import os
os._exit(0)
"""


@pytest.mark.parametrize(
    ("family", "change"), [("qwen2", {"head_dim": 32, "hidden_size": 128}), ("qwen3_moe", {})]
)
def test_new_weights_take_effect_buffer_by_buffer(
    family: str, change: dict, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """By vLLM's own ``ipc`` transfer into a real engine; only the handles are no GPU's."""
    folder = tiny_model(family, **change)
    changed = save_as_model(tmp_path / "changed", folder, updated_weights(folder, seed=2))
    engines = tmp_path / "engine.model"
    write_engine_folder(HFFolder(folder), engines, 259)
    requests = [dataclasses.astuple(request) for request in REQUESTS]
    run = subprocess.run(
        [sys.executable, "-c", FROM_GPU_TO_GPU, engines, changed, json.dumps(requests)],
        env=process.engine_environment(os.environ, threads=1, cuda_devices=None),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    samples = [
        Sample(tuple(ids), tuple(logprobs), reason)
        for ids, logprobs, reason in json.loads(run.stdout.splitlines()[-1])
    ]
    assert largest_gap(changed, REQUESTS, samples) < 1e-4


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen2", {"max_window_layers": 0, "head_dim": 32, "hidden_size": 128}),
        ("qwen3", {"max_window_layers": 2}),  # of two layers: none has a window
    ],
)
def test_windows_are_those_of_transformers(
    family: str, change: dict, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 10}
    folder = tiny_model(family, **windows, **change)
    with start(folder, tmp_path) as engine:
        samples = engine.generate(REQUESTS, SAMPLING)
    assert largest_gap(folder, REQUESTS, samples) < 1e-4


def test_an_engine_of_fewer_columns_samples_from_these_alone(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Log-probs and samples are those of the softmax over the first columns."""
    folder, columns = tiny_model("llama", tie_word_embeddings=True, seed=9), 90
    new = updated_weights(folder, seed=2)
    changed = save_as_model(tmp_path / "changed", folder, new)
    cut = {n: t[:columns] if t.shape[0] == 259 else t for n, t in new.items()}
    settings = {"max_model_len": 128, "cpu_kv_gib": 0.25, "threads": 1, "vocab_size": columns}
    with (
        RolloutEngine(folder, log_file=tmp_path / "engine.log", **settings) as engine,
        WeightMailbox(tmp_path) as mailbox,
    ):
        samples = engine.generate(REQUESTS, Sampling())
        with pytest.raises(InputError, match="misshapen"):
            engine.load_weights(mailbox.write(new.items()))
        mailbox.clear()
        engine.load_weights(mailbox.write(cut.items()))
        after = engine.generate(REQUESTS, Sampling())
        assert not (tmp_path / "engine.model").exists()
    for model, found in ((folder, samples), (changed, after)):
        assert max(max(sample.token_ids) for sample in found) == columns - 1
        assert largest_gap(model, REQUESTS, found, columns) < 1e-4


def test_settings_that_vllm_refuses_are_no_reason_to_start_again(
    tiny_llama: Path, tmp_path: Path
) -> None:
    settings = {"max_model_len": 64, "dtype": "float99"}
    with (
        RolloutEngine(tiny_llama, log_file=tmp_path / "log", **settings) as engine,
        pytest.raises(ConfigError, match="float99"),
    ):
        engine.wait_ready()


def test_settings_without_meaning_leave_nothing_behind(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_num_seqs must be at least 1, found 0"):
        RolloutEngine(tiny_llama, max_model_len=64, log_file=tmp_path / "log", max_num_seqs=0)
    assert not list(tmp_path.iterdir())


def test_a_restart_repeats_bit_for_bit_and_a_death_is_an_error_that_quotes_the_log(
    tiny_qwen2: Path, tmp_path: Path
) -> None:
    with start(tiny_qwen2, tmp_path) as engine, WeightMailbox(tmp_path) as mailbox:
        changed = check_updates(engine, tiny_qwen2, tmp_path)
        engine.load_weights(mailbox.write(updated_weights(tiny_qwen2, seed=2).items()))
        samples = engine.generate(REQUESTS, SAMPLING)
    engine = start(changed, tmp_path)
    assert engine.generate(REQUESTS, SAMPLING) == samples
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(TrainingError, match=r"(?s)signal 9.*Last lines of .*engine.log"):
        engine.generate(REQUESTS, SAMPLING)
    engine.close()
    engine.close()


def test_ctrl_c_and_sigterm_leave_the_engine_to_its_parent(
    engine: RolloutEngine,
) -> None:
    os.kill(engine.pid, signal.SIGINT)
    os.kill(engine.pid, signal.SIGTERM)
    time.sleep(0.3)
    assert len(engine.generate(REQUESTS, SAMPLING)) == len(REQUESTS)


ORPHAN = """
import sys, time
from pathlib import Path
from megatron_tropd.rollout.engines.engine import RolloutEngine
from megatron_tropd.rollout.weights.mailbox import WeightMailbox
engine = RolloutEngine(sys.argv[1], max_model_len=64, log_file=sys.argv[2] + "/engine.log")
mailbox = WeightMailbox(Path(sys.argv[2]))
print(engine.pid, flush=True)
time.sleep(600)
"""


def test_nothing_is_left_behind_by_a_killed_run(tiny_llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ORPHAN, str(tiny_llama), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        engine_pid = int(run.stdout.readline())
        run.kill()
    for _ in range(200):
        if not is_running(engine_pid):
            break
        time.sleep(0.1)
    assert not is_running(engine_pid)
    assert len(list(tmp_path.glob("tropd-weights-*"))) == 1
    with WeightMailbox(tmp_path) as mailbox:
        assert list(tmp_path.glob("tropd-weights-*")) == [mailbox.folder]


def is_running(pid: int) -> bool:
    """Whether a process is alive; one that only waits to be reaped is not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_teacher_responses_tool_writes_what_training_reads(
    tiny_qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out" / "responses.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(5)))
    arguments = ["--teacher", tiny_qwen2, "--prompts", prompts, "--out", out, "--samples", 2]
    arguments += ["--max-new-tokens", 12, "--threads", 1]
    for added in (10, 0):
        assert main(["responses", *map(str, arguments)]) == 0
        assert f"{added} responses added" in capsys.readouterr().out
    tokenizer = load_tokenizer(tiny_qwen2)
    responses = load_responses(out, load_prompts(prompts, tokenizer), tokenizer)
    assert [len(responses[i]) for i in range(5)] == [2] * 5
    assert len({r.token_ids for found in responses.values() for r in found}) == 10
    assert main(["responses", *map(str, arguments[:-3]), "13"]) == 2
    assert "max_new_tokens: 12 in the file, 13 asked for" in capsys.readouterr().err


def test_head_sizes_vllm_refuses_on_cpu_are_named(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama", head_dim=16)
    with pytest.raises(InputError, match=r"heads of size 16; vLLM on CPU runs sizes \[32"):
        start(folder, folder)
    check_engine(HFFolder(folder).config, 128, cuda=True, who="model")


def test_folders_without_weights_or_context_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"holds neither model\.safetensors nor"):
        start(tmp_path, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        start(tmp_path, tmp_path)
    with pytest.raises(InputError, match=r"context of 256 tokens.* need 300"):
        RolloutEngine(tiny_llama, max_model_len=300, log_file=tmp_path / "log")


def test_an_engine_reads_what_the_trainer_reads(
    engine: RolloutEngine, tiny_qwen3: Path, tmp_path: Path
) -> None:
    """Two formats of the weights, an adapter, old tensors, the embedding under another name."""
    wanted, folder = engine.generate(REQUESTS, SAMPLING), tmp_path / "model"
    tensors = load_file(tiny_qwen3 / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_as_model(folder, tiny_qwen3, tensors)
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    save_file({"base.q_proj.lora_A.weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with start(folder, tmp_path) as odd:
        assert odd.generate(REQUESTS, SAMPLING) == wanted
        new = save_as_model(tmp_path / "new", tiny_qwen3, updated_weights(tiny_qwen3, 3))
        odd.load_weights(new)
        changed = odd.generate(REQUESTS, SAMPLING)
    assert changed != wanted and largest_gap(new, REQUESTS, changed) < 1e-4
    assert not list(tmp_path.glob(".engine-*"))


@pytest.mark.parametrize("name", ["stories260K-hd32", "babyllama-tok105-hd32"])
def test_real_models_agree_with_transformers(name: str, shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "models" / name
    requests = [SampleRequest((1, 10 + i, 20 + i), 60, i) for i in range(8)]
    with start(folder, tmp_path) as engine:
        samples = engine.generate(requests, Sampling(stop_token_ids=(2,)))
    assert largest_gap(folder, requests, samples) < 1e-3
