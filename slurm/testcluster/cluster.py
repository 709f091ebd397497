#!/usr/bin/env python3
"""A real Slurm of two nodes on this one machine, for tests: munge, slurmctld, two slurmd.

    slurm/testcluster/cluster.py up        start it; prints what to export
    slurm/testcluster/cluster.py status    what answers
    slurm/testcluster/cluster.py down      end every job and daemon, remove the folder

Everything lies in one folder (``--folder``) with a key, a socket, ports and a slurm.conf of its
own; a Slurm that belongs to the machine is neither used nor touched. ``up`` on a running cluster
and ``down`` on none change nothing; ``guard`` is ``down`` at the end of the input. Needs only the
standard library.

Each node gets cores of its own where the machine has two. Jobs are tracked by process group, the
weakest way Slurm knows: it kills nothing that a job leaves behind, so a test sees what was left.
"""

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

NODES = ("n1", "n2")
GPUS_PER_NODE = 8
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", "sbatch", "srun", "scontrol", "squeue")
APT = "apt-get install -y --no-install-recommends slurm-wlm munge"
MARK = "TROPD_TESTCLUSTER"
"""Set to the folder in the environment of our daemons, by which they are found again."""
OURS = ".tropd-testcluster"
"""A file in the folder: it belongs to a test cluster, and ``down`` may remove it."""
DOWN_AFTER_SECONDS = 10
"""A node whose slurmd is silent for so long is down, and its jobs are requeued."""
REQUEUE_SECONDS = 5
"""A requeued job starts no earlier than this (Slurm: 120)."""
GRACE_SECONDS = 30
"""So long a job of partition ``low`` may go on when one of ``main`` wants its nodes."""
PATIENCE_SECONDS = 60.0

# MessageTimeout: a message that a busy machine answers too late is sent again a minute later, and
# the order to end a step would then meet the same step of the job's next attempt.
CONFIG = """\
ClusterName=tropd
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={requeue}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.daemon.pid
SlurmdPidFile={folder}/slurmd-%n.daemon.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
SlurmdTimeout={down_after}
MessageTimeout=60
BatchStartTimeout=60
SlurmctldDebug=verbose
SlurmdDebug=verbose
KillWait=30
GresTypes=gpu
{nodes}
PartitionName=DEFAULT Nodes={names} MaxTime=INFINITE State=UP
PartitionName=main Default=YES PriorityTier=2 PreemptMode=OFF
PartitionName=low PriorityTier=1 GraceTime={grace}
"""


LONGEST_FOLDER = 107 - len("/spool-n1/n1_99999.4294967294")
"""Bytes that the address of a step's socket leaves: Unix has 107, and beyond no job starts."""


class ClusterError(RuntimeError):
    """The test cluster cannot be used; the message says what to do."""


def missing() -> str | None:
    """Why no cluster can be started here, and the command that helps; None if one can."""
    absent = [program for program in PROGRAMS if _find(program) is None]
    if absent:
        return (
            f"Slurm is not installed ({', '.join(absent)} not found). Debian or Ubuntu: {APT} "
            "(it starts no service that the test cluster would use)."
        )
    if os.geteuid() != 0:
        return "The test cluster runs as root, found another user. Use a container or sudo."
    return None


