"""A served teacher: what is asked of a server, who is refused, and servers that come and go.

The answers are those of a real `vllm serve`, written down by tests/vllm_serve.py; a real one is in
tests/integration/test_served_signals.py.
"""

import copy
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tropd.base.errors import ConfigError, InputError, ServersLost, TrainingError
from megatron_tropd.cli.score import job_config
from megatron_tropd.config import config_to_dict, load_config
from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.data.packing import pack
from megatron_tropd.data.sequence import SampleKey, TokenSequence, Writer
from megatron_tropd.distill.inputs import load_inputs
from megatron_tropd.distill.score import load_to_score
from megatron_tropd.integrations import startup
from megatron_tropd.losses import check_signal
from megatron_tropd.teacher import signal_of
from megatron_tropd.teacher._routed import _Reader
from megatron_tropd.teacher.cached.files import TeacherCache
from megatron_tropd.teacher.served import ServedTeacher, _meet
from megatron_tropd.teacher.served import probe as probes
from megatron_tropd.teacher.served.server import TOKEN_VARIABLE, Wanted, _scored
from tests.ranks import run_in_process, run_with_env
from tests.teacher_stand_in import Model, StandIn
from tests.unit_tests.test_megatron_lm_startup import arguments
from tests.unit_tests.test_teacher_cache import score_in_shards, write_rollouts
from tests.vllm_serve import (
    NAME,
    PAIR,
    RECORDING,
    SEQUENCES,
    TOP_K,
    Answer,
    Behave,
    Replay,
    teacher_servers,
    to_score,
)

WORK = [to_score(ids) for ids in SEQUENCES]
COMPLETIONS = "/v1/completions"


@pytest.fixture
def start() -> Iterator[Callable[..., Replay]]:
    """``start(behave)``: a server of recorded answers."""
    started: list[Replay] = []

    def make(behave: Behave | None = None, port: int = 0) -> Replay:
        started.append(Replay(port, behave))
        return started[-1]

    yield make
    for server in started:
        server.stop()


