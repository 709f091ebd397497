"""Student weights from the trainer to the engine: safetensors in a folder, bucket by bucket.

The exporting rank writes HF-named tensors as they arrive, so it never holds more than one bucket;
the engine maps the files and loads them in place. An engine of the same rank gets them through a
:class:`WeightMailbox` in /dev/shm, servers through the run folder (versions.py).
"""

import fcntl
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_tropd.base.errors import ConfigError, TrainingError
from megatron_tropd.rollout.weights.interface import NamedTensor

_PREFIX = "tropd-weights-"
_LOCK = "owner.lock"
SHARED_MEMORY = Path("/dev/shm")
BUCKET_BYTES = 256 * 2**20


class WeightMailbox:
    """A folder of this process that holds at most one version of the weights at a time.

    The owner holds a file lock for as long as it lives, however it ends; folders whose lock is
    free are left-overs and are removed when the next mailbox is made.
    """

    def __init__(self, root: Path, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        """Make the folder and remove those of dead runs.

        Args:
            root: where; :func:`roomy_root` finds one.
            bucket_bytes: tensors are written in files of about this size.
        """
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

    def write(self, tensors: Iterable[NamedTensor]) -> Path:
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
        write_buckets(target, tensors, self._bucket_bytes)
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


def write_buckets(
    target: Path,
    tensors: Iterable[NamedTensor],
    bucket_bytes: int = BUCKET_BYTES,
) -> None:
    """Write tensors as safetensors into a folder, holding one bucket at a time.

    Args:
        tensors: HF names and tensors on any device; ``None`` values are skipped. Exhausted even if
            writing fails, since making them may be collective.
        bucket_bytes: tensors are written in files of about this size.

    Raises:
        TrainingError: no room for the weights.
    """
    tensors = iter(tensors)
    try:
        bucket: dict[str, Tensor] = {}
        size = count = 0
        for name, tensor in tensors:
            if tensor is None:
                continue
            if bucket and size + tensor.nbytes > bucket_bytes:
                _save(bucket, target / f"model-{count:05d}.safetensors")
                bucket, size, count = {}, 0, count + 1
            bucket[name] = tensor.detach().to("cpu").contiguous()
            size += tensor.nbytes
        if bucket:
            _save(bucket, target / f"model-{count:05d}.safetensors")
    finally:
        for _ in tensors:
            pass


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


def roomy_root(engines: int, weight_bytes: int) -> Path:
    """Where the engines of this node can get their weights: shared memory, or the temporary folder.

    Args:
        engines: that get them at the same time.

    Returns:
        The first of the two that has room, without what dead runs have left.

    Raises:
        ConfigError: neither has; says what is needed, what is there, and what to do.
    """
    needed, found = engines * weight_bytes, []
    for root in dict.fromkeys((SHARED_MEMORY, Path(tempfile.gettempdir()))):
        if not os.access(root, os.W_OK):
            found.append(f"{root} cannot be written")
            continue
        remove_stale(root)
        free = shutil.disk_usage(root).free
        if free >= needed:
            if found:
                print(f"Weights go to the engines through {root}: {found[0]}.", flush=True)
            return root
        found.append(f"{root} has {free / 2**30:.1f} GiB free")
    raise ConfigError(
        f"The engines of {socket.gethostname()} get the student's weights through shared memory, "
        f"{engines} x {weight_bytes / 2**30:.1f} GiB at a time, but {' and '.join(found)}. Enlarge "
        f"shared memory (docker run --shm-size={-(-needed // 2**30) + 1}g, or --ipc=host; under "
        "Kubernetes an emptyDir with medium Memory), or set TMPDIR to a folder with so much room "
        "(slower), or lower rollout.num_engines."
    )


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
    try:
        with torch.no_grad():
            save_file(bucket, path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{path} could not be written: {error}. {needed / 2**20:.0f} MiB were needed, "
            f"{free / 2**20:.0f} MiB free. Make room or fix the folder, then resume.",
            kind="disk",
        ) from None
