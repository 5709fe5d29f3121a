"""Training one network of a finished run further, or anew, and handing it over beside the exported ones.

It lies in `exports/KEY-tuned-HASH` (`KEY-scratch-HASH`, `KEY-qat-HASH`), HASH being that of the arch and of
all settings: the same command finds its own checkpoints, and another one spoils nothing. `model_before.onnx`
there is the same network with the supernet's weights; what is said of before and after was measured on these
two files.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nestling.config import ConfigError, TrainConfig
from nestling.export import load_onnx, save_onnx, with_metadata
from nestling.file_keys import file_key
from nestling.pipeline.alone import alone_with, new_weights, recipe_alone, train_network
from nestling.pipeline.candidate import write_candidate
from nestling.pipeline.listening import Listener
from nestling.pipeline.measuring import score
from nestling.pipeline.members import hand_over
from nestling.pipeline.policies import is_precision
from nestling.pipeline.quantized_training import Method, defaults, record_folders, train_quantized
from nestling.pipeline.teaching import TEACHERS, begin_with_teachers, check_teachers, teacher_files
from nestling.pipeline.verifying import verify_candidate
from nestling.pipeline.workbench import Workbench, macs_of
from nestling.run import write_atomically
from nestling.space import Arch
from nestling.train.evaluate import recalibrate
from nestling.train.strategies import Alone
from nestling.train.strategies.accounting import BACKWARD
from nestling.train.teachers import SoftLabels, Teacher, load_teacher

CHECKPOINTS = "finetuning"
"""The folder of checkpoints of what is not finished."""
LARGEST, PARENT, NONE = "largest", "parent", "none"
EPOCHS = 25.0
"""Once-for-all's authors train a searched subnet on for 25 epochs, or 75 (arXiv 1908.09791)."""
LR_PART = 0.1
"""Of the run's learning rate. Once-for-all's recipe for this was not published; its last phases, which go on
from a trained network too, have 0.03 of the first phase's over 25 epochs and 0.09 over 120."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How one network is trained.

    Attributes:
        from_scratch: whether it begins as the supernet began, and learns by the run's whole recipe; else it
            goes on from the supernet's weights.
        epochs: of the run's training images.
        lr: the highest learning rate.
        teacher: `largest` (the supernet's largest network), `parent` (this network in floats, as it is),
            `none`, or timm's name of a model and `=PATH`.
        teacher_weight: of the loss against the teacher's soft labels.
        labels_weight: of the loss against the labels.
        qat: how it is trained in its precisions, see `nestling.pipeline.quantized_training`; None: in floats.
        constant_tail: whether its learning rate falls as a sandwich's may, with a constant tail.
    """

    from_scratch: bool
    epochs: float
    lr: float
    teacher: str
    teacher_weight: float
    labels_weight: float
    qat: Method | None = None
    constant_tail: bool = False


def tuning(
    bench: Workbench,
    arch: Arch,
    *,
    from_scratch: bool = False,
    epochs: float | None = None,
    lr: float | None = None,
    teacher: str | None = None,
    teacher_weight: float | None = None,
    labels_weight: float | None = None,
    qat: Method | None = None,
) -> Tuning:
    """How `arch` is trained, what is None being as it mostly should be.

    That is: 25 epochs, and a tenth of the run's learning rate; from scratch, the run's own; in its
    precisions, see `nestling.pipeline.quantized_training.defaults`. The largest network teaches all others,
    and a network that is trained in its precisions learns from itself in floats; labels and teacher weigh 1
    each, as in once-for-all (arXiv 1908.09791).

    Raises:
        ConfigError: a number that cannot be used, nothing to learn from, or no layers in integers.
    """
    own = bench.config.train
    if qat is not None and from_scratch:
        raise ConfigError("from scratch and qat are both asked for; few bits begin from a trained network")
    itself = not from_scratch and qat is None and _is_largest(bench, arch)
    who = teacher or (PARENT if qat is not None else NONE if itself else LARGEST)
    if who == PARENT and qat is None:
        raise ConfigError("teacher is 'parent', which is for qat: without it a network has none but itself")
    usual_epochs, lr_part = (EPOCHS, LR_PART) if qat is None else defaults(bench, arch)
    if who == NONE and teacher_weight is not None:
        raise ConfigError(f"teacher_weight is {teacher_weight:g}, but there is no teacher; leave it out")
    asked = Tuning(
        from_scratch=from_scratch,
        epochs=(own.epochs if from_scratch else usual_epochs) if epochs is None else epochs,
        lr=(own.lr if from_scratch else lr_part * own.lr) if lr is None else lr,
        teacher=who,
        teacher_weight=(0.0 if who == NONE else 1.0) if teacher_weight is None else teacher_weight,
        labels_weight=1.0 if labels_weight is None else labels_weight,
        qat=qat,
        constant_tail=from_scratch and alone_with(own).constant_tail,
    )
    for name in ("epochs", "lr", *(() if who == NONE else ("teacher_weight",))):
        value = asdict(asked)[name]
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} is {value:g}; it must be above 0")
    if not 0 <= asked.labels_weight < math.inf:
        raise ConfigError(f"labels_weight is {asked.labels_weight:g}; it must be 0 or above")
    if asked.labels_weight == 0 and (who == NONE or (who == LARGEST and itself)):
        raise ConfigError(
            f"labels_weight is 0 and the teacher of {arch.key} is "
            + ("none" if who == NONE else "that network itself")
            + ", so there is nothing to learn; give labels a weight, or another teacher"
        )
    return asked


