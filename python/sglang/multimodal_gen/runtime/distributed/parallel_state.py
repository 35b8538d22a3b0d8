"""Where this process stands in its replica: size and rank on each of the axes (cfg, ring, ulysses, tp)."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from sglang.multimodal_gen.configs.replica_shape import AXES, ReplicaShape


@dataclass(frozen=True, kw_only=True)
class ProcessAxis:
    """One axis of the replica's process mesh. `group` holds the ranks that differ on this axis only."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, f"rank {self.rank} is outside an axis of size {self.size}"

    def share(self, total: int, what: str) -> int:
        """This rank's part of `total` equal things; the degrees were checked against the model at start-up."""
        assert total % self.size == 0, f"{total} {what} cannot be dealt to {self.size} ranks"
        return total // self.size


ALONE = ProcessAxis()


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """The axes of one replica. Layers take it as an argument, so that models never ask for a global.

    `sequence` is ring and Ulysses together, the ring outermost: the ranks among which the tokens of a sample are dealt.
    `world` are all ranks of the replica.
    """

    cfg: ProcessAxis = ALONE
    ring: ProcessAxis = ALONE
    ulysses: ProcessAxis = ALONE
    tp: ProcessAxis = ALONE
    sequence: ProcessAxis = ALONE
    world: ProcessAxis = ALONE

    @property
    def shape(self) -> ReplicaShape:
        """Sizes of the axes."""
        return ReplicaShape(cfg=self.cfg.size, ring=self.ring.size, ulysses=self.ulysses.size, tp=self.tp.size)

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for the replica: it sends what all of them have."""
        return self.world.rank == 0


SINGLE = ParallelContext()
"""A replica of one process."""


def join_replica(
    shape: ReplicaShape, rank: int, *, store: Path, device: torch.device, timeout_s: float = 600.0
) -> ParallelContext:
    """Meet the other ranks of the replica over a file that all of them see, and divide into groups.

    Tensors on the CPU travel through gloo, those on GPUs through NCCL. A collective that takes longer than `timeout_s`
    fails. A replica of one rank joins nobody.
    """
    if shape.num_ranks == 1:
        return SINGLE
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=dist.FileStore(str(store), shape.num_ranks),
        rank=rank,
        world_size=shape.num_ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    mesh = init_device_mesh(device.type, shape.sizes, mesh_dim_names=AXES)
    sequence = mesh["ring", "ulysses"]._flatten("sequence")
    axes = {
        name: ProcessAxis(size=size, rank=mesh.get_local_rank(name), group=mesh.get_group(name))
        for name, size in zip(AXES, shape.sizes, strict=True)
    }
    return ParallelContext(
        **axes,
        sequence=ProcessAxis(
            size=shape.ring * shape.ulysses, rank=sequence.get_local_rank(), group=sequence.get_group()
        ),
        world=ProcessAxis(size=shape.num_ranks, rank=rank, group=dist.group.WORLD),
    )
