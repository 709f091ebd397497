"""What a user can get wrong is refused before the first step: expected, found, what to do.

Through the command itself (``--dry-run`` checks everything a run checks before it starts ranks);
nothing may be written by a refused command.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tropd.cli import main as cli


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model) -> Path:
    """A folder with a working config, prompts, problems and responses of a tiny pair."""
    from megatron_tropd.data.prompts import load_prompts
    from megatron_tropd.data.responses import TeacherResponse, header_record, response_record
    from megatron_tropd.data.tokenizers import load_tokenizer

    folder = tmp_path_factory.mktemp("inputs")
    lines = [json.dumps({"prompt": f"{i} + {i} =", "answer": str(2 * i)}) for i in range(8)]
    for name in ("prompts.jsonl", "heldout.jsonl"):
        (folder / name).write_text("\n".join(lines) + "\n")
    student = tiny_model("llama", tie_word_embeddings=True)
    tokenizer = load_tokenizer(student)
    records = [header_record(tokenizer, {"max_new_tokens": 4})]
    for prompt in load_prompts(folder / "prompts.jsonl", tokenizer):
        response = TeacherResponse(prompt.index, 0, (10, 11, 2), "stop")
        records.append(response_record(prompt, response, text="ab", seed=1))
    (folder / "responses.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "tropd.toml").write_text(f"""
        [model]
        student = "{student}"
        teacher = "{tiny_model("qwen3", hidden_size=96, num_hidden_layers=4, seed=5)}"
        [rollout]
        prompts = "prompts.jsonl"
        max_new_tokens = 16
        prompts_per_step = 4
        samples_per_prompt = 2
        [guidance]
        responses = "responses.jsonl"
        [train]
        steps = 2
        [evaluation]
        problems = "heldout.jsonl"
        [run]
        dir = "unset"
    """)
    return folder


@pytest.fixture
def dry_run(inputs, tmp_path, capsys) -> Callable[..., tuple[int, str]]:
    """``dry_run(*overrides)``: exit code and output; asserts that nothing was written."""

    def run(*overrides: str, toml: Path = inputs / "tropd.toml") -> tuple[int, str]:
        folder = tmp_path / "run"
        code = cli.main(["distill", str(toml), f"run.dir={folder}", "--dry-run", *overrides])
        assert not folder.exists()
        out, err = capsys.readouterr()
        return code, out + err

    return run


def test_a_good_config_says_what_would_run(dry_run):
    code, text = dry_run("parallel.tensor=2", "megatron.ddp.overlap_grad_reduce=true")
    assert code == 0
    assert "option:     megatron.ddp.overlap_grad_reduce=True" in text
    assert "TP 2 x PP 1 x DP 1" in text and "8 prompts have one" in text
    assert '"lr": 5e-06' in text and "nothing was written" in text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.student=nowhere"], ["nowhere", "does not exist"]),
        (["train.lrr=1"], ["Unknown config key train.lrr", "Did you mean train.lr?"]),
        (["train.lr=fast"], ["train.lr must be float", "'fast'"]),
        (["parallel.tensor=3"], ["must divide the student's", "heads", "found 4"]),
        (["parallel.pipeline=3"], ["must divide the student's layers", "found 2"]),
        (["rollout.num_engines=2"], ["must divide the world size 1"]),
        (["rollout.prompts_per_step=9"], ["exceeds the 8 prompts"]),
        (["parallel.data=3"], ["must be divisible by parallel.data = 3"]),
        (["parallel.data=2", "parallel.expert=2"], ["needs a mixture of experts", "dense"]),
        (
            ["loss.method=tropd", "loss.top_k=260"],
            ["top_k <= the vocabulary of 259", "found 260"],
        ),
        (["loss.method=tropd", "loss.outlier=clip"], ["needs loss.tau"]),
        (
            ["loss.method=opd", "loss.mask_first_ids=[259]"],
            ["loss.mask_first_ids", "259 tokens", "[259]"],
        ),
        (["rollout.max_new_tokens=256"], ["no room for a prompt", "256"]),
        (["rollout.max_new_tokens=250"], ["prompts.jsonl, line 1", "at most 6 fit"]),
        (["guidance.responses=gone.jsonl"], ["gone.jsonl", "cannot be read"]),
        (["guidance.prefixed_per_prompt=3"], ["exceeds", "samples_per_prompt = 2"]),
        (["evaluation.problems=gone.jsonl"], ["gone.jsonl", "cannot be read"]),
        (["megatron.model.num_layers=2"], ["num_layers is set by the model's folder"]),
        (["megatron.ddp.bucket_sise=2"], ["no such field", "Did you mean 'bucket_size'?"]),
        (["megatron.model.recompute_granularity=full"], ["Megatron refuses", "recompute_method"]),
        (["megatron.teacher.fp8=hybrid"], ["needs Transformer Engine", "no CUDA device"]),
    ],
)
def test_settings_that_do_not_fit_are_refused(dry_run, overrides, expected):
    code, text = dry_run(*overrides)
    assert code == 2
    for part in expected:
        assert part in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "empty"),
        ('{"prompt": "1 +"}\n{"prompt": \n', "line 2"),
        ('{"prompt": "1 +"}\n{"prompt": ""}\n', "line 2"),
        ('{"question": "1 +"}\n', "line 1"),
    ],
)
def test_a_broken_prompts_file_names_the_line(dry_run, tmp_path, content, expected):
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    code, text = dry_run(f"rollout.prompts={path}")
    assert code == 2 and "broken.jsonl" in text and expected in text


def test_a_broken_responses_file_names_the_line(dry_run, inputs, tmp_path):
    path = tmp_path / "responses.jsonl"
    lines = (inputs / "responses.jsonl").read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3].replace("token_ids", "ids"), *lines[4:]]))
    code, text = dry_run(f"guidance.responses={path}")
    assert code == 2 and "line 4" in text


def test_responses_to_other_prompts_are_refused(dry_run, tmp_path):
    path = tmp_path / "others.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} - {i} ="}) + "\n" for i in range(8)))
    code, text = dry_run(f"rollout.prompts={path}")
    assert code == 2 and "responses.jsonl" in text


def test_files_of_a_windows_editor(dry_run, inputs, tmp_path):
    text = (inputs / "prompts.jsonl").read_text().replace("\n", "\r\n")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(text, encoding="utf-8-sig")
    assert dry_run(f"rollout.prompts={prompts}")[0] == 0
    prompts.write_text(text, encoding="utf-16")
    code, text = dry_run(f"rollout.prompts={prompts}")
    assert code == 2 and "is UTF-16 text" in text and "iconv -f UTF-16" in text


def test_long_prompts_are_all_named_or_left_out(dry_run, inputs, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    long = "".join(json.dumps({"prompt": n * "a"}) + "\n" for n in (245, 300))
    prompts.write_text((inputs / "prompts.jsonl").read_text() + long)
    code, text = dry_run(f"rollout.prompts={prompts}")
    assert code == 2 and "line 9 (245 tokens), line 10 (300 tokens): 2 of 10 prompts" in text
    code, text = dry_run(f"rollout.prompts={prompts}", "rollout.filter_overlong_prompts=true")
    assert code == 0 and "prompts.jsonl: 2 of 10 prompts are left out" in text


@pytest.fixture
def chatting(inputs, tmp_path, dry_run, tiny_model) -> Callable[..., tuple[int, str]]:
    """``chatting(student's template, teacher's, *overrides)``: a dry run on lines of messages."""
    prompts = tmp_path / "messages.jsonl"
    line = json.dumps({"messages": [{"role": "user", "content": "1 + 1 ="}]})
    prompts.write_text(f"{line}\n" * 8)

    def run(student: object, teacher: object, *overrides: str) -> tuple[int, str]:
        folders = []
        for name, template in (("student", student), ("teacher", teacher)):
            folder = tmp_path / name
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(tiny_model("llama", tie_word_embeddings=True), folder)
            path = folder / "tokenizer_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
            folders.append(f"model.{name}={folder}")
        toml = tmp_path / "chat.toml"
        text = (inputs / "tropd.toml").read_text()
        toml.write_text(text.replace('responses = "responses.jsonl"', ""), encoding="utf-8-sig")
        given = [f"rollout.prompts={prompts}", f"evaluation.problems={inputs / 'heldout.jsonl'}"]
        return dry_run(*folders, *given, *overrides, toml=toml)

    return run


CHAT = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


def test_templates_are_compared_whenever_one_is_used(chatting):
    code, text = chatting(CHAT, CHAT.replace("[", "<"))
    assert code == 2 and "messages.jsonl, line 1: the chat templates of student and" in text
    unused = "{% if messages[0].role == 'system' %}S{% endif %}"
    assert chatting(CHAT, unused + CHAT)[0] == 0
    assert chatting(CHAT, unused + CHAT, "rollout.apply_chat_template=true")[0] == 0


def test_templates_under_names_are_chosen_by_name(chatting):
    named = [{"name": name, "template": name + CHAT} for name in ("rag", "tool_use")]
    code, text = chatting(named, named)
    assert code == 2 and "no chat template 'default', but rag, tool_use" in text
    code, text = chatting(named, named, "rollout.chat_template_kwargs.chat_template=rag")
    assert code == 0 and '"chat_template": "rag"' in text


def test_arguments_of_the_template_are_printed_and_misspelt_ones_refused(chatting):
    template = "{% if not think %}<think></think>{% endif %}" + CHAT
    code, text = chatting(template, template, "rollout.chat_template_kwargs={think = false}")
    assert code == 0 and '"think": false' in text
    code, text = chatting(template, template, "rollout.chat_template_kwargs={thnk = false}")
    assert code == 2 and "does not read thnk" in text and "reads think" in text


def test_a_truncated_model_file_is_refused(dry_run, inputs, tmp_path, tiny_model):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model("llama", tie_word_embeddings=True), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, text = dry_run(f"model.student={broken}")
    assert code == 2 and "model.safetensors" in text


def test_tokenizers_that_differ_are_named_by_their_first_ids(dry_run, tmp_path, tiny_model):
    other = tmp_path / "other"
    shutil.copytree(tiny_model("qwen3", hidden_size=96, num_hidden_layers=4, seed=5), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = (token for token, i in vocabulary.items() if i in (40, 41))
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, text = dry_run(f"model.teacher={other}")
    assert code == 2 and "id 40" in text and "id 41" in text


def test_a_teacher_padded_otherwise_is_handled(dry_run, tiny_model):
    code, text = dry_run(f"model.teacher={tiny_model('qwen3', vocab_size=272, seed=6)}")
    assert code == 0 and "259 shared columns" in text


def test_a_tokenizer_larger_than_the_model_is_refused(dry_run, tiny_model):
    code, text = dry_run(f"model.teacher={tiny_model('qwen3', vocab_size=200, seed=6)}")
    assert code == 2 and "259 ids" in text and "200 vocabulary columns" in text


def test_a_student_with_more_columns_than_its_teacher_is_handled(dry_run, tiny_model):
    code, text = dry_run(f"model.student={tiny_model('llama', vocab_size=300, seed=7)}")
    assert code == 0 and "259 shared columns" in text


def test_models_that_no_engine_runs_are_refused_first(dry_run, tiny_model):
    code, text = dry_run(f"model.student={tiny_model('llama', head_dim=16, seed=7)}")
    assert code == 2 and "heads of size 16; vLLM on CPU runs" in text
    mixed = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    folder = tiny_model("qwen3", seed=8, **mixed)
    code, text = dry_run(f"model.student={folder}")
    assert code == 2 and "in some layers only" in text
    # The trainer computes it, so it can be a teacher that nothing samples from.
    assert dry_run(f"model.teacher={folder}", "evaluation.task=reverse_kl")[0] == 0
    code, text = dry_run(f"model.teacher={folder}", "evaluation.task=exact_match")
    assert code == 2 and str(folder) in text and "in some layers only" in text


def test_a_run_folder_is_needed_where_one_is_meant(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