def _resident(ids: list[int]) -> torch.Tensor:
    """Log-probs of every next token, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(PAIR / "teacher"), dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_recorded_scores_are_those_of_the_weights(start: Callable[..., Replay]):
    server = start()
    servers = teacher_servers([server.address])
    for ids, scored in zip(SEQUENCES, servers.score(WORK), strict=True):
        logp_TV = _resident(ids)[1:-1]
        at = torch.tensor(ids[2:])[:, None]
        np.testing.assert_allclose(scored.sampled_M, logp_TV.gather(1, at)[:, 0], atol=1e-4)
        top_TK = logp_TV.topk(TOP_K)
        assert scored.ids_MK.tolist() == top_TK.indices.tolist()
        np.testing.assert_allclose(scored.logprobs_MK, top_TK.values, atol=1e-4)
    said = probes.resident_score(HFFolder(PAIR / "teacher"), servers.probe.ids, torch.float32)
    assert probes.difference(servers.said, said) < 1e-4
    bodies = [body for path, body in server.asked if path == COMPLETIONS]
    assert all(body["max_tokens"] == 1 for body in bodies)
    assert bodies[-1]["temperature"] == 1.0 and bodies[-1]["repetition_penalty"] == 1.0


def test_the_stand_in_of_fault_stories_answers_as_the_real_one_did():
    model = Model(str(PAIR / "teacher"), 0.0)
    for one in json.loads(RECORDING.read_text()):
        code, answer = model.answer(one["path"], one["body"])
        assert code == one["code"]
        if one["path"] == "/tokenize":
            assert answer["tokens"] == one["answer"]["tokens"]
        for told, right in zip(_tables(answer), _tables(one["answer"]), strict=True):
            assert told == pytest.approx(right, abs=1e-4)


def _tables(answer: Any) -> list[dict[str, float]]:
    """Id -> log-prob of each scored token."""
    [choice] = answer.get("choices", [{}])
    entries = choice.get("prompt_logprobs") or []
    return [{i: said["logprob"] for i, said in entry.items()} for entry in entries if entry]


def test_a_known_server_is_asked_but_once_more_in_each_step(start: Callable[..., Replay]):
    server = start()
    servers = teacher_servers([server.address])
    first = servers.score(WORK)
    met = len(server.asked)
    second = servers.score(WORK)
    assert len(server.asked) - met == 1 + len(WORK)
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.sampled_M, other.sampled_M)
    assert servers.score([]) == []


def test_replicas_share_the_work(start: Callable[..., Replay]):
    shared = threading.Event()

    def waiting(path: str, body: Any, right: Answer) -> Answer:
        assert not _is_work(path, body) or shared.wait(60)
        return right

    def sharing(path: str, body: Any, right: Answer) -> Answer:
        if _is_work(path, body):
            shared.set()
        return right

    replicas = [start(waiting), start(sharing)]
    servers = teacher_servers([one.address for one in replicas], timeout_seconds=90.0)
    servers.score(WORK * 3)
    for one in replicas:
        assert any(_is_work(*each) for each in one.asked)


def _is_work(path: str, body: Any) -> bool:
    return path == COMPLETIONS and body["prompt"] in SEQUENCES


def _slow(path: str, body: Any, right: Answer) -> Answer:
    time.sleep(0.02)
    return right


def _changed(change: Callable[[Any], None]) -> Behave:
    """Answers to completions with something changed."""

    def behave(path: str, body: Any, right: Answer) -> Answer:
        code, answer = right
        if path == COMPLETIONS and code == 200:
            answer = copy.deepcopy(answer)
            change((body, answer))
        return code, answer

    return behave


def _entries(answer: Any) -> Iterator[dict[str, Any]]:
    for entry in answer["choices"][0].get("prompt_logprobs") or ():
        yield from (entry or {}).values()


def _as_logits(told: Any) -> None:
    for said in _entries(told[1]):
        said["logprob"] += 12.5


def _as_low_logits(told: Any) -> None:
    for said in _entries(told[1]):
        said["logprob"] -= 12.5


def _with_temperature(told: Any) -> None:
    body, answer = told
    for said in _entries(answer):
        said["logprob"] /= body.get("temperature", 1.0)


def _with_defaults(told: Any) -> None:
    body, answer = told
    for said in _entries(answer):
        said["logprob"] /= 1.0 if "temperature" in body else 0.6


def _path(path: str, code: int, answer: Any) -> Behave:
    return lambda found, body, right: (code, answer) if found == path else right


def _models(**fields: Any) -> Behave:
    return _path("/v1/models", 200, {"data": [{"id": NAME, "root": "x", **fields}]})


@pytest.mark.parametrize(
    ("behave", "error", "message"),
    [
        (_models(id="qwen", root="/a/qwen"), InputError, f"serves qwen, expected {NAME}"),
        (_models(max_model_len=100), ConfigError, "sequences of 100 tokens, expected at least 101"),
        (_path("/tokenize", 200, {"tokens": [1, 2]}), InputError, "has another tokenizer"),
        (_changed(_as_logits), ConfigError, "gives no log-probs.*--logprobs-mode raw_logprobs"),
        (_changed(_as_low_logits), ConfigError, "gives no log-probs"),
        (_changed(_with_temperature), ConfigError, r"depend on .* \(temperature and penalties"),
        (_changed(_with_defaults), ConfigError, r"depend on .* \(its defaults"),
        (_path(COMPLETIONS, 401, {"error": "Unauthorized"}), ConfigError, TOKEN_VARIABLE),
    ],
)
def test_what_is_not_the_teacher_is_refused(
    start: Callable[..., Replay], behave: Behave, error: type[Exception], message: str
):
    servers = teacher_servers([start(behave).address])
    with pytest.raises(error, match=message):
        servers.meet()


def _vocabulary(size: int) -> Behave:
    def behave(path: str, body: Any, right: Answer) -> Answer:
        if path != COMPLETIONS or "logprob_token_ids" not in body:
            return right
        message = "token_id(s) [9] in logprob_token_ids contain out-of-vocab token ids."
        inside = body["logprob_token_ids"][0] < size
        return (200, {"choices": []}) if inside else (400, {"error": {"message": message}})

    return behave


@pytest.mark.parametrize("size", [319, 321])
def test_another_vocabulary_is_refused(start: Callable[..., Replay], size: int):
    with pytest.raises(InputError, match="another vocabulary than the 320 columns"):
        teacher_servers([start(_vocabulary(size)).address]).meet()
    teacher_servers([start(_vocabulary(320)).address]).meet()


def test_another_model_of_the_same_name_is_refused_by_its_scores(start: Callable[..., Replay]):
    servers = teacher_servers([start().address])
    said = servers.meet()
    servers.said = said - 0.3
    servers.said_when = "what the teacher said when the run began"
    with pytest.raises(InputError, match=r"differ by 0\.3 nats from what the teacher said when"):
        servers.score(WORK)


def test_a_server_without_a_tokenizer_is_taken(start: Callable[..., Replay]):
    teacher_servers([start(_path("/tokenize", 404, {"detail": "Not Found"})).address]).meet()


def test_a_request_that_no_server_takes_ends_at_once(start: Callable[..., Replay]):
    told = {"error": {"message": "Requested prompt logprobs of 64, greater than max allowed: 20"}}
    servers = teacher_servers([start().address])
    servers.meet()
    server = start(_path(COMPLETIONS, 400, told))
    servers.servers[0].address = server.address
    with pytest.raises(InputError, match=r"max allowed: 20 Start it with a --max-logprobs"):
        servers.score(WORK)


# ---- settings ----

SERVED = ("teacher.placement=served", 'teacher.address=["http://a:1"]', "evaluation.teacher=false")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([SERVED[0]], r'"served" needs addresses of `vllm serve`'),
        (['teacher.address=["http://a:1"]'], r'"resident" and teacher\.address .* do not go'),
        ([SERVED[0], 'teacher.address=["a:1"]'], r"must hold addresses like .* found ..a:1"),
        ([*SERVED[:2]], r'"served" loads no teacher, found an evaluation that needs one'),
        ([*SERVED, "evaluation.task=reverse_kl"], r'"served" loads no teacher'),
        ([*SERVED, "rollout.behaviour=blended"], r"samples with a teacher that is loaded"),
        ([*SERVED, "teacher.offload=host"], r"is for a model that the job loads"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(PAIR / "opd.toml", settings)


def test_losses_that_need_more_than_the_likeliest_ids_are_refused_by_name():
    for method in ("gkd_jsd", "trb", "eopd", "tropd_exact"):
        config = load_config(PAIR / "opd.toml", [*SERVED, f"loss.method={method}"])
        with pytest.raises(ConfigError, match=r"loss.method = '\w+' needs .*: tropd, "):
            check_signal(config.loss, signal_of(config), vocab_size=320)
    config = load_config(PAIR / "opd.toml", [*SERVED, "loss.method=tropd", "loss.top_k=8"])
    check_signal(config.loss, signal_of(config), vocab_size=320)
    assert config.signal_top_k == 8 and not config.loads_teacher
    assert load_config(PAIR / "served.toml").signal_top_k == 1
    reference = [*SERVED, "loss.method=delta", f"teacher.reference={PAIR / 'student'}"]
    with pytest.raises(ConfigError, match="'served' takes no reference"):
        signal_of(load_config(PAIR / "opd.toml", reference))


def test_the_teachers_folder_needs_no_weights(tmp_path: Path):
    folder = tmp_path / "teacher"
    shutil.copytree(PAIR / "teacher", folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    asked = [f"model.teacher={folder}", "rollout.num_engines=1", "parallel.tensor=1"]
    inputs = load_inputs(load_config(PAIR / "opd.toml", [*SERVED, *asked]))
    teacher = inputs.folders["teacher"]
    assert teacher.config["vocab_size"] == 320
    why = probes.resident_score(teacher, (1, 2), torch.float32)
    assert why == f"{folder} holds no weights"
    with pytest.raises(InputError, match="teacher"):
        load_inputs(load_config(PAIR / "opd.toml", asked))


# ---- servers that come and go ----


def test_without_a_server_the_wait_ends(start: Callable[..., Replay]):
    server = start()
    server.stop()
    servers = teacher_servers([server.address], lost_seconds=0.3)
    with pytest.raises(ServersLost, match=r"No teacher server has answered.*is not there.*vllm"):
        servers.meet()


def test_a_hung_server_is_named(start: Callable[..., Replay]):
    hung = threading.Event()

    def behave(path: str, body: Any, right: Answer) -> Answer:
        hung.wait(10)
        return right

    servers = teacher_servers([start(behave).address], timeout_seconds=0.2, lost_seconds=1.0)
    with pytest.raises(ServersLost, match=r"server 0 \(http.*\) did not answer for 0\.2 s"):
        servers.meet()
    hung.set()


def test_a_server_that_fails_over_a_sequence_again_and_again_ends_the_run(
    start: Callable[..., Replay],
):
    def behave(path: str, body: Any, right: Answer) -> Answer:
        failed = path == COMPLETIONS and body["prompt"] == SEQUENCES[1]
        return (500, {"error": {"message": "EngineCore is dead"}}) if failed else right

    servers = teacher_servers([start(behave).address])
    with pytest.raises(TrainingError, match=r"failed 3 times.*answered 500: EngineCore"):
        servers.score(WORK)


def test_work_of_a_server_that_dies_goes_to_the_other(start: Callable[..., Replay]):
    def dying(path: str, body: Any, right: Answer) -> Answer | None:
        return None if path == COMPLETIONS and body["prompt"] in SEQUENCES else right

    right = teacher_servers([start().address]).score(WORK)
    servers = teacher_servers([start(dying).address, start(_slow).address])
    for one, other in zip(servers.score(WORK), right, strict=True):
        assert np.array_equal(one.logprobs_MK, other.logprobs_MK)


def test_a_hung_replica_neither_holds_up_a_step_nor_keeps_its_threads(start: Callable[..., Replay]):
    hung = threading.Event()

    def behave(path: str, body: Any, right: Answer) -> Answer:
        hung.wait(10)
        return right

    before = threading.active_count()
    servers = teacher_servers([start(behave).address, start().address], timeout_seconds=1.0)
    for _ in range(3):
        assert len(servers.score(WORK)) == len(WORK)
    deadline = time.monotonic() + 8.0
    while threading.active_count() > before + 8 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline, "threads of the steps before wait for the hung server"
    hung.set()


def _lower(told: Any) -> None:
    for said in _entries(told[1]):
        said["logprob"] -= 0.3


def test_each_of_two_teachers_is_compared_with_itself(start: Callable[..., Replay], tmp_path: Path):
    """At the run's first start and at a later one; only the first has weights at hand."""
    other, record = tmp_path / "teacher", tmp_path / "said.json"
    other.mkdir()
    shutil.copy(PAIR / "teacher" / "config.json", other)
    folders = [HFFolder(PAIR / "teacher"), HFFolder(other, weights=False)]
    addresses = [start().address, start(_changed(_lower)).address]
    for _ in range(2):
        for folder, address in zip(folders, addresses, strict=True):
            _meet(teacher_servers([address]), folder, torch.float32, record)
    with pytest.raises(InputError, match=r"is another model.*when the run began \(.*said\.json"):
        _meet(teacher_servers([addresses[1]]), folders[0], torch.float32, record)
    record.unlink()
    with pytest.raises(InputError, match=r"served teacher is another .* those of the weights in"):
        _meet(teacher_servers([addresses[1]]), folders[0], torch.float32, record)


