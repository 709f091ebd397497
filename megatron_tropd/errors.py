"""Errors a caller may want to catch by name. Messages say expected, found and what to do."""


class ConfigError(ValueError):
    """A setting is unknown, missing, of the wrong type, or does not fit another setting."""


class InputError(ValueError):
    """A file the user named (model, prompts, responses, run folder) is missing or unusable."""


class TrainingError(RuntimeError):
    """Training cannot go on (non-finite loss, dead engine, full disk); nothing was overwritten."""

    kind = "training"
    """One of ``failures.KINDS``: decides whether a restart may cure it."""

    def __init__(self, message: str, *, kind: str | None = None) -> None:
        """``kind``: other than that of the class."""
        super().__init__(message)
        self.kind = kind or self.kind
