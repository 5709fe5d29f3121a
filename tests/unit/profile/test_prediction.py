from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from nestling.profile.held_out import by_macs, by_model, by_table, held_out, qualities, quality
from nestling.profile.lookup_table import fit_table, look_up
from nestling.profile.prediction import LEAST, LatencyModel, Step, describe, fit, predict

COSTS = {("Conv 1x1", "fp32"): 3.0, ("Conv 1x1", "w8a8"): 1.0, ("depthwise Conv 3x3", "fp32"): 9.0}


def steps(rng: random.Random) -> list[Step]:
    """An operator of each kind, and up to nine more."""
    kinds = [*COSTS, *rng.choices(list(COSTS), k=rng.randint(0, 9))]
    found = []
    for kind, precision in kinds:
        width = rng.choice([16, 24, 32, 48])
        signature = f"{kind} {precision} {width}"
        found.append(Step(kind, signature, precision, float(width**2), float(width), float(width)))
    return found


def seconds(network: Sequence[Step]) -> float:
    """What the made-up device takes: a constant, calls, multiply-accumulates, and a width that it hates."""
    return 5.0 + sum(
        1.0 + COSTS[step.kind, step.precision] * step.macs / 1000 + (1.5 if " 24" in step.signature else 0)
        for step in network
    )


@pytest.fixture(scope="module")
def networks() -> list[list[Step]]:
    rng = random.Random(0)
    return [steps(rng) for _ in range(80)]


def test_sums_are_by_kind_and_precision_and_signatures_are_counted() -> None:
    step = Step("Conv 1x1", "a", "w8a8", macs=10.0, activation_bytes=4.0, weight_bytes=2.0)
    told = describe([step, step, replace(step, precision="fp32", signature="b", converted_bytes=8.0)])
    assert told.counts == {"a": 2, "b": 1}
    assert told.sums["Conv 1x1 w8a8 macs"] == 20.0
    assert told.sums["Conv 1x1 fp32 calls"] == 1.0
    assert told.sums["w8a8 activation bytes"] == 8.0
    assert told.sums["converted bytes"] == 8.0


def test_unlike_operators_of_one_signature_are_refused(networks: list[list[Step]]) -> None:
    step = Step("Conv 1x1", "a", "w8a8", macs=10.0, activation_bytes=4.0, weight_bytes=2.0)
    other = replace(step, converted_bytes=8.0)
    with pytest.raises(ValueError, match="'a' is the signature of operators that differ"):
        describe([step, other])
    described = [describe(network) for network in networks]
    model = fit(described, [seconds(network) for network in networks])
    few = [describe([step]), describe([other])]
    with pytest.raises(ValueError, match="'a' is the signature of operators that differ"):
        fit([*described, *few], [1.0] * (len(networks) + 2))
    with pytest.raises(ValueError, match="differ"):
        predict(model, few)


def test_networks_that_were_left_out_are_predicted_better_than_by_macs(networks: list[list[Step]]) -> None:
    described = [describe(network) for network in networks]
    times = [seconds(network) for network in networks]
    model = quality(held_out(len(times), by_model(described, times)), times)
    macs = [sum(step.macs for step in network) for network in networks]
    rough = quality(held_out(len(times), by_macs(macs, times)), times)
    assert model.mape < 0.03
    assert model.tau > 0.95
    assert rough.tau < model.tau
    assert rough.mape > 2 * model.mape


def test_an_operator_that_the_device_hates_is_told_from_networks_that_have_it(
    networks: list[list[Step]],
) -> None:
    described = [describe(network) for network in networks]
    model = fit(described[:60], [seconds(network) for network in networks[:60]])
    small, hated = (Step("Conv 1x1", f"Conv 1x1 w8a8 {w}", "w8a8", w * w, w, w) for w in (16.0, 24.0))
    rest = [step for step in networks[70] if step.kind != "Conv 1x1"] * 2
    pair = [describe([*rest, *[one] * 6]) for one in (replace(small, signature="Conv 1x1 w8a8 16"),
            replace(hated, signature="Conv 1x1 w8a8 24"))]  # fmt: skip
    without, with_it = predict(model, pair)
    assert with_it - without == pytest.approx(6 * (1.5 + 0.32), rel=0.4)


def test_noisy_latencies_count_less(networks: list[list[Step]]) -> None:
    rng = np.random.default_rng(0)
    described = [describe(network) for network in networks]
    right = np.array([seconds(network) for network in networks])
    noises = np.where(np.arange(60) % 2, 0.2, 0.0)
    times = right[:60] * np.exp(noises * rng.standard_normal(60))
    trusting, knowing = (
        quality(
            predict(fit(described[:60], times.tolist(), noises=told), described[60:]), right[60:].tolist()
        ).mape
        for told in (None, noises.tolist())
    )
    assert knowing < 0.7 * trusting


@pytest.mark.parametrize("noises", [[0.1] * 9, [-0.1] * 10, [math.nan] * 10])
def test_noises_that_are_none_are_refused(networks: list[list[Step]], noises: list[float]) -> None:
    with pytest.raises(ValueError, match="noise"):
        fit([describe(n) for n in networks[:10]], [seconds(n) for n in networks[:10]], noises=noises)


