"""``tropd slurm``: the site file, the layout on nodes, and the job file as text."""

import dataclasses
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.cli.main import main
from megatron_tropd.cluster.job_layout import make_layout
from megatron_tropd.cluster.render import render_job
from megatron_tropd.cluster.site import Container, Site, load_site
from megatron_tropd.config import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "slurm" / "site.example.toml"
RECIPES = sorted((REPOSITORY / "configs" / "recipes").glob("*.toml"))
SITE = Site(partition="gpu", account="us", time="04:00:00", gpus_per_node=8)
CPU = Site(partition="", account="", time="30", gpus_per_node=0, ranks_per_node=2)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "my run.toml"
    path.write_text(f"""
        model = {{ student = "s", teacher = "t" }}
        rollout = {{ prompts = "p.jsonl", max_new_tokens = 8 }}
        train = {{ steps = 3 }}
        run = {{ dir = "{tmp_path}/runs/it's 100%" }}
    """)
    return path


def _render(toml: Path, site: Site, *overrides: str) -> str:
    config = load_config(toml, overrides)
    run = Path(config.run.dir).resolve()
    return render_job(run, site, make_layout(config, site), path=toml)


def _directives(text: str) -> set[str]:
    return set(re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE))


def test_the_example_site_file_loads():
    site = load_site(EXAMPLE)
    assert (site.gpus_per_node, site.slots_per_node, site.warning_seconds) == (8, 8, 600)
    assert {f.name for f in dataclasses.fields(Site)} <= set(
        re.findall(r"^(?:# )?\[?(\w+)", EXAMPLE.read_text(), re.MULTILINE)
    ) | {"ranks_per_node"}, "the example shows every key"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("gpu_per_node = 8", r"Unknown config key gpu_per_node\. Did you mean gpus_per_node"),
        ("account = 7", "account must be str, found 7"),
        ("account", "not valid TOML"),
        ("gpus_per_node = 0", "needs ranks_per_node"),
        ("ranks_per_node = 4", "nodes without GPUs"),
        ('time = "4 hours"', "time must look like 04:00:00"),
        ("warning_seconds = 14400", r"below time = '04:00:00' \(14400 s\)"),
        ('container = { image = "a.sqsh" }', "venv or container, not both"),
        ('options = ["--array=1-3%1"]', "one run is one job, no array"),
        ('options = ["--nodelist=n1", "-N2"]', "options: '-N2' must be"),
        ('options = ["exclude=n1"]', "must be an option of sbatch"),
        ('srun_options = ["--ntasks=2"]', "srun_options: '--ntasks=2' must be an option of srun"),
        ('srun_options = ["--container-image=a"]', "is written by tropd slurm itself"),
        ('venv = "~/venv"', "venv must be an absolute path"),
        ("max_restarts = -1", "max_restarts must be at least 0"),
        ('environment = { WANDB_API_KEY = "x" }', "WANDB_API_KEY looks like a secret"),
        ('environment = { "A B" = "x" }', "must be a variable's name"),
    ],
)
def test_unusable_site_files_are_refused(tmp_path, change, message):
    values = {"partition": '"gpu"', "account": '"us"', "time": '"04:00:00"'}
    values |= {"gpus_per_node": "8", "venv": '"/venv"'}
    name, _, value = change.partition(" = ")
    values[name] = value
    path = tmp_path / "site.toml"
    path.write_text("\n".join(f"{k} = {v}" for k, v in values.items()))
    with pytest.raises(ConfigError, match=message):
        load_site(path)


def test_what_only_sounds_like_a_secret_is_none():
    dataclasses.replace(SITE, environment={"TOKENIZERS_PARALLELISM": "false", "MAX_TOKENS": "1"})
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "wandb_api_key"):
        with pytest.raises(ConfigError, match=f"{name} looks like a secret"):
            dataclasses.replace(SITE, environment={name: "x"})


