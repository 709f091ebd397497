"""What a job does after its training ended: the real job file, with Slurm's commands played.

The same file on a real Slurm is ``make slurm-test``; here are the cases Slurm takes minutes for.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_tropd.cluster.job_layout import make_layout
from megatron_tropd.cluster.render import DISTILL, SCORE, JobCommand, render_job
from megatron_tropd.cluster.site import Site
from megatron_tropd.config import load_config

SITE = Site(
    partition="", account="", time="60", gpus_per_node=4, warning_seconds=60, max_restarts=2
)
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") printf 'n%s\\n' 1 2 3 4 5 ;;
    "show node") echo "   NodeAddr=10.0.0.${3#n} NodeHostName=$3" ;;
    "show job")
        echo "   JobState=${FAKE_STATE:-RUNNING} Reason=None"
        echo "   StartTime=2026-01-01T00:00:00 EndTime=${FAKE_END:-Unknown} X=Y"
        echo "   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=${FAKE_PREEMPT:-None}"
        ;;
    requeue*) echo "$2" >>"$FAKE/requeued" && kill -TERM "$PPID" ;;
esac
"""
SQUEUE = """#!/bin/bash
case "$*" in
    *"--jobs=6 --name=tropd-run "*) cat "$FAKE/other" && mv "$FAKE/next" "$FAKE/other" ;;
esac
"""
SRUN = """#!/bin/bash
name=train
for word; do [ "$word" != serve ] || name=serve; done
echo "$MASTER_ADDR $MASTER_PORT ${#TROPD_SERVER_TOKEN} $*" \
    >>"$FAKE/$name.calls"
source "$FAKE/$name"
"""


