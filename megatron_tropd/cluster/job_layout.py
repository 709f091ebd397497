"""How a run lies on the nodes of a job: training nodes first, then those of the rollout servers."""

from dataclasses import dataclass

from megatron_tropd.base.errors import ConfigError
from megatron_tropd.cluster.site import Site
from megatron_tropd.config import Config


@dataclass(frozen=True)
class JobLayout:
    """Nodes of a job and what each has."""

    training_nodes: int
    """Of all ranks: the student's, then a separate teacher's."""
    ranks_per_node: int
    servers: int = 0
    """Rollout servers, each on one node."""
    server_nodes: int = 0
    servers_per_node: int = 0
    gpus_per_server: int = 0
    """0: no GPUs."""
    warnings: tuple[str, ...] = ()

    @property
    def nodes(self) -> int:
        """All nodes of the job."""
        return self.training_nodes + self.server_nodes


def make_layout(config: Config, site: Site, *, engines: bool = True) -> JobLayout:
    """Place the ranks and servers of a run.

    Args:
        engines: whether the command has any; `tropd score` has not.

    Raises:
        ConfigError: they do not fit the nodes; says what would.
    """
    ranks = _ranks_per_node(config.world_size, site, config.ranks_in_words)
    layout = JobLayout(
        training_nodes=config.world_size // ranks,
        ranks_per_node=ranks,
        warnings=tuple(_warnings(config, site, ranks)),
    )
    if not engines:
        return layout
    if config.rollout.placement == "colocated":
        _check_engines(config, site, ranks)
        return layout
    return _with_servers(layout, config, site)


def _ranks_per_node(world: int, site: Site, words: str) -> int:
    slots = site.slots_per_node
    if world <= slots:
        return world
    if world % slots:
        raise ConfigError(
            f"{world} ranks ({words}) do not fill nodes of "
            f"{slots}: {world % slots} would be left for the last one. Change them to a "
            f"multiple of {slots}, or gpus_per_node (ranks_per_node) of the site file."
        )
    return slots


def _warnings(config: Config, site: Site, ranks: int) -> list[str]:
    warnings, tensor = [], config.parallel.tensor
    if ranks % tensor:
        warnings.append(
            f"parallel.tensor = {tensor} does not divide the {ranks} ranks of a node: tensor "
            "groups reach over the network, several times in every layer."
        )
    own = config.teacher_parallel.tensor if config.teacher.ranks else 1
    if ranks % own or config.parallel.world_size % own:
        warnings.append(
            f"teacher.parallel.tensor = {own} does not divide the {ranks} ranks of a node, or the "
            "teacher's first rank is not the first of a node or of such a group: its tensor groups "
            "reach over the network."
        )
    if ranks < site.gpus_per_node:
        warnings.append(
            f"{ranks} of a training node's {site.gpus_per_node} GPUs are used"
            + (", but the whole node is reserved (exclusive)." if site.exclusive else ".")
        )
    return warnings


def _check_engines(config: Config, site: Site, ranks: int) -> None:
    """A colocated engine takes the devices of its rank and the next ones, all of one node."""
    gpus, engines = config.rollout.engine_tensor_parallel, config.rollout.num_engines
    if gpus == 1 or not site.gpus_per_node:
        return
    block = config.parallel.world_size // engines
    if block < gpus or any(
        first % ranks + gpus > ranks for first in range(0, block * engines, block)
    ):
        raise ConfigError(
            f"rollout.engine_tensor_parallel = {gpus} does not fit: {engines} engines (rollout."
            f"num_engines) begin at every {block}th rank, on nodes of {ranks}. An engine needs "
            "GPUs of its own on one node: lower one of the two."
        )


def _with_servers(layout: JobLayout, config: Config, site: Site) -> JobLayout:
    servers, gpus = config.rollout.num_engines, config.rollout.engine_tensor_parallel
    if gpus > site.slots_per_node:
        raise ConfigError(
            f"rollout.engine_tensor_parallel = {gpus} does not fit a node of "
            f"{site.slots_per_node}: a server's GPUs are of one node. Lower it."
        )
    per_node = min(servers, site.slots_per_node // gpus)
    nodes = -(-servers // per_node)
    warnings = list(layout.warnings)
    idle = nodes * site.gpus_per_node - servers * gpus
    if idle > 0:
        warnings.append(
            f"{idle} of {nodes * site.gpus_per_node} GPUs on the server nodes stay idle: "
            f"{servers} servers (rollout.num_engines) of {gpus} GPUs."
        )
    return JobLayout(
        training_nodes=layout.training_nodes,
        ranks_per_node=layout.ranks_per_node,
        servers=servers,
        server_nodes=nodes,
        servers_per_node=per_node,
        gpus_per_server=gpus if site.gpus_per_node else 0,
        warnings=tuple(warnings),
    )
