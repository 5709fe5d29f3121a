"""One suite over every file of search_spaces/: that it is the published space, and that its networks work.

The table `[published]` of a file says what its source tells of the space:

==================  ==================================================================================
`source`            where the figures stand
`classes`           for which they are given; 1000 where it is not said
`resolution`        for which they are given, where the space has no choice of that name
`networks_at_least` how many networks there are, choices of precision and resolution left out
`smallest_mmacs`    millions of multiply-accumulates of the smallest network, at its resolution
`largest_mmacs`     of the largest network
`smallest_mparams`, `largest_mparams`  millions of parameters
`left_out_mmacs`    `smallest`, `largest`: what the source counts and our network leaves out, with the
                    reason in a comment of the file
`archs`             networks with a name: `mmacs`, `mparams`, and `decisions`. A decision's name may be a
                    pattern, for every open choice that has the value; what is not decided is the largest's.
                    A network without decisions is one whose arch was not published: it must lie inside
                    the space.
`found`             a network that does not lie in the space; the family's own tests look at it
==================  ==================================================================================
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nestling.export import save_onnx, to_onnx, verify
from nestling.models.building import build_shapes
from nestling.models.cost import Cost, cost
from nestling.models.families import Family, family
from nestling.models.graph import trace
from nestling.models.meaning import complaints
from nestling.models.supernet import Supernet, at_resolution
from nestling.space import Arch, Choice, SearchSpace, Value, load_space
from nestling.train.evaluate import recalibrate
from nestling.train.losses import label_loss, soft_label_loss
from nestling.train.strategies import Progress, Sandwich

SPACES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.toml"))
WITHIN = 0.02
USUAL_RESOLUTION = 224
QUANTITIES = ("mmacs", "mparams")
KNOWN = {
    "source", "classes", "resolution", "networks_at_least", "left_out_mmacs", "archs", "found",
    *(f"{end}_{quantity}" for end in ("smallest", "largest") for quantity in QUANTITIES),
}  # fmt: skip
KNOWN_OF_AN_ARCH = {"name", "decisions", *QUANTITIES}


def published_of(path: Path) -> dict[str, Any]:
    """The file's `[published]`, empty where it has none."""
    table: dict[str, Any] = tomllib.loads(path.read_text()).get("published", {})
    return table


WITH_FIGURES = [path for path in SPACES if published_of(path)]


@dataclass(frozen=True)
class Published:
    """A space, and what its source says of it."""

    path: Path

    @cached_property
    def told(self) -> dict[str, Any]:
        return published_of(self.path)

    @cached_property
    def space(self) -> SearchSpace:
        return load_space(self.path).with_constants({"classes": self.told.get("classes", 1000)})

    @cached_property
    def ends(self) -> dict[str, Cost]:
        return {"smallest": self.cost(self.space.smallest), "largest": self.cost(self.space.largest)}

    def cost(self, arch: Arch) -> Cost:
        network = build_shapes(family(self.space.family).build, arch)
        return cost(network, int(arch.get("resolution", self.told.get("resolution", USUAL_RESOLUTION))))

    def arch(self, decisions: Mapping[str, Value]) -> Arch:
        """The largest arch with `decisions`, whose names may be patterns."""
        decided: dict[str, Value] = dict(self.space.largest)
        for pattern, value in decisions.items():
            ruled = [
                choice.name
                for choice in self.space.open_choices
                if fnmatchcase(choice.name, pattern) and value in choice.values
            ]
            assert ruled, f"{pattern} = {value!r} decides no open choice of {self.path.name}"
            decided |= dict.fromkeys(ruled, value)
        return self.space.canonical(decided)


def counted(result: Cost, quantity: str) -> float:
    return {"mmacs": result.macs, "mparams": result.params}[quantity] / 1e6


@pytest.fixture(scope="module", params=WITH_FIGURES, ids=lambda path: path.stem)
def published(request: pytest.FixtureRequest) -> Published:
    return Published(request.param)


def test_every_space_tells_where_it_is_from_or_is_our_own() -> None:
    ours = {path.stem for path in SPACES if "source" not in tomllib.loads(path.read_text())}
    told = {path.stem for path in WITH_FIGURES}
    assert not ours & told, "a space with published figures has a source"


def test_what_is_published_is_told_in_known_words(published: Published) -> None:
    assert set(published.told) <= KNOWN
    assert "source" in published.told
    for arch in published.told.get("archs", []):
        assert set(arch) <= KNOWN_OF_AN_ARCH
        assert "name" in arch
        assert set(arch) & set(QUANTITIES), arch


