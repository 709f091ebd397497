"""One training step at its real size, on fake tensors, as any rank of a job: nothing is computed.

Each rank is rehearsed by a process of its own, forked from one that believes in a GPU and can do
nothing else afterwards. docs/planning.md says what is shown and what is not.
"""

from megatron_tropd.rehearsal.processes import Rehearsal, Stage, rehearse
from megatron_tropd.rehearsal.report import rehearsal_json, rehearsal_table

__all__ = ["Rehearsal", "Stage", "rehearsal_json", "rehearsal_table", "rehearse"]
