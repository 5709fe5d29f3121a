from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from nestling.config import ConfigError, RunConfig, TrainConfig, load_config, override_config, parse_config

MINIMAL = 'name = "toy"\nspace = "toy.toml"\n'


def write(folder: Path, text: str = MINIMAL) -> Path:
    (folder / "toy.toml").touch()
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_a_file_leaves_out_has_its_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL + "[train]\nepochs = 3\nlr = 1e-3\n"))
    assert config.train == TrainConfig(epochs=3.0, lr=0.001)
    assert config.data.source == "digits"


def test_a_configuration_survives_json(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL + "[search]\nlimits = { latency_ms = 2.5 }\n"))
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig().lr = 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sede = 1", "unknown key 'sede'; did you mean 'seed'?"),
        ("[train]\nepoch = 1", "unknown key 'train.epoch'; did you mean 'epochs'?"),
        ("[search]\nqqq = 1", "unknown key 'search.qqq'; known here: trials, objectives, limits"),
        ("[serch]\ntrials = 1", "unknown key 'serch'; did you mean 'search'?"),
        ("[train]\nepochs = -1", "train.epochs: Input should be greater than 0 (given: -1)"),
        ("[train]\nlr = inf", "train.lr: Input should be a finite number (given: inf)"),
        ("[data]\ntest_fraction = 1.5", "data.test_fraction: Input should be less than or equal to 1"),
        ("[train]\ncompile = true\njoint_norm = true", "compile and joint_norm are both asked for"),
        ('[train]\noptimizer = "adam"', "train.optimizer: Input should be 'sgd', 'rmsprop' or 'adamw'"),
        ("[search]\nlimits = { top1 = 'high' }", "search.limits.top1: Input should be a valid number"),
    ],
)
def test_an_unknown_key_or_a_bad_value_is_named_with_what_would_do(
    tmp_path: Path, text: str, message: str
) -> None:
    path = write(tmp_path, MINIMAL + text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.lr: .*; unknown key 'sede'"):
        load_config(write(tmp_path, MINIMAL + "sede = 1\n[train]\nlr = 0\n"))


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"memory: name: Field required; space: Field required$"):
        parse_config({}, origin="memory")


def test_a_file_that_is_not_there_or_not_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file .*missing\.toml"):
        load_config(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match=r"config\.toml is not TOML: .*line 2"):
        load_config(write(tmp_path, 'name = "toy"\nspace = toy.toml\n'))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.toml is not TOML"):
        load_config(binary)
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs=5", {"epochs": 5.0}),
        ("train.lr=1e-3", {"lr": 0.001}),
        ("train.optimizer=adamw", {"optimizer": "adamw"}),
        ('train.optimizer="rmsprop"', {"optimizer": "rmsprop"}),
    ],
)
def test_an_override_is_laid_over_the_file(
    tmp_path: Path, override: str, expected: dict[str, object]
) -> None:
    path = write(tmp_path, MINIMAL + "[train]\nepochs = 3\nweight_decay = 0.5\n")
    config = load_config(path, overrides=[override])
    assert config.train == TrainConfig.model_validate({"epochs": 3.0, "weight_decay": 0.5, **expected})


def test_an_empty_override_unsets_another_run_and_another_study(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), overrides=["search.warm_from=there", "search.study=study.db"])
    assert (config.search.warm_from, config.search.study) == ("there", "study.db")
    unset = override_config(config, ["search.warm_from=", 'search.study=""'])
    assert (unset.search.warm_from, unset.search.study) == (None, None)


def test_overrides_reach_lists_tables_and_values_with_an_equals_sign(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path),
        overrides=[
            'search.objectives=["top1", "mmacs"]',
            "search.limits.size_mb=1.5",
            "profile.device=ort:cpu?threads=2",
            "data.test_split=",
        ],
    )
    assert config.search.objectives == ("top1", "mmacs")
    assert config.search.limits == {"size_mb": 1.5}
    assert config.profile.device == "ort:cpu?threads=2"
    assert config.data.test_split == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "--set 'train.epochs' must be key=value, such as train.epochs=5"),
        ("=5", "--set '=5' must be key=value"),
        ("name.first=x", "--set 'name.first=x': name is a value, not a table"),
        ("train.epohcs=5", "unknown key 'train.epohcs'; did you mean 'epochs'?"),
        ("train.epochs=many", "train.epochs: Input should be a valid number"),
        ("seed=-1", r"seed: Input should be greater than or equal to 0 (given: -1)"),
        ("seed=18446744073709551616", r"seed: Input should be less than 18446744073709551616"),
    ],
)
def test_a_bad_override_is_told(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path), overrides=[override])
    assert message in str(caught.value)


def test_a_space_is_found_beside_the_configuration_before_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, working = tmp_path / "configs", tmp_path / "working"
    for folder in (beside, working):
        folder.mkdir()
        (folder / "both.toml").touch()
    (working / "only.toml").touch()
    monkeypatch.chdir(working)
    path = write(beside)
    assert load_config(path, overrides=["space=both.toml"]).space == str(beside / "both.toml")
    assert load_config(path, overrides=["space=only.toml"]).space == str(working / "only.toml")
    with pytest.raises(
        ConfigError, match=r"space is 'none\.toml', but there is no file .*configs/none\.toml nor"
    ):
        load_config(path, overrides=["space=none.toml"])


def test_no_password_of_a_study_is_kept() -> None:
    config = RunConfig(name="x", space="x.toml")
    for url in ("postgresql://me@board:5433/nas", "postgresql://me@/nas?host=/tmp/a:b@c", "shared/study.db"):
        assert override_config(config, [f'search.study="{url}"']).search.study == url
    for url in ("postgresql://me:secret@board/nas", "postgresql://board/nas?user=me&password=secret"):
        with pytest.raises(ConfigError, match=r"search.study: .*leave it out, and put it into ~/.pgpass"):
            override_config(config, [f'search.study="{url}"'])


def test_a_run_from_when_strategies_were_called_samplers_can_be_read() -> None:
    content = RunConfig(name="x", space="x.toml").model_dump()
    del content["search"]["strategy"]
    content["search"]["sampler"] = "TPESampler"
    assert parse_config(content, origin="x").search.strategy == "TPESampler"


def test_a_configuration_is_overridden_and_a_slip_named() -> None:
    config = RunConfig(name="x", space="x.toml")
    assert override_config(config, ["search.trials=7"]).search.trials == 7
    assert override_config(config, []) == config
    with pytest.raises(ConfigError, match="did you mean 'trials'"):
        override_config(config, ["search.trails=7"])
