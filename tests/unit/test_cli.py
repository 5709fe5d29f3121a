"""The command line: its speed, its messages, its exit codes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from nestling.cli import main
from nestling.config import load_config
from nestling.profile import MeasurementStore, connect
from nestling.profile.reference import reference_model
from nestling.run import Run
from nestling.space import load_space

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended."""

    returncode: int | str | None
    stdout: str
    stderr: str


def _nestling(*arguments: str) -> Done:
    """Runs a command in this process, as a shell would in the project's folder: importing takes seconds."""
    out, told = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(out), redirect_stderr(told):
        patched.setattr(sys, "argv", ["nestling", *arguments])
        patched.chdir(ROOT)
        with pytest.raises(SystemExit) as ended:
            main()
    return Done(ended.value.code, out.getvalue(), told.getvalue())


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, nestling.cli\n"
        "heavy = {'torch', 'timm', 'optuna', 'onnx', 'onnxruntime', 'numpy', 'pydantic', 'rich.progress'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_every_command() -> None:
    told = _nestling("--help").stdout
    for command in (
        "run",
        "train",
        "evaluate",
        "search",
        "worker",
        "export",
        "finetune",
        "report",
        "profile",
        "devices",
        "precisions",
        "space",
    ):
        assert command in told


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "nowhere.toml"), 2, "no configuration file nowhere.toml"),
        (("run", "configs/demo.toml", "--set", "train.epoch=3"), 2, "did you mean 'epochs'?"),
        (("run", "configs/demo.toml", "--set", "train.epochs=many"), 2, "train.epochs"),
        (("run", "configs/demo.toml", "--output", "nowhere", "--resume"), 2, "holds no run"),
        (("report", "nowhere"), 2, "holds no run"),
        (("evaluate", "nowhere"), 2, "holds no run"),
        (("worker", "nowhere"), 2, "holds no run"),
        (("finetune", "nowhere", "largest"), 2, "holds no run"),
        (("finetune", "nowhere"), 2, "Missing parameter: arch"),
        (("space", "nowhere.toml"), 2, "no space file"),
        (("space",), 2, "give one of FILE, --timm MODEL and --convert MODEL"),
        (("space", "--timm", "resnet18", "--axes"), 2, "--axes and --json are for a space FILE"),
        (("space", "--timm", "resnet81"), 2, "timm has no model 'resnet81'; did you mean"),
        (("space", "--convert", "resnet81"), 2, "timm has no model 'resnet81'; did you mean"),
        (("frobnicate",), 2, "No such command"),
        (("profile", "nowhere.onnx"), 3, "nowhere.onnx"),
        (("profile", "nowhere.onnx", "--device", "ort:gpu"), 3, "ort:gpu"),
        (("profile",), 2, "give at least one ONNX file"),
        (("profile", "--compare", "one.onnx"), 2, "--compare takes two files"),
        (("devices", "nowhere"), 2, "there is no store of measurements nowhere"),
        (("precisions", "ort:gpu"), 3, "ort:gpu"),
        (("precisions", "ort:cpu", "--only", "w5"), 2, "'w5' is no precision; there are fp32, fp16,"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = _nestling(*arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (ROOT / "nowhere").exists()


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (("run", "nowhere.toml"), 1),
        (("train", "nowhere.toml"), 1),
        (("evaluate", "nowhere"), 1),
        (("search", "nowhere"), 1),
        (("search", "nowhere", "--from", "nowhere"), 1),
        (("worker", "nowhere"), 1),
        (("finetune", "nowhere", "largest"), 1),
        (("report", "nowhere"), 0),
        (("export", "nowhere"), 0),
        (("space", "nowhere.toml"), 0),
    ],
)
def test_commands_that_train_or_search_keep_the_memory_that_they_free(
    arguments: tuple[str, ...], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[None] = []
    monkeypatch.setattr("nestling.memory.keep_freed_memory", lambda: asked.append(None))
    assert _nestling(*arguments).returncode == 2
    assert len(asked) == kept


def test_what_each_choice_governs_is_a_table_or_json() -> None:
    done = _nestling("space", "search_spaces/mobilenet_digits.toml", "--axes", "--classes", "10", "--json")
    rows = {row["choice"]: row for row in json.loads(done.stdout)}
    assert "conv_stem.weight[0]" in rows["stem.width"]["axes"]
    assert rows["s3.depth"]["vanishing"]


def test_a_proposed_space_can_be_loaded_as_it_is_printed(tmp_path: Path) -> None:
    for option, model in (("--timm", "test_convnext"), ("--convert", "test_resnet")):
        path = tmp_path / f"{model}.toml"
        path.write_text(_nestling("space", option, model, "--resolution", "32").stdout)
        assert load_space(path).size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "is not finished; `nestling train` finishes it"),
        (("--subnets", "1"), "subnets is 1; a curve needs at least 2, the smallest and the largest"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    Run.create(tmp_path / "run", load_config(ROOT / "tests" / "toy.toml"))
    done = _nestling("evaluate", str(tmp_path / "run"), *arguments)
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("largest",), "is not finished; `nestling train` finishes it"),
        (("0123456789ab",), "no arch '0123456789ab' in"),
        (("largest", "--epochs", "0"), "epochs is 0; it must be above 0"),
    ],
)
def test_what_cannot_be_fine_tuned_is_said_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    Run.create(tmp_path / "run", load_config(ROOT / "tests" / "toy.toml"))
    done = _nestling("finetune", str(tmp_path / "run"), *arguments)
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_of_many_processes_each_command_but_train_and_evaluate_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments in (("run", "tests/toy.toml", "--output", str(tmp_path / "run")), ("report", "nowhere")):
        done = _nestling(*arguments)
        assert done.returncode == 2
        assert "torchrun is for `nestling train` and `nestling evaluate`" in done.stderr
    assert not (tmp_path / "run").exists()


