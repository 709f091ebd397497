"""The engine's side of the pipe: one vLLM ``LLM`` inside a process of its own.

Started by :class:`megatron_tropd.rollout.engines.process.EngineProcess` as
``python -m megatron_tropd.rollout.engines.child FD PARENT_PID``. Messages are
``(command, *arguments)``. The first names the log; each of the others gets one reply,
``("ok", value)`` or ``("error", text)``. The process ends when the pipe closes or its parent is
gone.
"""

import logging
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from megatron_tropd.base.exits import STOP_SIGNALS
from megatron_tropd.base.files import never_fail_to_print
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.rollout.engines.blended import blended_generate
from megatron_tropd.rollout.engines.settings import EngineSettings
from megatron_tropd.rollout.engines.worker_extension import WorkerExtension

CPU_SEQUENCES = 256
"""Decoded together without CUDA, if ``max_num_seqs`` does not say: vLLM's default there."""
_PARENT_POLL_SECONDS = 0.5
_GIB = 2**30
_CPU_BLOCK = 128  # tokens of a KV block, vLLM's choice on CPU
_CHATTY_LOGGERS = ("vllm.renderers.base", "vllm.v1.core.block_pool")


def build_llm(settings: EngineSettings) -> Any:
    """The vLLM engine, scheduler and model in this process."""
    arguments = engine_arguments(settings)
    from vllm import LLM

    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    llm = LLM(**arguments)
    if settings.cut_from:
        llm.collective_rpc("tropd_load_first_rows", args=(settings.cut_from, settings.vocab_size))
    if settings.draft_folder:
        llm.collective_rpc("tropd_blend", args=(settings.draft_cut_from, settings.vocab_size))
    return llm


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """What ``vllm.LLM`` is called with; test_vllm_on_cuda.py reviews it for CUDA."""
    device = _cuda_arguments(settings) if settings.cuda else _cpu_arguments(settings)
    return {
        "model": settings.model_folder,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "tensor_parallel_size": settings.tensor_parallel,
        "enable_prefix_caching": settings.prefix_caching,
        "skip_tokenizer_init": True,
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        "generation_config": "vllm",
        "logprobs_mode": "raw_logprobs",
        "load_format": "dummy" if settings.cut_from else "safetensors",
        "trust_remote_code": False,
        "disable_log_stats": True,
        "seed": 0,
        **device,
    }


def _cuda_arguments(settings: EngineSettings) -> dict[str, Any]:
    limits = {
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
    }
    return {
        "gpu_memory_utilization": settings.gpu_share,
        "enable_sleep_mode": True,
        "weight_transfer_config": {"backend": "ipc"},
        **{name: limit for name, limit in limits.items() if limit is not None},
    }


