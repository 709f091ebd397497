"""Student weights from the trainer to the engine: safetensors in shared memory, bucket by bucket.

The exporting rank writes HF-named tensors into a folder under /dev/shm as they arrive, so it never
holds more than one bucket; the engine maps the files, loads them in place, and they are removed.
"""

import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_tropd.errors import TrainingError

_PREFIX = "tropd-weights-"
_LOCK = "owner.lock"
_BUCKET_BYTES = 256 * 2**20


class WeightMailbox:
    """A folder of this process that holds at most one version of the weights at a time.

    The owner holds a file lock for as long as it lives, however it ends; folders whose lock is
    free are left-overs and are removed when the next mailbox is made.
    """

    def __init__(self, root: Path | None = None, *, bucket_bytes: int = _BUCKET_BYTES) -> None:
        """Make the folder and remove those of dead runs.

        Args:
            root: where; None: /dev/shm, or the temporary folder where there is none.
            bucket_bytes: tensors are written in files of about this size.
        """
        root = root or _shared_memory()
        remove_stale(root)
        self._bucket_bytes = bucket_bytes
        name = f"{_PREFIX}{uuid.uuid4().hex}"
        # Locked under a name nobody looks for: another process may be clearing up.
        hidden = root / f".{name}"
        hidden.mkdir(mode=0o700)
        self._lock = (hidden / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.folder = hidden.rename(root / name)
        self._version = 0

    def write(self, tensors: Iterable[tuple[str, Tensor | None]]) -> Path:
        """Write one version of the weights; the one before is removed first.

        Args:
            tensors: HF names and tensors on any device; ``None`` values are skipped.

        Returns:
            The folder of ``*.safetensors``.

        Raises:
            TrainingError: no room for the weights.
        """
        self.clear()
        self._version += 1
        target = self.folder / str(self._version)
        target.mkdir()
        bucket: dict[str, Tensor] = {}
        size = count = 0
        for name, tensor in tensors:
            if tensor is None:
                continue
            if bucket and size + tensor.nbytes > self._bucket_bytes:
                _save(bucket, target / f"model-{count:05d}.safetensors")
                bucket, size, count = {}, 0, count + 1
            bucket[name] = tensor.detach().to("cpu").contiguous()
            size += tensor.nbytes
        if bucket:
            _save(bucket, target / f"model-{count:05d}.safetensors")
        return target

    def clear(self) -> None:
        """Remove the weights written last, once the engine has them."""
        shutil.rmtree(self.folder / str(self._version), ignore_errors=True)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def remove_stale(root: Path) -> None:
    """Remove the mailboxes in ``root`` whose owner is gone.

    Args:
        root: the folder mailboxes are made in.
    """
    for folder in root.glob(f"{_PREFIX}*"):
        if not os.access(folder, os.W_OK):
            continue
        try:
            lock = (folder / _LOCK).open("r")
        except FileNotFoundError:  # its owner is removing it
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(folder, ignore_errors=True)


def _shared_memory() -> Path:
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def _save(bucket: dict[str, Tensor], path: Path) -> None:
    # Tensors that share memory (a tied embedding and output layer) must be told apart.
    seen: set[int] = set()
    for name, tensor in bucket.items():
        if tensor.untyped_storage().data_ptr() in seen:
            bucket[name] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    needed, free = sum(t.nbytes for t in bucket.values()), shutil.disk_usage(path.parent).free
    if needed > free:
        raise TrainingError(
            f"{path.parent} has {free / 2**20:.0f} MiB free, the student's weights need "
            f"{needed / 2**20:.0f} MiB more for the rollout engine. Free some or enlarge it.",
            kind="disk",
        )
    with torch.no_grad():
        save_file(bucket, path)
