"""Progress bars of commands whose work says how much of it is done."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def counted(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar while a command counts; gives what is to be called with (done, in all)."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=unit, dynamic_ncols=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
