"""Episodes with an environment: the ids of all turns, faults, and what a run says of them."""

import fcntl
import re
import resource
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from calculator import Calculator
from grid_world import GridWorld

from megatron_tropd.base import workers
from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import EnvironmentConfig, GuidanceConfig, RolloutConfig, load_config
from megatron_tropd.data.conversations import Talk
from megatron_tropd.data.packing import pack
from megatron_tropd.data.prompts import tokenize_line
from megatron_tropd.data.responses import TeacherResponse
from megatron_tropd.data.samples import EPISODE_FIELD, Sample, SampleRequest
from megatron_tropd.data.sequence import TokenSequence, Writer
from megatron_tropd.data.sequence_files import dump_sequences, read_sequences
from megatron_tropd.data.tokenizers import load_tokenizer
from megatron_tropd.data.types import Prompt
from megatron_tropd.distill.metrics import sequence_metrics
from megatron_tropd.distill.step_loss import targets_of
from megatron_tropd.losses import HiddenStatesSignal, preset, tropd_loss_from_hidden
from megatron_tropd.rollout.environments import EnvironmentCall, Environments, SharedEnvironments
from megatron_tropd.rollout.episodes import EpisodePlan, load_mode
from megatron_tropd.rollout.source import SampledRollouts
from megatron_tropd.tasks.exact_match import item_digest
from tests.unit_tests.test_rollout_source import Engines

TOOLS = Path(__file__).resolve().parents[2] / "examples" / "tool_use"
TOKENIZER = load_tokenizer(TOOLS / "student")
EOS = TOKENIZER.eos_token_id
ROLLOUT = RolloutConfig(
    prompts="x",
    max_new_tokens=60,
    prompts_per_step=2,
    samples_per_prompt=2,
    mode="multi_turn",
    apply_chat_template=True,
)
CLASS_OF = "tests.odd_environments:"


def ids(text: str) -> list[int]:
    """Of a text by itself."""
    return list(TOKENIZER.encode(text, add_special_tokens=False))


class Student(Engines):
    """An engine that writes "NUMBER of the turn=", or what ``texts`` says, to each request."""

    def __init__(self, texts: Sequence[str] = (), end: Sequence[int] = (EOS,)) -> None:
        super().__init__()
        self.texts, self.end = texts, end

    def _answers(self) -> list[Sample]:
        return [self._answer(request) for request in self.requests[-1]]

    def _answer(self, request: SampleRequest) -> Sample:
        turn = request.token_ids.count(EOS)
        text = self.texts[turn] if turn < len(self.texts) else f"{turn + 1}{request.seed % 7}="
        wrote = [*ids(text), *self.end]
        kept = tuple(wrote[: request.max_new_tokens])
        finish = "stop" if len(kept) == len(wrote) else "length"
        return Sample(kept, tuple(-0.5 - i for i in range(len(kept))), finish)


def prompt_of(index: int, **fields: Any) -> Prompt:
    line = {"prompt": f"start {index}:", **fields}
    text, token_ids = tokenize_line(line, TOKENIZER, ROLLOUT, "here", ())
    return Prompt(index, text, token_ids, line, index + 1)


def played(
    engines: Engines,
    name: str = "Echo",
    prompts: Sequence[Prompt] | None = None,
    *,
    responses: Any = None,
    rollout: RolloutConfig = ROLLOUT,
    **settings: Any,
) -> list[TokenSequence]:
    """The sequences of a step in which the student talks to one of ``odd_environments``."""
    config = EnvironmentConfig(name=CLASS_OF + name, **settings)
    plan = EpisodePlan(rollout, GuidanceConfig(), 10, 1, responses, None, config)
    talk = Talk(TOKENIZER, rollout, config.stop_token_ids)
    with SharedEnvironments(config, rank=0, world_size=1) as environments:
        source = SampledRollouts(
            engines,
            load_mode("multi_turn"),
            prompts or [prompt_of(i) for i in range(3)],
            replace(plan, talk=talk),
            stop_token_ids=(EOS,),
            environments=environments,
            is_main=True,
        )
        source.begin(2)
        return source.collect()


