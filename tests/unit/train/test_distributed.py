from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from nestling.data import Batch
from nestling.train.distributed import (
    ALONE,
    Ranks,
    RanksError,
    check_agreement,
    joined,
    ranks_of,
)
from nestling.train.gradients import average_gradients
from nestling.train.joint_norm import joint_statistics
from nestling.train.sharing import PartOfStream, rows_of

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


def test_without_torchrun_there_is_one_rank() -> None:
    assert ranks_of({"PATH": "/bin"}) == ALONE
    assert ranks_of({}, device="cuda:1") == Ranks(0, 1, torch.device("cuda:1"), "nccl")


def test_torchruns_variables_tell_the_rank() -> None:
    ranks = ranks_of(TORCHRUN)
    assert ranks == Ranks(5, 8, torch.device("cpu"), "gloo")
    assert not ranks.first


def test_each_rank_has_the_gpu_of_its_number_on_its_machine() -> None:
    assert ranks_of(TORCHRUN, device="cuda", gpus=4) == Ranks(5, 8, torch.device("cuda", 1), "nccl")


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"RANK": ""}, "cpu", "RANK is not set"),
        ({"WORLD_SIZE": "many"}, "cpu", "WORLD_SIZE is 'many', where a number is needed"),
        ({"RANK": "8"}, "cpu", "rank 8 of 8 ranks; ranks are counted from 0"),
        ({"LOCAL_RANK": ""}, "cuda", "LOCAL_RANK is not set"),
        ({"LOCAL_RANK": "2"}, "cuda", "number 2 on its machine, which has 2 GPUs.*nproc_per_node=2 at most"),
        ({}, "cuda:1", "torch_device is cuda:1, but each of 8 ranks has its own GPU; use cuda"),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused(
    changes: dict[str, str], device: str, message: str
) -> None:
    with pytest.raises(RanksError, match=message):
        ranks_of(TORCHRUN | changes, device=device, gpus=2)


def test_alone_nothing_is_started_copied_or_sent() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = gradient = torch.full((3,), 2.0)
    losses, values = torch.ones(2), torch.arange(3)
    with joined(ALONE) as ranks, joint_statistics(ranks):
        assert not torch.distributed.is_initialized()
        assert average_gradients(ranks, [weight], losses, images=4) is losses
        assert weight.grad is gradient
        assert gradient.tolist() == [2.0, 2.0, 2.0]
        assert ranks.sum(values) is values
        assert ranks.gather(values).tolist() == [[0, 1, 2]]
        assert ranks.from_first(lambda: values) is values
        check_agreement(ranks, [], nn.Linear(2, 2), step=0)
        ranks.share(nn.Linear(2, 2))
        ranks.wait()


def test_ranks_that_nobody_answers_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RanksError, match=r"rank 1 of 2 could not meet the others by gloo.*torchrun"):
        joined(Ranks(1, 2), timeout_seconds=1).__enter__()


@pytest.mark.parametrize(("count", "world"), [(8, 1), (8, 2), (7, 2), (11, 4), (3, 3)])
def test_every_image_is_one_ranks(count: int, world: int) -> None:
    parts = [list(range(count))[rows_of(count, Ranks(rank, world))] for rank in range(world)]
    assert list(itertools.chain(*parts)) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_batch_with_fewer_images_than_ranks_is_refused() -> None:
    with pytest.raises(RanksError, match="a batch of 3 images for 4 ranks; use a larger batch_size"):
        rows_of(3, Ranks(0, 4))


@dataclass(frozen=True)
class Numbers:
    """Batches that hold their step's number and the places in the batch."""

    def batches(
        self, *, start_step: int, batch_size: int, augment: str, device: torch.device | str
    ) -> Iterator[Batch]:
        assert augment == "some"
        for step in itertools.count(start_step):
            labels = torch.arange(batch_size, device=device) + 100 * step
            yield Batch(labels.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2), labels)

    def steps_per_epoch(self, batch_size: int) -> int:
        return 100 // batch_size


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ranks_parts_put_together_are_the_batch_of_one(world: int) -> None:
    parts = [PartOfStream(Numbers(), Ranks(rank, world)) for rank in range(world)]
    streams = [p.batches(start_step=4, batch_size=10, augment="some", device="cpu") for p in parts]
    whole = Numbers().batches(start_step=4, batch_size=10, augment="some", device="cpu")
    for _ in range(2):
        batches, wanted = [next(stream) for stream in streams], next(whole)
        assert torch.equal(torch.cat([batch.labels for batch in batches]), wanted.labels)
        assert torch.equal(torch.cat([batch.images for batch in batches]), wanted.images)
    assert {part.steps_per_epoch(10) for part in parts} == {10}
