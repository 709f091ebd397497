"""Errors a caller may want to catch by name. Messages say expected, found and what to do."""


class ConfigError(ValueError):
    """A setting is unknown, missing, of the wrong type, or does not fit another setting."""


class InputError(ValueError):
    """A file the user named (model, prompts, responses, run folder) is missing or unusable."""


class TrainingError(RuntimeError):
    """Training cannot go on (non-finite loss, dead engine, full disk); nothing was overwritten."""

    def __init__(self, message: str, *, kind: str = "training") -> None:
        """``kind``: one of ``failures.KINDS``; decides whether a restart may cure it."""
        super().__init__(message)
        self.kind = kind


class ServersLost(TrainingError):
    """No rollout server has answered for too long; starting the same command again may cure it."""

    def __init__(self, message: str) -> None:
        """``message``: what was wrong with each server."""
        super().__init__(message, kind="engine")