def test_a_replica_without_rows_of_a_teacher_meets_the_others():
    """Of several teachers: the gather of what went wrong is over all ranks."""
    called = []
    source = SimpleNamespace(
        everywhere=True, begin=lambda *_: None, signals=lambda batches: called.append(batches) or []
    )
    layout = SimpleNamespace(batch_multiple=1, pad_multiple=1, row_multiple=1, ep_size=1)
    reader = _Reader(source, layout, 64)  # type: ignore[arg-type]
    [batch] = pack(
        [TokenSequence.of_runs(SampleKey(0, 0, 0), (Writer.CONTEXT, [3]), (Writer.TEACHER, [4]))],
        **{"dp_rank": 0, "dp_size": 1, "tokens_per_micro_batch": 8, "seed": 0, "step": 0},
    )
    reader.begin(0, {})
    assert reader.signals([batch]) == [None] and called == [[]]
    assert ServedTeacher.everywhere


def test_a_model_that_is_not_there_any_more_is_named(start: Callable[..., Replay]):
    other = threading.Event()

    def behave(path: str, body: Any, right: Answer) -> Answer:
        if other.is_set() and path == COMPLETIONS:
            return 404, {"error": {"message": f"The model `{NAME}` does not exist."}}
        if other.is_set() and path == "/v1/models":
            return 200, {"data": [{"id": "qwen", "root": "/a/qwen"}]}
        return right

    servers = teacher_servers([start(behave).address])
    servers.score(WORK)
    other.set()
    with pytest.raises(InputError, match=f"serves qwen, expected {NAME}"):
        servers.score(WORK)


