"""The other ranks, who are not there: process groups that answer at once, with the right shapes.

What is known of a tensor that this rank gives to an all-gather is known of the others' too: every
rank of a rehearsal does the same.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeProcessGroup, FakeWork
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_flatten, tree_map_only

from megatron_tropd.rehearsal.events import Collective, Events
from megatron_tropd.rehearsal.tensors import Device, known, on_device, set_known


def believe(device: Device) -> "World":
    """Let this process take collectives for answered by ranks that do not exist."""
    world = World(device.events)
    device.collective = world.answer
    _replace_objects(world)
    new_group = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        kwargs["backend"] = "fake"
        kwargs.pop("pg_options", None)
        return new_group(*args, **kwargs)

    dist.new_group = fake_group
    torch.distributed.new_group = fake_group
    return world


def join(*, rank: int, world_size: int) -> None:
    """Be ``rank`` of the world."""
    dist.init_process_group(
        backend="fake",
        store=FakeStore(),
        rank=rank,
        world_size=world_size,
        # Who makes a group reads the time-out of this one.
        pg_options=FakeProcessGroup.Options(),  # type: ignore[call-arg]
    )


class World:
    """Answers collectives: outputs keep what they hold, and what neighbours send is told before."""

    def __init__(self, events: Events) -> None:
        """Nobody has sent anything."""
        self._events = events
        self._shapes: dict[int, list[tuple[int, ...]]] = {}
        self._sayings: dict[type, Callable[[int], Any]] = {}

    def expect_shapes(self, sender: int, shapes: Iterable[tuple[int, ...]]) -> None:
        """Tell which shapes a rank will announce, in this order."""
        self._shapes[sender] = list(shapes)

    def let_each_say(self, kind: type, saying: Callable[[int], Any]) -> None:
        """Tell what each rank says if objects of ``kind`` are gathered, by its global rank."""
        self._sayings[kind] = saying

    def gathered(self, mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
        """What every rank of a group says, if this one says ``mine``."""
        ranks = dist.get_process_group_ranks(group)
        said = [mine] * len(ranks)
        for kind, saying in self._sayings.items():
            by_rank = [partial(_say, saying(rank)) for rank in ranks]
            said = [tree_map_only(kind, say, one) for say, one in zip(by_rank, said, strict=True)]
        return said

    def answer(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Note a collective; what it returns looks like the real one's."""
        name, group = self.record(func, args)
        if name == "recv":
            self._receive(args[0][0], dist.get_global_rank(group, args[2]))
        elif name == "allgather_base" and (mine := known(args[1])) is not None:
            set_known(args[0], torch.cat([mine.flatten()] * group.size()).view(args[0].shape))
        work = FakeWork().boxed()
        returns = len(func._schema.returns)
        return {0: None, 1: work, 2: (args[0], work)}[returns]

    def record(self, func: Any, args: tuple) -> tuple[str, dist.ProcessGroup]:
        """Note an operation of torch's ``c10d``: its name, and the group it is of."""
        group = next(
            dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch._C.ScriptObject)
        )
        name = func._schema.name.removeprefix("c10d::").strip("_")
        self.note(name, group, self._given(name, args))
        return name, group

    def note(self, name: str, group: dist.ProcessGroup | None, tensors: list[Tensor]) -> None:
        """Count one call; ``group`` None: of all ranks."""
        group = group or dist.group.WORLD
        assert group is not None
        title = group.group_desc if group.group_desc != "undefined" else group.group_name
        self.count(name, title, group.size(), tensors)

    def count(self, name: str, title: str, ranks: int, tensors: list[Tensor]) -> None:
        """Count one call of a group that is none of this process' own."""
        size = sum(t.numel() * t.element_size() for t in tensors)
        where = "cuda" if any(on_device(t) for t in tensors) else "cpu"
        self._events.collectives[
            Collective(self._events.phase, name, title, ranks, size, where)
        ] += 1

    def _given(self, name: str, args: tuple) -> list[Tensor]:
        """What this rank puts in."""
        second = ("allgather", "reduce_scatter", "alltoall", "gather", "scatter", "_base")
        is_second = any(part in name for part in second)
        value = args[1] if is_second else args[0]
        return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]

    def _receive(self, tensor: Tensor, sender: int) -> None:
        shapes = self._shapes.get(sender)
        if tensor.dtype == torch.int64 and tensor.numel() == 3 and shapes:
            set_known(tensor, torch.tensor(shapes.pop(0)))


def _say(said: Any, _: Any) -> Any:
    return said


def _replace_objects(world: World) -> None:
    """Objects travel between hosts: what each rank says is told before, or what this one says."""

    def all_gather_object(objects: list[Any], mine: Any, group: Any = None) -> None:
        world.note("all_gather_object", group, [])
        objects[:] = world.gathered(mine, group)

    def gather_object(
        mine: Any, objects: Any = None, dst: int = 0, group: Any = None, **_: Any
    ) -> None:
        world.note("gather_object", group, [])
        if objects is not None:
            objects[:] = world.gathered(mine, group)

    def broadcast_object_list(
        objects: list[Any], src: int = 0, group: Any = None, **_: Any
    ) -> None:
        world.note("broadcast_object_list", group, [])

    for function in (all_gather_object, gather_object, broadcast_object_list):
        setattr(dist, function.__name__, function)


def route_evenly() -> None:
    """Let every router of a mixture send each expert as many tokens as any other.

    Where tokens go is up to numbers; even routes are what planning assumes and training aims at.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    original = TopKRouter.routing

    def routing(self: TopKRouter, *args: Any, **kwargs: Any) -> Any:
        probabilities, routes = original(self, *args, **kwargs)
        if routes is not None and on_device(routes):
            set_known(routes, _even_routes(len(routes), routes.shape[1], self.topk))
        return probabilities, routes

    TopKRouter.routing = routing


def _even_routes(tokens: int, experts: int, of_token: int) -> Tensor:
    """[tokens, experts] bool: the next ``of_token`` experts for each token in turn."""
    first = torch.arange(tokens) * of_token
    chosen = (first[:, None] + torch.arange(of_token)) % experts
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen, True)