def finetuned_name(arch: Arch, asked: Tuning) -> str:
    """The name under which `arch`, trained as asked, is handed over; other settings give another name."""
    told = json.dumps([arch.to_json(), _settings(asked)])
    how = "qat" if asked.qat is not None else "scratch" if asked.from_scratch else "tuned"
    return f"{arch.key}-{how}-{hashlib.sha256(told.encode()).hexdigest()[:6]}"


def _settings(asked: Tuning) -> dict[str, Any]:
    """What was asked, by name; of what came later only what is set: names must stay as they were."""
    came_later = {"qat": None, "constant_tail": False}
    return {name: value for name, value in asdict(asked).items() if (name, value) not in came_later.items()}


def finetune(bench: Workbench, arch: Arch, asked: Tuning, *, listener: Listener) -> dict[str, Any]:
    """The figures of `arch`, trained as asked and handed over as members of the front are.

    Continues where it was stopped; what is finished is not done again. Beside a member's figures they hold
    `finetuning`: what was asked, what it cost, and the accuracy before and after, on the search images, by
    which `arch` may have been chosen, and on the test images. Precisions are those of `arch`: its ranges are
    observed anew, after training in floats, or learned with `asked.qat`.

    Raises:
        RunError: the supernet's training is not finished, or the file of the teacher's weights has changed
            since this one's began.
        ConfigError: the teacher cannot be had, or knows other classes.
        TrainingStopped: the loss runs away; try a smaller learning rate.
        EvaluationFailed: a file does not compute what PyTorch computes.
    """
    _ = bench.supernet  # an unfinished training is told before anything else
    name = finetuned_name(arch, asked)
    checkpoints, folder = bench.run.folder / CHECKPOINTS / name, bench.run.exports / name
    card = f"{bench.run.exports.name}/{name}/card.json"
    known = bench.run.read_json(card)
    model = folder / "model.onnx"
    if known is not None and model.exists() and file_key(model) == known["sha256"]:
        if "=" not in asked.teacher or Path(asked.teacher.partition("=")[2]).exists():
            learnt_from = known["finetuning"].get("teacher_files", {})
            check_teachers(teacher_files([asked.teacher]), learnt_from, folder=folder)
        listener.note(f"{name} is finished already")
    else:
        teachers = _teachers(bench, arch, asked)
        begin_with_teachers(teacher_files([asked.teacher]), checkpoints / TEACHERS)
        with bench.timed("finetune"):
            _finetune(bench, arch, asked, teachers, name=name, listener=listener)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return dict(bench.run.read_json(card))


