"""Models by their id on the hub: its own library downloads them from a server of this file."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SAY = """
import sys
from megatron_tropd.base.failures import exit_code
from megatron_tropd.config.hub import local_model
sys.exit(exit_code(lambda: print(local_model(sys.argv[1], weights=sys.argv[2] == "weights")) or 0))
"""


class Hub:
    """A server with one model, some/one, and what was asked of it."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.asked = files, []

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """What the hub says to a path."""
        path = request.path.partition("?")[0]
        self.asked.append(path)
        if path == "/api/models/some/one/revision/main":
            body = json.dumps({"id": "some/one", "sha": COMMIT, "siblings": []}).encode()
        elif path.startswith(f"/api/models/some/one/tree/{COMMIT}"):
            body = json.dumps([self._entry(name) for name in self.files]).encode()
        elif path.startswith(f"/some/one/resolve/{COMMIT}/"):
            body = self.files[path.rpartition("/")[2]]
        else:
            request.send_response(404)
            request.send_header("X-Error-Code", "RepoNotFound")
            request.end_headers()
            return
        request.send_response(200)
        request.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def _entry(self, name: str) -> dict:
        oid = hashlib.sha256(self.files[name]).hexdigest()
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": oid}

    def downloaded(self) -> set[str]:
        """Names of the files that were asked for."""
        return {path.rpartition("/")[2] for path in self.asked if "/resolve/" in path}


@pytest.fixture
def hub(tiny_llama: Path) -> Iterator[tuple[Hub, dict[str, str]]]:
    """The hub with a tiny Llama, and the environment in which it is the hub."""
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir() if path.is_file()}
    files |= {"pytorch_model.bin": b"pickled", "consolidated.safetensors": b"another format"}
    hub = Hub(files)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield hub, {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        server.shutdown()


def call(words: list[str], home: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Run Python with a cache of its own."""
    unset = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE")
    inherited = {k: v for k, v in os.environ.items() if k not in unset}
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=inherited | {"HF_HOME": str(home)} | environment,
    )


def test_a_model_is_downloaded_once_and_then_found_without_a_network(hub, tmp_path: Path):
    hub, online = hub
    for weights, there in (("texts", False), ("weights", True)):
        found = call(["-c", SAY, "hf://some/one", weights], tmp_path, online)
        assert found.returncode == 0, found.stderr
        folder = Path(found.stdout.strip())
        assert (folder / "config.json").is_file() and COMMIT in str(folder)
        assert (folder / "model.safetensors").is_file() is there
        assert "taken from the cache" in found.stderr
    assert hub.downloaded() == set(hub.files) - {"pytorch_model.bin", "consolidated.safetensors"}
    offline = call(["-c", SAY, "hf://some/one", "weights"], tmp_path, {"HF_HUB_OFFLINE": "1"})
    assert offline.stdout == found.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf://some/other", "cannot be had"),
        ("hf://one", "hf://OWNER/NAME"),
        ("hf://datasets/a/b", "hf://OWNER/NAME"),
    ],
)
def test_a_name_that_the_hub_does_not_know_is_a_users_mistake(hub, tmp_path, name, said):
    found = call(["-c", SAY, name, "weights"], tmp_path, hub[1])
    assert found.returncode == 2 and said in found.stderr and name in found.stderr


def test_commands_take_models_by_their_ids(hub, tmp_path: Path):
    """A dry run with weights, a plan without; a conversion."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one two"}\n')
    config = tmp_path / "run.toml"
    config.write_text(
        '[model]\nstudent = "hf://some/one"\nteacher = "hf://some/one"\n'
        f'[rollout]\nprompts = "{prompts}"\nmax_new_tokens = 8\nprompts_per_step = 1\n'
        "[guidance]\nprefixed_per_prompt = 0\n[train]\nsteps = 1\ntokens_per_micro_batch = 1024\n"
        f'[run]\ndir = "{tmp_path / "run"}"\n'
    )
    tropd = ["-m", "megatron_tropd.cli"]
    plan = call([*tropd, "plan", str(config), "--prompt-tokens", "16"], tmp_path / "plan", hub[1])
    assert plan.returncode == 0, plan.stderr
    assert not any(name.endswith(".safetensors") for name in hub[0].downloaded())
    dry = call([*tropd, "distill", str(config), "--dry-run"], tmp_path / "dry", hub[1])
    assert dry.returncode == 0, dry.stderr
    assert "model.safetensors" in hub[0].downloaded() and COMMIT in dry.stdout
    words = ["convert", "to-megatron", "--hf", "hf://some/one", "--megatron", str(tmp_path / "m")]
    made = call([*tropd, *words], tmp_path / "dry", {"HF_HUB_OFFLINE": "1"})
    assert made.returncode == 0, made.stderr
    wrong = call(
        [*tropd, *words[:-1], str(tmp_path / "n")], tmp_path / "no", {"HF_HUB_OFFLINE": "1"}
    )
    assert wrong.returncode == 2 and "cannot be had" in wrong.stderr