def test_an_account_must_be_named_or_refused(tmp_path):
    path = tmp_path / "site.toml"
    path.write_text('partition = "gpu"\ntime = "10"\ngpus_per_node = 8\n')
    with pytest.raises(ConfigError, match="account is missing"):
        load_site(path)
    with pytest.raises(ConfigError, match=r"does not exist. Copy slurm/site.example.toml"):
        load_site(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        load_site(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be read \(Not a directory\)"):
        load_site(path / "site.toml")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("30:15", 1815), ("01:00:00", 3600), ("1-2", 93600), ("1-00:01:01", 86461)],
)
def test_times_as_slurm_writes_them(time, seconds):
    dataclasses.replace(SITE, time=time, warning_seconds=min(seconds, 65536) - 1)
    with pytest.raises(ConfigError, match=rf"\({seconds} s\)"):
        dataclasses.replace(SITE, time=time, warning_seconds=min(seconds, 65536))


@pytest.mark.parametrize(
    ("site", "overrides", "expected"),
    [
        (SITE, ["parallel.data=4"], (1, 4, 0, 0)),
        (SITE, ["parallel.tensor=4", "parallel.data=8"], (4, 8, 0, 0)),
        (CPU, ["parallel.tensor=2", "parallel.data=2"], (2, 2, 0, 0)),
        (SITE, ["parallel.data=8", "rollout.placement=separate"], (1, 8, 1, 1)),
        (
            SITE,
            [
                *("parallel.data=16", "rollout.placement=separate", "rollout.num_engines=5"),
                "rollout.engine_tensor_parallel=4",
            ],
            (2, 8, 5, 3),
        ),
        (CPU, ["rollout.placement=separate", "rollout.num_engines=3"], (1, 1, 3, 2)),
    ],
)
def test_nodes_ranks_and_servers(toml, site, overrides, expected):
    layout = make_layout(load_config(toml, overrides), site)
    found = (layout.training_nodes, layout.ranks_per_node, layout.servers, layout.server_nodes)
    assert found == expected
    assert layout.nodes == expected[0] + expected[3]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tensor=12"], "12 ranks .* do not fill nodes of 8: 4 would be left"),
        (
            ["parallel.data=8", "rollout.num_engines=4", "rollout.engine_tensor_parallel=4"],
            "4 engines .* begin at every 2th rank",
        ),
        (
            ["parallel.data=16", "rollout.engine_tensor_parallel=16"],
            "engine_tensor_parallel = 16 does not fit",
        ),
        (
            ["rollout.placement=separate", "rollout.engine_tensor_parallel=16"],
            "does not fit a node of 8",
        ),
    ],
)
def test_what_does_not_fit_is_refused(toml, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_layout(load_config(toml, overrides), SITE)


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["parallel.tensor=16"], "parallel.tensor = 16 does not divide the 8 ranks of a node"),
        (["parallel.data=4"], "4 of a training node's 8 GPUs are used, but the whole node"),
        (["parallel.data=8", "rollout.placement=separate"], "7 of 8 GPUs on the server nodes"),
    ],
)
def test_what_is_wasteful_is_said(toml, overrides, warning):
    (found,) = make_layout(load_config(toml, overrides), SITE).warnings
    assert warning in found