def said(sequence: TokenSequence) -> dict[str, Any]:
    return dict(sequence.fields[EPISODE_FIELD])


def test_the_ids_of_an_episode_are_what_the_engine_saw_turn_by_turn() -> None:
    engines = Student()
    sequences = played(engines)
    assert len(sequences) == 4 and len(engines.requests) == 3
    for place, sequence in enumerate(sequences):
        whole = sequence.ids_N.tolist()
        for asked in engines.requests:
            seen = list(asked[place].token_ids)
            assert whole[: len(seen)] == seen
        turns = [f"{n + 1}{asked[place].seed % 7}=" for n, asked in enumerate(engines.requests)]
        prompt = f"start {sequence.key.prompt}:"
        written = f"{prompt}{turns[0]}</s>1 {turns[0]}{turns[1]}</s>2 {turns[1]}{turns[2]}</s>"
        assert TOKENIZER.decode(whole) == written, "as the template renders it"
        own = [token for turn in turns for token in [*ids(turn), EOS]]
        assert sequence.by(Writer.STUDENT).tolist() == own
        assert (sequence.weight_N > 0).tolist() == (sequence.writer_N == 2).tolist()
        assert sequence.finish == "stop"
        assert said(sequence)["end"] == "done" and said(sequence)["turns"] == 3
        assert said(sequence)["info"] == {"heard": 3, "even": False}
    seeds = [request.seed for asked in engines.requests for request in asked]
    assert len(set(seeds)) == len(seeds), "a turn has a seed of its own"


def test_async_methods_and_first_messages_of_the_environment() -> None:
    first = [{"role": "user", "content": "start 99:"}]
    found = played(Student(), "Slow")
    assert {said(s)["turns"] for s in found} == {3}
    found = played(Student(), prompts=[prompt_of(i, first=first) for i in range(3)])
    assert {TOKENIZER.decode(s.prompt_ids) for s in found} == {"start 99:"}


