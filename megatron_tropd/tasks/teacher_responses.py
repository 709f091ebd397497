"""Writing teacher responses beforehand, in the format of :mod:`megatron_tropd.data.responses`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tropd.data.responses import TeacherResponse, header_record, response_record
from megatron_tropd.data.samples import Sample, SampleRequest, Sampling
from megatron_tropd.data.types import Prompt
from megatron_tropd.losses.draws import Purpose, keyed_seed
from megatron_tropd.tasks.exact_match import Sampler
from megatron_tropd.tasks.sample_files import WantedSample, write_samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_responses(
    engine: Callable[[], Sampler],
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

    Args:
        seed: keys the samples, with prompt and number of the sample.
        teacher: identity of the teacher's weights (``model_identity(folder)``).
        template: what the prompts' chat template read beside the messages, for the header.

    Raises:
        InputError: as ``write_samples``.
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

    def record(prompt: Prompt, number: int, drawn_with: int, sample: Sample) -> dict[str, Any]:
        response = TeacherResponse(prompt.index, number, sample.token_ids, sample.finish_reason)
        text = tokenizer.decode(list(sample.token_ids), skip_special_tokens=True)
        return response_record(prompt, response, text=text, seed=drawn_with)

    wanted = []
    for prompt in prompts:
        for number in range(samples):
            own_seed = keyed_seed(seed, Purpose.TEACHER_RESPONSE, prompt.index, number)
            request = SampleRequest(prompt.token_ids, max_new_tokens, own_seed)
            make = partial(record, prompt, number, own_seed)
            wanted.append(WantedSample((prompt.index, number), request, make))
    return write_samples(
        engine,
        wanted,
        path,
        header=header_record(tokenizer, settings),
        key=("prompt_index", "sample"),
        sampling=sampling,
        resume=resume,
        progress=progress,
    )
