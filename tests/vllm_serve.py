"""vLLM's own server for tests: started for real, or answers of a real one that were written down.

``python -m tests.vllm_serve`` writes them down again (``RECORDING``).
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import requests

from megatron_tropd.rollout.engines.process import engine_environment
from tests.ranks import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
PAIR = REPOSITORY / "examples" / "arithmetic"
RECORDING = Path(__file__).parent / "unit_tests" / "vllm_serve_answers.json"
NAME = "arithmetic-teacher"
START_SECONDS = 600.0


@contextmanager
def vllm_serve(
    folder: Path, log: Path, *options: str, port: int | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run ``vllm serve``; its address, once it answers, and its process."""
    port = port or free_port()
    words = [
        *(
            sys.executable,
            "-m",
            "vllm.entrypoints.launchers.api_server.entry",
            "--model",
            str(folder),
        ),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME),
        *("--enforce-eager", "--dtype", "float32", "--max-logprobs", "32"),
        *("--max-num-seqs", "32", "--disable-uvicorn-access-log", *options),
    ]
    environment = engine_environment(os.environ, threads=1, cuda_devices=None)
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            words, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(address, process, log)
        yield address, process
    finally:
        kill(process)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """End a server and its engine at once."""
    if process.poll() is None:
        os.killpg(process.pid, 9)
    process.wait()


def wait_until_up(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until it answers."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if requests.get(f"{address}/health", timeout=5).ok:
                return
        except requests.RequestException:
            pass
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.1)


# ---- answers that were written down ----

TOP_K = 4
SEQUENCES = ([5, 9, 12, 40, 7, 8, 2], [6, 30, 31, 32, 33], [5, 5, 5, 5])
"""What is scored: all tokens but the first two of each."""


class Replay(ThreadingHTTPServer):
    """Answers what a real server answered; :attr:`behave` may answer otherwise, or not at all."""

    daemon_threads = True

    def __init__(self, port: int = 0, behave: "Behave | None" = None) -> None:
        """Listen, and answer in the background."""
        self.allow_reuse_address = True
        super().__init__(("127.0.0.1", port), _Handler)
        self.behave = behave or (lambda path, body, right: right)
        self.asked: list[tuple[str, Any]] = []
        self.answers = {
            _key(one["path"], one["body"]): (one["code"], one["answer"])
            for one in json.loads(RECORDING.read_text())
        }
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        """Be gone."""
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        """Say nothing of connections that were cut."""


Answer = tuple[int, Any]
Behave = Callable[[str, Any, Answer], Answer | None]
"""(path, body, right answer) -> what is answered; None: the connection is cut."""


class _Handler(BaseHTTPRequestHandler):
    server: Replay

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        self.server.asked.append((self.path, body))
        right = self.server.answers.get(
            _key(self.path, body), (400, {"error": {"message": "this was not recorded"}})
        )
        told = self.server.behave(self.path, body, right)
        if told is None:
            self.close_connection = True
            return
        code, answer = told
        text = answer if isinstance(answer, str) else json.dumps(answer)
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def _key(path: str, body: Any) -> str:
    return f"{path} {json.dumps(body, sort_keys=True)}"


def teacher_servers(addresses: Sequence[str], **patience: float) -> Any:
    """The arithmetic teacher's servers, as the recording knows them."""
    from megatron_tropd.convert.hf_folder import HFFolder
    from megatron_tropd.data.dispatch import Patience
    from megatron_tropd.data.tokenizers import load_tokenizer
    from megatron_tropd.teacher.served import TeacherServers
    from megatron_tropd.teacher.served.probe import make_probe
    from megatron_tropd.teacher.served.server import Wanted

    folder = HFFolder(PAIR / "teacher")
    vocab = folder.config["vocab_size"]
    probe = make_probe(
        load_tokenizer(folder.path), folder, served_model=NAME, vocab_size=vocab, longest=100
    )
    quick = {"lost_seconds": 30.0, "first_pause": 0.01, "longest_pause": 0.1, "batch_failures": 3}
    wanted = Wanted(TOP_K, vocab, vocab, patience.pop("timeout_seconds", 30.0))
    return TeacherServers(addresses, wanted, probe, Patience(**quick | patience), requests=2)


def to_score(ids: Sequence[int]) -> Any:
    """A sequence of the recording."""
    from megatron_tropd.teacher.served import ToScore

    return ToScore(tuple(ids), tuple(range(2, len(ids))))


def record(address: str) -> None:
    """Write down what a server answers to a first contact and to ``SEQUENCES``."""
    written: list[dict[str, Any]] = []
    request = requests.Session.request

    def asking(self: requests.Session, method: str, url: str, **options: Any) -> requests.Response:
        answer = request(self, method, url, **options)
        content = answer.json()
        written.append(
            {
                "path": url.removeprefix(address),
                "body": options["json"],
                "code": answer.status_code,
                "answer": content,
            }
        )
        return answer

    with patch.object(requests.Session, "request", asking):
        servers = teacher_servers([address])
        servers.meet()
        servers.score([to_score(ids) for ids in SEQUENCES])
    unique = {_key(one["path"], one["body"]): one for one in written}
    text = "[\n" + ",\n".join(map(json.dumps, unique.values())) + "\n]\n"
    RECORDING.write_text(text.replace(f"{REPOSITORY}/", ""))


if __name__ == "__main__":
    LOG = Path(tempfile.gettempdir(), "vllm_serve.log")
    with vllm_serve(PAIR / "teacher", LOG) as (found, _):
        record(found)
