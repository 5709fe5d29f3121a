"""The whole path on a toy: one run, looked at from every side."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file

from nestling import pipeline
from nestling.config import ConfigError, RunConfig, load_config
from nestling.models.families import family as family_of
from nestling.pipeline import concluding
from nestling.pipeline.studies import problem
from nestling.run import RunError
from nestling.search import InfeasibleLimit, load_result
from nestling.space import SpaceError, load_space

TOY = Path(__file__).parent / "toy.toml"


class Listening(pipeline.Silent):
    """Writes down which stages it heard of."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []
        self.trials = 0

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def trial(self, *_: Any) -> None:
        self.trials += 1


@pytest.fixture(scope="module", autouse=True)
def _no_pauses_at_the_end() -> Iterator[None]:
    """The machine may be busy all the while, and a front that changes is a front that is exported anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concluding, "PAUSES_AT_END", ())
        yield


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(TOY)


@pytest.fixture(scope="module")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "toy"
    listener = Listening()
    pipeline.run_all(config, folder, listener=listener)
    assert listener.stages == ["prepare", "train", "search", "export", "report"]
    return folder


def _members(folder: Path) -> list[dict[str, Any]]:
    members: list[dict[str, Any]] = json.loads((folder / "members.json").read_text())
    return members


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.add_session_config_entry("optimization.disable_specified_optimizers", "WeightBiasQuantization")
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _test_images(folder: Path, resolution: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    from PIL import Image

    split = np.load(folder / "test_split.npz")
    resized = [
        np.asarray(Image.fromarray(image).resize((resolution, resolution), Image.Resampling.BICUBIC))
        if image.shape[0] != resolution
        else image
        for image in split["images"]
    ]
    images = np.stack(resized).astype(np.float32) / np.float32(255)
    images = (images - split["mean"].astype(np.float32)) / split["std"].astype(np.float32)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), split["labels"]


def test_the_reported_test_accuracy_is_what_the_runtime_computes_from_the_file(finished: Path) -> None:
    for member in _members(finished):
        path = finished / "exports" / member["name"] / "model.onnx"
        images, labels = _test_images(finished, member["resolution"])
        session = _session(path)
        guesses = [session.run(None, {"images": image[None]})[0].argmax() for image in images]
        assert int((np.array(guesses) == labels).sum()) == member["test_correct"]
        assert len(labels) == member["test_total"] == 60


def test_a_card_names_its_file_by_hash_and_size(finished: Path) -> None:
    for member in _members(finished):
        folder = finished / "exports" / member["name"]
        content = (folder / "model.onnx").read_bytes()
        card = json.loads((folder / "card.json").read_text())
        assert card["sha256"] == hashlib.sha256(content).hexdigest()
        assert card["size_bytes"] == len(content)


def test_the_rebuilt_timm_network_agrees_with_the_float_file(finished: Path) -> None:
    for member in _members(finished):
        folder = finished / "exports" / member["name"]
        names: dict[str, Any] = {"__file__": str(folder / "rebuild.py")}
        source = (folder / "rebuild.py").read_text()
        assert "nestling" not in source
        exec(source, names)
        float_file = folder / ("model_fp32.onnx" if member["quantized"] else "model.onnx")
        images, _ = _test_images(finished, member["resolution"])
        with torch.no_grad():
            expected = names["network"](torch.from_numpy(images[:16])).numpy()
        session = _session(float_file)
        got = np.concatenate([session.run(None, {"images": image[None]})[0] for image in images[:16]])
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
        assert set(load_file(folder / "weights.safetensors")) == set(names["network"].state_dict())


def test_an_exported_file_computes_what_the_search_timed_and_tells_its_figures(finished: Path) -> None:
    bench = pipeline.open_run(finished)
    result = load_result(problem(bench), storage=finished / "study.db", name="nestling")
    found = {trial.arch.key: trial.metrics for trial in result.front}
    for member in _members(finished):
        searched = onnx.load(finished / "candidates" / f"{member['arch_key']}.onnx")
        exported = onnx.load(finished / "exports" / member["name"] / "model.onnx")
        told = {entry.key: entry.value for entry in exported.metadata_props}
        assert float(told["nestling.search.top1"]) == found[member["arch_key"]]["top1"]
        assert json.loads(told["nestling.arch"]) == member["decisions"]
        assert exported.graph == searched.graph


def test_every_trial_is_a_different_network_of_the_space(finished: Path) -> None:
    bench = pipeline.open_run(finished)
    result = load_result(problem(bench), storage=finished / "study.db", name="nestling")
    tried = [trial.arch for trial in (*result.complete, *result.failed)]
    assert len(tried) == len(set(tried)) == 8
    assert not result.failed
    assert bench.space.smallest in tried
    assert bench.space.largest in tried


def test_a_finished_run_is_not_done_again(config: RunConfig, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.onnx")}
    listener = Listening()
    members, files = pipeline.run_all(config, finished, listener=listener)
    assert listener.trials == 0
    assert members == _members(finished)
    assert files.html.exists()
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.onnx")} == before


def test_a_folder_with_another_configuration_is_refused_by_key(config: RunConfig, finished: Path) -> None:
    other = config.model_copy(update={"train": config.train.model_copy(update={"lr": 0.3})})
    with pytest.raises(RunError, match=r"train\.lr"):
        pipeline.prepare(other, finished, listener=pipeline.Silent())


def test_any_arch_of_the_space_can_be_handed_over(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    bench = pipeline.open_run(folder)
    try:
        card = pipeline.export_arch(bench, pipeline.find_arch(bench, "smallest"), listener=pipeline.Silent())
    finally:
        bench.close()
    assert card["arch_key"] == bench.space.smallest.key
    assert card["quantized"]
    assert (folder / "exports" / card["name"] / "model_fp32.onnx").exists()
    with pytest.raises(SpaceError, match="no arch 'nobody'"):
        pipeline.find_arch(bench, "nobody")


def test_a_search_is_extended_and_its_front_exported_anew(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / "exports" / "01-000000000000").mkdir()
    bench = pipeline.open_run(folder, overrides=["search.trials=10", "export.members=2"])
    try:
        result = pipeline.search_supernet(bench, listener=pipeline.Silent())
        members = pipeline.export_front(bench, listener=pipeline.Silent())
    finally:
        bench.close()
    assert len(result.complete) == 10
    assert 1 <= len(members) <= 2  # a front of toys may have one member
    assert {path.name for path in (folder / "exports").iterdir()} == {member["name"] for member in members}
    with pytest.raises(RunError, match=r"train\.lr"):
        pipeline.open_run(folder, overrides=["train.lr=0.5"])


def test_a_run_whose_images_changed_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / "data.json").write_text(json.dumps({"fingerprint": "another"}))
    with pytest.raises(RunError, match="no longer those"):
        _ = pipeline.open_run(folder).data


def test_one_objective_without_latency_a_space_without_precision_or_resolution_and_an_open_batch(
    config: RunConfig, tmp_path: Path
) -> None:
    space = tmp_path / "space.toml"
    space.write_text(
        'family = "mobilenet"\nact = "relu6"\nstem.width = 8\nhead.width = [8, 16]\n'
        'stages = [{ block = "ds", width = [8, 16], stride = 2 }]\n'
    )
    plain = config.model_copy(
        update={
            "space": str(space),
            "train": config.train.model_copy(update={"epochs": 1.0, "strategy": "sandwich"}),
            "search": config.search.model_copy(
                update={"objectives": ("top1",), "trials": 9, "recalibration_images": 10**6}
            ),
            "export": config.export.model_copy(update={"dynamic_batch": True}),
        }
    )
    members, _ = pipeline.run_all(plain, tmp_path / "run", listener=pipeline.Silent())
    session = _session(tmp_path / "run" / "exports" / members[0]["name"] / "model.onnx")
    images, labels = _test_images(tmp_path / "run", 16)
    guesses = session.run(None, {"images": images})[0].argmax(axis=1)
    assert int((guesses == labels).sum()) == members[0]["test_correct"]
    assert not members[0]["quantized"]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("search", {"objectives": ("top1", "speed")}, "speed"),
        ("search", {"limits": {"mmacs": 1e-6}}, "no network can keep mmacs"),
        ("search", {"strategy": "NSGASampler"}, "NSGAIISampler"),
        ("train", {"dropout": 0.5, "drop_path": 0.0, "strategy": "sandwich"}, None),
    ],
)
def test_what_cannot_be_searched_is_refused_before_training(
    config: RunConfig, tmp_path: Path, part: str, change: dict[str, Any], message: str | None
) -> None:
    changed = config.model_copy(update={part: getattr(config, part).model_copy(update=change)})
    if message is None:
        pipeline.prepare(changed, tmp_path / "run", listener=pipeline.Silent()).close()
        return
    with pytest.raises(ConfigError, match=message):
        pipeline.prepare(changed, tmp_path / "run", listener=pipeline.Silent())
    # a refused configuration does not stand in the way of the next one
    pipeline.prepare(config, tmp_path / "run", listener=pipeline.Silent()).close()


def test_a_curriculum_whose_images_the_networks_cannot_read_is_refused_before_training(
    config: RunConfig, tmp_path: Path
) -> None:
    vit = {"space": str(TOY.parents[1] / "search_spaces" / "vit_cifar.toml")}
    data = config.data.model_copy(update={"size": 32})
    train = config.train.model_copy(update={"curriculum": "efficienttrain", "strategy": "sandwich"})
    odd = config.model_copy(update=vit | {"data": data, "train": train})
    with pytest.raises(ConfigError, match=r"images of 22 px.*set train\.curriculum_multiple"):
        pipeline.prepare(odd, tmp_path / "run", listener=pipeline.Silent())
    whole = train.model_copy(update={"curriculum_multiple": 4})
    even = odd.model_copy(update={"train": whole})
    pipeline.prepare(even, tmp_path / "run", listener=pipeline.Silent()).close()


def test_a_search_before_training_is_refused(config: RunConfig, tmp_path: Path) -> None:
    bench = pipeline.prepare(config, tmp_path / "new", listener=pipeline.Silent())
    try:
        with pytest.raises(RunError, match=r"training .* is not finished"):
            _ = bench.supernet
    finally:
        bench.close()


def test_the_report_shows_every_member_and_links_files_that_exist(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    for member in _members(finished):
        assert member["name"] in page
        assert f"exports/{member['name']}/model.onnx" in page
        assert (finished / "exports" / member["name"] / "model.onnx").exists()
    assert (finished / "front.png").stat().st_size > 1000


def _with_space(config: RunConfig, path: Path, content: str) -> RunConfig:
    path.write_text(content)
    changed = {
        "space": str(path),
        "train": config.train.model_copy(
            update={"epochs": 1.0, "warmup_epochs": 0.0, "lr": 0.01, "sort_channels": False}
        ),
        "search": config.search.model_copy(update={"objectives": ("top1", "mmacs"), "trials": 5}),
    }
    return config.model_copy(update=changed)


def _rebuilt(folder: Path) -> torch.nn.Module:
    names: dict[str, Any] = {"__file__": str(folder / "rebuild.py")}
    source = (folder / "rebuild.py").read_text()
    assert "nestling" not in source
    exec(source, names)
    network: torch.nn.Module = names["network"]
    return network


SPACES = {
    "timm": """