def test_of_two_different_replicas_one_is_refused(start: Callable[..., Replay]):
    servers = teacher_servers([start(_changed(_lower)).address, start().address])
    deadline = time.monotonic() + 60.0
    with pytest.raises(InputError, match="is another model"):
        while time.monotonic() < deadline:
            servers.score(WORK)


@pytest.mark.parametrize("same", [True, False])
def test_a_server_that_was_replaced_is_checked_again(start: Callable[..., Replay], same: bool):
    """In the middle of a step another program answers at the address."""
    replaced = threading.Event()

    def behave(path: str, body: Any, right: Answer) -> Answer:
        code, answer = right
        if path == COMPLETIONS and body["prompt"] == SEQUENCES[1]:
            replaced.set()
        if path == COMPLETIONS and code == 200 and replaced.is_set():
            answer = copy.deepcopy(answer)
            answer["system_fingerprint"] = "vllm-0.33-12345678"
            for said in [] if same else _entries(answer):
                said["logprob"] = 1.3 * said["logprob"]
        return code, answer

    servers = teacher_servers([start(behave).address])
    right = teacher_servers([start().address]).score(WORK)
    if not same:
        with pytest.raises((InputError, ConfigError), match=r"is another model|gives no log"):
            servers.score(WORK)
        return
    for one, other in zip(servers.score(WORK), right, strict=True):
        assert np.array_equal(one.logprobs_MK, other.logprobs_MK)


