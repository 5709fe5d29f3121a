"""The command line: each sub-command is one call into the pipeline. Data on stdout, all else on stderr."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from nestling.config import RunConfig

# Nothing heavy is imported here: `nestling --help` answers at once. Each command imports what it runs.

BAD_INPUT, NO_DEVICE, STOPPED, INTERRUPTED = 2, 3, 4, 130
EXIT_CODES = {
    "ConfigError": BAD_INPUT,
    "DataError": BAD_INPUT,
    "SpaceError": BAD_INPUT,
    "RunError": BAD_INPUT,
    "InfeasibleLimit": BAD_INPUT,
    "StudyMismatch": BAD_INPUT,
    "StudyUnavailable": STOPPED,
    "WorkersLost": STOPPED,
    "ClickException": BAD_INPUT,
    "DeviceError": NO_DEVICE,
    "DevicesGoneError": NO_DEVICE,
    "TrainingStopped": STOPPED,
    "RanksError": STOPPED,
    "CheckpointError": STOPPED,
    "EvaluationFailed": STOPPED,
    "StoreError": STOPPED,
    "OSError": STOPPED,
}
"""Errors that a person can act on, by name: their modules are not imported before they are needed."""

app = typer.Typer(
    name="nestling",
    help="Neural architecture search that hands over what it measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Lay a value over the configuration.")
]
ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A configuration, such as configs/demo.toml.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FOLDER", help="The run's folder. [default: runs/NAME]"),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue a run that is there; an error if there is none.")
]
Study = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The study's database: postgresql://user@host/database. [default: the run's own, in SQLite]",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def run(config: ConfigFile, output: Output = None, set_: Overrides = None, resume: Resume = False) -> None:
    """Train, search, export and report, all of it; continues where it was stopped."""
    _keep_memory()
    _check_alone()
    loaded, folder = _load(config, output, set_, resume=resume)
    from nestling import console, pipeline

    with console.display() as listener:
        members, report = pipeline.run_all(loaded, folder, listener=listener)
    console.print_front(members, report)


@app.command()
def train(config: ConfigFile, output: Output = None, set_: Overrides = None, resume: Resume = False) -> None:
    """Train the supernet; continues from the newest checkpoint.

    On many GPUs: `torchrun --nproc_per_node=8 -m nestling.cli train CONFIG`, on a folder that all see.
    """
    _keep_memory()
    loaded, folder = _load(config, output, set_, resume=resume)
    from nestling import console, pipeline

    with pipeline.join_ranks(loaded) as ranks:
        silent = nullcontext(pipeline.Silent())
        with console.display() if ranks.first else silent as listener:
            bench = pipeline.prepare(loaded, folder, listener=listener, ranks=ranks)
            try:
                pipeline.train_supernet(bench, listener=listener)
            finally:
                bench.close()
    if ranks.first:
        console.print_next(f"nestling search {folder}")


@app.command()
def evaluate(
    folder: RunFolder,
    subnets: Annotated[
        int, typer.Option(help="How many networks are scored, spread from cheapest to dearest.")
    ] = 20,
    alone: Annotated[
        int, typer.Option(help="How many of them are also trained by themselves, to compare with.")
    ] = 0,
    epochs: Annotated[
        float | None, typer.Option(help="Epochs of training alone. [default: the supernet's]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell how good the trained supernet is, over all costs; continues where it was stopped.

    On many GPUs: `torchrun --nproc_per_node=8 -m nestling.cli evaluate RUN`.
    """
    _keep_memory()
    _check_run(folder, together=True)
    from nestling import console, pipeline

    with pipeline.join_ranks(pipeline.open_run(folder).config) as ranks:
        bench = pipeline.open_run(folder, ranks=ranks)
        silent = nullcontext(pipeline.Silent())
        try:
            with console.display() if ranks.first else silent as listener:
                found = pipeline.evaluate_supernet(
                    bench, subnets=subnets, alone=alone, epochs=epochs, listener=listener
                )
        finally:
            bench.close()
    if ranks.first:
        console.print_evaluation(found, as_json=as_json)


