"""The two conversion commands, called by tests in their own process."""

from megatron_tropd.cli.main import main


def main_to_megatron(words: list[str]) -> int:
    """Run ``tropd convert to-megatron``; its exit code."""
    return main(["convert", "to-megatron", *words])


def main_to_hf(words: list[str]) -> int:
    """Run ``tropd convert to-hf``; its exit code."""
    return main(["convert", "to-hf", *words])
