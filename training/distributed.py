"""One process or many: the same code, the same loss at the same global batch.

Under `torchrun` every process holds the whole network and takes its share of each batch's rows.
Gradients are summed in one call over one flat tensor. Small control messages (a stop request, a
count) travel over gloo between CPUs, so that they never make a GPU wait.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass
class World:
    """Where this process stands among the others."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` by its sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_numbers(self, *numbers: float) -> list[float]:
        """The sums of a few numbers over all processes."""
        if self.size == 1:
            return list(numbers)
        return self.sum_(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` by the main process's, in place."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            self.sum_numbers(0.0)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def join_world() -> World:
    """Join the process group that `torchrun` describes in the environment; alone without it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return World()
    world = World(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_size=int(os.environ["LOCAL_WORLD_SIZE"]),
    )
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    # The others wait while the main process tokenises, which takes long for a large file.
    dist.init_process_group(backend, timeout=timedelta(hours=3))
    return world
