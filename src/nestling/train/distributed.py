"""Training on many GPUs and machines: the processes that torchrun starts, and what they tell each other.

Every rank visits the same subnets, on its part of the same batch. The gradients of all visits add up locally,
then one sum over the ranks makes them those of the whole batch. That is one exchange a step instead of one a
visit, and it does not lose the gradients of what the last visit did not use, as DistributedDataParallel does
with `no_sync` (pytorch issue 69031).

Alone, a process is the only rank: nothing is started, copied or sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nestling.space import Arch

T = TypeVar("T")

STEPS_BETWEEN_CHECKS = 50
"""How often the ranks are compared. Also at the first step of a process, where most mistakes show."""


class RanksError(RuntimeError):
    """Ranks that cannot work together; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train together.

    Its methods are to be called by every rank, in the same order: each waits for all.

    Attributes:
        rank: its number, from 0 on; the first alone writes files.
        world: how many there are.
        device: where its tensors are.
        backend: what carries the exchange: gloo on the CPU, nccl on CUDA.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    backend: Literal["gloo", "nccl"] = "gloo"

    def __post_init__(self) -> None:
        """Refuses a number that is not one of the ranks'.

        Raises:
            RanksError: `rank` is not in [0, `world`).
        """
        if not 0 <= self.rank < self.world:
            raise RanksError(f"rank {self.rank} of {self.world} ranks; ranks are counted from 0")

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` added up over the ranks, in place: the same bits on every rank.

        Raises:
            RanksError: another rank is gone, or sent something else.
        """
        if self.world > 1:
            with self._exchange():
                dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """(world, *shape): the `values` of every rank, by rank.

        Raises:
            RanksError: another rank is gone, or sent something else.
        """
        if self.world == 1:
            return values[None]
        gathered = [torch.empty_like(values) for _ in range(self.world)]
        with self._exchange():
            dist.all_gather(gathered, values.contiguous())
        return torch.stack(gathered)

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank, which alone does it; the others get a copy.

        So a file is read on one machine, and need not be there on the others.

        Raises:
            Exception: whatever `work` raises, on the first rank.
            RanksError: the same failure, on the others.
        """
        if self.world == 1:
            return work()
        told: list[Any] = [None, None]
        failure: Exception | None = None
        if self.first:
            try:
                told[0] = work()
            except Exception as error:
                failure = error
                told[1] = f"{type(error).__name__}: {error}"
        with self._exchange():
            dist.broadcast_object_list(told, src=0, device=self.device)
        if failure is not None:
            raise failure
        if told[1] is not None:
            raise RanksError(f"rank {self.rank} stops because rank 0 did: {told[1]}")
        result: T = told[0]
        return result

    def share(self, network: nn.Module) -> None:
        """Gives every rank the first one's parameters and buffers of `network`, in place.

        Raises:
            RanksError: another rank is gone.
        """
        if self.world == 1:
            return
        with torch.no_grad(), self._exchange():
            for tensor in (*network.parameters(), *network.buffers()):
                sent = tensor.detach().contiguous()  # channels last, a tensor cannot be sent as it is
                dist.broadcast(sent, src=0)
                tensor.copy_(sent)

    def wait(self) -> None:
        """Returns once every rank is here.

        Raises:
            RanksError: another rank is gone.
        """
        if self.world > 1:
            with self._exchange():
                dist.barrier(device_ids=[self.device.index] if self.backend == "nccl" else None)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RanksError(
                f"rank {self.rank} of {self.world} lost the others ({_first_line(error)}); if one of them "
                "stopped before, its message tells why"
            ) from error


ALONE = Ranks()
"""One process on the CPU."""


def ranks_of(
    environment: Mapping[str, str], *, device: torch.device | str = "cpu", gpus: int | None = None
) -> Ranks:
    """This process' place among those that torchrun started, read off its `environment`.

    Args:
        environment: as `os.environ`; without torchrun's variables there is one rank.
        device: `cpu`, or `cuda` for the GPU of the rank's number on its machine.
        gpus: how many GPUs this machine has; by default those that torch sees.

    Raises:
        RanksError: variables that are missing or no numbers, more ranks on a machine than GPUs, or a GPU
            named for all ranks.
    """
    device = torch.device(device)
    if "WORLD_SIZE" not in environment and "RANK" not in environment:
        return Ranks(device=device, backend=_backend(device))
    rank, world = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if device.type == "cuda" and world > 1:
        if device.index is not None:
            raise RanksError(f"torch_device is {device}, but each of {world} ranks has its own GPU; use cuda")
        local, gpus = _number(environment, "LOCAL_RANK"), torch.cuda.device_count() if gpus is None else gpus
        if local >= gpus:
            raise RanksError(
                f"rank {rank} is number {local} on its machine, which has {gpus} GPUs; "
                f"start torchrun with --nproc_per_node={gpus} at most"
            )
        device = torch.device("cuda", local)
    return Ranks(rank, world, device, _backend(device))


@contextmanager
def joined(ranks: Ranks, *, timeout_seconds: float = 1800.0) -> Iterator[Ranks]:
    """`ranks`, joined with the others until the block is left; one rank alone joins nothing.

    Args:
        ranks: of this process, as `ranks_of` tells them.
        timeout_seconds: how long a rank waits for the others; longer than what one of them does alone.

    Raises:
        RanksError: the others cannot be reached, or this build of torch cannot reach them.
    """
    if ranks.world == 1:
        yield ranks
        return
    on_cuda = ranks.backend == "nccl"
    if on_cuda:
        torch.cuda.set_device(ranks.device)
    try:
        dist.init_process_group(
            ranks.backend,
            init_method="env://",  # torchrun's agent answers at MASTER_ADDR and MASTER_PORT
            timeout=timedelta(seconds=timeout_seconds),
            rank=ranks.rank,
            world_size=ranks.world,
            device_id=ranks.device if on_cuda else None,
        )
    except (RuntimeError, ValueError) as error:
        raise RanksError(
            f"rank {ranks.rank} of {ranks.world} could not meet the others by {ranks.backend} "
            f"({_first_line(error)}); start all of them with torchrun, and see that every machine reaches "
            "the one of --rdzv_endpoint"
        ) from error
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def check_agreement(ranks: Ranks, archs: Sequence[Arch], network: nn.Module, *, step: int) -> None:
    """Nothing, if all ranks visit the same `archs`, with the same weights of `network`, at `step`.

    To be called before the first step of a process and every `STEPS_BETWEEN_CHECKS` steps.

    Raises:
        RanksError: they do not; on every rank.
    """
    if ranks.world == 1:
        return
    keys = hashlib.sha256(" ".join(arch.key for arch in archs).encode()).digest()
    visited = int.from_bytes(keys[:8], "big", signed=True)
    mine = torch.stack([torch.tensor(visited, device=ranks.device), _fingerprint(network, ranks.device)])
    told = ranks.gather(mine).tolist()
    for column, what, cure in (
        (0, "visit other subnets", "a strategy may draw from the rng that it is given alone"),
        (1, "have other weights", "what a step does may depend on the ranks' common gradients alone"),
    ):
        others = [str(rank) for rank, said in enumerate(told) if said[column] != told[0][column]]
        if others:
            raise RanksError(
                f"at step {step} ranks {', '.join(others)} {what} than rank 0; start all with the same "
                f"configuration, code and data, and note that {cure}"
            )


def _fingerprint(network: nn.Module, device: torch.device) -> Tensor:
    """An integer that tells the weights apart, to the last bit, whatever order it is added up in."""
    found = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters(), start=1):
            bits = parameter.detach().float().contiguous().view(-1).view(torch.int32).long()
            places = torch.arange(1, len(bits) + 1, device=device)  # so that channels in another order show
            found += (bits * places).sum() * number
    return found


def _backend(device: torch.device) -> Literal["gloo", "nccl"]:
    return "nccl" if device.type == "cuda" else "gloo"


def _number(environment: Mapping[str, str], name: str) -> int:
    given = environment.get(name, "")
    if not given.isdecimal():
        told = f"is {given!r}" if given else "is not set"
        raise RanksError(
            f"the environment variable {name} {told}, where a number is needed; start many processes with "
            "torchrun, or one without RANK and WORLD_SIZE"
        )
    return int(given)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