class Job:
    """A rendered job in a folder with played commands."""

    def __init__(self, folder: Path, *overrides: str, command: JobCommand = DISTILL) -> None:
        self.fake, self.run = folder / "fake", folder / "run"
        self.fake.mkdir()
        self.logs = self.run / "logs"
        self.logs.mkdir(parents=True)
        config = folder / "config.toml"
        config.write_text(f"""
            model = {{ student = "s", teacher = "t" }}
            rollout = {{ prompts = "p.jsonl", max_new_tokens = 8 }}
            train = {{ steps = 3 }}
            run = {{ dir = "{self.run}" }}
            parallel = {{ data = 8 }}
        """)
        loaded = load_config(config, overrides)
        layout = make_layout(loaded, SITE)
        self.file = folder / "job.sbatch"
        text = render_job(self.run, SITE, layout, path=config, command=command)
        self.file.write_text(text.replace("look_seconds=1", "look_seconds=0.05"))
        for name, text in {"scontrol": SCONTROL, "srun": SRUN, "squeue": SQUEUE}.items():
            (self.fake / name).write_text(text)
            (self.fake / name).chmod(0o755)
        (self.fake / "serve").write_text("exit 0")

    def start(
        self, train: str, *, restart: int = 0, end: str = "Unknown", **slurm: str
    ) -> subprocess.Popen:
        """Begin the job; its training step does what the lines of shell ``train`` say."""
        (self.fake / "train").write_text(train)
        environment = os.environ | {
            "PATH": f"{self.fake}:{os.environ['PATH']}",
            "FAKE": str(self.fake),
            "FAKE_END": end,
            "RUN": str(self.run),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "tropd-run",
            "SLURM_JOB_NODELIST": "n[1-5]",
            "SLURM_RESTART_COUNT": str(restart),
            **{f"FAKE_{name}": value for name, value in slurm.items()},
        }
        self.process = subprocess.Popen(
            ["bash", str(self.file)],
            env=environment,
            stderr=(self.fake / "said").open("w+"),
            start_new_session=True,
        )
        return self.process

    def end(self) -> None:
        """What Slurm does with whatever a job leaves behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def finish(self, train: str, **options: object) -> tuple[int, str]:
        """(exit code, what was said)."""
        self.start(train, **options)
        return self.outcome()

    def outcome(self) -> tuple[int, str]:
        """(exit code, what was said), once the script has ended."""
        code = self.process.wait(timeout=60)
        self.end()
        return code, (self.fake / "said").read_text()

    @property
    def requeues(self) -> int:
        path = self.fake / "requeued"
        return len(path.read_text().split()) if path.exists() else 0

    def calls(self, name: str) -> list[str]:
        path = self.fake / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


def test_training_is_one_task_on_each_training_node(job):
    job.finish("touch $RUN/summary.json")
    (call,) = job.calls("train")
    assert call.startswith("10.0.0.1 10007 64 ")
    for word in ("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n1,n2"):
        assert f" {word} " in call
    assert "--kill-on-bad-exit=1" in call and f"--output={job.logs}/job_%j_node_%n.log" in call
    assert call.endswith(f"tropd distill {job.file.parent}/config.toml")


@pytest.mark.parametrize(
    ("code", "requeued"),
    [
        (0, False),  # asked to stop by a signal to a rank: not complete, no failure
        (1, True),  # srun's own: our launcher records a reason
        (2, False),
        (130, False),
        (143, False),
        (75, True),
        (138, True),
        (137, True),  # killed, or Slurm lost a node
        (9, True),
    ],
)
def test_what_each_exit_code_leads_to(job, code, requeued):
    found, said = job.finish(f"exit {code}")
    assert (found, job.requeues) == (code, int(requeued))
    assert (f"{job.logs}/job_7_node_0.log" in said) == (code in (0, 2))


def test_a_complete_run_ends_well(job):
    (job.run / "restarts").write_text("1 2 3\n")
    code, said = job.finish("touch $RUN/summary.json; exit 143", restart=1)
    assert (code, job.requeues) == (0, 0) and "complete" in said
    assert not (job.run / "restarts").exists()


@pytest.mark.parametrize(("recorded", "requeues"), [(1, 0), (2, 0), (75, 1)])
def test_the_recorded_reason_outranks_the_code_of_srun(job, recorded, requeues):
    failure = json.dumps({"kind": "x", "message": 'a "b"\nc', "exit_code": recorded}, indent=2)
    code, said = job.finish(f"cat >$RUN/failure.json <<'.'\n{failure}\n.\nexit 137")
    assert (code, job.requeues) == (recorded, requeues)
    assert '"kind": "x"' in said


def test_the_reason_of_an_earlier_attempt_does_not_count(job):
    (job.run / "failure.json").write_text('{"exit_code": 1}')
    assert job.finish("exit 75")[0] == 75
    assert job.requeues == 1


def test_restarts_in_vain_are_counted(job):
    for restart in range(2):
        job.finish("exit 75", restart=restart)
        assert job.requeues == restart + 1
    code, said = job.finish("exit 75", restart=2)
    assert (code, job.requeues) == (75, 2) and "gave up: 2 restarts" in said


@pytest.mark.parametrize(
    "work",
    ["echo >>$RUN/metrics.jsonl", "mkdir -p $RUN/checkpoints/step_00000$SLURM_RESTART_COUNT"],
)
def test_progress_starts_the_count_again(job, work):
    for restart in range(1, 8):
        job.finish(f"{work}; exit 75", restart=restart)
        assert job.requeues == restart


def test_a_file_of_scores_is_progress(tmp_path):
    job = Job(tmp_path, command=SCORE)
    for restart in range(1, 8):
        work = "touch $RUN/../signals-0000$((SLURM_RESTART_COUNT / 2)).safetensors; exit 75"
        job.finish(work, restart=restart)
        assert job.requeues == restart
    for restart in range(8, 11):
        job.finish("exit 75", restart=restart)
    assert job.requeues == 8, "the last of them was the second in vain"
    assert " score " in job.calls("train")[0] and " distill " not in job.calls("train")[0]


def test_steps_that_are_lost_and_trained_again_are_no_progress(job):
    """A run that always breaks in step 4 goes back to its checkpoint and comes just as far."""
    work = "printf '\\n\\n\\n' >$RUN/metrics.jsonl; mkdir -p $RUN/checkpoints/step_000002; exit 75"
    for restart in range(5):
        job.finish(work, restart=restart)
    assert job.requeues == 3  # the first made progress, two more were allowed


@pytest.mark.parametrize(
    ("states", "refused"), [(["RUNNING"], True), (["COMPLETING", ""], False), ([""], False)]
)
def test_a_second_job_of_a_run_touches_nothing(job, states, refused):
    for name, state in zip(("other", "next"), (*states, ""), strict=False):
        (job.fake / name).write_text(state)
    for name, text in {"job_id": "6\n", "restarts": "1 2 3\n", "failure.json": "{}"}.items():
        (job.run / name).write_text(text)
    code, said = job.finish("touch $RUN/summary.json")
    assert code == (2 if refused else 0) and ("refused: job 6 works on" in said) == refused
    assert (job.run / "failure.json").exists() == (job.run / "restarts").exists() == refused
    assert (job.run / "job_id").read_text() == ("6\n" if refused else "7\n")


def test_where_the_count_cannot_be_kept_slurm_counts(job):
    """As on a full or read-only file system."""
    (job.run / "restarts").mkdir()
    for restart in range(3):
        job.finish("exit 75", restart=restart)
    assert job.requeues == 2


def test_the_token_goes_to_no_address_of_an_earlier_start(tmp_path):
    job = Job(tmp_path, "rollout.placement=separate")
    (job.run / "servers").mkdir()
    (job.run / "servers" / "server_000.json").write_text("{}")
    code, _ = job.finish("[ -e $RUN/servers/server_000.json ] || touch $RUN/summary.json; exit 1")
    assert code == 0


def test_submitting_again_forgets_the_count(job):
    for _ in range(5):
        job.finish("exit 75", restart=0)
    assert job.requeues == 5


def _when(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


WAIT = """
sleep 20 &
trap 'kill $!; exit 138' USR1
trap 'kill $!; exit 143' TERM
touch $FAKE/up
wait
"""


@pytest.mark.parametrize("end", ["2020-01-01T00:00:00", "2099-01-01T00:00:00"])
def test_the_warning_reaches_the_training_and_requeues(job, end):
    process = job.start(WAIT, end=end)
    _when((job.fake / "up").exists)
    process.send_signal(signal.SIGUSR1)
    code, said = job.outcome()
    assert (code, job.requeues) == (138, 1)
    assert "the time is nearly up" in said and "requeued at step 0" in said


def test_a_warning_before_the_training_begins_is_kept(job):
    """Here it comes while the script waits for an earlier job of the run to save."""
    for name, state in {"other": "COMPLETING", "next": ""}.items():
        (job.fake / name).write_text(state)
    (job.run / "job_id").write_text("6\n")
    process = job.start(WAIT)
    _when((job.run / "job_id").exists)
    _when(lambda: not (job.fake / "next").exists())  # it has looked once
    process.send_signal(signal.SIGUSR1)
    code, said = job.outcome()
    assert (code, job.requeues) == (138, 1) and "the time is nearly up" in said
    assert not job.calls("train")


def test_a_warning_while_the_training_begins_reaches_it(job):
    """The step is there before the script knows its number."""
    text = job.file.read_text()
    begun = '"${tropd[@]}" distill "${config[@]}" &\n'
    assert begun in text
    job.file.write_text(text.replace(begun, begun + "    kill -USR1 $$; sleep 0.5\n"))
    code, said = job.finish(WAIT)
    assert (code, job.requeues) == (138, 1) and "the time is nearly up" in said


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST"])
def test_without_slurm_the_file_says_what_it_is_for(job, name, value):
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-5]", name: value}
    done = subprocess.run(
        ["bash", str(job.file)],
        env={k: v for k, v in (os.environ | variables).items() if v is not None},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and f"sbatch {job.file}" in done.stderr
    assert not (job.run / "job_id").exists()


def test_scancel_ends_the_job(job):
    """Slurm tells the steps by itself, and srun, which belongs to the script's group."""
    process = job.start(WAIT)
    _when((job.fake / "up").exists)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None, "it waits for the run to save"
    _terminate_srun(job)
    code, said = job.outcome()
    assert (code, job.requeues) == (143, 0) and "cancelled" in said