def _cpu_arguments(settings: EngineSettings) -> dict[str, Any]:
    sequences = settings.max_num_seqs or CPU_SEQUENCES
    most_bytes = int(settings.cpu_kv_gib * _GIB)
    block_bytes = _CPU_BLOCK * _cache_bytes_of_a_token(settings)
    blocks = -(-settings.max_model_len // _CPU_BLOCK)
    if settings.draft_folder:
        # All that are decoded together fit: whoever had to wait would go on without drafts.
        sequences = max(1, min(sequences, (most_bytes // block_bytes - 1) // blocks))
    return {
        "max_num_seqs": sequences,
        # The cache is zeroed at start-up, so memory nobody can use costs seconds.
        "kv_cache_memory_bytes": min(most_bytes, (blocks * sequences + 1) * block_bytes),
        "enforce_eager": True,
        # A prompt cut in two rewinds its generator, which a CPU generator cannot do.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": settings.max_num_batched_tokens
        or max(4096, settings.max_model_len, sequences),
        **(_draft_arguments(settings, sequences) if settings.draft_folder else {}),
    }


def _draft_arguments(settings: EngineSettings, sequences: int) -> dict[str, Any]:
    """What makes the student of ``settings`` the draft model."""
    drafts = settings.draft_tokens or 1
    return {
        # Every sequence has its drafts, the token before them and a slot of the draft model.
        "max_num_batched_tokens": max(
            settings.max_num_batched_tokens or 4096,
            settings.max_model_len + sequences,
            sequences * (drafts + 2),
        ),
        "async_scheduling": False,
        "speculative_config": {
            "method": "draft_model",
            "model": settings.draft_folder,
            "num_speculative_tokens": drafts,
            "draft_sample_method": "probabilistic",
        },
    }


def _cache_bytes_of_a_token(settings: EngineSettings) -> int:
    """Keys and values of one token, of all the engine's models."""
    from transformers import AutoConfig

    element, total = 4 if settings.dtype == "float32" else 2, 0
    for folder in filter(None, (settings.model_folder, settings.draft_folder)):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        total += 2 * config.num_hidden_layers * kv_heads * size * element
    return total


def generate(llm: Any, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Sample]:
    """Continue every request; a function of weights, requests and sampling alone.

    Args:
        requests: what to continue, each with a seed of its own.
    """
    # What is cached decides how prompts are chunked, and with it the last bits.
    forget_prefixes(llm)
    if sampling.blend is not None:
        return blended_generate(llm, requests, sampling)
    prompts = [{"prompt_token_ids": list(request.token_ids)} for request in requests]
    params = [_sampling_params(request, sampling) for request in requests]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [_sample(output.outputs[0]) for output in outputs]


def stream(llm: Any, connection: Connection, sampling: Sampling) -> None:
    """Continue requests as they come, and send each sample when it is done.

    Messages are (index, request) and, when all samples are there, None.
    """
    forget_prefixes(llm)
    engine = llm.llm_engine
    while True:
        while not engine.has_unfinished_requests() or connection.poll():
            message = connection.recv()
            if message is None:
                return
            index, request = message
            prompt = {"prompt_token_ids": list(request.token_ids)}
            engine.add_request(str(index), prompt, _sampling_params(request, sampling))
        for output in engine.step():
            if output.finished:
                connection.send(("ok", (int(output.request_id), _sample(output.outputs[0]))))


def _sampling_params(request: SampleRequest, sampling: Sampling) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=request.seed,
        max_tokens=request.max_new_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _sample(completion: Any) -> Sample:
    flat = completion.logprobs
    return Sample(
        token_ids=tuple(completion.token_ids),
        logprobs=tuple(flat.logprobs[start] for start in flat.start_indices),
        finish_reason=completion.finish_reason,
    )


def load_weights(llm: Any, folder: str, *, draft: bool = False) -> None:
    """Replace the weights in place by those of a folder of safetensors with HF names.

    Args:
        folder: complete, ``lm_head.weight`` included for tied models (checked by the parent).
    """
    if draft:
        llm.collective_rpc("tropd_reload_draft", args=(folder,))
    else:
        llm.collective_rpc("tropd_forget_packed_experts")
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    forget_prefixes(llm)


def forget_prefixes(llm: Any) -> None:
    """Forget cached keys and values: they are of other weights, or decide how prompts are cut."""
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM did not empty its prefix cache")


def begin_weights(llm: Any) -> None:
    """Begin to replace the weights by vLLM's ``ipc`` transfer, of packed buffers."""
    llm.collective_rpc("tropd_forget_packed_experts")
    llm.init_weight_transfer_engine({"init_info": {"packed": True}})
    llm.start_weight_update()


def finish_weights(llm: Any) -> None:
    """Use the weights that came since :func:`begin_weights`."""
    llm.finish_weight_update()
    forget_prefixes(llm)


def _serve(connection: Connection) -> None:
    import_module("vllm")  # whoever starts us may not know yet what to serve
    import_module("vllm.entrypoints.llm")
    _, log_file = connection.recv()
    _print_to(log_file)
    _, settings = connection.recv()
    if settings.tensor_parallel > 1:
        shield_children()
    try:
        llm = build_llm(settings)
    except Exception as error:
        if not _is_refusal(error):
            raise
        traceback.print_exc()
        connection.send(("refused", f"{type(error).__name__}: {error}"))
        return
    connection.send(("ok", None))
    commands: dict[str, Callable[..., Any]] = {
        "generate": lambda *arguments: generate(llm, *arguments),
        "stream": lambda sampling: stream(llm, connection, sampling),
        "load_weights": lambda folder: load_weights(
            llm, folder, draft=settings.draft_folder is not None
        ),
        "begin_weights": lambda: begin_weights(llm),
        "take_weights": lambda update: llm.update_weights({"update_info": update}),
        "finish_weights": lambda: finish_weights(llm),
        # Level 2 drops the weights: they are replaced before they are used again.
        "sleep": lambda: llm.sleep(level=2),
        "wake": lambda part: llm.wake_up(tags=[part]),
    }
    while True:
        command, *arguments = connection.recv()
        connection.send(("ok", commands[command](*arguments)))


def _is_refusal(error: Exception) -> bool:
    """Whether vLLM does not take model or settings: the next start would fail alike.

    Memory that somebody else still holds is a ValueError too, and may be free the next time. A
    package that is missing will still be missing.
    """
    kinds = (AssertionError, NotImplementedError, ValueError, TypeError, LookupError, ImportError)
    return isinstance(error, kinds) and "memory" not in str(error).lower()


def shield_children() -> None:
    """Keep a job's signals from processes that this one starts and that set handlers of their own.

    So do vLLM's workers of a tensor-parallel engine, and SIGTERM would end them before the run has
    saved. A mask is inherited, and no handler lifts it. They end when this process does.
    """
    # Started later, it would lift the mask (CPython 3.12).
    multiprocessing.resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _print_to(log_file: str) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _watch_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_POLL_SECONDS)
    os._exit(1)


def main() -> None:
    """Serve the parent until it closes the pipe or dies."""
    connection, parent_pid = Connection(int(sys.argv[1])), int(sys.argv[2])
    # Ctrl-C and a job's signals reach every process: the parent decides when we end.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_watch_parent, args=(parent_pid,), daemon=True).start()
    never_fail_to_print()
    code = 1
    try:
        _serve(connection)
    except EOFError:
        code = 0
    except Exception as error:
        traceback.print_exc()
        connection.send(("error", f"{type(error).__name__}: {error}"))
    sys.stdout.flush()
    sys.stderr.flush()
    # No teardown: vLLM's can hang, and everything here dies with the process.
    os._exit(code)


if __name__ == "__main__":
    main()
