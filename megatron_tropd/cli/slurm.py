"""``tropd slurm``: write the job file of a run, show it or submit it."""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.cluster.job_layout import JobLayout, make_layout
from megatron_tropd.cluster.render import DISTILL, SCORE, copy_config, render_job
from megatron_tropd.cluster.site import load_site
from megatron_tropd.config import Config, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``tropd slurm``."""
    parser.add_argument("config", type=Path, help="TOML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="any setting of that file"
    )
    parser.add_argument(
        "--site",
        type=Path,
        required=True,
        help="TOML file of the cluster (slurm/site.example.toml)",
    )
    parser.add_argument(
        "--score",
        action="store_true",
        help="a job that fills teacher.cache (tropd score); its files go to CACHE/job",
    )
    parser.description = (
        "Write the job file of a run to RUN/job.sbatch, with a copy of the config beside it; print "
        "it or submit it."
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--dry-run", action="store_true", help="print the job file, write nothing")
    action.add_argument("--submit", action="store_true", help="write the job file and submit it")


def _scoring(config: Config) -> str:
    """Folder of `tropd score`'s own files."""
    from megatron_tropd.cli.score import job_config  # for --help a command loads no other's file

    return job_config(config).run.dir


def run(arguments: argparse.Namespace) -> int:
    """Write the job file, print or submit it."""
    config = load_config(arguments.config, arguments.overrides)
    site = load_site(arguments.site)
    command = SCORE if arguments.score else DISTILL
    folder = Path(_scoring(config) if arguments.score else config.run.dir).resolve()
    layout = make_layout(config, site, engines=not arguments.score)
    copy, settings = copy_config(config, folder)
    text = render_job(folder, site, layout, path=copy, command=command)
    for warning in layout.warnings:
        print(f"tropd: warning: {warning}", file=sys.stderr)
    if arguments.dry_run:
        print(text, end="")
        return 0
    job = folder / "job.sbatch"
    if arguments.submit:
        _check_queue(job)
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)  # Slurm opens its log there
        copy.write_text(settings)
        job.write_text(text)
    except OSError as error:
        raise ConfigError(
            f"The job file {job} cannot be written ({error.strerror}). Choose another "
            f"{'teacher.cache' if arguments.score else 'run.dir'}."
        ) from None
    print(_describe(layout))
    if arguments.submit:
        return _submit(job)
    print(f"sbatch {shlex.quote(str(job))}")
    return 0


def _describe(layout: JobLayout) -> str:
    text = f"training nodes: {layout.training_nodes} x {layout.ranks_per_node} ranks"
    if layout.servers:
        text += f"; server nodes: {layout.server_nodes}, {layout.servers} servers"
    return text


def _check_queue(job: Path) -> None:
    """Refuse a second job of a run: it would wait, start, and find the first one at work."""
    if shutil.which("squeue") is None:
        return
    command = ["squeue", "--me", "--noheader", "--states=PENDING,RUNNING", "--format=%A %T %o"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    for line in lines:
        number, state, path = (*line.split(maxsplit=2), "", "")[:3]
        if path.strip() == str(job):
            raise ConfigError(
                f"Job {number} of this run is {state} already and goes on by itself until the run "
                f"is complete. To give it other settings: scancel {number}, then submit again."
            )


def _submit(job: Path) -> int:
    if shutil.which("sbatch") is None:
        raise ConfigError(f"There is no sbatch on this machine. Submit {job} on one that has it.")
    return subprocess.run(["sbatch", str(job)]).returncode and 1