@pytest.mark.parametrize(
    ("state", "preempt", "requeues"),
    [("RUNNING", "2026-01-02T00:00:00", 1), ("CANCELLED", "2026-01-02T00:00:00", 0)],
)
def test_a_preempted_job_is_no_cancelled_one(job, state, preempt, requeues):
    """It saves in the time it is given; Slurm would not requeue what ends by itself."""
    for restart in range(4):  # it is nobody's fault: not counted
        process = job.start(WAIT, restart=restart, STATE=state, PREEMPT=preempt)
        _when((job.fake / "up").exists)
        (job.fake / "up").unlink()
        process.send_signal(signal.SIGTERM)
        _terminate_srun(job)
        code, said = job.outcome()
        assert (code, job.requeues) == (143, requeues * (restart + 1))
        assert ("preempted: Slurm needs" in said) == bool(requeues)


@pytest.mark.parametrize(
    ("end", "requeues"),
    [("2020-01-01T00:00:00", 1), ("2099-01-01", 0), ("Unknown", 0), (" (none given)", 0)],
)
def test_after_the_warning_the_end_of_the_time_requeues_and_scancel_does_not(job, end, requeues):
    process = job.start(WAIT.replace("kill $!; exit 138", "touch $FAKE/warned; wait"), end=end)
    _when((job.fake / "up").exists)
    process.send_signal(signal.SIGUSR1)
    _when((job.fake / "warned").exists)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    _terminate_srun(job)
    assert (job.outcome()[0], job.requeues) == (143, requeues)


