"""``tropd report``: the HTML report of a run."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``tropd report``."""
    parser.add_argument("run", type=Path, help="run folder")


def run(arguments: argparse.Namespace) -> int:
    """Write the report and print its path."""
    from megatron_tropd.report.html import write_report

    print(write_report(arguments.run))
    return 0
