from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestling.models.compiling import CompiledCall, call_lent, compiled_calls
from nestling.models.lending import lend
from nestling.models.supernet import Supernet
from nestling.space import Arch, SearchSpace


class Compiler:
    """Stands for `torch.compile`: notes each run of what it made, and fails on demand."""

    def __init__(self, *, fails: Exception | None = None) -> None:
        self.fails = fails
        self.backends: list[str] = []
        self.functions: list[FunctionType] = []
        self.shapes: list[tuple[int, ...]] = []

    def __call__(
        self, function: Callable[..., Tensor], *, backend: str, dynamic: bool
    ) -> Callable[..., Tensor]:
        assert not dynamic
        self.backends.append(backend)
        assert isinstance(function, FunctionType)
        self.functions.append(function)

        def run(network: nn.Module, lent: Mapping[str, Tensor], images: Tensor) -> Tensor:
            self.shapes.append(tuple(images.shape))
            if self.fails is not None:
                raise self.fails
            logits: Tensor = function(network, lent, images)
            return logits

        return run


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    stand_in = Compiler()
    monkeypatch.setattr(torch, "compile", stand_in)
    return stand_in


def dropping() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Dropout(0.5))


def weights() -> dict[str, Tensor]:
    """Parts of larger tensors, as a supernet lends them."""
    generator = torch.Generator().manual_seed(2)
    large = {
        "1.weight": nn.Parameter(torch.randn(6, 12, generator=generator)),
        "1.bias": nn.Parameter(torch.randn(6, generator=generator)),
    }
    return lend(large, dict(dropping().named_parameters()))


IMAGES = torch.linspace(-1, 1, 24).reshape(2, 3, 2, 2)


def test_each_arch_has_a_compiled_call_of_its_own(space: SearchSpace, compiler: Compiler) -> None:
    calls = compiled_calls([space.largest, space.smallest], backend="mine")
    assert list(calls) == [space.largest, space.smallest]
    for call in calls.values():
        call(dropping(), weights(), IMAGES)
    assert compiler.backends == ["mine", "mine"]
    assert compiler.functions[0].__code__ is not compiler.functions[1].__code__


def test_a_compiled_call_draws_and_computes_what_a_plain_one_does(
    space: SearchSpace, compiler: Compiler
) -> None:
    network, lent, call = dropping(), weights(), CompiledCall(space.largest)
    torch.manual_seed(0)
    expected = [call_lent(network, lent, IMAGES) for _ in range(2)]
    torch.manual_seed(0)
    found = [call(network, lent, IMAGES) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(compiler.shapes) == 3  # one for trial


def test_the_trial_leaves_no_gradient(space: SearchSpace, compiler: Compiler) -> None:
    assert compiler.backends == []
    network, call = dropping(), CompiledCall(space.largest)
    weight = nn.Parameter(torch.ones(4, 12))
    lent: dict[str, Tensor] = {"1.weight": weight, "1.bias": torch.zeros(4)}
    logits = call(network, lent, IMAGES)
    assert weight.grad is None
    torch.autograd.backward(logits.sum())
    assert weight.grad is not None


def test_every_kind_of_call_is_tried_once(space: SearchSpace, compiler: Compiler) -> None:
    network, lent, call = dropping(), weights(), CompiledCall(space.largest)
    for _ in range(2):
        call(network, lent, IMAGES)
        call(network, lent, IMAGES[:1])
        with torch.no_grad():
            call(network, lent, IMAGES)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            call(network, lent, IMAGES)
    assert len(compiler.shapes) == 8 + 4


@pytest.mark.parametrize("error", [RuntimeError("no C++ compiler\nlong story"), NotImplementedError("op")])
def test_where_compiling_fails_it_says_so_once_and_runs_without(
    space: SearchSpace, compiler: Compiler, error: Exception
) -> None:
    compiler.fails = error
    network, lent, call = dropping().eval(), weights(), CompiledCall(space.largest)
    first = str(error).partition("\n")[0]
    said = rf"{space.largest.key} could not be compiled \({type(error).__name__}: {first[:4]}"
    with pytest.warns(RuntimeWarning, match=said):
        logits = call(network, lent, IMAGES)
    assert not call.is_compiled
    assert torch.equal(logits, call_lent(network, lent, IMAGES))
    assert torch.equal(call(network, lent, IMAGES), logits)  # a second warning would be an error
    assert len(compiler.shapes) == 1


def test_a_failure_in_the_backward_pass_is_found_in_the_trial(
    space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gradient: Tensor) -> Tensor:
        raise RuntimeError(f"no backward of {tuple(gradient.shape)}")

    def compile_badly(function: Callable[..., Tensor], **_: object) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            logits = function(*arguments)
            logits.register_hook(fail)  # type: ignore[no-untyped-call]
            return logits

        return run

    monkeypatch.setattr(torch, "compile", compile_badly)
    call = CompiledCall(space.largest)
    with pytest.warns(RuntimeWarning, match="no backward"):
        logits = call(dropping(), weights(), IMAGES)
    torch.autograd.backward(logits.sum())


@pytest.mark.slow
def test_more_shapes_and_archs_are_compiled_than_the_compiler_takes_of_one_function(
    space: SearchSpace,
) -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        del inputs
        compiled.append(1)
        return graph.forward

    network, lent = dropping(), weights()
    calls = [CompiledCall(space.largest, backend=backend) for _ in range(10)]
    for call in calls:
        call(network, lent, IMAGES)
    for images in range(3, 12):
        call(network, lent, IMAGES[:1].expand(images, 3, 2, 2))
    assert len(compiled) == 10 + 9
    assert all(call.is_compiled for call in calls)


@pytest.mark.slow
def test_torch_compiles_each_network_once_and_it_computes_the_same(
    supernet: Supernet, archs: list[Arch], images: Tensor
) -> None:
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    supernet.train()
    for arch in archs[:2]:
        borrower = supernet._borrower(arch, is_largest=False)
        call = CompiledCall(arch, backend=counter)
        parameters = dict(supernet.largest.named_parameters())
        found = []
        for run in (call_lent, call, call):
            lent = lend(parameters, borrower.parameters, cuts=borrower.cuts)
            logits = run(borrower.network, lent, images)
            gradients = torch.autograd.grad(
                logits.square().sum(), list(parameters.values()), allow_unused=True
            )
            found.append((logits, gradients))
        assert call.is_compiled
        for logits, gradients in found[1:]:
            assert torch.allclose(logits, found[0][0], atol=1e-5)
            for got, expected in zip(gradients, found[0][1], strict=True):
                assert (got is None) == (expected is None)
                if got is not None and expected is not None:
                    assert torch.allclose(got, expected, atol=1e-3, rtol=1e-3)
    assert counter.frame_count == 2
