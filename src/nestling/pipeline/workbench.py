"""What the stages of one run share: data, space, supernet, device; each made when first needed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from nestling.config import ConfigError
from nestling.data import Data, load_data
from nestling.models.families import Family, family
from nestling.models.supernet import Supernet
from nestling.profile import Device, MeasurementStore, connect
from nestling.run import Run, RunError
from nestling.space import Arch, SearchSpace, load_space, save_space
from nestling.train.checkpoint import load_checkpoint
from nestling.train.loop import restore

EVALUATION_BATCH = 256


class Workbench:
    """One run, opened for work.

    Args:
        run: the run's folder.

    Raises:
        ConfigError: the run's configuration is damaged.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config = run.config()

    @cached_property
    def data(self) -> Data:
        """The images.

        Raises:
            DataError: they cannot be had, or cannot be split as asked.
        """
        return load_data(self.config.data, seed=self.config.seed)

    @cached_property
    def space(self) -> SearchSpace:
        """The search space, with the number of classes that the data has."""
        if self.run.space_file.exists():
            return load_space(self.run.space_file)
        space = load_space(Path(self.config.space)).with_constants({"classes": len(self.data.classes)})
        save_space(space, self.run.space_file)
        return space

    @cached_property
    def family(self) -> Family:
        """How the space's networks are built."""
        return family(self.space.family)

    @cached_property
    def torch_device(self) -> torch.device:
        """Where networks are trained and recalibrated.

        Raises:
            ConfigError: CUDA is asked for and there is none.
        """
        asked = self.config.torch_device
        if asked == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if asked.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"torch_device is {asked!r}, but torch sees no CUDA device; use auto or cpu")
        return torch.device(asked)

    @property
    def checkpoints(self) -> Path:
        """The folder of the training's checkpoints and records."""
        return self.run.folder / "training"

    def new_supernet(self) -> Supernet:
        """The untrained supernet; its initial weights depend on the run's seed alone."""
        torch.manual_seed(self.config.seed)
        config = self.config.train
        supernet = Supernet(self.space, self.family.build, dropout=config.dropout, drop_path=config.drop_path)
        return supernet.to(self.torch_device)

    @cached_property
    def supernet(self) -> Supernet:
        """The trained supernet.

        Raises:
            RunError: training is not finished.
        """
        if self.run.read_json("training.json") is None:
            raise RunError(f"the training of {self.run.folder} is not finished; `nestling train` finishes it")
        checkpoint = load_checkpoint(self.checkpoints)
        if checkpoint is None:
            raise RunError(f"{self.checkpoints} holds no checkpoint")
        supernet = self.new_supernet()
        restore(supernet, checkpoint)
        return supernet.eval()

    @cached_property
    def device(self) -> Device:
        """The device that measures.

        Raises:
            DeviceError: there is no such device or runtime, or it does not answer.
        """
        profile = self.config.profile
        return connect(
            profile.device,
            seconds=profile.seconds,
            tolerance=profile.tolerance,
            timeout_seconds=profile.timeout_seconds,
            store=MeasurementStore(self.run.folder / "measurements.db"),
        )

    def close(self) -> None:
        """Ends the device's worker where one was started."""
        if "device" in vars(self):
            self.device.close()

    def recalibration_images(self, resolution: int) -> Iterator[Tensor]:
        """Training images without augmentation, in batches (N, 3, R, R), on the training device."""
        images = self.data.train.calibration(self.config.search.recalibration_images)
        for batch in images.at(resolution, batch_size=EVALUATION_BATCH, device=self.torch_device):
            yield batch.images

    def calibration_images(self, resolution: int) -> Iterator[Tensor]:
        """Training images without augmentation for ranges, in batches (N, 3, R, R), on the CPU."""
        images = self.data.train.calibration(self.config.search.calibration_images)
        for batch in images.at(resolution, batch_size=EVALUATION_BATCH):
            yield batch.images

    def resolution(self, arch: Arch) -> int:
        """The side of the images that `arch` reads, in pixels."""
        return arch.integer("resolution") if "resolution" in arch else self.data.size
