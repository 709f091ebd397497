"""The trainer's handle of a rollout engine: vLLM in a child process, reached through a pipe.

vLLM lives in a process of its own so that torchrun's environment, Megatron's process groups and
the CPU platform switches never meet it, and so that its death is an error and not a hang. Inside
that process nothing runs concurrently, which makes sampling repeatable bit for bit.
"""

import contextlib
import json
import os
import queue
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from megatron_tropd.base.errors import ConfigError, InputError, TrainingError
from megatron_tropd.convert.checks import check_tensors
from megatron_tropd.convert.families import model_shape
from megatron_tropd.convert.hf_folder import HFFolder, naming, read_config
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.rollout.engines import process
from megatron_tropd.rollout.engines.engine_model import (
    check_engine,
    engine_tensors,
    remove_engine_folder,
    served_models,
    write_engine_folder,
)
from megatron_tropd.rollout.engines.process import engine_environment
from megatron_tropd.rollout.engines.settings import EngineSettings

_LOG_LINES_QUOTED = 15
_CLOSE_SECONDS = 5.0
_MEMORY = ("weights", "kv_cache")
"""What an engine gives back asleep, by vLLM's names; each is woken by itself."""


_FOLDERS = (".model", ".teacher")
"""Ends of the names of the folders that vLLM opens: the sampled model's, and its teacher's."""
BLENDED_ON_CUDA = (
    "Sampling from between student and teacher (rollout.behaviour) is built for engines without "
    'CUDA, found CUDA. Set rollout.behaviour = "student" (docs/behaviour.md says what is '
    "missing)."
)


