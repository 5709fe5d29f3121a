"""RunConfig: everything that a run is told, validated. An unknown key is refused, the nearest one named."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, its value and what would do."""


class Part(BaseModel):
    """A frozen piece of configuration that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(Part):
    """Where images come from and how they are split. The search split is cut off the training split."""

    source: str = "digits"
    """`digits`, a folder of class folders, a folder or file of Parquet, or a dataset's name on the hub."""
    image_column: str | None = None
    """The column with images; found by its type where it is not given (datasets only)."""
    label_column: str = "label"
    train_split: str = "train"
    test_split: str | None = "test"
    """The split that is read once, for the final table; where there is none, `test_fraction` is cut off."""
    test_fraction: Fraction = 0.2
    size: Annotated[int, Field(ge=8)] | None = None
    """Side in pixels at which images are kept: in memory up to 96, above that read from disk as needed."""
    train_images: Count | None = None
    """Use only this many training images, spread evenly over the classes."""
    search_images: Count = 1000
    """Images taken off the training split to score candidates and to calibrate."""
    test_images: Count | None = None
    """Read only this many test images, as many of one class as of another."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    augment: Literal["none", "shift", "standard", "strong"] = "standard"
    """`shift` moves the image a little; `standard` also mirrors it; `strong` adds TrivialAugment (arXiv
    2103.10158) and erasing."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes for images that are read from disk."""