def _terminate_srun(job: Job) -> None:
    for pid in _srun(job):
        os.kill(pid, signal.SIGTERM)


def _srun(job: Job) -> list[int]:
    """Processes of the played srun: it and, for a moment, what it is about to start."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid, command = int(entry.name), (entry / "cmdline").read_bytes().decode().split("\0")
            if str(job.fake / "srun") in command[:3]:
                found.append(pid)
    return found


@pytest.fixture
def busy_core() -> Iterator[int]:
    """A core that two other processes keep busy."""
    core = min(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(2)]
    yield core
    for other in others:
        other.kill()
        other.wait()


def test_a_signal_in_the_moment_the_training_ends_leaves_its_code(job, busy_core):
    """Slurm signals a job and its steps at once; on a busy node the script comes too late."""
    for _ in range(3):
        process = job.start("echo $$ >$FAKE/pid; mv $FAKE/pid $FAKE/up; sleep 20")
        _when((job.fake / "up").exists)
        training = int((job.fake / "up").read_text())
        (job.fake / "up").unlink()
        time.sleep(0.2)  # the script waits
        # So far behind the others that it sees both events at once.
        os.sched_setaffinity(process.pid, {busy_core})
        os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
        os.kill(training, signal.SIGKILL)
        while _state_of(training) not in "ZX":
            pass
        process.send_signal(signal.SIGTERM)
        assert job.outcome()[0] == 137


def _state_of(pid: int) -> str:
    """``Z`` once it has ended, and still so when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return "Z"


def _calls(number: int) -> str:
    """Shell that waits for so many starts of servers."""
    starts = "$(cat $FAKE/serve.calls 2>/dev/null | wc -l)"
    return f"until (({starts} >= {number})); do sleep 0.05; done"


