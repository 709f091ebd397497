"""Engines for tests, forked from a server that has imported vLLM.

Importing vLLM takes eight of the nine CPU seconds that an engine of a tiny model needs to start. A
test that is about what an engine computes asks for engines of the server, by the fixture
``warm_engines`` or, on ranks, by :func:`use`. Tests about processes do without: whoever dies, is
stopped or is left behind there has been started as in a run.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, spawn
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from forked_process import ForkedProcess

from megatron_tropd.rollout.engines import process

SITE = "import warm_engines\nwarm_engines.use_always()\n"
ADDRESS = "TROPD_TEST_ENGINES"
"""Environment variable: where the server of another process listens."""
PRELOADED = [
    "megatron_tropd.rollout.engines.child",
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.model_loader",
    *(
        f"vllm.model_executor.models.{family}"
        for family in ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
    ),
    "tests.frozen",
]
"""What every engine imports, and the models of the tests."""


class _Server(forkserver.ForkServer):
    """A second fork server of this process, or the one that another process has started."""

    def ensure_running(self) -> None:
        """Start it, unless it runs."""
        if address := os.environ.get(ADDRESS):
            if self._forkserver_address != address:
                self._forkserver_address = address
                # The starter keeps the server alive; ours stands in for its end of that pipe.
                self._forkserver_alive_fd = os.open(os.devnull, os.O_WRONLY)
            return
        # One thread for each engine, whatever it asks for: libraries have read the number by then.
        environment = process.engine_environment(os.environ, threads=1, cuda_devices=None)
        before = dict(os.environ)
        os.environ.clear()
        os.environ.update(environment)
        try:
            super().ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)


_server = _Server()
_server.set_forkserver_preload(PRELOADED)


def address() -> dict[str, str]:
    """Environment with which ranks of this process can :func:`use` its server."""
    _server.ensure_running()
    return {ADDRESS: _server._forkserver_address}


def environment_of_commands(folder: Path, *paths: Path | str) -> dict[str, str]:
    """Environment of a command whose ranks are to use the server.

    Args:
        folder: for a ``sitecustomize.py``, which each Python that is started reads first.
        paths: others of its PYTHONPATH, before that of this process.
    """
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE)
    searched = (folder, Path(__file__).parent, *paths, os.environ.get("PYTHONPATH", ""))
    return (
        os.environ | address() | {"PYTHONPATH": os.pathsep.join(filter(None, map(str, searched)))}
    )


_preparation_data = spawn.get_preparation_data


def _without_main(name: str) -> dict[str, Any]:
    """Nothing that an engine needs is in the script that starts it, which may train a model."""
    found = _preparation_data(name)
    return {key: value for key, value in found.items() if not key.startswith("init_main")}


class _Child(ForkedProcess):
    """The part of ``subprocess.Popen`` that an engine's parent uses."""

    def __init__(self, target: Any, *arguments: Any) -> None:
        made = get_context("forkserver").Process(target=target, args=arguments, daemon=True)
        before = forkserver.connect_to_new_process, spawn.get_preparation_data
        forkserver.connect_to_new_process = _server.connect_to_new_process
        spawn.get_preparation_data = _without_main
        try:
            made.start()
        finally:
            forkserver.connect_to_new_process, spawn.get_preparation_data = before
        super().__init__(made, "engine")

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()


class _WarmEngine(process.EngineProcess):
    """An engine's process that has vLLM from the start."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self._output = None  # nothing is imported, so nothing printed before the log has its name
        self.connection, theirs = Pipe()
        with theirs:
            self.child: Any = _Child(_serve, theirs, self.environment)


def _serve(connection: Connection, environment: dict[str, str]) -> None:
    from megatron_tropd.rollout.engines import child

    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["child", str(os.dup(connection.fileno())), str(os.getppid())]
    connection.close()
    child.main()


def _take(environment: Mapping[str, str]) -> process.EngineProcess:
    cuda = environment.get("CUDA_VISIBLE_DEVICES")
    return process.EngineProcess(environment) if cuda else _WarmEngine(environment)


def use_always() -> None:
    """Let every engine that this process starts from now on come from the server."""
    process.take, process.prepare = _take, lambda threads: None


@contextmanager
def use() -> Iterator[None]:
    """The same until the block ends."""
    before = process.take, process.prepare
    use_always()
    try:
        yield
    finally:
        process.take, process.prepare = before
