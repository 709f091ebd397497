"""What a user installs: the public names, the files that texts name, the wheel in empty rooms."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest

import megatron_tropd
from megatron_tropd.cli import files
from megatron_tropd.cli.main import EXTRAS, main
from tests import public_api

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "megatron_tropd"
NAMED = re.compile(r"\b(?:docs|configs|examples|slurm|tools|benchmarks|tests|docker)/[\w./-]*\w")
UV = Path(sys.executable).with_name("uv")
needs_uv = pytest.mark.skipif(not UV.exists(), reason="no uv beside Python: make env")


def test_the_public_api_is_the_committed_one():
    """A change of it is seen, and held against the rule of CONTRIBUTING.md."""
    found = public_api.lines()
    assert found == public_api.FILE.read_text().splitlines(), "python -m tests.public_api --write"
    assert set(megatron_tropd.__all__) == set(megatron_tropd._MODULE_OF)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        megatron_tropd.nothing  # noqa: B018


def test_the_version_stands_in_one_place():
    assert version("megatron-tropd") == megatron_tropd.__version__
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"] and "version" not in project


def _named_in_texts() -> set[str]:
    """The files that strings of the package name: errors, help, settings; not docstrings."""
    named: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, documented) and ast.get_docstring(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named.update([] if id(node) in docstrings else NAMED.findall(node.value))
    return named


def test_every_file_that_a_text_of_the_package_names_comes_with_it():
    shipped = set(files.shipped())
    folders = {str(parent) for name in shipped for parent in Path(name).parents}
    named = _named_in_texts()
    assert "docs/losses.md" in named and "slurm/site.example.toml" in named
    assert named - shipped - folders == set()


def test_files_are_listed_found_and_copied(tmp_path: Path, capsys):
    assert main(["files", "docs/losses.md"]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text().startswith("# ")
    site = tmp_path / "new" / "site.toml"
    assert main(["files", "slurm/site.example.toml", "--copy", str(site)]) == 0
    assert "partition" in site.read_text()
    assert main(["files", "slurm/site.example.toml", "--copy", str(site)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["files", "docs/nothing.md"]) == 2
    assert "`tropd files` lists them" in capsys.readouterr().err


def test_a_package_that_an_extra_brings_is_named():
    config = str(REPOSITORY / "examples" / "arithmetic" / "tropd.toml")
    code = (
        "import sys; sys.modules['tqdm'] = None\n"
        "from megatron_tropd.cli.main import main\n"
        f"sys.exit(main(['convert', 'to-hf', '--megatron', {config!r}, '--hf', 'x']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2
    assert "pip install 'megatron-tropd[train]'" in run.stderr


def test_the_extras_are_those_that_errors_name():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert extras.keys() >= {*EXTRAS, "train", "serve", "cpu", "gpu", "te", "tasks", "dev", "docs"}
    modules = {"huggingface-hub": "huggingface_hub", "megatron-core": "megatron"}
    for extra in ("train", "serve"):
        named = [re.split(r"[\[<>=]", text)[0] for text in extras[extra]]
        assert {modules.get(name, name) for name in named} == set(EXTRAS[extra]), extra


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built with the setuptools that is installed here: no network is needed."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    source = out / "source"
    _copy_tracked(source)
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    (found,) = out.glob("*.whl")
    return found


def _copy_tracked(to: Path) -> None:
    """A copy of what a wheel is made of, so that the checkout stays as it is."""
    import shutil

    to.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, to)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("megatron_tropd", *(link.name for link in (PACKAGE / "shipped").iterdir())):
        shutil.copytree(REPOSITORY / name, to / name, symlinks=True, ignore=ignore)


def _run(*command: object, **options: object) -> str:
    words = [str(word) for word in command]
    run = subprocess.run(words, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert run.returncode == 0, f"{' '.join(words)}\n{run.stdout[-3000:]}{run.stderr[-3000:]}"
    return run.stdout


def test_the_wheel_holds_what_texts_name_and_is_clean(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    lacking = {name for name in files.shipped() if f"megatron_tropd/shipped/{name}" not in names}
    assert lacking == set()
    assert {"megatron_tropd/cluster/job.sbatch", "megatron_tropd/report/page.js"} <= names
    assert not [name for name in names if "__pycache__" in name]
    pytest.importorskip("twine")
    both = [wheel, next(wheel.parent.glob("*.tar.gz"))]
    said = _run(sys.executable, "-m", "twine", "check", "--strict", *both)
    assert said.count("PASSED") == 2


def _install_from_cache(python: Path, what: str) -> None:
    """Install without a network; skips if uv's cache lacks a package."""
    command = [UV, "pip", "install", "--offline", "--quiet", "--python", python]
    command += ["--constraint", REPOSITORY / "constraints" / "cpu.txt", what]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"uv's cache cannot make this environment: {run.stderr.strip()[-300:]}")


@cache
def _outside() -> dict[str, str]:
    """The variables of somebody who has no checkout."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    return {k: v for k, v in os.environ.items() if k not in hidden} | {"OMP_NUM_THREADS": "1"}


@needs_uv
@pytest.mark.slow
def test_a_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path):
    """With torch alone the losses work; with the extra for training a run is checked."""
    python = tmp_path / "venv" / "bin" / "python"
    _run(UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv")
    _install_from_cache(python, str(wheel))
    tropd = python.with_name("tropd")
    config = _run(tropd, "files", "examples/arithmetic/tropd.toml", env=_outside()).strip()
    example = _run(tropd, "files", "examples/loss_only.py", env=_outside()).strip()
    said = _run(python, example, cwd=tmp_path, env=_outside())
    values = [float(value) for value in re.findall(r"reverse KL (\S+) nats", said)]
    assert values[0] > 1 and values[-1] < values[0] / 10
    check = (tropd, "distill", config, f"run.dir={tmp_path / 'run'}", "--dry-run")
    refused = subprocess.run(check, capture_output=True, text=True, env=_outside())
    assert refused.returncode == 2, refused.stderr
    assert "pip install 'megatron-tropd[train]'" in refused.stderr

    _install_from_cache(python, f"{wheel}[train,serve]")
    said = _run(*check, cwd=tmp_path, env=_outside())
    assert '"method": "tropd' in said and "dry run: nothing was written" in said
    assert not (tmp_path / "run").exists()