def test_ctrl_c_keeps_what_is_done_and_says_so(tmp_path: Path) -> None:
    arguments = ["run", "tests/toy.toml", "--output", str(tmp_path / "run"), "--set", "train.epochs=100000"]
    with subprocess.Popen(
        [sys.executable, "-m", "nestling.cli", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "epoch" in line:
                break
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues it" in told
    assert "Traceback" not in told


def test_space_as_json_is_on_stdout_alone() -> None:
    done = _nestling("space", "search_spaces/mobilenet_digits.toml", "--classes", "10", "--json")
    summary = json.loads(done.stdout)
    assert done.stderr == ""
    assert summary["size"] > 10**6
    assert summary["smallest"]["macs"] < summary["largest"]["macs"]


def test_a_file_is_profiled_as_a_table_and_as_json(tmp_path: Path) -> None:
    model = tmp_path / "reference.onnx"
    model.write_bytes(reference_model())
    arguments = ("profile", str(model), "--seconds", "0.05", "--nodes")
    shown = _nestling(*arguments)
    assert shown.returncode == 0, shown.stderr
    assert "stage4.block1.project" in shown.stdout
    assert "images: float32 1x3x96x96" in shown.stdout
    [held] = json.loads(_nestling(*arguments, "--json").stdout)
    assert held["device"] == "ort:cpu?threads=1"
    assert 0.3 < held["ratio_to_reference"] < 3  # the reference model itself, however busy the machine is
    assert sum(node["op"] == "Conv" for node in held["nodes"]) == 28


def test_a_device_that_refuses_costs_no_other_its_figures(tmp_path: Path) -> None:
    model = tmp_path / "reference.onnx"
    model.write_bytes(reference_model())
    words = ("profile", str(model), "nowhere.onnx", "--seconds", "0.02")
    done = _nestling(*words, "--device", "ort:gpu", "--device", "ort:cpu", "--json")
    assert done.returncode == 3
    told = json.loads(done.stdout)
    assert told[0]["device"] == "ort:cpu?threads=1"
    assert told[0]["latency_ms"] > 0
    refused = [(one["model"], one["device"]) for one in told[1:]]
    assert refused == [(str(model), "ort:gpu"), ("nowhere.onnx", "ort:gpu"), ("nowhere.onnx", "ort:cpu")]
    assert [line.startswith("error: ") for line in done.stderr.splitlines()] == [True, True]


@pytest.mark.timing
def test_the_reference_model_takes_as_long_as_itself(tmp_path: Path) -> None:
    model = tmp_path / "reference.onnx"
    model.write_bytes(reference_model())
    [held] = json.loads(_nestling("profile", str(model), "--seconds", "0.05", "--json").stdout)
    assert 0.8 < held["ratio_to_reference"] < 1.25


def test_the_devices_of_this_machine_and_of_a_store_are_listed(tmp_path: Path) -> None:
    model = tmp_path / "reference.onnx"
    model.write_bytes(reference_model())
    store = MeasurementStore(tmp_path / "measurements.db")
    with connect("ort:cpu", seconds=0.05, store=store) as device:
        store.put(device.measure(model), file="f", settings="s")
        key = device.fingerprint.key
    done = _nestling("devices", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    here = {one["address"]: one for one in listed if one["source"] == "here"}
    assert here["ort:cpu"]["fingerprint_key"] == key
    [stored] = [one for one in listed if one["source"] == str(store.path)]
    assert stored["fingerprint_key"] == key
    assert stored["measurements"] >= 1
