"""The job file of a run: a template of shell, and the few places where run and site fill it in."""

import hashlib
import re
import shlex
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.cluster.job_layout import JobLayout
from megatron_tropd.cluster.site import Site
from megatron_tropd.config import Config, config_to_toml


@dataclass(frozen=True)
class JobCommand:
    """What the training nodes of a job do, and how far a job file can see that they have come."""

    name: str
    """After ``tropd``."""
    resumes: str
    steps: str
    """What counts as a step."""
    count_steps: str
    """Shell that sets ``steps``."""


DISTILL = JobCommand(
    "distill",
    "The run resumes from its last complete checkpoint",
    "Steps in the metrics",
    '[ ! -e "$run/metrics.jsonl" ] || steps=$(wc -l <"$run/metrics.jsonl")',
)
SCORE = JobCommand(
    "score",
    "The command writes the files that are missing",
    "Files of scores, beside the command's folder",
    "steps=$(find \"$run/..\" -maxdepth 1 -name '*-[0-9]*.safetensors' 2>/dev/null | wc -l)",
)


def copy_config(config: Config, run: Path) -> tuple[Path, str]:
    """The config that a job runs, so that whoever edits the original changes no waiting job.

    Args:
        run: folder of the command.

    Returns:
        Where it belongs in that folder, and its text: overrides in it, paths absolute. The name
        follows from the text: a job submitted before keeps its own.
    """
    kept = str(Path(config.run.dir).resolve())
    text = config_to_toml(replace(config, run=replace(config.run, dir=kept)))
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return run / f"job_{digest}.toml", f"# The settings of a job of `tropd slurm`.\n{text}"


def render_job(
    run: Path, site: Site, layout: JobLayout, *, path: Path, command: JobCommand = DISTILL
) -> str:
    """The job file, a shell script for sbatch.

    Args:
        run: folder of the command, whole.
        path: of the config that the job reads whenever it starts (:func:`copy_config`).

    Raises:
        ConfigError: a value has a line break, with which it could not be one word of a script.
    """
    separate = layout.servers > 0
    text = _template("job.sbatch")
    text = text.replace("@SERVERS@\n", _template("servers.sh") + "\n" if separate else "\n")
    text = text.replace("@START_SERVERS@", "start_servers\n" if separate else "")
    marks = {
        "DIRECTIVES": _directives(site, layout, run),
        "RUN": _quote(run),
        "COMMAND": command.name,
        "RESUMES": command.resumes,
        "STEPS_ARE": command.steps,
        "COUNT_STEPS": command.count_steps,
        "TRAINING_NODES": str(layout.training_nodes),
        "MAX_RESTARTS": str(site.max_restarts),
        "TROPD": _quote(Path(site.venv) / "bin" / "tropd" if site.venv else "tropd"),
        "CONFIG": _quote(path.resolve()),
        "STEP_OPTIONS": "".join(f" {_quote(o)}" for o in (*_container(site), *site.srun_options)),
        "ENVIRONMENT": "\n".join(_environment(site)),
        "NUM_SERVERS": str(layout.servers),
        "SERVERS_PER_NODE": str(layout.servers_per_node),
        "GPUS_PER_SERVER": str(layout.gpus_per_server),
    }
    return re.sub(r"@([A-Z_]+)@", lambda mark: marks[mark[1]], text)


def _template(name: str) -> str:
    return files(__package__).joinpath(name).read_text()


def _quote(word: object) -> str:
    text = str(word)
    if re.search(r"[\r\n]", text):
        raise ConfigError(f"A job file cannot hold {text!r}: expected one line. Change it.")
    return shlex.quote(text)


def _directives(site: Site, layout: JobLayout, run: Path) -> str:
    logs = str(run / "logs").replace("%", "%%")
    gres = f"{site.gres}:{site.gpus_per_node}" if site.gpus_per_node and site.gres else None
    options = {
        "job-name": f"tropd-{run.name}",
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "time": site.time,
        "nodes": layout.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": site.cpus_per_node,
        "gres": gres,
        "mem": site.memory,
        # To the script alone: it passes the signal on to the training, the servers go on serving.
        "signal": f"B:USR1@{site.warning_seconds}",
        "chdir": Path.cwd(),
        "output": f"{logs}/job_%j.log",
        "open-mode": "append",
    }
    words = [f"--{name}={value}" for name, value in options.items() if value not in (None, "")]
    words += ["--requeue", *(["--exclusive"] if site.exclusive else []), *site.options]
    return "\n".join(f"#SBATCH {_quote(word)}" for word in words)


def _container(site: Site) -> list[str]:
    if site.container is None:
        return []
    mounts, names = ",".join(site.container.mounts), ",".join(site.environment)
    return [
        f"--container-image={site.container.image}",
        *([f"--container-mounts={mounts}"] if mounts else []),
        f"--container-workdir={Path.cwd()}",
        # Without it the image's own values of these variables would win.
        *([f"--container-env={names}"] if names else []),
    ]


def _environment(site: Site) -> list[str]:
    lines = [f"module load {_quote(module)}" for module in site.modules]
    lines += site.setup
    if site.venv:
        lines.append(f"export PATH={_quote(Path(site.venv) / 'bin')}:$PATH")
    if site.gpus_per_node:
        # A rank that finds none must say so, and not train on the CPU.
        lines.append(f"export TROPD_GPUS_PER_NODE={site.gpus_per_node}")
    return lines + [f"export {name}={_quote(value)}" for name, value in site.environment.items()]