def test_every_directive(toml, monkeypatch):
    site = dataclasses.replace(
        SITE,
        gres="gpu:h100",
        cpus_per_node=96,
        memory="900G",
        qos="long",
        constraint="nvlink",
        options=("--exclude=n[7-8]", "--comment=two words"),
        warning_seconds=120,
    )
    monkeypatch.chdir(toml.parent)
    run = f"{toml.parent.resolve()}/runs/it's 100%%/logs/job_%j.log".replace("'", "'\"'\"'")
    assert _directives(_render(toml, site, "parallel.data=16")) == {
        "--job-name=tropd-it's 100%".replace("'", "'\"'\"'").join("''"),
        *("--partition=gpu", "--account=us", "--qos=long", "--constraint=nvlink"),
        *("--time=04:00:00", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=96"),
        *("--gres=gpu:h100:8", "--mem=900G", "--signal=B:USR1@120", f"--chdir={toml.parent}"),
        *(f"'--output={run}'", "--open-mode=append", "--requeue", "--exclusive"),
        *("'--exclude=n[7-8]'", "'--comment=two words'"),
    }


def test_what_a_site_does_not_give_is_left_to_slurm(toml):
    site = dataclasses.replace(CPU, memory="", exclusive=False)
    names = {line.split("=")[0].strip("'") for line in _directives(_render(toml, site))}
    assert names == {
        *("--job-name", "--time", "--nodes", "--ntasks-per-node", "--signal", "--chdir"),
        *("--output", "--open-mode", "--requeue"),
    }


def test_environments(toml):
    plain = _render(toml, SITE)
    assert "tropd=(tropd)" in plain and "container" not in plain
    venv = _render(toml, dataclasses.replace(SITE, venv="/v", modules=("cuda/13",), setup=("x=1",)))
    assert "tropd=(/v/bin/tropd)" in venv
    before, _, _ = venv.partition("set -uo")
    assert "module load cuda/13\nx=1\nexport PATH=/v/bin:$PATH" in before
    container = Container(image="/i m.sqsh", mounts=("/a:/a", "/b:/b"))
    site = dataclasses.replace(SITE, container=container, environment={"NCCL_DEBUG": "a b"})
    extra = dataclasses.replace(site, srun_options=("--no-container-mount-home", "--mpi=none"))
    text = _render(toml, extra)
    options = "'--container-image=/i m.sqsh' --container-mounts=/a:/a,/b:/b --container-workdir="
    ours = f" --open-mode=append {options}{Path.cwd()} --container-env=NCCL_DEBUG"
    assert f"{ours} --no-container-mount-home --mpi=none)" in text
    assert f"{ours})" in _render(toml, site)
    assert "export NCCL_DEBUG='a b'" in text
    assert "export TROPD_GPUS_PER_NODE=8\n" in text


def test_a_job_runs_the_config_as_it_was(toml, tmp_path, monkeypatch):
    """Edited while it waits in the queue, submitted from elsewhere: the job's settings stay."""
    words = ["train.lr=1e-3", "model.teacher=here/t", "--site", str(EXAMPLE)]
    monkeypatch.chdir(tmp_path)
    asked = load_config(toml, words[:2])
    assert main(["slurm", str(toml), *words]) == 0
    run = tmp_path / "runs" / "it's 100%"
    (copy,) = run.glob("job_*.toml")
    before = copy.read_text()
    assert f"config=({shlex.quote(str(copy))})" in (run / "job.sbatch").read_text()

    toml.write_text(toml.read_text().replace("steps = 3", "steps = 4"))
    monkeypatch.chdir("/")
    assert load_config(copy) == asked
    assert main(["slurm", str(toml), *words]) == 0
    assert copy.read_text() == before, "a job that was submitted before keeps its own"
    assert len(list(run.glob("job_*.toml"))) == 2


def test_a_job_that_scores(toml, tmp_path, capsys):
    """Under any settings of engines, for it has none; in its own folder, beside the scores."""
    cache = tmp_path / "scores"
    toml.write_text(toml.read_text().replace("max_new", 'recorded = "r.jsonl", max_new'))
    words = ["slurm", str(toml), "--site", str(EXAMPLE), "parallel.data=16", "--score"]
    assert main(words) == 2
    assert "`tropd score` fills teacher.cache" in capsys.readouterr().err
    words += ["teacher.placement=cached", f"teacher.cache={cache}", "rollout.placement=separate"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "training nodes: 2 x 8 ranks\n" in said.out
    text = (cache / "job" / "job.sbatch").read_text()
    (copy,) = (cache / "job").glob("job_*.toml")
    assert load_config(copy).teacher.placement == "cached", "as `tropd score` expects"
    assert '"${tropd[@]}" score "${config[@]}"' in text and "start_servers" not in text
    assert f"run={shlex.quote(str(cache / 'job'))}\n" in text
    assert not re.search(r"@[A-Z_]+@", text)
    subprocess.run(["bash", "-n"], input=text.encode(), check=True)


def test_nothing_of_servers_without_servers(toml):
    colocated, separate = _render(toml, SITE), _render(toml, SITE, "rollout.placement=separate")
    assert "start_servers" not in colocated and " serve " not in colocated
    assert "start_servers\ntrain\n" in separate and "gpus_per_server=1" in separate
    assert "TROPD_SERVER_TOKEN=$(od -An -N32 -tx1 /dev/urandom" in separate


def test_a_line_break_is_refused(toml):
    with pytest.raises(ConfigError, match="expected one line"):
        _render(toml, dataclasses.replace(SITE, qos="a\nrm -rf b"))


@pytest.mark.parametrize("placement", ["colocated", "separate"])
def test_the_shell_is_sound(toml, tmp_path, placement):
    job = tmp_path / "job.sbatch"
    job.write_text(_render(toml, SITE, f"rollout.placement={placement}"))
    assert not re.search(r"@[A-Z_]+@", job.read_text())
    subprocess.run(["bash", "-n", str(job)], check=True)


@pytest.mark.needs("shellcheck")
@pytest.mark.parametrize("placement", ["colocated", "separate"])
def test_shellcheck_has_nothing_to_say(toml, tmp_path, placement):
    job = tmp_path / "job.sbatch"
    job.write_text(_render(toml, SITE, f"rollout.placement={placement}"))
    done = subprocess.run(["shellcheck", "-S", "warning", str(job)], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_name_their_command_and_fit(recipe, capsys):
    config = load_config(recipe)
    assert f"tropd slurm configs/recipes/{recipe.name} --site" in recipe.read_text()
    nodes = make_layout(config, SITE).nodes
    assert nodes == max(1, config.parallel.world_size // 8)
    assert main(["slurm", str(recipe), "--site", str(EXAMPLE), "--dry-run"]) == 0
    assert f"#SBATCH --nodes={nodes}\n" in capsys.readouterr().out


def test_the_file_is_written_and_the_command_printed(toml, capsys):
    assert main(["slurm", str(toml), "--site", str(EXAMPLE), "parallel.data=8"]) == 0
    run = toml.parent / "runs" / "it's 100%"
    assert (run / "logs").is_dir() and (run / "job.sbatch").read_text().startswith("#!/bin/bash")
    out = capsys.readouterr().out
    assert out.startswith("training nodes: 1 x 8 ranks\n") and "sbatch " in out


def test_a_run_folder_that_cannot_be_made_is_named(toml, capsys):
    in_a_file = f"run.dir={toml}/run"
    assert main(["slurm", str(toml), in_a_file, "--site", str(EXAMPLE)]) == 2
    assert "cannot be written (Not a directory). Choose another run.dir" in capsys.readouterr().err


def test_submitting_needs_a_cluster(toml, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(toml.parent))
    assert main(["slurm", str(toml), "--site", str(EXAMPLE), "--submit"]) == 2
    assert "There is no sbatch on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("queue", "code"),
    [("7 RUNNING JOB", 2), ("7 PENDING JOB", 2), ("7 RUNNING JOB.old", 0), ("8 RUNNING", 0)],
)
def test_a_run_that_is_in_the_queue_is_not_submitted_again(toml, capfd, monkeypatch, queue, code):
    job = toml.parent / "runs" / "it's 100%" / "job.sbatch"
    for name, text in {"squeue": f'echo "{queue}"'.replace("JOB", str(job)), "sbatch": ""}.items():
        command = toml.parent / name
        command.write_text(f"#!/bin/bash\n{text}\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{toml.parent}:/usr/bin:/bin")
    assert main(["slurm", str(toml), "--site", str(EXAMPLE), "--submit"]) == code
    assert job.exists() == (code == 0)
    assert ("Job 7 of this run is" in capfd.readouterr().err) == (code == 2)


def test_an_installed_package_has_the_templates():
    """The package's files are links; setuptools packs what they lead to."""
    settings = (REPOSITORY / "pyproject.toml").read_text()
    for name, pattern in {"job.sbatch": "cluster/*.sbatch", "servers.sh": "cluster/*.sh"}.items():
        assert pattern in settings
        packaged = REPOSITORY / "megatron_tropd" / "cluster" / name
        assert packaged.resolve() == REPOSITORY / "slurm" / name
