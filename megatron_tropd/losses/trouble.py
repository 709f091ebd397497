"""Tokens whose loss is no number, and whose fault that is.

The finding is a number per token on the device that has the loss, so that nobody waits for it; the
words come later, if the step turns out to have such a token.

Shape suffix: T = tokens.
"""

import torch
from torch import Tensor

BITS = 3
"""A finding is below 2**BITS."""
_STUDENT, _TEACHER, _OTHER, _INFINITE = 1, 2, 3, 4
_BOTH = 5
_WORDS = {
    _STUDENT: "the student's log-prob of it is nan: its weights or activations are no longer "
    "numbers. Lower train.lr, or look for inf and nan in the student's weights.",
    _TEACHER: "the teacher's log-prob of it is nan. Look for inf and nan in the teacher's weights, "
    "or try another dtype.",
    _BOTH: "both models' log-probs of it are nan. If both models' weights are numbers, the id is "
    "outside the vocabulary: compare the tokenizers.",
    _OTHER: "both models' log-probs of it are numbers, so its weight, draw, reward or rollout "
    "log-prob is nan. Look at the engine's log-probs and at the weights of tokens.",
    _INFINITE: "its loss is infinite: one model excludes (probability 0) what the other writes. "
    "Choose a loss that stays finite there (region = 'exact', jsd), or lower train.lr.",
}


def trouble(values: dict[str, Tensor]) -> Tensor:
    """What is wrong with each token.

    Args:
        values: [T] each, ``LossOutput.values``; of a token that weighs nothing the models are
            looked at all the same.

    Returns:
        [T] int64 on the same device, 0 for tokens that are well; :func:`words` says the rest.
    """
    loss_T = values["loss"]
    student_T = values["student_logprob"].isnan()
    teacher_T = values["teacher_logprob"].isnan()
    found_T = torch.zeros_like(loss_T, dtype=torch.int64)
    for where_T, finding in (
        (loss_T.isinf(), _INFINITE),
        (loss_T.isnan(), _OTHER),
        (student_T, _STUDENT),
        (teacher_T, _TEACHER),
        (student_T & teacher_T, _BOTH),
    ):
        found_T = found_T.masked_fill(where_T, finding)
    return found_T


def words(finding: int) -> str:
    """A clause and what to do, for a finding that is not 0."""
    return _WORDS[finding]