class TrainConfig(Part):
    """How the supernet is trained.

    A key that says which subnets learn, or from whom, must be one that the strategy reads; at its default it
    says nothing. What says when and how they join (`switch`, `ramp_epochs`, `sort_channels`,
    `constant_tail`) may stand in a file for other strategies, so that one file serves several.
    """

    strategy: Literal[
        "delayed-shrinking",
        "sandwich",
        "progressive-shrinking",
        "sorted-net",
        "fixed-list",
        "attentive",
        "shifting",
        "single-path",
        "alone",
    ] = "delayed-shrinking"
    epochs: Annotated[float, Field(gt=0)] = 30.0
    optimizer: Literal["sgd", "rmsprop", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 3e-5
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    """Less than `epochs`; in a run that is no longer than the default, half the run in its place."""
    label_smoothing: Fraction = 0.1
    dropout: Fraction = 0.0
    """Before the classifier, for the largest network only."""
    drop_path: Fraction = 0.0
    """Stochastic depth of the last block (earlier blocks less), for the largest network only."""
    zero_last_norms: bool = False
    """Whether the last batch normalization of each residual branch begins at 0, as BigNAS has it."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    clip_value: Annotated[float, Field(gt=0)] | None = None
    """The largest that each number of a gradient may be, as AttentiveNAS and AlphaNet have it with 1.0."""
    random_subnets: Annotated[int, Field(ge=0)] = 2
    """Subnets drawn at random for each step, beside the largest and the smallest where those are visited."""
    divergence: Literal["kl", "alpha"] = "kl"
    """How subnets learn from the largest network: `alpha` is AlphaNet's adaptive alpha-divergence."""
    switch: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Delayed shrinking: the part of the run in which the largest network learns alone; 0.54 as published."""
    ramp_epochs: Annotated[float, Field(ge=0)] = 5.0
    """Delayed shrinking: the epochs over which the subnets' weight rises from 0 to 1; what is left of the run
    after the switch, where that is less."""
    sort_channels: bool = True
    """Delayed and progressive shrinking: whether channels are sorted by importance before subnets join."""
    constant_tail: bool = True
    """Sandwich: whether the learning rate falls exponentially to 5 % and stays there, or along a cosine."""
    subnets: tuple[str, ...] = ()
    """Archs as JSON: those of a fixed list or a sorted net, or the one that is trained alone."""
    spread: Count | None = None
    """Fixed list, sorted net: in place of `subnets`, this many archs spread from smallest to largest."""
    cost_bins: Count = 16
    """Attentive, shifting: how many bins there are between the cost of the smallest and of the largest."""
    candidates: Count = 3
    """Attentive: how many archs of one cost compete."""
    keeps: Literal["best", "worst"] = "best"
    """Attentive: which of them learns, by the loss on the batch: BestUp or WorstUp."""
    floor: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    """Shifting: the part of draws that is uniform over the bins of cost."""
    coarse: Fraction = 0.0
    """Single-path: the part of the run, its first, in which images have the lowest resolution."""
    teachers: tuple[str, ...] = ()
    """Alone, progressive shrinking: timm's names of networks whose averaged soft labels are learnt from, each
    followed by `=PATH` where its weights are in a file."""
    teacher_weight: Annotated[float, Field(gt=0)] = 1.0
    """Progressive shrinking, or with `teachers`: the weight of soft labels."""
    teacher_labels: Annotated[float, Field(ge=0)] = 0.0
    """Alone, with `teachers`: the weight of the labels beside them; MEAL V2 has none."""
    joint_norm: bool = False
    """On several ranks: whether batch normalization uses the statistics of all ranks' images."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Automatic mixed precision; `auto` is bf16 on a GPU that has it, else fp16, and off on a CPU."""
    average: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Decay of the moving average of the weights, such as 0.9999, which then are the result; 0: none."""
    curriculum: Literal["none", "efficienttrain", "efficienttrain++"] = "none"
    """Low frequencies and weak augmentation first: 0.65x and 0.44x of the pixels (arXiv 2211.09703)."""
    curriculum_multiple: Count = 2
    """The curriculum's sides are multiples of it: a vision transformer's patch size, for one."""
    compile: bool = False
    """Whether the largest and the smallest network are compiled, which takes minutes."""
    quantize: bool = False
    """Whether networks train in the precisions that their archs choose: weights and activations are rounded
    in training as they are afterwards."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 60.0

    @model_validator(mode="after")
    def _refuse_what_is_not_read(self) -> Self:
        read = READ_BY[self.strategy]
        for name in sorted(set().union(*READ_BY.values()) - read):
            if not self._is_default(name):
                readers = " and ".join(s for s, keys in READ_BY.items() if name in keys)
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but the strategy {self.strategy!r} does not read "
                    f"it; it is a key of {readers}"
                )
        for name, needs, there in (
            ("curriculum_multiple", "a curriculum", self.curriculum != "none"),
            ("momentum", "the optimizer sgd or rmsprop", self.optimizer != "adamw"),
            ("teacher_weight", "teachers", bool(self.teachers) or self.strategy != "alone"),
            ("teacher_labels", "teachers", bool(self.teachers) or self.strategy != "alone"),
        ):
            if not there and not self._is_default(name):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but it is read only with {needs}; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _refuse_what_does_not_fit(self) -> Self:
        if self.warmup_epochs >= self.epochs and not self._is_default("warmup_epochs"):
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs:g}, of {self.epochs:g} epochs in all: the learning "
                "rate would only rise; give fewer"
            )
        if self.random_subnets == 0 and self.strategy in ("sorted-net", "attentive", "shifting"):
            raise ValueError(
                f"random_subnets is 0, but the strategy {self.strategy!r} is about those that it draws; give "
                "at least 1"
            )
        if self.strategy == "fixed-list" and not self.subnets and self.spread is None:
            raise ValueError("a fixed list names its subnets, or how many are spread over the space")
        if self.subnets and self.spread is not None:
            raise ValueError(f"{len(self.subnets)} subnets are named and {self.spread} are spread; give one")
        if self.strategy == "alone" and len(self.subnets) > 1:
            raise ValueError(f"{len(self.subnets)} subnets are named, but one alone is trained")
        if self.compile and self.joint_norm:
            raise ValueError(
                "compile and joint_norm are both asked for, but a compiled network normalizes by its own "
                "rank's images; set one of them to false"
            )
        if self.compile and self.quantize:
            raise ValueError(
                "compile and quantize are both asked for, but a compiled network is called as it is, without "
                "its precisions; set one of them to false"
            )
        return self

    def _is_default(self, name: str) -> bool:
        return bool(getattr(self, name) == type(self).model_fields[name].default)


