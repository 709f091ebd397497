"""The story of a run on the ranks of a separate teacher."""

from contextlib import ExitStack

from megatron_tropd.base.progress import Progress
from megatron_tropd.config.run_folder import RunFolder
from megatron_tropd.distill import startup
from megatron_tropd.distill.inputs import load_inputs
from megatron_tropd.distill.reporter import Clock
from megatron_tropd.mcore import parallel
from megatron_tropd.mcore.options_check import check_options
from megatron_tropd.report.timeline import Timeline
from megatron_tropd.teacher._own_ranks import OwnRanks


def teach(folder: RunFolder, *, progress: Progress) -> None:
    """Load the teacher and score until the student's ranks say that there is no more.

    A signal that asks to stop is theirs to obey: they need the teacher until they have saved.

    Args:
        progress: tells the watchdog where this rank is.

    Raises:
        ConfigError, InputError: the teacher cannot be loaded.
    """
    config = folder.read_config()
    with ExitStack() as exits:
        layout = startup.join_ranks(config)
        exits.push(startup.leave_ranks)
        inputs = load_inputs(config)
        check_options(config, **{who: f.config for who, f in inputs.folders.items()})
        drawn = Timeline(folder.root, "teacher") if layout.is_main else None
        ranks = OwnRanks(config, inputs.folders, layout, parallel.bridge())
        ranks.serve(progress, Clock(progress, drawn))