family = "timm"
model = "test_vit"
resolution = [8, 16]
patch_size = 4
depth = [1, 2]
mlp_ratio = [2.0, 3.0]
"blocks.precision" = ["w8a8", "fp32"]
""",
    "convert": """
family = "convert"
model = "test_resnet"
traced_at = 16
resolution = [8, 16]
"layer2.0.conv1.width" = [24, 32, 48]
"layer3.0.conv2.width" = [24, 48]
"layer1.precision" = ["w8a8", "fp32"]
""",
}


@pytest.mark.parametrize("family", SPACES)
def test_a_timm_model_is_searched_without_code_and_handed_over_plain(
    config: RunConfig, family: str, tmp_path: Path
) -> None:
    changed = _with_space(config, tmp_path / "space.toml", SPACES[family])
    folder = tmp_path / "run"
    members, _ = pipeline.run_all(changed, folder, listener=pipeline.Silent())
    bench = pipeline.open_run(folder)
    result = load_result(problem(bench), storage=bench.run.study_file, name="nestling")
    bench.close()
    assert [trial.reason for trial in result.failed] == []
    precisions = {value for t in result.complete for k, value in t.arch.items() if k.endswith("precision")}
    assert precisions == {"w8a8", "fp32"}
    for member in members:
        exported = folder / "exports" / member["name"]
        network = _rebuilt(exported)
        images, _ = _test_images(folder, member["resolution"])
        with torch.no_grad():
            expected = network(torch.from_numpy(images[:4])).numpy()
        session = _session(exported / ("model_fp32.onnx" if member["quantized"] else "model.onnx"))
        got = np.concatenate([session.run(None, {"images": image[None]})[0] for image in images[:4]])
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("family", SPACES)
def test_the_largest_network_of_a_run_has_the_pretrained_weights(
    config: RunConfig, family: str, tmp_path: Path
) -> None:
    content = SPACES[family]
    space = load_space(_written(tmp_path / "bare.toml", content)).with_constants({"classes": 10})
    timm_network = family_of(space.family).build(space.largest).eval()
    save_file(timm_network.state_dict(), tmp_path / "weights.safetensors")
    weights = f'pretrained = "{tmp_path / "weights.safetensors"}"\n'
    changed = _with_space(config, tmp_path / "space.toml", content.replace("model =", f"{weights}model ="))
    bench = pipeline.prepare(changed, tmp_path / "run", listener=pipeline.Silent())
    bench.close()
    supernet = bench.new_supernet()
    images = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = timm_network.to(memory_format=torch.channels_last)(images)
        assert torch.equal(supernet.materialize(supernet.space.largest)(images), wanted)
    pipeline.train_supernet(bench, listener=pipeline.Silent())
    (tmp_path / "weights.safetensors").unlink()  # a trained run needs them no more
    assert pipeline.open_run(tmp_path / "run").supernet is not None
    with pytest.raises(ConfigError, match=r"pretrained = '.*weights\.safetensors' names cannot be had"):
        pipeline.prepare(changed, tmp_path / "anew", listener=pipeline.Silent())


def test_a_network_whose_channels_cannot_be_sorted_is_refused_with_what_would_do(
    config: RunConfig, tmp_path: Path
) -> None:
    changed = _with_space(config, tmp_path / "space.toml", SPACES["timm"])
    train = changed.train.model_copy(update={"sort_channels": True})
    with pytest.raises(ConfigError, match=r"VisionTransformer cannot be sorted.*set train\.sort_channels to"):
        pipeline.prepare(
            changed.model_copy(update={"train": train}), tmp_path / "run", listener=pipeline.Silent()
        )


def test_norms_that_begin_at_zero_are_refused_beside_pretrained_weights(
    config: RunConfig, tmp_path: Path
) -> None:
    content = SPACES["timm"]
    space = load_space(_written(tmp_path / "bare.toml", content)).with_constants({"classes": 10})
    save_file(family_of("timm").build(space.largest).state_dict(), tmp_path / "weights.safetensors")
    weights = f'pretrained = "{tmp_path / "weights.safetensors"}"\n'
    changed = _with_space(config, tmp_path / "space.toml", content.replace("model =", f"{weights}model ="))
    train = changed.train.model_copy(update={"zero_last_norms": True})
    with pytest.raises(ConfigError, match=r"zero_last_norms is true, but .* pretrained weights .*set it to"):
        pipeline.prepare(
            changed.model_copy(update={"train": train}), tmp_path / "run", listener=pipeline.Silent()
        )


def _written(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('family = "mobilenet"\npretrained = true\nstem.width = 8\nhead.width = 8\nstages = [{width=8}]\n',
         "the family 'mobilenet' knows no pretrained weights"),
        ('family = "timm"\nmodel = "resnet81"\n', "resnet81"),
        ('family = "timm"\nmodel = "test_resnet"\n"layers.0" = [1, 2]\nstem = [1, 2]\n', "stem"),
        ('family = "nowhere.to_be:found"\nwidth = 3\n', "cannot be imported"),
        (SPACES["convert"].replace("[24, 48]", "[24, 480]"), "480"),
    ],
)  # fmt: skip
def test_a_space_that_lends_wrongly_is_refused_before_training(
    config: RunConfig, tmp_path: Path, content: str, message: str
) -> None:
    changed = _with_space(config, tmp_path / "space.toml", content)
    with pytest.raises((ConfigError, SpaceError), match=message):
        pipeline.prepare(changed, tmp_path / "run", listener=pipeline.Silent())


def test_a_budget_that_is_asked_for_later_picks_the_best_of_what_was_tried(
    finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    tried = load_result(problem(pipeline.open_run(run)), storage=run / "study.db", name="nestling").complete
    costs = sorted(trial.metrics["mmacs"] for trial in tried)
    overrides = pipeline.limit_overrides(at_most=[f"mmacs={costs[len(costs) // 2]!r}"], at_least=[])
    bench, listener = pipeline.open_run(run, overrides=overrides), Listening()
    result = pipeline.search_supernet(bench, listener=listener)
    card = pipeline.export_best(bench, listener=listener)
    bench.close()
    assert listener.trials == 0
    assert listener.notes[:2] == [
        "8 candidates of before are judged by the limits that are given now",
        "all 8 candidates were evaluated under other limits; `--set search.trials=16` looks for more under "
        "these",
    ]
    kept = [trial for trial in tried if trial.metrics["mmacs"] <= costs[len(costs) // 2]]
    assert result.best is not None
    assert result.best.metrics["top1"] == max(trial.metrics["top1"] for trial in kept)
    assert card["arch_key"] == result.best.arch.key
    assert (run / "exports" / card["name"] / "model.onnx").exists()
    again = pipeline.open_run(run)
    assert problem(again).limits == result.problem.limits
    impossible = pipeline.limit_overrides(at_most=[], at_least=["top1=0.999"])
    bench = pipeline.open_run(run, overrides=impossible)
    pipeline.search_supernet(bench, listener=listener)
    with pytest.raises(RunError, match=r"limits: no network tried so far keeps top1 at least 0.999"):
        pipeline.export_best(bench, listener=listener)
    bench.close()


def test_a_budget_below_the_smallest_network_is_refused_before_anything_is_evaluated(
    finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    bench = pipeline.open_run(run, overrides=["search.limits.mmacs=0.001", "search.trials=12"])
    with pytest.raises(InfeasibleLimit, match=r"mmacs at most 0.001: the smallest one"):
        pipeline.search_supernet(bench, listener=pipeline.Silent())
    with pytest.raises(ConfigError, match=r"--at-least top1=0\.9 is meant"):
        pipeline.limit_overrides(at_most=["top1=0.9"], at_least=[])


@pytest.mark.timeout(600)  # starts three processes that import PyTorch
def test_workers_of_the_command_line_go_on_with_a_search(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    reference = (run / "reference.json").read_text()
    bench = pipeline.open_run(run, overrides=["search.workers=2", "search.trials=10"])
    listener = Listening()
    result = pipeline.search_supernet(bench, listener=listener)
    bench.close()
    archs = [trial.arch for trial in result.complete]
    assert len(archs) == len(set(archs)) == 10
    assert listener.trials == 2
    assert (run / "reference.json").read_text() == reference
    assert all(set(trial.metrics) == set(result.complete[0].metrics) for trial in result.complete)


def test_a_search_for_another_device_takes_accuracies_over_and_measures_latencies(
    finished: Path, tmp_path: Path
) -> None:
    listener, folder = Listening(), tmp_path / "beside"
    shutil.copytree(finished, tmp_path / "other")
    finished = tmp_path / "other"
    images = json.loads((finished / "data.json").read_text())
    assert images.pop("few") == "drawn"
    (finished / "data.json").write_text(json.dumps(images))  # as a run of before has it
    asked = ["search.trials=4", f"search.warm_from={json.dumps(str(finished))}"]
    with pytest.raises(RunError, match=r"cannot have another train\.lr"):
        pipeline.begin_from(folder, other=finished, overrides=[*asked, "train.lr=0.3"], listener=listener)
    asked += ['profile.device="ort:cpu?threads=2"', "search.warm_start=0"]
    bench = pipeline.begin_from(folder, other=finished, overrides=asked, listener=listener)
    assert json.loads((folder / "data.json").read_text()) == images | {"few": "first"}
    result = pipeline.search_supernet(bench, listener=listener)
    bench.close()
    there = pipeline.searched(pipeline.open_run(finished))
    before = {trial.arch: trial.metrics for trial in there.complete}
    both = [trial for trial in result.complete if trial.arch in before]
    assert len(both) >= 2
    assert all(trial.metrics["top1"] == before[trial.arch]["top1"] for trial in both)
    assert all(trial.metrics["latency_ms"] != before[trial.arch]["latency_ms"] for trial in both)
    assert all(trial.metrics.get("top1_reused") == 1.0 for trial in both)
    assert any("8 candidates" in note for note in listener.notes)
    again = pipeline.begin_from(folder, other=finished, overrides=asked, listener=listener)
    assert len(pipeline.searched(again).complete) == 4
    again.close()
