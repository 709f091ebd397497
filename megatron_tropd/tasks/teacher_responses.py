"""Writing teacher responses beforehand: a file that survives interruption and is never mixed.

The format is that of :mod:`megatron_tropd.data.responses`.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tropd.convert.hf_folder import HFFolder
from megatron_tropd.data.responses import TeacherResponse, header_record, response_record
from megatron_tropd.data.resumable import ResumableLines
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.data.types import Prompt
from megatron_tropd.losses.draws import Purpose, keyed_seed
from megatron_tropd.tasks.exact_match import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REQUESTS_PER_BATCH = 256


def write_responses(
    engine: Callable[[], Engine],
    prompts: Sequence[Prompt],
    tokenizer: "PreTrainedTokenizerBase",
    path: str | Path,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    samples: int = 1,
    seed: int = 1234,
    teacher: str = "",
    template: Mapping[str, Any] | None = None,
    resume: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Sample the responses a file does not have yet and append them.

    Every batch is on disk before the next one starts; a last line torn by a kill is dropped. A
    response depends on the seed, its prompt and its sample number, not on where a run was cut.

    Args:
        engine: makes an engine that serves the teacher; not called when nothing is missing.
        prompts: what to continue.
        tokenizer: the teacher's.
        path: the file; made if absent.
        sampling: temperature, top-p and stop ids.
        max_new_tokens: longest response.
        samples: responses per prompt.
        seed: keys the samples.
        teacher: identity of the teacher's weights (:func:`model_identity`).
        template: what the prompts' chat template read beside the messages, for the header.
        resume: continue an existing file; False: an existing file is an error.
        progress: called with (responses in the file, responses wanted) after every batch.

    Returns:
        How many responses were added.

    Raises:
        InputError: the file exists and may not be continued, was made with other settings, is
            broken before its last line, or is being written by another process.
    """
    settings = {
        "teacher": teacher,
        "samples": samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "stop_token_ids": list(sampling.stop_token_ids),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        **(template or {}),
    }
    header = header_record(tokenizer, settings)
    with ResumableLines(path, header, key=("prompt_index", "sample"), resume=resume) as file:
        wanted = [(p, s) for p in prompts for s in range(samples)]
        missing = [(p, s) for p, s in wanted if (p.index, s) not in file.done]
        if not missing:
            return 0
        server = engine()
        for batch in batched(missing, _REQUESTS_PER_BATCH):
            requests = [
                SampleRequest(
                    prompt.token_ids,
                    max_new_tokens,
                    keyed_seed(seed, Purpose.TEACHER_RESPONSE, prompt.index, sample),
                )
                for prompt, sample in batch
            ]
            written = server.generate(requests, sampling)
            file.append(
                [
                    _record(prompt, number, sample, tokenizer, request.seed)
                    for (prompt, number), request, sample in zip(
                        batch, requests, written, strict=True
                    )
                ]
            )
            progress(len(file.done), len(wanted))
    return len(missing)


def model_identity(folder: str | Path) -> str:
    """Cheap identity of an HF folder: hash of config.json and of the weight files' beginnings.

    Args:
        folder: HF folder.

    Returns:
        16 hexadecimal digits. Differs for another architecture or other first tensors; does not
        read whole weights.
    """
    folder = Path(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in (folder / name for name in HFFolder(folder).files):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
    return digest.hexdigest()[:16]


def _record(
    prompt: Prompt, number: int, sample: Sample, tokenizer: "PreTrainedTokenizerBase", seed: int
) -> dict[str, Any]:
    response = TeacherResponse(prompt.index, number, sample.token_ids, sample.finish_reason)
    text = tokenizer.decode(list(sample.token_ids), skip_special_tokens=True)
    return response_record(prompt, response, text=text, seed=seed)
