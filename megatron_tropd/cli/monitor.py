"""``tropd monitor``: a run as it is now, in the terminal or, with ``--serve``, in a browser."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tropd.base.errors import ConfigError, InputError

if TYPE_CHECKING:
    from http.server import ThreadingHTTPServer

    from rich.console import Group

LOOPBACK = "127.0.0.1"
PORT = 8650


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``tropd monitor``."""
    add = parser.add_argument
    add("run", type=Path, help="run folder")
    add("--every", type=float, default=2.0, help="seconds between two looks (default 2)")
    add("--once", action="store_true", help="print one view and stop; so without a terminal")
    add("--serve", action="store_true", help="serve the live report on loopback instead")
    add("--port", type=int, default=PORT, help=f"of --serve (default {PORT}; 0: any)")


def run(arguments: argparse.Namespace) -> int:
    """Show the run until it is complete, or until Ctrl-C."""
    if not arguments.every > 0:
        raise ConfigError(f"--every must be above 0 seconds, found {arguments.every}.")
    if arguments.serve:
        return _serve(arguments)
    from rich.console import Console
    from rich.live import Live

    console = Console()
    first = look(arguments.run)
    if arguments.once or not sys.stdout.isatty():
        console.print(first)
        return 0
    with Live(first, console=console, auto_refresh=False) as live:
        while not (arguments.run / "summary.json").exists():
            time.sleep(arguments.every)
            live.update(look(arguments.run), refresh=True)
        live.update(look(arguments.run), refresh=True)
    return 0


def look(folder: Path) -> "Group":
    """Read the run's files and make the view of them.

    Raises:
        InputError: it is no run folder.
    """
    from megatron_tropd.config.run_folder import RunFolder
    from megatron_tropd.report.monitor import newest, view
    from megatron_tropd.report.records import read_run

    files = sorted(RunFolder(folder).heartbeats.glob("rank_*.json"))
    return view(read_run(folder), _beats(files), beat_age=newest(files))


def _beats(files: list[Path]) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from megatron_tropd.launch.watchdog import read_beats

    if not files:
        return []
    ranks = [int(path.stem.removeprefix("rank_")) for path in files]
    return [asdict(beat) for beat in read_beats(files[0].parent, ranks).values()]


def _serve(arguments: argparse.Namespace) -> int:
    with make_server(arguments.run, arguments.port, every=arguments.every) as server:
        port = server.server_address[1]
        print(f"http://{LOOPBACK}:{port}/   the report of {arguments.run}, live; Ctrl-C ends it")
        print(f"from elsewhere: ssh -L {port}:{LOOPBACK}:{port} THIS_MACHINE", flush=True)
        server.serve_forever()
    return 0


def make_server(folder: Path, port: int, *, every: float) -> "ThreadingHTTPServer":
    """Make the server of the live report, on loopback alone; it reads and never writes.

    Raises:
        InputError: it is no run folder.
        ConfigError: the port is taken.
    """
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from megatron_tropd.report.html import page_data, render
    from megatron_tropd.report.records import read_run

    read_run(folder)  # no page is promised for what is no run

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer with the report as it is now."""
            if self.path != "/":
                self.send_error(404)
                return
            try:
                text = render(page_data(read_run(folder)))
            except InputError as error:  # a file that is being written
                self.send_error(503, "The run's files cannot be read", str(error))
                return
            body = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Refresh", str(max(5, round(5 * every))))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing of requests."""

    try:
        return ThreadingHTTPServer((LOOPBACK, port), Page)
    except OSError as error:
        raise ConfigError(
            f"Port {port} cannot be listened on ({error.strerror}). Give another with --port."
        ) from None