class Cluster:
    """munge, slurmctld and one slurmd per node in ``folder``.

    As a context manager it goes up and comes down, also where the process that holds it is killed.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """``folder``: default one per user."""
        temporary = Path(tempfile.gettempdir())
        self.folder = (folder or temporary / f"tropd-testcluster-{os.geteuid()}").resolve()
        self.config = self.folder / "slurm.conf"
        self._guard: subprocess.Popen | None = None
        # As it was when there was a Slurm on PATH: that must still be so when we come down.
        self._environment = dict(os.environ)

    @property
    def environment(self) -> dict[str, str]:
        """What a client (sbatch, srun, scontrol) must have in its environment."""
        # Leftovers of a job we may run in ourselves would send its options to ours.
        ours = self._environment.items()
        clean = {k: v for k, v in ours if not k.startswith(("SLURM", "SBATCH"))}
        return clean | {"SLURM_CONF": str(self.config)}

    def up(self) -> None:
        """Start what is not running, and wait until both nodes are idle.

        Raises:
            ClusterError: the folder holds something else, Slurm is missing, or a daemon did not
                come up (its log is quoted), or the name of the folder is too long.
        """
        if self._is_foreign() and any(self.folder.iterdir()):
            raise ClusterError(
                f"{self.folder} is not empty and not a test cluster of this user. Give another "
                "--folder."
            )
        if len(str(self.folder).encode()) > LONGEST_FOLDER:
            raise ClusterError(
                f"The name of a test cluster's folder has at most {LONGEST_FOLDER} bytes, or its "
                f"sockets find no room, found {self.folder}. Give a shorter --folder."
            )
        reason = missing()
        if reason:
            raise ClusterError(reason)
        if not self.config.exists():
            self._write_files()
        if not self._pid("munged"):
            self._start_munged()
        if not self._pid("slurmctld"):
            self._start("slurmctld", ["-D"])
        for node in NODES:
            self.start_node(node)
        self._wait(self.is_up, "both nodes to be idle", of="slurmctld")

    def down(self) -> None:
        """End every job, daemon and process of the cluster and remove its folder.

        A folder that is not a test cluster's is left alone.
        """
        if self._is_foreign():
            return
        if self.config.exists() and self._pid("slurmctld"):
            self._end_jobs()
        for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munged"):
            self._stop(name)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while left := self.processes():
            for pid in left:
                _kill(pid)
            if time.monotonic() > deadline:
                raise ClusterError(f"Processes {left} of the test cluster do not end.")
            time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        # It waits for the end of its input, which comes with our end, whatever that is.
        command = [sys.executable, __file__, "guard", "--folder", str(self.folder)]
        self._guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self.up()
        except BaseException:  # Ctrl-C too
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        if self._guard is not None:
            self._guard.communicate()

    def run(self, *command: str, check: bool = True) -> str:
        """What a Slurm command prints, for instance ``run("squeue", "-h")``.

        Raises:
            ClusterError: it failed.
        """
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout.strip()

    def node_states(self) -> dict[str, str]:
        """State of each node in Slurm's words (``idle``, ``mixed``, ``down*`` ...)."""
        lines = self.run("sinfo", "-h", "-N", "-o", "%N %t").splitlines()
        return dict(line.split() for line in lines)

    def is_up(self) -> bool:
        """Whether the controller answers and every node can take a job."""
        if not self._pid("slurmctld"):  # a client would try to reach it for a minute
            return False
        try:
            states = self.node_states()
        except (ClusterError, subprocess.TimeoutExpired):
            return False
        return all(states.get(node) in ("idle", "mix", "alloc") for node in NODES)

    def log(self, name: str = "slurmctld") -> str:
        """The end of what a daemon has written."""
        texts = [
            (self.folder / f"{name}{end}").read_text(errors="replace")
            for end in (".out", ".log")
            if (self.folder / f"{name}{end}").exists()
        ]
        return "".join(texts)[-4000:]

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, unless it runs."""
        if not self._pid(f"slurmd-{node}"):
            self._start(f"slurmd-{node}", ["-D", "-N", node], program="slurmd", cores=_cores(node))

    def kill_node(self, node: str) -> None:
        """Kill -9 of a node's slurmd; its steps and their processes live on."""
        pid = self._pid(f"slurmd-{node}")
        if pid is None:
            raise ClusterError(f"slurmd of {node} is not running.")
        os.kill(pid, signal.SIGKILL)
        self._wait(lambda: self._pid(f"slurmd-{node}") is None, f"slurmd of {node} to end")

    def job_processes(self, node: str | None = None) -> list[int]:
        """Every living process of any job, of one node if given, however it was started."""
        wanted = {"SLURM_CONF": str(self.config)} | ({"SLURMD_NODENAME": node} if node else {})
        return [pid for pid, env in processes_with(wanted) if "SLURMD_NODENAME" in env]

    def processes(self) -> list[int]:
        """Every living process of the cluster: daemons, step managers and jobs."""
        marked = [pid for pid, _ in processes_with({MARK: str(self.folder)})]
        return sorted({*marked, *self.job_processes()} - {os.getpid()})

    def _is_foreign(self) -> bool:
        """Whether the folder is there and was not made by us: /tmp is everybody's."""
        mark = self.folder / OURS
        return self.folder.exists() and not (
            mark.exists() and mark.stat().st_uid == self.folder.stat().st_uid == os.geteuid()
        )

    def _write_files(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / OURS).touch()
        for name in ("state", "munge"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        controller_port, *ports = _free_ports(1 + len(NODES))
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 "
            f"RealMemory=1024000 Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN"
            for node, port in zip(NODES, ports, strict=True)
        )
        # Slurm wants a file for every GPU and looks no further: job scripts that ask for GPUs can
        # be submitted, nothing can compute on them.
        for number in range(GPUS_PER_NODE):
            (self.folder / f"gpu{number}").touch()
        gpus = f"Name=gpu File={self.folder}/gpu[0-{GPUS_PER_NODE - 1}]\n"
        (self.folder / "gres.conf").write_text(gpus)
        text = CONFIG.format(
            host=host,
            controller_port=controller_port,
            # Jobs take their ports from their ids, and all clusters share this machine's ports.
            first_job=controller_port,
            user=_user(),
            folder=self.folder,
            nodes=nodes,
            names=",".join(NODES),
            down_after=DOWN_AFTER_SECONDS,
            requeue=REQUEUE_SECONDS,
            grace=GRACE_SECONDS,
        )
        # Last and at once: the folder counts as prepared from here on.
        temporary = self.config.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self.config)

    def _start_munged(self) -> None:
        folder = self.folder / "munge"
        (folder / "socket").unlink(missing_ok=True)
        options = {
            "--socket": folder / "socket",
            "--key-file": folder / "key",
            "--log-file": folder / "log",
            "--pid-file": folder / "daemon.pid",
            "--seed-file": folder / "seed",
            "--num-threads": 2,
        }
        # --force: it would refuse a folder that other users cannot enter, as tests' are.
        arguments = [f"{name}={value}" for name, value in options.items()]
        self._start("munged", ["-F", "--force", *arguments])
        self._wait((folder / "socket").exists, "munged's socket", of="munged")

    def _start(
        self,
        name: str,
        arguments: list[str],
        *,
        program: str | None = None,
        cores: set[int] | None = None,
    ) -> None:
        found = _find(program or name)
        assert found, "missing() is asked first"

        def prepare() -> None:
            if cores:
                os.sched_setaffinity(0, cores)

        with (self.folder / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                [found, *arguments],
                env=self.environment | {MARK: str(self.folder)},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=prepare,
            )
        _CHILDREN[process.pid] = process
        (self.folder / f"{name}.pid").write_text(f"{process.pid}\n")

    def _pid(self, name: str) -> int | None:
        try:
            pid = int((self.folder / f"{name}.pid").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return pid if is_alive(pid) and str(self.folder) == variables_of(pid).get(MARK) else None

    def _stop(self, name: str) -> None:
        pid = self._pid(name)
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(ClusterError):  # what stays is killed with the rest
            self._wait(lambda: self._pid(name) is None, f"{name} to end", seconds=5)

    def _end_jobs(self) -> None:
        with contextlib.suppress(ClusterError, subprocess.TimeoutExpired):
            jobs = self.run("squeue", "-h", "-o", "%A").split()
            if jobs:
                self.run("scancel", "--signal=KILL", "--full", *jobs, check=False)
                self.run("scancel", *jobs, check=False)
                self._wait(lambda: not self.job_processes(), "the jobs to end", seconds=10)

    def _wait(
        self,
        condition: Callable[[], object],
        what: str,
        *,
        seconds: float = PATIENCE_SECONDS,
        of: str | None = None,
    ) -> None:
        """Poll; ``of``: the daemon without which there is nothing to wait for."""
        start = time.monotonic()
        while not condition():
            waited = time.monotonic() - start
            if waited > seconds or (of and not self._pid(of)):
                raise ClusterError(f"Waited {waited:.0f} s for {what}. {self.log(of or '')}")
            time.sleep(0.05)


_CHILDREN: dict[int, subprocess.Popen] = {}
"""Kept so that an ended daemon can be reaped and is not taken for a living one."""


def _find(program: str) -> str | None:
    # Daemons lie in /usr/sbin, which not every PATH has; slurmstepd is Slurm's own affair.
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/lib/slurm-wlm"
    return shutil.which(program, path=path)


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name


def _cores(node: str) -> set[int] | None:
    """The node's share of the cores; None where there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[NODES.index(node) :: len(NODES)]) if len(cores) >= len(NODES) else None


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def processes_with(wanted: Mapping[str, str]) -> list[tuple[int, dict[str, str]]]:
    """(pid, environment) of every living process that has these variables."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and is_alive(int(entry.name)):
            variables = variables_of(int(entry.name))
            if wanted.items() <= variables.items():
                found.append((int(entry.name), variables))
    return found


def variables_of(pid: int) -> dict[str, str]:
    """The environment a process was started with; empty if it is gone."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    child = _CHILDREN.get(pid)
    if child is not None and child.poll() is not None:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("up", "down", "status", "guard"))
    parser.add_argument("--folder", type=Path, help="of the cluster (default: one per user)")
    parser.add_argument("--install", action="store_true", help=f"first run: {APT}")
    options = parser.parse_args(arguments)
    cluster = Cluster(options.folder)
    try:
        return _act(cluster, options)
    except ClusterError as error:
        print(f"testcluster: {error}", file=sys.stderr)
        return 1


def _act(cluster: Cluster, options: argparse.Namespace) -> int:
    if options.action == "guard":
        sys.stdin.read()
    if options.action in ("down", "guard"):
        cluster.down()
        return 0
    if options.action == "up":
        if options.install and missing():
            subprocess.run(APT.split(), check=True)
        try:
            cluster.up()
        except KeyboardInterrupt:
            cluster.down()
            return 130
        print(f"export SLURM_CONF={cluster.config}")
        return 0
    if not cluster.is_up():
        print("down")
        return 1
    print(cluster.run("sinfo"), cluster.run("squeue"), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