def _finetune(
    bench: Workbench,
    arch: Arch,
    asked: Tuning,
    teachers: SoftLabels | None,
    *,
    name: str,
    listener: Listener,
) -> None:
    listener.stage(f"score {arch.key} as it is")
    folder, checkpoints = bench.run.exports / name, bench.run.folder / CHECKPOINTS / name
    # a network that cannot be handed over is refused here, before it is trained
    as_it_is = write_candidate(bench, arch, folder / "model_before.onnx")
    before = _accuracies(bench, as_it_is.path, arch)

    listener.stage(
        "train from scratch"
        if asked.from_scratch
        else "fine-tune"
        if asked.qat is None
        else f"train in few bits ({asked.qat})"
    )
    steps = max(1, round(asked.epochs * bench.data.train.steps_per_epoch(bench.config.data.batch_size)))
    macs = (
        steps
        * bench.config.data.batch_size
        * (BACKWARD * bench.macs(arch) + (macs_of(teachers, bench.data.size) if teachers else 0))
    )
    listener.note(f"{name}: {steps:,} steps, {macs:.3g} MACs")
    strategy = Alone(
        teacher=asked.teacher_weight, labels=asked.labels_weight, constant_tail=asked.constant_tail
    )
    told = {"nestling.finetuned": json.dumps(_settings(asked))}
    if asked.qat is not None:
        candidate, spent = train_quantized(
            bench,
            as_it_is,
            folder / "model.onnx",
            method=asked.qat,
            strategy=strategy,
            config=_recipe(bench, arch, asked),
            teachers=teachers,
            folder=checkpoints,
            listener=listener,
            told=told,
        )
    else:
        network = train_network(
            bench,
            arch,
            begins=new_weights(bench, arch) if asked.from_scratch else bench.supernet.materialize(arch),
            strategy=strategy,
            config=_recipe(bench, arch, asked),
            teachers=teachers,
            folder=checkpoints,
            listener=listener,
        )
        candidate = write_candidate(bench, arch, folder / "model.onnx", network=network)
        save_onnx(with_metadata(load_onnx(candidate.path), told), candidate.path)
        candidate = replace(candidate, worst_error=verify_candidate(bench, candidate))
        spent = json.loads((checkpoints / "training.json").read_text())["spent"]

    listener.stage("export")
    after = _accuracies(bench, candidate.path, arch)
    records = [(part / "records.jsonl").read_bytes() for part in record_folders(checkpoints)]
    write_atomically(folder / "training.jsonl", b"".join(records))
    told_of = {"spent": spent, "before": before, "after": after}
    if (checkpoints / TEACHERS).exists():
        told_of["teacher_files"] = json.loads((checkpoints / TEACHERS).read_text(encoding="utf-8"))
    more = {"finetuning": {**_settings(asked), **told_of}}
    # training in few bits leaves the network in floats, which the sibling holds, as it was
    sibling = told if asked.qat is None else None
    hand_over(bench, candidate, search_top1=after["search_top1"], told=sibling, more=more)


def _recipe(bench: Workbench, arch: Arch, asked: Tuning) -> TrainConfig:
    """The run's recipe with what is asked; for a network that goes on, without what is for a beginning."""
    pretrained = bool(bench.space.largest.get("pretrained", False))
    recipe = recipe_alone(
        bench.config.train,
        epochs=asked.epochs,
        given=pretrained or not asked.from_scratch,
        largest=_is_largest(bench, arch),
    )
    changed: dict[str, Any] = {"lr": asked.lr}
    if not asked.from_scratch:
        changed |= {"warmup_epochs": 0.0, "curriculum": "none"}
    return recipe.model_copy(update=changed)


def _teachers(bench: Workbench, arch: Arch, asked: Tuning) -> SoftLabels | None:
    """The teacher's soft labels; a network of the run is frozen, with its statistics over training images."""
    if asked.teacher == NONE:
        return None
    if asked.teacher in (LARGEST, PARENT):
        frozen = bench.space.largest if asked.teacher == LARGEST else arch
        side = bench.resolution(frozen)
        network = recalibrate(bench.supernet.materialize(frozen), bench.recalibration_images(side))
        teacher = Teacher(network, side, bench.data.mean, bench.data.std)
    else:
        try:
            teacher = load_teacher(asked.teacher, classes=len(bench.data.classes))
        except (ValueError, OSError) as error:
            raise ConfigError(f"teacher is {asked.teacher!r}: {error}") from error
    return SoftLabels([teacher], mean=bench.data.mean, std=bench.data.std).to(bench.torch_device)


def _accuracies(bench: Workbench, path: Path, arch: Arch) -> dict[str, Any]:
    """What the file at `path` gets right of the search images and of the test images."""
    told: dict[str, Any] = {"file": path.name, "sha256": file_key(path)}
    for split, images in (("search", bench.data.search), ("test", bench.data.test())):
        accuracy = score(bench.device, path, images, resolution=bench.resolution(arch))
        told |= {
            f"{split}_correct": accuracy.correct,
            f"{split}_total": accuracy.total,
            f"{split}_top1": accuracy.top1,
            f"{split}_top1_interval": list(accuracy.interval),
        }
    return told


def _is_largest(bench: Workbench, arch: Mapping[str, Any]) -> bool:
    """Whether `arch` is the space's largest network, in whatever precision."""
    largest = bench.space.largest.items()
    return all(arch[name] == value for name, value in largest if not is_precision(name))