@pytest.mark.parametrize("end", ["smallest", "largest"])
def test_the_ends_of_a_space_cost_what_is_published(published: Published, end: str) -> None:
    for quantity in QUANTITIES:
        expected = published.told.get(f"{end}_{quantity}")
        if expected is not None:
            expected -= published.told.get(f"left_out_{quantity}", {}).get(end, 0)
            assert counted(published.ends[end], quantity) == pytest.approx(expected, rel=WITHIN), quantity


def test_the_networks_that_have_a_name_cost_what_is_published_or_lie_inside(published: Published) -> None:
    low, high = published.ends["smallest"], published.ends["largest"]
    for known in published.told.get("archs", []):
        for quantity in set(QUANTITIES) & set(known):
            if "decisions" in known:
                result = published.cost(published.arch(known["decisions"]))
                assert counted(result, quantity) == pytest.approx(known[quantity], rel=WITHIN), known["name"]
            else:
                assert counted(low, quantity) < known[quantity] < counted(high, quantity), known["name"]


def test_a_space_has_as_many_networks_as_is_published(published: Published) -> None:
    space = published.space
    left_out = {
        choice.name: choice.values[0]
        for choice in space.open_choices
        if choice.name == "resolution" or choice.name.endswith(".precision")
    }
    assert space.with_constants(left_out).size >= published.told.get("networks_at_least", 2)


def shrunken(space: SearchSpace) -> SearchSpace:
    """`space` with its two cheapest values for every open choice, images of at most 48 pixels, five classes.

    Every choice that was open still is: what it changes about a network is tried, at a fraction of the cost.
    """
    choices = []
    for choice in space.choices:
        values = choice.values[:2]
        if choice.name == "resolution" and any(int(value) > 48 for value in values):
            values = (32, 48)[-len(values) :]
        choices.append(Choice(choice.name, values, choice.needs))
    return SearchSpace(space.family, tuple(choices)).with_constants({"classes": 5})


def full(space: SearchSpace) -> SearchSpace:
    return space if "classes" in space.by_name else space.with_constants({"classes": 1000})


def random_images(count: int, side: int) -> Tensor:
    """Noise that differs in brightness, colour and contrast, as photographs do: a channel that all images
    leave alike has no variance, and normalizing by it amplifies rounding.
    """
    contrast = torch.rand(count, 1, 1, 1)
    return contrast * torch.randn(count, 3, side, side) + torch.randn(count, 3, 1, 1)


@dataclass(frozen=True)
class Trained:
    """A space's supernet after one step of training, and one random subnet of it, recalibrated."""

    family: Family
    supernet: Supernet
    images: Tensor
    arch: Arch
    subnet: nn.Module
    losses: list[float]

    @property
    def own_images(self) -> Tensor:
        """The images at the subnet's resolution."""
        return at_resolution(self.images, self.arch)


def enliven(network: nn.Module) -> None:
    """Gives every scale and bias a number of its own: a residual branch that starts at zero hides faults."""
    for parameter in network.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)


def train_one_step(supernet: Supernet, images: Tensor, labels: Tensor) -> list[float]:
    """The losses of one step by the sandwich rule; changes the supernet's weights, keeps their gradients."""
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.01)
    progress = Progress(step=0, steps=1, steps_per_epoch=1)
    soft_labels: dict[Arch, Tensor] = {}
    losses = []
    for visit in Sandwich(random_subnets=1).visits(supernet.space, progress, random.Random(1)):
        logits = supernet(images, visit.arch)
        teacher = None if visit.learns_from is None else soft_labels[visit.learns_from]
        loss = (
            label_loss(logits, labels, smoothing=0.1) if teacher is None else soft_label_loss(logits, teacher)
        )
        soft_labels.setdefault(visit.arch, logits.detach())
        torch.autograd.backward(loss)
        losses.append(loss.item())
    # a fresh network's gradients are so large that one step of them leaves channels without any variance
    torch.nn.utils.clip_grad_norm_(supernet.parameters(), 1.0)
    optimizer.step()
    return losses


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param((path, shrunken), id=path.stem) for path in SPACES),
        *(pytest.param((path, full), id=f"{path.stem}-full", marks=pytest.mark.slow) for path in SPACES),
    ],
)
def trained(request: pytest.FixtureRequest) -> Trained:
    path, size = request.param
    space = size(load_space(path))
    kind = family(space.family)
    torch.manual_seed(0)
    supernet = Supernet(space, kind.build, layout=kind.layout).train()
    enliven(supernet.largest)
    side = int(space.largest.get("resolution", 48 if size is shrunken else USUAL_RESOLUTION))
    many = random_images(16, side)
    images = many[:4]
    losses = train_one_step(supernet, images, torch.arange(4))
    arch = space.sample(random.Random(path.stem))
    subnet = recalibrate(supernet.materialize(arch), [at_resolution(many, arch)])
    return Trained(kind, supernet, images, arch, subnet, losses)


