"""A stand-in for `vllm serve` in tests of faults: the same protocol, computed by transformers.

It starts in a second or two, where the real one takes half a minute of processor time; that its
answers are those of the real one, a test compares (tests/unit_tests/test_served_teacher.py).
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import requests
import torch

from tests.ranks import PRELOADED, free_port
from tests.vllm_serve import NAME


class StandIn:
    """A process that serves a model folder; the same port for all its lives."""

    def __init__(self, folder: Path, *, seconds: float = 0.0) -> None:
        """Start it.

        Args:
            seconds: that each answer takes at least.
        """
        self.port, self._seconds = free_port(), seconds
        self.start(folder)

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, folder: Path) -> None:
        """Serve a folder, and wait until it does."""
        multiprocessing.set_forkserver_preload(PRELOADED)
        context = multiprocessing.get_context("forkserver")
        arguments = (str(folder), self.port, self._seconds)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        while True:
            with suppress(requests.RequestException):
                if requests.get(f"{self.address}/v1/models", timeout=5).ok:
                    return
            assert self.process.is_alive()
            time.sleep(0.05)

    def send_signal(self, number: int) -> None:
        """Such as SIGSTOP."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Be gone at once."""
        self.send_signal(signal.SIGKILL)
        self.process.join()


def serve(folder: str, port: int, seconds: float) -> None:
    """Be the server."""
    server = ThreadingHTTPServer(("127.0.0.1", port), _Handler, bind_and_activate=False)
    server.daemon_threads = server.allow_reuse_address = True
    server.server_bind()
    server.model = Model(folder, seconds)  # type: ignore[attr-defined]
    server.server_activate()
    server.serve_forever()


class Model:
    """Answers to each path."""

    def __init__(self, folder: str, seconds: float) -> None:
        """Load it."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._folder, self._seconds, self._lock = folder, seconds, threading.Lock()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Code and content."""
        if path == "/v1/models":
            return 200, {"data": [{"id": NAME, "root": self._folder, "max_model_len": 128}]}
        if path == "/tokenize":
            ids = self._tokenizer.encode(body["prompt"], add_special_tokens=False)
            return 200, {"tokens": ids, "count": len(ids), "max_model_len": 128}
        columns = self._model.config.vocab_size
        if any(token >= columns for token in body.get("logprob_token_ids", ())):
            said = f"token_id(s) in logprob_token_ids contain out-of-vocab token ids: {columns}"
            return 400, {"error": {"message": said}}
        time.sleep(self._seconds)
        choice = {"prompt_logprobs": None}
        if "prompt_logprobs" in body:
            choice = {"prompt_logprobs": self._scores(body["prompt"], body["prompt_logprobs"])}
        return 200, {"choices": [choice], "system_fingerprint": "vllm-stand-in"}

    @torch.no_grad()
    def _scores(self, ids: list[int], k: int) -> list[dict[str, Any] | None]:
        with self._lock:
            logp_TV = self._model(torch.tensor([ids])).logits[0].log_softmax(-1)
        top = logp_TV.topk(k)
        entries: list[dict[str, Any] | None] = [None]
        for logp_V, token, most in zip(logp_TV, ids[1:], top.indices, strict=False):
            known = [token, *most.tolist()]
            entries.append({str(i): {"logprob": logp_V[i].item()} for i in known})
        return entries


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._say(None)

    def do_POST(self) -> None:
        self._say(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _say(self, body: Any) -> None:
        code, content = self.server.model.answer(self.path, body)  # type: ignore[attr-defined]
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Nothing."""