class RolloutEngine:
    """One vLLM engine in a child process.

    The constructor returns while the engine is still starting; :meth:`wait_ready` (or the first
    call) waits for it. The log of the child is kept in ``log_file``.
    """

    def __init__(
        self,
        model_folder: str | Path,
        *,
        max_model_len: int,
        log_file: str | Path,
        tensor_parallel: int = 1,
        threads: int | None = None,
        vocab_size: int | None = None,
        teacher_folder: str | Path | None = None,
        draft_tokens: int = 6,
        **settings: Any,
    ) -> None:
        """Start the child process.

        Args:
            max_model_len: longest prompt + response in tokens; at most the model's context.
            log_file: what the child prints is appended here.
            tensor_parallel: GPUs of the engine, from this rank's device on; 1 without CUDA.
            threads: CPU threads of the engine; None: as many as this process may use.
            vocab_size: the engine has so many columns of the vocabulary, the first ones: others
                are never sampled and log-probs are over these. None: all of the model's.
            teacher_folder: HF folder of a teacher: the engine samples from between the two
                (``Sampling.blend``), and new weights are the student's. None: there is none.
            draft_tokens: of the student, for each pass of the teacher.
            settings: further ones of :class:`EngineSettings`.

        Raises:
            InputError: the folder has no readable weights, or vLLM does not run its model.
            ConfigError: tensor_parallel > 1 without CUDA, or it does not divide the model; a
                teacher's folder with CUDA.
        """
        cuda = torch.cuda.is_available()
        blended = teacher_folder is not None
        _check_device(cuda, tensor_parallel, blended=blended)
        self._max_model_len = max_model_len
        if blended:
            max_model_len = blended_length(max_model_len, draft_tokens)
        folders = [Path(folder) for folder in (model_folder, teacher_folder) if folder]
        sources = _checked_sources(folders, max_model_len, cuda, tensor_parallel)
        self._log_file = Path(log_file)
        self._places = [self._log_file.with_suffix(end) for end in _FOLDERS[: len(sources)]]
        served = served_models(sources, self._places, vocab_size)
        self._settings = EngineSettings(
            **served,
            **settings,
            draft_tokens=draft_tokens if blended else None,
            max_model_len=max_model_len,
            tensor_parallel=tensor_parallel,
            cuda=cuda,
        )
        self._expected = engine_tensors(sources[0].config, self._settings.vocab_size)
        self._missing: dict[str, tuple[int, ...]] = {}
        self._configs = [
            write_engine_folder(source, place, served["vocab_size"])
            for source, place in zip(sources, self._places, strict=True)
        ]
        self._waiting_for = "start"
        self._reading = threading.Lock()
        self._to_send: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._early: tuple[str, Any] | None = None
        """What :meth:`arrived` has received before it was waited for."""
        self._asleep: set[str] = set()
        self.has_weights = True
        """Whether it can sample. An engine that slept cannot, before it is given weights again."""
        devices = _visible_devices(os.environ, tensor_parallel) if cuda else None
        threads = threads or len(os.sched_getaffinity(0))
        self._start(engine_environment(os.environ, threads=threads, cuda_devices=devices))

    def _start(self, environment: dict[str, str]) -> None:
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._log_file.open("a") as log:
            for config in self._configs:
                log.write(f"The engine's config.json: {json.dumps(config)}\n")
        self._child = process.take(environment)
        self._process, self._connection = self._child.child, self._child.connection
        self._send("print_to", str(self._log_file))
        self._send("start", self._settings)

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    @property
    def forgets(self) -> bool:
        """Whether sleeping drops the weights; without CUDA an engine never sleeps."""
        return self._settings.cuda

    @property
    def gpus(self) -> int:
        """How many it uses; 1 without CUDA."""
        return self._settings.tensor_parallel

    @property
    def weight_bytes(self) -> int:
        """Size of one version of the weights on their way to the engine."""
        element = torch.finfo(getattr(torch, self._settings.dtype)).bits // 8
        return sum(map(prod, self._expected.values())) * element

    def wait_ready(self) -> None:
        """Wait until the engine has loaded its model.

        Raises:
            TrainingError: the engine failed to start; quotes its log.
        """
        if self._waiting_for == "start":
            self._receive()
            self._remove_folders()

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
        """Continue every request with the current weights.

        Args:
            requests: token ids, length and seed of each; none is fine.
            sampling: temperature, top-p and stop ids of all of them.

        Returns:
            One :class:`Sample` per request, in order. Equal weights, requests and sampling give
            equal bits, also in another process.

        Raises:
            InputError: a request is empty or does not fit ``max_model_len``.
            TrainingError: the engine died; quotes its log.
        """
        self.start_generate(requests, sampling)
        return self.finish_generate()

    def start_generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> None:
        """Like :meth:`generate` without waiting; fetch with :meth:`finish_generate`."""
        blended = self._settings.draft_folder is not None
        assert blended == (sampling.blend is not None), "a blend is what engines of a pair sample"
        for index, request in enumerate(requests):
            self._check_request(index, request)
        self._be_ready()
        self._send("generate", list(requests), sampling)

    @contextmanager
    def stream(self, sampling: Sampling) -> Iterator[None]:
        """Continue in the block what :meth:`add_to_stream` adds, as it comes.

        Which requests are decoded together depends on time, so bits do.
        """
        assert self._settings.draft_folder is None, "a blend is sampled as a whole"
        self._be_ready()
        self._send("stream", sampling)
        # The child sends without reading, so whoever reads here may not wait for a message to go.
        self._to_send = queue.SimpleQueue()
        threading.Thread(target=self._send_all, daemon=True).start()
        yield
        self._to_send.put(None)
        self._receive()

    def add_to_stream(self, index: int, request: SampleRequest) -> None:
        """Ask for one more sample, which has a number of the caller's."""
        self._check_request(index, request)
        self._to_send.put((index, request))

    def next_of_stream(self, seconds: float) -> tuple[int, Sample] | None:
        """Wait so long for the next sample and its number."""
        if not self._connection.poll(seconds):
            return None
        found: tuple[int, Sample] = self._receive()
        self._waiting_for = "stream"
        return found

    def _be_ready(self) -> None:
        self.wait_ready()
        if not self.has_weights:
            raise TrainingError(
                "The rollout engine dropped its weights when it slept and was given none since.",
                kind="engine",
            )
        self._wake("kv_cache")

    def _send_all(self) -> None:
        message = ()
        with contextlib.suppress(OSError):  # who reads finds that the child is gone
            while message is not None:
                message = self._to_send.get()
                self._connection.send(message)

    def finish_generate(self) -> list[Sample]:
        """The samples of the last :meth:`start_generate`."""
        assert self._waiting_for == "generate", "finish_generate without start_generate"
        return self._receive()

    def arrived(self) -> list[Sample] | None:
        """The samples of :meth:`finish_generate`, if they are there; in any thread."""
        with self._reading, contextlib.suppress(EOFError, OSError):  # who finishes will say so
            if self._early is None and self._waiting_for == "generate" and self._connection.poll():
                self._early = self._connection.recv()
        return self._early[1] if self._early and self._early[0] == "ok" else None

    def load_weights(self, folder: str | Path) -> None:
        """Replace the weights by those of ``folder``; cached prefixes are forgotten.

        Args:
            folder: ``*.safetensors`` with HF names, every tensor of the first folder, and
                ``lm_head.weight`` also where the model is tied: vLLM keeps the old output layer
                without it and only warns.

        Raises:
            InputError: tensors are missing, unknown or of another shape; nothing was loaded.
            TrainingError: the engine died; quotes its log.
        """
        check_complete(self._expected, tensor_shapes(Path(folder)), Path(folder))
        self._wake("weights")
        self._ask("load_weights", str(folder))
        self.has_weights = True

    def begin_weights(self) -> None:
        """Begin to replace the weights by those that follow, buffer by buffer, on the GPUs.

        Raises:
            TrainingError: here and in the two calls that follow: the engine died, or it has no
                weights that can be used.
        """
        self.has_weights = False
        self._missing = dict(self._expected)
        self._wake("weights")
        self._ask("begin_weights")

    def take_weights(self, update: Mapping[str, Any]) -> None:
        """Load what lies in a buffer; on return the engine has read it."""
        for name, shape in zip(update["names"], update["shapes"], strict=True):
            expected = self._missing.pop(name, None)
            if expected != tuple(shape):
                raise TrainingError(
                    f"The engine's model has no weights {name} of shape {shape}"
                    + (f", expected {list(expected)}." if expected else " that it still needs."),
                    kind="engine",
                )
        self._ask("take_weights", update)

    def finish_weights(self) -> None:
        """Use the weights that came; cached prefixes are forgotten."""
        if self._missing:
            raise TrainingError(
                f"The engine's model still needs {len(self._missing)} tensors, "
                f"{next(iter(self._missing))} first.",
                kind="engine",
            )
        self._ask("finish_weights")
        self.has_weights = True

    def sleep(self) -> None:
        """Give the GPU memory back while the trainer works. Nothing to do without CUDA.

        The weights are dropped, not copied to the host: new ones come before the next samples.
        New weights wake the memory for weights, generating wakes the cache.
        """
        if self.forgets and len(self._asleep) < len(_MEMORY):
            self._ask("sleep")
            self._asleep = set(_MEMORY)
            self.has_weights = False

    def _wake(self, part: str) -> None:
        if part in self._asleep:
            self._ask("wake", part)
            self._asleep.remove(part)

    def _ask(self, command: str, *arguments: Any) -> Any:
        self.wait_ready()
        self._send(command, *arguments)
        return self._receive()

    def kill(self) -> None:
        """End the child process at once, from any thread; whoever waits for it gets its death."""
        self._process.kill()

    def close(self) -> None:
        """End the child process and what it started; harmless when it has ended already.

        Returns when their device memory is free, unless the driver takes longer.
        """
        self._remove_folders()
        workers = process.descendants(self.pid)
        self._connection.close()
        if self._waiting_for:
            self._process.kill()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        process.wait_gone(workers, _CLOSE_SECONDS)

    def _remove_folders(self) -> None:
        for place in self._places:
            remove_engine_folder(place)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_request(self, index: int, request: SampleRequest) -> None:
        length = len(request.token_ids)
        if not length or request.max_new_tokens < 1:
            raise InputError(
                f"Request {index} has {length} prompt tokens and asks for "
                f"{request.max_new_tokens} new ones; both must be at least 1."
            )
        if length < 2 and self._settings.draft_folder:
            raise InputError(
                f"Request {index} has 1 prompt token; to be continued from between student and "
                "teacher it needs 2. Put a token before the prompt, such as BOS."
            )
        if length + request.max_new_tokens > self._max_model_len:
            raise InputError(
                f"Request {index} needs {length} + {request.max_new_tokens} tokens, the engine "
                f"was built for {self._max_model_len}. Shorten the prompt or the response."
            )

    def _send(self, command: str, *arguments: Any) -> None:
        try:
            self._connection.send((command, *arguments))
        except OSError:
            raise self._death() from None
        self._waiting_for = command

    def _receive(self) -> Any:
        try:
            with self._reading:
                status, value = self._early or self._connection.recv()
                self._early = None
        except (EOFError, OSError):
            raise self._death() from None
        self._child.keep_output(self._log_file)
        starting, self._waiting_for = self._waiting_for == "start", ""
        if status == "refused" and starting:
            raise ConfigError(
                f"vLLM does not start with this model and these settings: {value}\n"
                f"{self._log_tail()}\nChange the setting it names, or choose another model."
            )
        if status != "ok":
            raise TrainingError(
                f"The rollout engine failed: {value}\n{self._log_tail()}", kind="engine"
            )
        return value

    def _death(self) -> TrainingError:
        try:
            code = self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        self._child.keep_output(self._log_file)
        ended = f"with signal {-code}" if code is not None and code < 0 else f"with code {code}"
        return TrainingError(
            f"The rollout engine (process {self._process.pid}) ended {ended} during "
            f"{self._waiting_for or 'idling'!r}. Start the same command again to resume.\n"
            + self._log_tail(),
            kind="engine",
        )

    def _log_tail(self) -> str:
        lines = self._log_file.read_text(errors="replace").splitlines()[-_LOG_LINES_QUOTED:]
        return f"Last lines of {self._log_file}:\n" + "\n".join(f"  {line}" for line in lines)