@pytest.mark.parametrize("text", ["<html>", "{}", '{"choices": [{"prompt_logprobs": [null]}]}'])
def test_what_is_no_vllm_serve_is_named(start: Callable[..., Replay], text: str):
    servers = teacher_servers([start(_path(COMPLETIONS, 200, text)).address], lost_seconds=0.3)
    with pytest.raises((ServersLost, InputError), match=r"like no `vllm serve`|vocabulary"):
        servers.meet()


def test_ids_that_the_student_lacks_are_left_out():
    wanted = Wanted(top_k=2, vocab_size=10, teacher_vocab=12, timeout_seconds=1.0)
    assert wanted.asked == 4
    entry = {str(i): {"logprob": float(np.log(p))} for i, p in ((3, 0.1), (11, 0.5), (7, 0.2))}
    entry |= {"2": {"logprob": float(np.log(0.1))}, "10": {"logprob": float(np.log(0.05))}}
    scored = _scored([None, entry], [4, 3], [1], wanted)
    assert scored.ids_MK.tolist() == [[7, 2]]
    np.testing.assert_allclose(np.exp(scored.logprobs_MK), [[0.2 / 0.45, 0.1 / 0.45]], rtol=1e-6)
    np.testing.assert_allclose(np.exp(scored.sampled_M), [0.1 / 0.45], rtol=1e-6)