def test_a_step_of_training_reaches_every_weight(trained: Trained) -> None:
    assert np.isfinite(trained.losses).all()
    for name, parameter in trained.supernet.largest.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
            assert bool(parameter.grad.any()), name


def test_a_subnet_computes_the_same_with_lent_and_with_its_own_weights(trained: Trained) -> None:
    supernet = trained.supernet
    for arch in (trained.arch, supernet.space.smallest):
        with torch.no_grad():
            shared = supernet(trained.images, arch)
            own = supernet.materialize(arch).train()(at_resolution(trained.images, arch))
        assert float((shared - own).abs().max()) == 0.0, arch.to_json()


def gradients(trained: Trained, images: Tensor) -> dict[str, Tensor]:
    """Those of all weights, for a weighted sum of the subnet's logits; the weights' own stay as they are."""
    logits = trained.supernet.train()(images, trained.arch)
    learning = dict(trained.supernet.largest.named_parameters())
    loss = (logits * torch.linspace(-1, 1, 5)).sum()
    found = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
    return {n: gradient for n, gradient in zip(learning, found, strict=True) if gradient is not None}


def test_the_gradients_of_a_subnet_are_those_that_ordinary_convolutions_give(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = random_images(12, trained.images.shape[-1])
    found = gradients(trained, images)
    with monkeypatch.context() as patch:
        # then every convolution is PyTorch's own, and none is ours
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        wanted = gradients(trained, images)
    assert found.keys() == wanted.keys()
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        # of a bias before a normalization the gradient is 0, and what is found is rounding alone; that of 12
        # images is amplified besides where a channel hardly varies (layers alone agree to 1e-5)
        most = max(float(gradient.abs().max()), 1e-2 * scale)
        assert float((found[name] - gradient).abs().max()) < 1e-2 * most, name


def run_onnx(path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.concatenate([np.asarray(session.run(None, {"images": image[None]})[0]) for image in images])


def test_the_file_of_a_subnet_computes_what_the_subnet_does(trained: Trained, tmp_path: Path) -> None:
    images = trained.own_images
    save_onnx(to_onnx(trace(trained.subnet, resolution=images.shape[-1])), tmp_path / "subnet.onnx")
    with torch.no_grad():
        expected = trained.subnet(images)
    model = verify(tmp_path / "subnet.onnx", images, expected=expected, run=run_onnx)
    assert model.resolution == trained.arch.get("resolution", images.shape[-1])
    assert len(expected.unique()) > 1


def test_a_subnet_is_rebuilt_from_source_that_does_not_need_nestling(trained: Trained) -> None:
    source = trained.family.rebuild(trained.arch)
    assert "nestling" not in source
    names: dict[str, Any] = {}
    exec(source, names)
    rebuilt = names["network"]
    assert isinstance(rebuilt, nn.Module)
    rebuilt.load_state_dict(trained.subnet.state_dict())
    rebuilt.to(memory_format=torch.channels_last).eval()
    with torch.no_grad():
        assert torch.equal(rebuilt(trained.own_images), trained.subnet(trained.own_images))


def test_every_stage_with_a_precision_has_layers(trained: Trained) -> None:
    names = [name for name, _ in trained.supernet.largest.named_modules()]
    for choice in trained.supernet.space.choices:
        stage, _, kind = choice.name.rpartition(".")
        if kind == "precision":
            prefixes = trained.family.layers(stage)
            ruled = [n for n in names for p in prefixes if n == p or n.startswith(f"{p}.")]
            assert ruled, f"{choice.name}: no layer's name begins with {' or '.join(prefixes)}"


def test_a_shrunken_space_keeps_every_choice_open() -> None:
    for path in SPACES:
        space = load_space(path)
        small = shrunken(space)
        assert [c.name for c in small.open_choices] == [c.name for c in space.open_choices], path.stem


SMALL = ("mobilenet_cifar_small", "mobilenet_digits", "resnet_cifar", "timm_resnet18", "vit_cifar")


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=() if p.stem in SMALL else pytest.mark.slow) for p in SPACES],
)
def test_what_is_lent_means_the_same_in_a_smaller_network(path: Path) -> None:
    space = load_space(path).with_constants({"classes": 10})
    side = space.by_name["resolution"].values[0]
    space = space.only({"resolution": [side]})
    its = family(space.family)
    assert complaints(space, its.build, layout=its.layout) == []