def test_prediction_does_not_depend_on_the_unit(networks: list[list[Step]]) -> None:
    described = [describe(network) for network in networks[:20]]
    times = [seconds(network) for network in networks[:20]]
    in_ms = predict(fit(described, [time * 1000 for time in times]), described)
    assert in_ms == pytest.approx(1000 * predict(fit(described, times), described), rel=1e-6)


def test_a_model_read_from_json_predicts_the_same(networks: list[list[Step]]) -> None:
    described = [describe(network) for network in networks[:20]]
    model = fit(described, [seconds(network) for network in networks[:20]])
    again = LatencyModel.from_json(model.to_json())
    assert again == model
    assert predict(again, described).tolist() == predict(model, described).tolist()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"names": 3}'])
def test_what_is_no_model_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a latency model"):
        LatencyModel.from_json(text)


def test_an_operator_that_no_network_had_is_named(networks: list[list[Step]]) -> None:
    model = fit([describe(n) for n in networks[:LEAST]], [seconds(n) for n in networks[:LEAST]])
    with pytest.raises(ValueError, match="Softmax fp32 calls"):
        predict(model, [describe([Step("Softmax", "x", "fp32", 0.0, 1.0, 0.0)])])


def test_where_it_is_left_out_such_a_network_has_no_prediction(networks: list[list[Step]]) -> None:
    odd = [*networks[0], Step("Softmax", "x", "fp32", 0.0, 1.0, 0.0)]
    described = [describe(network) for network in [*networks[1:30], odd]]
    told = held_out(30, by_model(described, [seconds(n) for n in networks[:30]]))
    assert [bool(missing) for missing in np.isnan(told)] == [False] * 29 + [True]
    assert quality(told, [1.0] * 30).told == 29


@pytest.mark.parametrize(
    ("count", "times", "said"),
    [
        (LEAST - 1, [1.0] * (LEAST - 1), "needs at least"),
        (LEAST, [1.0] * (LEAST + 1), "as many"),
        (LEAST, [0.0] + [1.0] * (LEAST - 1), "above zero"),
        (LEAST, [math.nan] + [1.0] * (LEAST - 1), "above zero"),
    ],
)
def test_a_fit_refuses_what_it_cannot_learn_from(
    networks: list[list[Step]], count: int, times: list[float], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        fit([describe(network) for network in networks[:count]], times)


def test_a_network_is_never_predicted_from_itself() -> None:
    groups: list[set[int]] = []

    def learn(known: Sequence[int], asked: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        assert not set(known) & set(asked)
        assert len(known) + len(asked) == 11
        groups.append(set(asked))
        return np.array(asked, dtype=np.float64)

    assert held_out(11, learn, parts=3).tolist() == list(range(11))
    assert sorted(map(len, groups)) == [3, 4, 4]


def test_quality_of_a_perfect_and_of_a_reversed_order() -> None:
    measured = [1.0, 2.0, 4.0]
    assert quality(np.array([1.1, 2.2, 4.4]), measured).mape == pytest.approx(0.1)
    assert quality(np.array([1.1, 2.2, 4.4]), measured).tau == 1.0
    assert quality(np.array([3.0, 2.0, 1.0]), measured).tau == -1.0


def test_a_lookup_table_finds_the_overheads_of_networks_that_are_sums() -> None:
    blocks = {"a": 1.0, "b": 2.0, "c": 4.0}
    networks = [["a"], ["a", "b"], ["b", "c", "c"], ["a", "a", "b", "c"]]
    times = [sum(blocks[name] for name in network) + 3.0 - 0.25 * len(network) for network in networks]
    table = fit_table(blocks, networks, times)
    assert (table.overhead, table.per_block) == pytest.approx((3.0, -0.25))
    assert look_up(table, [["c", "c"]])[0] == pytest.approx(8.0 + 3.0 - 0.5)


def test_a_block_that_was_not_measured_is_named_or_left_out() -> None:
    with pytest.raises(ValueError, match="'z'"):
        fit_table({"a": 1.0}, [["a", "z"]], [1.0])
    learn = by_table({"a": 1.0}, [["a"], ["a", "a"], ["z"]], [2.0, 3.0, 9.0])
    assert np.isnan(learn([2], [0, 1])).all()  # nothing to learn from
    told = learn([0, 1, 2], [0, 2])
    assert told[0] == pytest.approx(2.0)
    assert np.isnan(told[1])


def test_all_ways_are_judged_on_what_all_can_tell() -> None:
    measured, nan = [1.0, 2.0, 3.0, 4.0], np.nan
    told = {
        "whole": np.array([1.1, 2.2, 3.3, 40.0]),
        "choosy": np.array([1.2, 2.4, 3.6, nan]),
        "mute": np.array([nan, nan, nan, 4.0]),
    }
    found = qualities(told, measured)
    assert [found[name].told for name in told] == [4, 3, 1]
    assert found["whole"].mape == pytest.approx(0.1)
    assert found["choosy"].mape == pytest.approx(0.2)
    assert np.isnan(found["mute"].mape)
    assert quality(told["whole"], measured).mape > 1