def test_servers_have_nodes_of_their_own(tmp_path):
    servers = ("rollout.placement=separate", "rollout.num_engines=5")
    job = Job(tmp_path, *servers, "rollout.engine_tensor_parallel=2")
    job.finish(f"{_calls(5)}; touch $RUN/summary.json")
    calls = sorted(job.calls("serve"), key=lambda call: call.split("--number ")[1])
    for number, (call, node) in enumerate(zip(calls, (3, 3, 4, 4, 5), strict=True)):
        assert "--export=ALL" in call
        assert f"--overlap --nodes=1 --ntasks=1 --nodelist=n{node} " in call
        assert call.endswith(f" --number {number} --host 10.0.0.{node}")
    assert "CUDA_VISIBLE_DEVICES" not in job.calls("train")[0]


@pytest.mark.parametrize("given", ["", "4,5,6,7"])
def test_a_server_takes_its_part_of_the_gpus_that_its_step_has(tmp_path, given):
    servers = ("rollout.placement=separate", "rollout.num_engines=2")
    job = Job(tmp_path, *servers, "rollout.engine_tensor_parallel=2")
    tropd = job.fake / "tropd"
    tropd.write_text('#!/bin/bash\necho "$CUDA_VISIBLE_DEVICES $*" >>"$FAKE/tropd.calls"\n')
    tropd.chmod(0o755)
    (job.fake / "serve").write_text(
        f'until [ "$1" = sh ]; do shift; done; CUDA_VISIBLE_DEVICES={given} exec "$@"'
    )
    job.finish("until [ $(wc -l <$FAKE/tropd.calls) = 2 ]; do sleep 0.1; done 2>$FAKE/waited")
    calls = sorted(job.calls("tropd"), key=lambda call: call.split("--number ")[1])
    assert [call.split()[:2] for call in calls] == [
        [gpus, "serve"] for gpus in (("4,5", "6,7") if given else ("0,1", "2,3"))
    ]


@pytest.mark.parametrize(
    ("known", "host"), [("192.168.7.4", "192.168.7.4"), ("127.0.1.1", "node3"), ("", "node3")]
)
def test_a_server_listens_on_the_address_that_the_trainer_knows(tmp_path, known, host):
    """Where Slurm has names for addresses, a node may know its own as loopback."""
    job = Job(tmp_path, "rollout.placement=separate")
    getent = job.fake / "getent"
    getent.write_text(f"#!/bin/bash\n[ -n '{known}' ] && echo '{known}     STREAM x'\n")
    getent.chmod(0o755)
    scontrol = job.fake / "scontrol"
    scontrol.write_text(scontrol.read_text().replace("10.0.0.$", "node$"))
    job.finish(f"{_calls(1)}; touch $RUN/summary.json")
    (call,) = job.calls("serve")
    assert call.endswith(f"--host {host}")
    assert job.calls("train")[0].startswith("node1 ")


def test_a_dead_server_is_started_again_and_an_unusable_one_is_not(tmp_path):
    job = Job(tmp_path, "rollout.placement=separate", "rollout.num_engines=2")
    job.file.write_text(job.file.read_text().replace("first_pause=5", "first_pause=0"))
    (job.fake / "serve").write_text('case "$*" in *"--number 0 "*) exit 75 ;; *) exit 2 ;; esac')
    _, said = job.finish(
        "for word in 'given up' 'cannot start'; do\n"
        'until grep -q "$word" $FAKE/said; do sleep 0.05; done; done\n'
        "touch $RUN/summary.json"
    )
    numbers = [call.split("--number ")[1][0] for call in job.calls("serve")]
    assert numbers.count("0") == 8 and numbers.count("1") == 1
    assert "server 0 on n3 ended with code 75 and is started again" in said
    assert (
        "server 0 is given up: it ended 8 times, each within 600 s of its start, last with" in said
    )
    assert "server 1 cannot start" in said


def test_a_server_that_lasted_is_always_started_again(tmp_path):
    job = Job(tmp_path, "rollout.placement=separate")
    text = job.file.read_text().replace("first_pause=5", "first_pause=0")
    job.file.write_text(text.replace("soon=600", "soon=0"))
    (job.fake / "serve").write_text("exit 75")
    _, said = job.finish(f"{_calls(9)}; touch $RUN/summary.json")
    assert len(job.calls("serve")) > 8 and "given up" not in said
