"""What the stages of one run share: data, space, supernet, device; each made when first needed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from nestling.config import ConfigError, RunConfig
from nestling.data import Data, EvalImages, load_data
from nestling.data.splits import Few
from nestling.models.building import build_shapes
from nestling.models.compiling import Call
from nestling.models.cost import cost
from nestling.models.families import Family, family
from nestling.models.supernet import Supernet, capped
from nestling.pipeline.calling import rounded_calls
from nestling.pipeline.checking import check_space
from nestling.pipeline.floats import FloatNetworks
from nestling.pipeline.teaching import TEACHERS, begin_with_teachers, teacher_files
from nestling.profile import Device, MeasurementStore, open_device
from nestling.run import Run, RunError
from nestling.space import Arch, SearchSpace, Value, load_space, save_space
from nestling.train.checkpoint import Checkpoint, CheckpointError, load_newest
from nestling.train.distributed import ALONE, Ranks
from nestling.train.loop import restore
from nestling.train.strategies import Strategy, make_strategy
from nestling.train.teachers import SoftLabels, load_teacher

EVALUATION_BATCH = 256
CHECKED_IMAGES = 16
OFFERED = "precisions.json"
"""The run's file of the precisions that its device can use, and of those that were dropped."""


class Workbench:
    """One run, opened for work.

    Args:
        run: the run's folder.
        ranks: which train it together; the first alone writes.
        config: what the run is asked for now, where that is not yet what it holds.

    Attributes:
        floats: the networks of the last candidates.

    Raises:
        ConfigError: the run's configuration is damaged.
    """

    def __init__(self, run: Run, *, ranks: Ranks = ALONE, config: RunConfig | None = None) -> None:
        self.run = run
        self.ranks = ranks
        self.config = run.config() if config is None else config
        self.floats = FloatNetworks()
        self._macs: dict[Arch, int] = {}
        self._teachers_macs: dict[int, int] = {}

    @cached_property
    def data(self) -> Data:
        """The images, kept as large as the space's largest resolution where the configuration gives no size.

        Raises:
            DataError: they cannot be had, or cannot be split as asked.
            RunError: they are no longer those that the run began with.
        """
        config = self.config.data
        sides = next((c.values for c in self._bare_space.choices if c.name == "resolution"), ())
        if config.size is None and sides:
            config = config.model_copy(update={"size": max(int(side) for side in sides)})
        begun = self.run.read_json("data.json")
        # runs of before it was written down had the first ones
        few: Few = "drawn" if begun is None else begun.get("few", "first")
        data = load_data(config, seed=self.config.seed, few=few)
        if begun is not None and begun["fingerprint"] != data.fingerprint:
            raise RunError(
                f"the images of {config.source} are no longer those that {self.run.folder} began with: "
                "its test images may now be among those it learnt from; name the right ones with "
                "--set data.source=..., or begin a new run"
            )
        return data

    @cached_property
    def _bare_space(self) -> SearchSpace:
        for saved in (self.run.space_file, self.run.given_space_file):
            if saved.exists():
                return load_space(saved)
        return load_space(Path(self.config.space))

    @property
    def given_space(self) -> SearchSpace:
        """The search space as its file has it, before the data and the device have their say."""
        return self._bare_space

    @cached_property
    def space(self) -> SearchSpace:
        """The search space, with the number of classes that the data has, and its size of images if need be.

        Raises:
            SpaceError: the space lends wrongly.
        """
        space = self.fitted(self._bare_space)
        if not self.run.space_file.exists():
            check_space(space, self.family)
            save_space(self._bare_space, self.run.given_space_file)
            save_space(space, self.run.space_file)
        return space

    def fitted(self, space: SearchSpace) -> SearchSpace:
        """`space` with what comes from data and device.

        `classes`, and `resolution` where it has none; and without the precisions that the device cannot use,
        as found when the run began. Choices whose layers `quant.keep` keeps have the precision of that.
        """
        constants: dict[str, Value] = {"classes": len(self.data.classes)}
        if "resolution" not in space.by_name:
            constants["resolution"] = self.data.size
        settled = self.run.read_json(OFFERED) or {}
        offered = settled.get("offered", {})
        constants |= {name: kept for name, kept in settled.get("kept", {}).items() if name in space.by_name}
        cut = {name: values for name, values in offered.items() if name in space.by_name}
        return space.only(cut).with_constants(constants) if cut else space.with_constants(constants)

    @cached_property
    def family(self) -> Family:
        """How the space's networks are built."""
        return family(self._bare_space.family)

    @cached_property
    def torch_device(self) -> torch.device:
        """Where networks are trained and recalibrated.

        Raises:
            ConfigError: CUDA is asked for and there is none.
        """
        return self.ranks.device if self.ranks.world > 1 else find_device(self.config.torch_device)

    def macs(self, arch: Arch) -> int:
        """The multiply-accumulates of one image through `arch`, at its resolution; counted once."""
        if arch not in self._macs:
            network = build_shapes(self.family.build, arch)
            self._macs[arch] = cost(network, self.resolution(arch)).macs
        return self._macs[arch]

    @cached_property
    def strategy(self) -> Strategy:
        """How the supernet is trained.

        Raises:
            ValueError: a subnet that the configuration names is not of the space.
        """
        return make_strategy(self.config.train, space=self.space, cost=self.macs, seed=self.config.seed)

    @cached_property
    def teachers(self) -> SoftLabels | None:
        """The soft labels of the networks that the configuration names; None where it names none.

        Raises:
            ValueError, FileNotFoundError: a teacher that cannot be had, or that knows other classes.
            RunError: a file of weights has changed since the run's training began.
        """
        names, classes = self.config.train.teachers, len(self.data.classes)
        if not names:
            return None
        teachers = [load_teacher(name, classes=classes) for name in names]
        if self.ranks.first:
            begin_with_teachers(teacher_files(names), self.run.folder / TEACHERS)
        return SoftLabels(teachers, mean=self.data.mean, std=self.data.std).to(self.torch_device)

    def teachers_macs_at(self, side: int) -> int:
        """The multiply-accumulates of one image of `side` pixels through all teachers; counted once.

        Where none are named they are those of a frozen largest network.
        """
        if self.teachers is None:
            return self.macs(capped(self.space.largest, side))
        if side not in self._teachers_macs:
            self._teachers_macs[side] = macs_of(self.teachers, side)
        return self._teachers_macs[side]

    @property
    def checkpoints(self) -> Path:
        """The folder of the training's checkpoints and records."""
        return self.run.folder / "training"

    def new_supernet(self, *, pretrained: bool = True) -> Supernet:
        """The supernet before training: its weights depend on the run's seed alone, or are pretrained ones.

        With `pretrained` false they never are: where others are loaded next, there need be none.

        Raises:
            ConfigError: the space asks for pretrained weights that its family does not have, or that cannot
                be read.
        """
        torch.manual_seed(self.config.seed)
        config, family, largest = self.config.train, self.family, self.space.largest
        given = None
        if pretrained and largest.get("pretrained", False):
            if family.pretrained is None:
                raise ConfigError(
                    f"pretrained is {largest['pretrained']!r}, but the family {self.space.family!r} knows no "
                    "pretrained weights; the families timm and convert do"
                )
            try:
                given = family.pretrained(largest)
            except Exception as error:  # a hub, a file, a network of the user's: all of it can fail
                raise ConfigError(
                    f"the weights that pretrained = {largest['pretrained']!r} names cannot be had: "
                    f"{type(error).__name__}: {error}"
                ) from error
        supernet = Supernet(
            self.space,
            family.build,
            layout=family.layout,
            largest=given,
            dropout=config.dropout,
            drop_path=config.drop_path,
            calling=self.calling,
        )
        return supernet.to(self.torch_device)

    @cached_property
    def calling(self) -> Callable[[Arch], Call | None] | None:
        """How subnets are called in training, where they train in their precisions (`train.quantize`).

        Raises:
            ConfigError: no arch of the space has layers in integers.
            ValueError: an unknown precision.
        """
        if not self.config.train.quantize:
            return None
        quant = self.config.quant
        return rounded_calls(self.family, self.space, keep=quant.keep, weights=quant.weights)

    @cached_property
    def supernet(self) -> Supernet:
        """The trained supernet.

        Raises:
            RunError: training is not finished, or its last checkpoint is damaged: weights from before the end
                are others than those that candidates were evaluated with.
        """
        self.check_trained()
        checkpoint = self.ranks.from_first(self._last_checkpoint)
        if checkpoint is None:
            raise RunError(f"{self.checkpoints} holds no checkpoint")
        supernet = self.new_supernet(pretrained=False)
        restore(supernet, checkpoint)
        return supernet.eval()

    def _last_checkpoint(self) -> Checkpoint | None:
        try:
            return load_newest(self.checkpoints)
        except CheckpointError as error:
            raise RunError(
                f"{error}; bring that file back, or remove {self.run.folder / 'training.json'} and run "
                f"`nestling train CONFIG --output {self.run.folder}`, which finishes from the one before"
            ) from None

    def check_trained(self) -> None:
        """Refuses a run whose training is not finished.

        Raises:
            RunError: it is not.
        """
        if self.ranks.from_first(lambda: self.run.read_json("training.json")) is None:
            raise RunError(f"the training of {self.run.folder} is not finished; `nestling train` finishes it")

    @cached_property
    def device(self) -> Device:
        """The device that measures.

        Raises:
            DeviceError: there is no such device or runtime, or it does not answer.
        """
        profile = self.config.profile
        return open_device(
            profile.device,
            seconds=profile.seconds,
            tolerance=profile.tolerance,
            timeout_seconds=profile.timeout_seconds,
            store=MeasurementStore(self.run.folder / "measurements.db"),
            leases=self.run.folder / "leases.db",
        )

    @contextmanager
    def timed(self, stage: str, *, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
        """Adds the seconds spent inside to the run's account, also where the stage is interrupted."""
        began = clock()
        try:
            yield
        finally:
            seconds = self.run.read_json("seconds.json") or {}
            seconds[stage] = seconds.get(stage, 0.0) + clock() - began
            self.run.write_json("seconds.json", seconds)

    def close(self) -> None:
        """Ends the device's worker where one was started."""
        if "device" in vars(self):
            self.device.close()

    def recalibration_images(self, resolution: int) -> Iterator[Tensor]:
        """Training images without augmentation, in batches (N, 3, R, R), on the training device."""
        images = self._recalibration
        size = even_batch(len(images), at_most=EVALUATION_BATCH)
        for batch in images.at(resolution, batch_size=size, device=self.torch_device):
            yield batch.images

    def calibration_images(self, resolution: int) -> Iterator[Tensor]:
        """Training images without augmentation for ranges, in batches (N, 3, R, R), on the CPU."""
        for batch in self._calibration.at(resolution, batch_size=EVALUATION_BATCH):
            yield batch.images

    @cached_property
    def checked_images(self) -> EvalImages:
        """The search images by which files are compared with PyTorch."""
        return self.data.search.take(min(CHECKED_IMAGES, len(self.data.search)))

    @cached_property
    def _recalibration(self) -> EvalImages:
        train = self.data.train
        return train.calibration(min(self.config.search.recalibration_images, len(train)))

    @cached_property
    def _calibration(self) -> EvalImages:
        train = self.data.train
        return train.calibration(min(self.config.search.calibration_images, len(train)))

    def candidate_path(self, arch: Arch) -> Path:
        """Where the file of the candidate `arch` lies during the search."""
        return self.run.folder / "candidates" / f"{arch.key}.onnx"

    def resolution(self, arch: Arch) -> int:
        """The side of the images that `arch` reads, in pixels."""
        return arch.integer("resolution")


def macs_of(teachers: SoftLabels, side: int) -> int:
    """The multiply-accumulates of one image of `side` pixels through all of `teachers`."""
    return sum(cost(teacher.network, teacher.side or side).macs for teacher in teachers.teachers)


def find_device(asked: str) -> torch.device:
    """The device called `asked`; of `auto`, CUDA where there is one.

    Raises:
        ConfigError: CUDA is asked for and there is none, or torch knows no such device.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"torch_device is {asked!r}, but torch sees no CUDA device; use auto or cpu")
    try:
        return torch.device(asked)
    except RuntimeError:
        raise ConfigError(
            f"torch_device is {asked!r}, which torch does not know; use auto, cpu or cuda"
        ) from None


def even_batch(count: int, *, at_most: int) -> int:
    """The batch size, at most `at_most`, that cuts `count` images into batches of nearly the same size.

    A last batch of one image has no variance to normalize by, and a small one would count like the others.
    """
    return math.ceil(count / math.ceil(count / at_most))