@app.command()
def latency(
    folder: RunFolder,
    networks: Annotated[
        int, typer.Option("--measure", help="How many networks are measured, from cheapest to dearest.")
    ] = 100,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Measure their blocks as well, for a lookup table beside it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Learn to predict the latencies of a run's networks; continues where it was stopped.

    Predictions leave candidates out of a search, never measurements out of a result. The run need not be
    trained.
    """
    _check_run(folder)
    from nestling import console, pipeline

    bench = pipeline.open_run(folder)
    try:
        with console.display() as listener:
            found = pipeline.learn_latency(bench, networks=networks, with_blocks=blocks, listener=listener)
    finally:
        bench.close()
    console.print_latency(found, as_json=as_json)


@app.command()
def search(
    folder: RunFolder,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes of this machine that evaluate candidates. [default: 1]"),
    ] = None,
    study: Study = None,
    at_most: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=BOUND", help="A limit on a cost, such as latency_ms=5."),
    ] = None,
    at_least: Annotated[
        list[str] | None, typer.Option(metavar="METRIC=BOUND", help="A limit on accuracy, such as top1=0.9.")
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="A run of the same supernet for another device, whose accuracies are taken over. If the "
            "first folder has no run yet, one begins there, for another device: --set profile.device=...",
        ),
    ] = None,
    set_: Overrides = None,
    resume: Resume = False,
) -> None:
    """Search the trained supernet; continues where it was stopped. `--set search.trials=200` extends it.

    With limits, which take the place of those on the same metrics, the best network that keeps them all is
    handed over; candidates of before are judged anew, and not evaluated again.
    """
    _keep_memory()
    begins = from_ is not None and not (folder / "training.json").exists()
    _check_run(folder if from_ is None or not begins else from_)
    from nestling import console, pipeline

    other = None if from_ is None else str(from_.resolve())
    asked = {"search.workers": workers, "search.study": study, "search.warm_from": other}
    overrides = [f"{key}={json.dumps(value)}" for key, value in asked.items() if value is not None]
    overrides += pipeline.limit_overrides(at_most=at_most or (), at_least=at_least or ())
    overrides += set_ or ()
    if from_ is not None and begins:
        with console.display() as listener:
            bench = pipeline.begin_from(folder, other=from_, overrides=overrides, listener=listener)
    else:
        bench = pipeline.open_run(folder, overrides=overrides)
    try:
        if resume and not pipeline.is_searched(bench):
            from nestling.run import RunError

            raise RunError(f"{folder} was not searched yet; leave --resume out")
        with console.display() as listener:
            result = pipeline.search_supernet(bench, listener=listener)
            limited = at_most or at_least
            best = pipeline.export_best(bench, listener=listener) if limited else None
    finally:
        bench.close()
    console.print_trials(result)
    if best is not None:
        console.print_best(best, result, folder)
    console.print_next(f"nestling export {folder}")


@app.command()
def worker(
    folder: RunFolder,
    study: Study = None,
    set_: Overrides = None,
    tied: Annotated[bool, typer.Option("--tied", hidden=True, help="End with standard input.")] = False,
) -> None:
    """Evaluate candidates of a search beside other processes, until it is done.

    On another machine RUN is a copy of the run's folder, and the study a PostgreSQL database.

    `--set` holds for this worker alone: data.source, where images lie elsewhere.
    """
    _keep_memory()
    _check_run(folder)
    from nestling import console, pipeline

    if tied:
        pipeline.end_with_input()
    bench = pipeline.open_run(folder, overrides=set_ or ())
    try:
        with console.display() as listener:
            pipeline.join_search(bench, study=study, listener=listener)
    finally:
        bench.close()


@app.command()
def export(
    folder: RunFolder,
    arch: Annotated[
        str | None,
        typer.Argument(
            metavar="[ARCH]",
            help="`smallest`, `largest`, a trial's key, an exported network's name, decisions as JSON or in "
            "a JSON file.",
        ),
    ] = None,
) -> None:
    """Hand over the front, or one network: ONNX file, plain weights, figures."""
    _check_run(folder)
    from nestling import console, pipeline

    bench = pipeline.open_run(folder)
    try:
        with console.display() as listener:
            if arch is None:
                members = pipeline.export_front(bench, listener=listener)
            else:
                members = [pipeline.export_arch(bench, pipeline.find_arch(bench, arch), listener=listener)]
    finally:
        bench.close()
    console.print_members(members)


@app.command()
def finetune(
    folder: RunFolder,
    arch: Annotated[
        str,
        typer.Argument(
            metavar="ARCH",
            help="`smallest`, `largest`, a trial's key, an exported network's name, decisions as JSON or in "
            "a JSON file.",
        ),
    ],
    from_scratch: Annotated[
        bool,
        typer.Option(
            "--from-scratch",
            help="Begin as the supernet began (with new weights, or pretrained ones) and use its recipe.",
        ),
    ] = False,
    epochs: Annotated[
        float | None,
        typer.Option(help="[default: 25, as once-for-all has it (it also has 75); from scratch, the run's]"),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="The highest learning rate. [default: 0.1 of the run's; from scratch, the run's]"),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="largest|parent|none|TIMM_NAME[=PATH]",
            help="Whose soft labels it learns from: the supernet's largest network's, with --qat its own in "
            "floats (parent), none, or a timm model's, its weights in a file. [default: largest; none for "
            "the largest itself; parent with --qat]",
        ),
    ] = None,
    teacher_weight: Annotated[
        float | None, typer.Option(help="Of the teacher's soft labels. [default: 1, as in once-for-all]")
    ] = None,
    labels_weight: Annotated[
        float | None, typer.Option(help="Of the labels. [default: 1, as in once-for-all]")
    ] = None,
    qat: Annotated[
        bool,
        typer.Option(
            "--qat", help="Train it in its precisions, scales and all; the file is what was trained."
        ),
    ] = False,
    qat_method: Annotated[
        Literal["lsq", "ofq"],
        typer.Option(
            help="lsq: learned scales. ofq: statistical scales of weights, undecided weights last, queries "
            "and keys of vision transformers as one product.",
        ),
    ] = "lsq",
    as_json: AsJson = False,
) -> None:
    """Train one network further, or anew, and hand it over; continues where it was stopped."""
    _keep_memory()
    _check_run(folder)
    from nestling import console, pipeline

    bench = pipeline.open_run(folder)
    try:
        with console.display() as listener:
            found = pipeline.find_arch(bench, arch)
            asked = pipeline.tuning(
                bench,
                found,
                from_scratch=from_scratch,
                epochs=epochs,
                lr=lr,
                teacher=teacher,
                teacher_weight=teacher_weight,
                labels_weight=labels_weight,
                qat=qat_method if qat else None,
            )
            card = pipeline.finetune(bench, found, asked, listener=listener)
    finally:
        bench.close()
    console.print_finetuned(card, as_json=as_json)


@app.command()
def report(folder: RunFolder) -> None:
    """Write the run's report anew, from what the run has so far."""
    _check_run(folder)
    from nestling import console, pipeline

    bench = pipeline.open_run(folder)
    try:
        with console.display() as listener:
            files = pipeline.make_report(bench, listener=listener)
    finally:
        bench.close()
    print(files.html.resolve())


@app.command()
def profile(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="MODEL.onnx...", help="ONNX files with their weights inside.", show_default=False
        ),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS",
            help="Such as ort:cpu?threads=1 or openvino:cpu; again for further ones. "
            "[default: ort:cpu?threads=1]",
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            min=0.01, help="The longest that timing may take; three times that while others slow the device."
        ),
    ] = 3.0,
    nodes: Annotated[bool, typer.Option("--nodes", help="Tell the time of each node.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with a picture of the nodes' times.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Tell how many times faster the first of two files is.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the latency of ONNX files on devices, or compare two files."""
    if not models:
        raise typer.BadParameter("give at least one ONNX file")
    if compare and (len(models) != 2 or nodes or html is not None):
        raise typer.BadParameter("--compare takes two files, and neither --nodes nor --html")
    from nestling import console
    from nestling.profile import compare_on_each, profile_on_each

    addresses = device or ["ort:cpu?threads=1"]
    if compare:
        compared, refused = compare_on_each(addresses, models[0], models[1], seconds=seconds)
        console.print_comparisons(compared, refused=refused, as_json=as_json)
    else:
        with_nodes = nodes or html is not None
        profiles, refused = profile_on_each(addresses, models, seconds=seconds, nodes=with_nodes)
        if html is not None and profiles:
            from nestling import pipeline

            pipeline.write_profile_page(profiles, html)
        console.print_profiles(profiles, refused=refused, nodes=nodes, as_json=as_json)
    for reason in dict.fromkeys(one.reason for one in refused):
        print(f"error: {reason}", file=sys.stderr)
    if refused:
        raise typer.Exit(NO_DEVICE)


@app.command()
def devices(
    places: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN|STORE]...", help="Runs or stores whose devices are listed too."),
    ] = None,
    noise: Annotated[
        bool, typer.Option("--noise", help="Time the reference model beside itself on those of this machine.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the devices of this machine, and those that runs were measured on; and how noisy each is."""
    from nestling import console
    from nestling.profile import devices_here, devices_in, with_aa_spread

    stores = [place / "measurements.db" if place.is_dir() else place for place in places or []]
    for store in stores:
        if not store.exists():
            raise typer.BadParameter(f"there is no store of measurements {store}")
    found = devices_here()
    if noise:
        found = [with_aa_spread(one) if one.fingerprint is not None else one for one in found]
    failed = [one for one in found if noise and one.fingerprint is not None and one.refusal]
    for store in stores:
        found += devices_in(store)
    console.print_devices(found, as_json=as_json)
    for one in failed:
        print(f"error: the noise of {one.address} cannot be told: {one.refusal}", file=sys.stderr)
    if failed:
        raise typer.Exit(NO_DEVICE)


@app.command()
def precisions(
    device: Annotated[str, typer.Argument(metavar="DEVICE", help="Such as ort:cpu?threads=1.")],
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PRECISION", help="Try this one, such as w8a8; may be given several times."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell which precisions a device executes, how fast, and which it refuses; by trying each."""
    from nestling import console, pipeline
    from nestling.profile import open_device

    unknown = set(only or ()) - set(pipeline.PRECISIONS)
    if unknown:
        known = ", ".join(pipeline.PRECISIONS)
        raise typer.BadParameter(f"{min(unknown)!r} is no precision; there are {known}", param_hint="--only")
    with open_device(device) as connected, console.display() as listener:
        listener.note(f"device: {connected.fingerprint}")
        asked = tuple(only or pipeline.PRECISIONS)
        findings = pipeline.probe_precisions(
            connected,
            asked,
            timed=True,
            on_found=lambda found: listener.trying(f"{found.precision}, {found.kind}: {found.status}"),
        )
        facts = pipeline.table_facts(connected, findings, precisions=asked)
    console.print_precisions(facts, as_json=as_json)


@app.command()
def space(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="A space, such as search_spaces/mobilenet_digits.toml."),
    ] = None,
    axes: Annotated[bool, typer.Option("--axes", help="Print what each choice governs.")] = False,
    timm: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Propose a space of a timm model: a file, on stdout."),
    ] = None,
    convert: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The same, of the channels and blocks that a timm model has."),
    ] = None,
    classes: Annotated[
        int, typer.Option(min=1, help="Classes, where the space leaves them to the data.")
    ] = 1000,
    resolution: Annotated[
        int | None,
        typer.Option(min=8, help="Resolution, where the space has none. [default: 224]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a space's size, its choices and the cost of its extremes; or propose a space."""
    if sum(given is not None for given in (file, timm, convert)) != 1:
        raise typer.BadParameter("give one of FILE, --timm MODEL and --convert MODEL")
    if file is None:
        if axes or as_json:
            raise typer.BadParameter("--axes and --json are for a space FILE")
        from nestling import pipeline

        if timm is not None:
            print(pipeline.propose_space(timm, classes=classes, resolution=resolution), end="")
        else:
            print(pipeline.convert_space(str(convert), classes=classes, resolution=resolution), end="")
        return
    from nestling.space import load_space

    load_space(file)  # a slip in the file is told before the heavy imports
    from nestling import console, pipeline

    if axes:
        found = pipeline.space_axes(file, classes=classes, resolution=resolution)
        print(json.dumps(found.to_json(), indent=2) if as_json else found)
        return
    summary = pipeline.space_summary(file, classes=classes, resolution=resolution)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        console.print_space(file, summary)


def main() -> None:
    """Runs the command line; the process ends with its exit code."""
    try:
        # typer answers Ctrl-C, --help and the like with an exit code
        code = app(standalone_mode=False) or 0
    except typer.Abort:
        code = INTERRUPTED
    except Exception as error:
        _end(error)
    if code == INTERRUPTED:
        print("interrupted: what is done is kept, and the same command continues it", file=sys.stderr)
    sys.exit(code)


def _end(error: Exception) -> NoReturn:
    """Ends the process: with one line for what a person can mend, with a traceback for our own faults."""
    # a command that failed has imported what it failed in; --help has not, and must not
    code = next(
        (code for kind in type(error).__mro__ if (code := EXIT_CODES.get(kind.__name__)) is not None), None
    )
    if code is None:
        raise error
    if str(error):  # a command without arguments has printed its help, and has nothing to add
        print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


def _keep_memory() -> None:
    """Lets this process train faster on a CPU, for the memory that it then holds to its end."""
    from nestling.memory import keep_freed_memory

    keep_freed_memory()


def _check_alone() -> None:
    """Refuses to be one of many processes, which would all write the same files."""
    from nestling.run import RunError

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RunError(
            "torchrun is for `nestling train` and `nestling evaluate`; start other commands without it"
        )


def _check_run(folder: Path, *, together: bool = False) -> None:
    """Refuses a folder without a run, and many processes unless `together`, before all that is heavy."""
    from nestling.run import Run

    if not together:
        _check_alone()
    Run.open(folder).config()


def _load(
    config: Path, output: Path | None, overrides: list[str] | None, *, resume: bool
) -> tuple[RunConfig, Path]:
    """The configuration, and the run's folder; with `resume` the folder must hold a run."""
    from nestling.config import load_config
    from nestling.run import Run

    loaded = load_config(config, overrides=overrides or ())
    folder = output or Path("runs") / loaded.name
    if resume:
        Run.open(folder)
    return loaded, folder


if __name__ == "__main__":
    main()