@pytest.mark.parametrize(
    ("what", "end", "error"),
    [
        ("dies", "died", "process is gone"),
        ("hangs", "timeout", "no answer within 1 s"),
        ("hangs in C", "timeout", "no answer within 1 s"),
        ("floods", "flooded", "a reply of more than 1,048,576 bytes"),
        ("raises", "raised", "ValueError: cannot go on"),
        ("half a pair", "refused", "half a surrogate pair"),
        ("an object", "refused", "cannot be sent: Object of type object"),
        ("a number", "refused", "content must be a text"),
        ("no tuple", "refused", "step() must return (messages, done, info)"),
        ("no messages", "refused", "must be a list"),
        ("nothing to say", "refused", "not empty"),
        ("as the student", "refused", "does not speak as 'assistant'"),
        ("done as text", "refused", "done as bool"),
        ("info as text", "refused", "info as dict"),
    ],
)
def test_an_environment_that_fails_ends_its_episode_alone(
    what: str, end: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [prompt_of(0, what=what), prompt_of(1, what="nothing")]
    sequences = played(Student(), "Odd", prompts, timeout_seconds=1)
    failed = [s for s in sequences if s.key.prompt == 0]
    rest = [s for s in sequences if s.key.prompt == 1]
    assert {said(s)["end"] for s in rest} == {"done"} and {said(s)["turns"] for s in rest} == {3}
    assert {said(s)["end"] for s in failed} == {end}
    for sequence in failed:
        assert error in said(sequence)["error"] and said(sequence)["turns"] == 2
        assert sequence.by(Writer.STUDENT).tolist().count(EOS) == 2, "what it wrote is trained on"
        assert sequence.writer_N[-1] == Writer.STUDENT and sequence.finish == "stop"
    assert f"2 of 4 environments failed, the first by {end}: " in capsys.readouterr().err
    metrics = sequence_metrics(sequences, step=2)
    assert metrics["environment/failed_share"] == 0.5
    assert metrics[f"environment/end/{end}"] == 0.5 == metrics["environment/end/done"]


def test_prints_of_an_environment_go_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    found = played(Student(), "Odd", [prompt_of(i, what="prints") for i in range(2)])
    assert {said(s)["end"] for s in found} == {"done"}
    assert "xxx" not in "".join(capfd.readouterr())


def test_too_many_failures_stop_the_run_and_say_why() -> None:
    prompts = [prompt_of(i, what="raises") for i in range(2)]
    with pytest.raises(InputError, match=r"4 of 4 environments failed.*cannot go on.*max_failures"):
        played(Student(), "Odd", prompts)
    assert len(played(Student(), "Odd", prompts, max_failures=1.0)) == 4


def test_one_that_fails_at_once_leaves_a_sequence_without_loss() -> None:
    prompts = [prompt_of(i, what="raises at once") for i in range(2)]
    found = played(Student(), "Odd", prompts, max_failures=1.0)
    assert all(not s.weight_N.any() and not s.response_ids for s in found)
    assert {said(s)["error"] for s in found} == {"RuntimeError: no such game"}
    assert sequence_metrics(found, step=2)["environment/turns"] == 0


def test_no_process_is_left() -> None:
    config = EnvironmentConfig(name=CLASS_OF + "Odd", timeout_seconds=1)
    with Environments(config) as environments:
        calls = {i: EnvironmentCall(prompt={"what": "hangs"}) for i in range(6)}
        assert not any(r.failure for r in environments.answer(calls).values())
        pids = [copy._pid for copy in environments._copies.values()]
        assert all(Path(f"/proc/{pid}").exists() for pid in pids) and len(set(pids)) == 6
        environments.end(0)
        environments.answer({9: EnvironmentCall(prompt={"what": "x"})})
        assert not Path(f"/proc/{pids[0]}").exists(), "the ended one is waited for"
    end = time.monotonic() + 10
    while any(_runs(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_limits_end_an_episode() -> None:
    found = played(Student(), turns=2)
    assert {(said(s)["end"], said(s)["turns"], s.finish) for s in found} == {("turns", 2, "length")}
    found = played(Student(["123456="]), turn_tokens=4)
    assert {(said(s)["end"], said(s)["turns"], s.finish) for s in found} == {
        ("length", 1, "length")
    }
    assert {len(s.response_ids) for s in found} == {4}
    engines = Student()
    short = replace(ROLLOUT, max_new_tokens=14)
    found = played(engines, rollout=short)
    assert {said(s)["end"] for s in found} == {"length"}
    assert all(len(s.response_ids) <= 14 for s in found)
    for request in (request for asked in engines.requests for request in asked):
        assert len(request.token_ids) + request.max_new_tokens == 14 + len(found[0].prompt_ids)


def test_ids_that_end_a_turn_are_part_of_it_and_what_closes_it_is_context() -> None:
    (call,) = ids("=")
    found = played(Student(["47*3", "8*2", "5"], end=[call]), stop_token_ids=(call,))
    for sequence in found:
        assert said(sequence)["turns"] == 3
        student = sequence.by(Writer.STUDENT).tolist()
        assert EOS not in student and student.count(call) == 3
        assert sequence.by(Writer.CONTEXT).tolist().count(EOS) == 2, "the template's closing"
        assert "47*3=</s>1 47*3=8*2=</s>" in TOKENIZER.decode(sequence.ids_N.tolist())


def test_another_stop_ends_the_response() -> None:
    (other,) = ids("=")
    found = played(Student(["47*3"], end=[other]))
    assert {(said(s)["end"], said(s)["turns"]) for s in found} == {("stop", 1)}


def test_ids_that_a_tokenizer_would_not_make_are_kept_and_counted() -> None:
    class Digits(Student):
        """Writes "start" letter by letter."""

        def _answer(self, request: SampleRequest) -> Sample:
            wrote = (*(i for letter in "start" for i in ids(letter)), EOS)
            return Sample(wrote, (-1.0,) * len(wrote), "stop")

    engines = Digits()
    sequences = played(engines)
    assert {said(s)["drifted"] for s in sequences} == {3}
    letters = [i for letter in "start" for i in ids(letter)]
    assert letters != ids("start")
    for place, sequence in enumerate(sequences):
        assert sequence.by(Writer.STUDENT).tolist() == [*letters, EOS] * 3
        last = list(engines.requests[-1][place].token_ids)
        assert sequence.ids_N.tolist()[: len(last)] == last
    assert sequence_metrics(sequences, step=2)["environment/drifted_share"] == 1


def test_a_prefix_begins_the_first_turn_and_the_environment_hears_it() -> None:
    responses = {i: (TeacherResponse(i, 0, (*ids("47*83="), EOS), "stop"),) for i in range(3)}
    found = played(Student(["", ""]), responses=responses)
    prefixed = [s for s in found if s.key.sample == 0]
    for sequence in prefixed:
        prefix = sequence.by(Writer.TEACHER).tolist()
        assert prefix and prefix == ids("47*83=")[: len(prefix)]
        heard = TOKENIZER.decode(sequence.ids_N.tolist())
        assert f"</s>1 {TOKENIZER.decode(prefix)}" in heard
    assert not any(s.count(Writer.TEACHER) for s in found if s.key.sample == 1)
    first = [{"role": "user", "content": "start 99:"}]
    with pytest.raises(ConfigError, match=r"guidance\.responses answer the prompts as their file"):
        played(
            Student(), prompts=[prompt_of(i, first=first) for i in range(3)], responses=responses
        )


def test_a_sequence_is_the_same_after_a_file(tmp_path: Path) -> None:
    sequences = played(Student())
    path = tmp_path / "x.jsonl"
    path.write_bytes(dump_sequences(sequences))
    again = read_sequences(path)
    assert dump_sequences(again) == path.read_bytes()
    assert [said(s) for s in again] == [said(s) for s in sequences]


def test_templates_and_prompts_without_turns_are_refused_at_the_start() -> None:
    plain = replace(ROLLOUT, apply_chat_template=False)
    with pytest.raises(ConfigError, match="speaks in messages, but the prompts are plain text"):
        Talk(TOKENIZER, plain).check([prompt_of(0)], (EOS,))
    with pytest.raises(ConfigError, match=r"closes a turn with '</s>' \(id 2\), which ends no"):
        Talk(TOKENIZER, ROLLOUT).check([prompt_of(0)], (7,))
    Talk(TOKENIZER, ROLLOUT, (7,)).check([prompt_of(0)], (8,))


def test_the_grid_world_is_played_to_its_treasure() -> None:
    world = GridWorld(walls=0.0)
    first = world.reset({"seed": 3, "size": 4})
    assert first == GridWorld(walls=0.0).reset({"seed": 3, "size": 4}), "a map is its seed's"
    said: list[Any] = []
    for _ in range(world.most_steps):
        (x, y), (a, b) = world.here, world.treasure
        way = ("east" if a > x else "west") if a != x else "south" if b > y else "north"
        messages, done, info = world.step(f"I go {way}")
        said.append(messages[0]["content"])
        if done:
            break
    assert done and info["found"] and info["distance"] == 0 and info["steps"] == len(said)
    lost = GridWorld(most_steps=2)
    lost.reset({"seed": 3})
    assert lost.step("hm")[0][0]["content"].startswith("That is no direction.")
    assert lost.step("hm")[1:] == (True, {"found": False, "steps": 2, "distance": ANY})


def test_the_calculator_calculates_and_takes_the_answer() -> None:
    tool = Calculator()
    tool.reset({"answer": "3901"})
    assert tool.step("47*83=") == (
        [{"role": "tool", "content": "3901"}],
        False,
        {"correct": False, "calls": 1, "errors": 0},
    )
    assert tool.step("47*=")[0][0]["content"] == "error"
    assert tool.step("answer 3901") == ([], True, {"correct": True, "calls": 2, "errors": 1})


@pytest.mark.parametrize("method", ["tropd", "tropd_exact", "gkd_jsd"])
def test_the_loss_ignores_what_the_environment_wrote_in_value_and_gradient(method: str) -> None:
    loss = preset(method)
    sequences = played(Student())
    (batch,) = pack(
        sequences, dp_rank=0, dp_size=1, tokens_per_micro_batch=4096, seed=3, step=2, loss=loss
    )
    vocab, width = len(TOKENIZER), 8
    generator = torch.Generator().manual_seed(0)
    student, teacher, layer = (
        torch.randn(*size, generator=generator)
        for size in ((*batch.tokens.shape, width), (*batch.tokens.shape, width), (vocab, width))
    )

    def of(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = student.clone().requires_grad_()
        output = tropd_loss_from_hidden(
            hidden.flatten(0, 1)[batch.loss_at],
            layer,
            targets_of(batch, weights_T=batch.of_loss_tokens(batch.weights)),
            HiddenStatesSignal(teacher.flatten(0, 1)[batch.loss_at], layer, vocab),
            config=loss,
            vocab_size=vocab,
            group=None,
        )
        return torch.autograd.grad(output.loss, hidden)[0], output.loss

    gradient, value = of(student, teacher)
    context = batch.writers == Writer.CONTEXT
    assert context.sum() > sum(s.count(Writer.CONTEXT) - s.prompt_length for s in sequences)
    assert not gradient[context].any() and gradient[~context].any(-1).sum() > 0
    noise = torch.randn(student.shape, generator=generator) * context[..., None]
    other = of(student + noise, teacher - noise)
    assert torch.equal(other[1], value) and torch.equal(other[0], gradient)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.mode=single_turn", r'"multi_turn" and environment\.name go together'),
        ("environment.name=", r'environment\.name = ""\. Set both or neither'),
        ("environment.name=calculator", r'must name a class as "package\.module:Class"'),
        ("rollout.steps_ahead=1", r"needs rollout\.steps_ahead = 0, found 1"),
        ("evaluation.task=reverse_kl", r'"reverse_kl" samples one turn'),
        ("environment.max_failures=0", r"environment\.max_failures must be in"),
        ('teacher.context="{prompt} {hint}"', r"teacher\.context does not go with"),
        ("environment.turns=0", r"environment\.turns must be at least 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TOOLS / "tropd.toml", [override])


def test_episodes_at_their_own_pace_are_not_promised_to_repeat() -> None:
    with pytest.raises(
        ConfigError, match=r"environment\.continuous = true needs colocated engines"
    ):
        load_config(TOOLS / "tropd.toml", ["environment.continuous=true", "run.deterministic=true"])


def test_the_answer_is_the_last_turn() -> None:
    (sequence, *_) = played(Student(["1=", "2=", "answer 3"]))
    assert TOKENIZER.decode(sequence.answer_ids) == "answer 3</s>"
    whole = TokenSequence.of_runs(
        sequence.key,
        (Writer.CONTEXT, (5, 6)),
        (Writer.TEACHER, (7,)),
        (Writer.STUDENT, (8, 2)),
        logprobs=(-1, -1),
    )
    assert whole.answer_ids == whole.response_ids == [7, 8, 2]


def test_a_process_is_heard_on_a_descriptor_that_select_does_not_know() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip(f"this system allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    mine, theirs = socket.socketpair()
    high = socket.socket(fileno=fcntl.fcntl(mine, fcntl.F_DUPFD, 1100))
    try:
        theirs.sendall(b'{"said": 1}\n')
        assert workers._Channel(high, lambda: None).read(5.0) == {"said": 1}
    finally:
        for one in (mine, theirs, high):
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_problems_that_differ_in_any_field_are_different_ones() -> None:
    one, other = prompt_of(0, answer="1", board="x"), prompt_of(0, answer="1", board="y")
    assert item_digest(one) != item_digest(other)
    assert item_digest(one) == item_digest(prompt_of(0, board="x", answer="1"))


def test_tasks_of_one_turn_are_refused_beside_episodes_at_their_own_pace(tmp_path: Path) -> None:
    text = (TOOLS / "tropd.toml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("prompts =")]
    for key in ("student", "teacher", "problems"):
        lines = [re.sub(rf'^{key} = "', f'{key} = "{TOOLS}/', line) for line in lines]
    tasks = '\n[[tasks]]\nname = "one"\nprompts = "a.jsonl"\nmode = "single_turn"\n'
    path = tmp_path / "tasks.toml"
    path.write_text("\n".join(lines) + tasks)
    assert load_config(path).tasks
    with pytest.raises(ConfigError, match="of every task"):
        load_config(path, ["environment.continuous=true"])