READ_BY: Mapping[str, frozenset[str]] = {
    "delayed-shrinking": frozenset({"random_subnets", "divergence"}),
    "sandwich": frozenset({"random_subnets", "divergence"}),
    "progressive-shrinking": frozenset({"teachers", "teacher_weight"}),
    "sorted-net": frozenset({"random_subnets", "subnets", "spread"}),
    "fixed-list": frozenset({"subnets", "spread"}),
    "attentive": frozenset({"random_subnets", "divergence", "cost_bins", "candidates", "keeps"}),
    "shifting": frozenset({"random_subnets", "divergence", "cost_bins", "floor"}),
    "single-path": frozenset({"coarse"}),
    "alone": frozenset({"subnets", "teachers", "teacher_weight", "teacher_labels"}),
}
"""Strategy -> those keys that it reads of all that say which subnets learn, and from whom."""


class SearchConfig(Part):
    """How the supernet is searched."""

    trials: Count = 100
    objectives: tuple[str, ...] = ("top1", "latency_ms")
    """Of `top1`, `latency_ms`, `size_mb`, `mmacs`, `peak_mb`: the first is maximised, others minimised."""
    limits: Mapping[str, float] = Field(default_factory=dict)
    """Metric -> bound: at most, for costs; at least, for `top1`."""
    strategy: str = Field(default="predictor", validation_alias=AliasChoices("strategy", "sampler"))
    """Who proposes candidates: `predictor` (models of every metric, fitted on all candidates so far),
    `linas`, `evolution`, `ofa_evolution`, `sorted_net`, `moocma`, `random`, or an Optuna sampler by its class
    name."""
    population: Annotated[int, Field(ge=2)] = 20
    batch: Count | None = None
    """Candidates that are proposed at a time; not given, 5 growing to 20 by `predictor`, a population by
    `linas`, one by others."""
    workers: Count = 1
    """Processes of this machine that evaluate candidates together; others may join them."""
    study: str | None = None
    """`postgresql://user@host/database`, where workers on other machines share the study; the run's own
    SQLite file where it is not given. PostgreSQL reads passwords from `~/.pgpass` or `PGPASSWORD`."""
    warm_start: Annotated[int, Field(ge=0)] = 6
    """Archs evenly spread from smallest to largest that are evaluated first; both ends always are."""
    warm_from: str | None = None
    """The folder of a run of the same supernet for another device: accuracy and size of its candidates are
    taken over, latency is measured anew. Empty: none, as with `study`."""
    race: bool = True
    """Whether a candidate is scored on some of the search images first, and on all only where it may yet
    reach the front: see `nestling.search.racing`."""
    sensitivity: bool = False
    """Whether archs that save bits where the largest network loses least by it are evaluated next: see
    `nestling.quant.sensitivity`."""
    stop_below: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Ends the search before `trials` where the last quarter of the candidates, 20 at least, added less than
    this part to the front's hypervolume; 0 never does."""
    recalibration_images: Count = 1024
    calibration_images: Count = 128

    @field_validator("study", "warm_from", mode="before")
    @classmethod
    def _none_where_empty(cls, given: Any) -> Any:
        return None if given == "" else given  # TOML has no word for it, and --set must be able to unset

    @field_validator("study")
    @classmethod
    def _without_password(cls, given: str | None) -> str | None:
        if given is not None and re.search(r"^[^/@]*://[^/@]*:[^/@]*@|[?&]password=", given):
            raise ValueError(
                "a password would be written to the run's folder; leave it out, and put it into ~/.pgpass or "
                "PGPASSWORD"
            )
        return given


class QuantConfig(Part):
    """How candidates' numbers get their integers, where a precision asks for some."""

    calibration: Literal[
        "minmax", "moving", "percentile-99.9", "percentile-99.99", "percentile-99.999", "mse", "entropy"
    ] = "minmax"
    """How the range of an activation follows from what the calibration images show."""
    weights: Literal["minmax", "mse"] = "minmax"
    """Whether a channel's integers span its weights, or have the least squared error; those of groups, in
    `w8` and `w4`, span them."""
    equalize: bool = False
    """Whether channels are brought to one size between layers first (arXiv 1906.04721)."""
    awq: bool = False
    """Whether what weight-only layers read is scaled by its size first (AWQ, arXiv 2306.00978)."""
    rounding: Literal["nearest", "moments", "gradients"] = "nearest"
    """How weights are rounded: `moments` is after GPTQ and takes seconds, `gradients` AdaRound: minutes."""
    rounding_iterations: Annotated[int, Field(ge=1)] = 10_000
    """Steps of `gradients` for each layer; the paper's number."""
    correct_biases: bool = False
    """Whether the mean error of each layer is taken off its bias last (arXiv 1906.04721)."""
    shared: tuple[Literal["Add", "Concat"], ...] = ()
    """Kinds of operators that read and write numbers of one scale, for targets that add integers as they are:
    with `Add`, all sums along a residual stream."""
    keep: dict[str, str] = {}
    """Layer -> precision, whatever the space's choices say. A layer is `first` (those that read the images),
    `last` (those that give the logits) or the beginning of its name; a list of layers keeps them `fp32`."""

    @field_validator("keep", mode="before")
    @classmethod
    def _in_floats(cls, given: Any) -> Any:
        listed = isinstance(given, list | tuple) and all(isinstance(layer, str) for layer in given)
        return dict.fromkeys(given, "fp32") if listed else given