def _checked_sources(
    folders: Sequence[Path], max_model_len: int, cuda: bool, tensor_parallel: int
) -> list[HFFolder]:
    """Open folders whose models vLLM runs."""
    sources = [HFFolder(folder) for folder in folders]
    for source in sources:
        check_tensors(source)
        check_engine(
            source.config,
            max_model_len,
            cuda=cuda,
            who=str(source.path),
            tensor_parallel=tensor_parallel,
        )
    return sources


def _check_device(cuda: bool, tensor_parallel: int, *, blended: bool) -> None:
    if tensor_parallel > 1 and not cuda:
        raise ConfigError(
            f"rollout.engine_tensor_parallel must be 1 without CUDA, found {tensor_parallel}."
        )
    if blended and cuda:
        raise ConfigError(BLENDED_ON_CUDA)


def _visible_devices(environment: Mapping[str, str], count: int) -> str:
    first = torch.cuda.current_device()
    available = torch.cuda.device_count()
    if first + count > available:
        raise ConfigError(
            f"An engine of {count} GPUs from device {first} on needs {first + count} devices on "
            f"this node, found {available}. Lower rollout.engine_tensor_parallel."
        )
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",") if listed else [str(i) for i in range(available)]
    return ",".join(names[first : first + count])


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a folder's safetensors, from their headers.

    Raises:
        InputError: there is none, or one is damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a readable safetensors file: {error}.") from None
    if not shapes:
        raise InputError(
            f"{folder} holds no *.safetensors. Give an HF folder saved as safetensors."
        )
    return shapes


def check_complete(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: object
) -> None:
    """Refuse a weight update that is not exactly what the model needs.

    Raises:
        InputError: names missing, unknown and misshapen tensors.
    """
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    shapes = [
        f"{name} is {list(found[name])}, expected {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    problems = [
        f"{label} {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for label, names in (("missing", missing), ("unknown", unknown), ("misshapen", shapes))
        if names
    ]
    if problems:
        raise InputError(
            f"Weights in {where} do not fit the engine's model: {'; '.join(problems)}. "
            "Nothing was loaded; export every tensor under its HF name."
        )


def blended_length(longest: int, draft_tokens: int) -> int:
    """What an engine of two models is built for, so that every request always has drafts.

    vLLM drafts for all requests of a pass or for none: not if one of them may come near the end.

    Args:
        longest: prompt + response in tokens.
        draft_tokens: for each pass of the teacher; in the pass under way and in the next.
    """
    return longest + 2 * draft_tokens


def context_length(folder: str | Path) -> int:
    """Longest sequence a model takes, in tokens.

    Raises:
        InputError: config.json is missing, damaged, or of a model that is not supported.
    """
    with naming(f"Model folder {folder}"):
        return model_shape(read_config(Path(folder))).context