def test_tropd_score_asks_a_server_for_what_it_would_compute(tmp_path: Path):
    server = StandIn(PAIR / "teacher")
    for name in ("served", "resident"):
        (tmp_path / name).mkdir()
        config = write_rollouts(tmp_path / name)
        if name == "served":
            teacher = replace(config.teacher, address=(server.address,), served_model=NAME)
            config = job_config(replace(config, teacher=replace(teacher, placement="cached")))
            assert config.teacher.placement == "served" and config.signal_top_k == 16
        assert run_in_process(score_in_shards, config_to_dict(config), None) == 0
    server.kill()
    caches = [TeacherCache(tmp_path / name / "cache") for name in ("served", "resident")]
    assert caches[0].header == caches[1].header
    for sequence in load_to_score(config).sequences:
        served, resident = (cache.read(sequence) for cache in caches)
        assert not served.pop("logsumexp").any() and resident.pop("logsumexp").any()
        assert served.keys() == resident.keys()
        same_ids = served.pop("topk_ids") == resident.pop("topk_ids")
        assert same_ids.float().mean() > 0.99, "but for ties"
        for column, values in served.items():
            torch.testing.assert_close(values, resident[column], rtol=0, atol=1e-4)


def ask_in_the_plug_in(address: str) -> None:
    """Be the one rank of a Megatron loop with a served teacher."""
    from megatron_tropd.config import ParallelConfig
    from megatron_tropd.distill.pair import build_teacher
    from megatron_tropd.mcore import parallel

    layout = parallel.initialize(ParallelConfig(), seed=1)
    args = arguments(
        *("--tropd-teacher-load", str(PAIR / "teacher"), "--tropd-teacher-address", address),
        *("--tropd-method", "tropd", "--tropd-top-k", str(TOP_K)),
        params_dtype=torch.float32,
        distributed_timeout_minutes=5,
    )
    startup.check_arguments(args)
    checked = startup.teachers(args, 320)
    teacher = build_teacher(
        checked.config,
        checked.folders,
        layout,
        checked.routes,
        dtype=torch.float32,
        padded_vocab_size=320,
        vocab_size=320,
        longest=checked.longest,
    )
    sequences = [
        TokenSequence.of_runs(
            SampleKey(0, number, 0),
            (Writer.CONTEXT, ids[:2]),
            (Writer.STUDENT, ids[2:]),
            logprobs=[-1.0] * len(ids[2:]),
        )
        for number, ids in enumerate([*SEQUENCES, SEQUENCES[0]])
    ]
    batches = pack(sequences, dp_rank=0, dp_size=1, tokens_per_micro_batch=16, seed=1, step=0)
    teacher.begin(0, sequences)
    for batch, signal in zip(batches, teacher.signals(batches), strict=True):
        for at, row in enumerate(batch.loss_rows.tolist()):
            ids = SEQUENCES[row % len(SEQUENCES)]
            place = 2 + int(batch.of_loss_tokens(batch.response_positions)[at])
            logp_V = _resident(ids)[place - 1]
            assert float(signal.sampled_logprobs_T[at]) == pytest.approx(
                float(logp_V[ids[place]]), abs=1e-4
            )
            top = logp_V.topk(TOP_K)
            assert signal.topk_ids_TK[at].tolist() == top.indices.tolist()
            torch.testing.assert_close(signal.topk_logprobs_TK[at], top.values, rtol=0.0, atol=1e-4)
    print(f"served: {len(batches)} micro-batches", flush=True)


def test_the_plug_in_asks_for_the_rows_that_it_was_given():
    server = StandIn(PAIR / "teacher")
    try:
        run_with_env(1, ask_in_the_plug_in, server.address)
    finally:
        server.kill()