class ProfileConfig(Part):
    """Where and how latency is measured."""

    device: str = "ort:cpu?threads=1"
    seconds: Annotated[float, Field(gt=0)] = 1.5
    """The longest that one measurement may take after warm-up; three times that where others slow it."""
    tolerance: Annotated[float, Field(gt=0)] = 0.01
    """Stop early when the 95 % interval of the ratio to the reference is within this fraction of it."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 120.0


class ExportConfig(Part):
    """What is handed over."""

    dynamic_batch: bool = False
    members: Count = 12
    """At most this many members of the front are exported, spread along it."""


class RunConfig(Part):
    """A whole run: one space, one data source, one device."""

    name: str
    space: str
    """A file such as those in search_spaces/, relative to the configuration file or to the working folder."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    torch_device: str = "auto"
    """Where the supernet is trained: `cpu`, `cuda`, or `auto` (CUDA where there is one)."""
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    search: SearchConfig = SearchConfig()
    quant: QuantConfig = QuantConfig()
    profile: ProfileConfig = ProfileConfig()
    export: ExportConfig = ExportConfig()


def load_config(path: Path, *, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in the TOML file `path`, with `overrides` such as `train.epochs=5` laid over it.

    An override's value is read as TOML; what is not TOML is taken as a word.

    Raises:
        ConfigError: no such file, not TOML, an unknown key (the nearest known one is named), a bad value, or
            no such space file.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    _lay_over(content, overrides)
    if isinstance(content.get("space"), str):
        content["space"] = str(_find(content["space"], near=path.parent))
    return parse_config(content, origin=str(path))


def override_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`config` with `overrides` such as `search.trials=200` laid over it.

    Raises:
        ConfigError: an unknown key or a bad value.
    """
    content = config.model_dump()
    _lay_over(content, overrides)
    return parse_config(content, origin="--set")


def parse_config(content: Mapping[str, Any], *, origin: str) -> RunConfig:
    """The configuration that the nested mapping `content` holds; `origin` names it in messages.

    Raises:
        ConfigError: an unknown key or a bad value; every one is listed, a line each.
    """
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        lines = [_explain(dict(problem)) for problem in error.errors()]
        raise ConfigError(f"{origin}: " + "; ".join(lines)) from None


def _lay_over(content: dict[str, Any], overrides: Sequence[str]) -> None:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override!r} must be key=value, such as train.epochs=5")
        table = content
        *parents, last = key.split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {override!r}: {parent} is a value, not a table")
        table[last] = _value(text)


def _find(name: str, *, near: Path) -> Path:
    places = dict.fromkeys([near / name, Path(name)])
    for place in places:
        if place.is_file():
            return place.resolve()
    raise ConfigError(
        f"space is {name!r}, but there is no file {' nor '.join(str(place) for place in places)}"
    )


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(problem: Mapping[str, Any]) -> str:
    location = [str(step) for step in problem["loc"]]
    key = ".".join(location)
    if problem["type"] != "extra_forbidden":
        # of a whole table the message says itself what was given
        tells = problem["type"] == "missing" or isinstance(problem["input"], Mapping)
        given = "" if tells else f" (given: {problem['input']!r})"
        return f"{key}: {problem['msg']}{given}"
    part: type[BaseModel] = RunConfig
    for step in location[:-1]:
        annotation = part.model_fields[step].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            part = annotation
    known = list(part.model_fields)
    near = difflib.get_close_matches(location[-1], known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"
