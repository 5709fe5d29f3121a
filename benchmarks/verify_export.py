"""Anyone can check what a run says of its files, without Nestling.

Claims, for every `exports/*/card.json` of a run's folder:

1. `model.onnx` is the file that the card speaks of (SHA-256), and ONNX Runtime, numpy and PIL alone
   reproduce the card's test accuracy from it, to the image. `correct_images` is all that this takes.
2. `rebuild.py`, with torch, timm and safetensors alone, gives a network whose logits on test images are
   those of the float file (`model_fp32.onnx` beside a quantized `model.onnx`) to 1e-4 of their scale.

    python benchmarks/verify_export.py RUN [--check] [--files-only]

RUN is the folder of a finished run, such as runs/demo. Takes seconds for small images; for each file it
runs every image of the test split once. `--files-only` leaves out the second part, which needs torch.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import runpy
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image
from record import Benchmark, Figures

COMPARED_IMAGES = 64
TOLERANCE = 1e-4

Split = Mapping[str, NDArray[Any]]


def correct_images(model: Path, split: Split) -> int:
    """How many pictures of `split` the ONNX file `model` gets right, prepared as its own metadata say."""
    session = open_session(model)
    [images] = session.get_inputs()
    told = session.get_modelmeta().custom_metadata_map
    mean, std = (np.array(told[key].split(","), np.float32) for key in ("mean", "std"))
    correct = 0
    for picture, label in zip(pictures(split), split["labels"], strict=True):
        pixels = fit(picture, images.shape[-1]).astype(np.float32) / np.float32(255)
        [logits] = session.run(None, {images.name: ((pixels - mean) / std).transpose(2, 0, 1)[None]})
        correct += int(logits.argmax() == label)
    return correct


def open_session(model: Path) -> onnxruntime.InferenceSession:
    """`model`, loaded on the CPU; quantized layers stay so, and float ones beside them float."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("optimization.disable_specified_optimizers", "WeightBiasQuantization")
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def pictures(split: Split) -> Iterator[Image.Image]:
    """The pictures of a `test_split.npz`: pixels, or names of files, or encoded bytes."""
    if "images" in split:
        yield from (Image.fromarray(pixels) for pixels in split["images"])
    elif "paths" in split:
        yield from (Image.open(path).convert("RGB") for path in split["paths"])
    else:
        encoded, ends = split["encoded"].tobytes(), split["offsets"].tolist()
        for start, end in pairwise(ends):
            yield Image.open(io.BytesIO(encoded[start:end])).convert("RGB")


def fit(picture: Image.Image, side: int) -> NDArray[np.uint8]:
    """The picture's shorter side resized to `side`, bicubic, and its centre cropped: `(side, side, 3)`."""
    width, height = picture.size
    shorter = min(width, height)
    if shorter != side:
        picture = picture.resize(
            (width * side // shorter, height * side // shorter), Image.Resampling.BICUBIC
        )
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return np.asarray(picture.crop((left, top, left + side, top + side)))


def rebuilt_difference(folder: Path, split: Split, *, resolution: int) -> float:
    """How far the rebuilt network is from the float file: the largest difference over the largest logit."""
    import torch  # the first part must run where torch is not installed

    float_file = folder / "model_fp32.onnx"
    session = open_session(float_file if float_file.exists() else folder / "model.onnx")
    network: torch.nn.Module = runpy.run_path(str(folder / "rebuild.py"))["network"]
    mean, std = (split[key].astype(np.float32) for key in ("mean", "std"))
    worst = scale = 0.0
    for picture, _ in zip(pictures(split), range(COMPARED_IMAGES), strict=False):
        pixels = fit(picture, resolution).astype(np.float32) / np.float32(255)
        image = ((pixels - mean) / std).transpose(2, 0, 1)[None]
        [got] = session.run(None, {session.get_inputs()[0].name: image})
        with torch.no_grad():
            expected = network(torch.from_numpy(image)).numpy()
        worst = max(worst, float(np.abs(expected - got).max()))
        scale = max(scale, float(np.abs(expected).max()))
    if not (np.isfinite(worst) and scale > 0):
        return float("inf")
    return worst / scale


def measure(options: argparse.Namespace) -> Figures:
    """What was found for each card; prints a line for each."""
    run: Path = options.run
    cards = sorted(run.glob("exports/*/card.json"))
    if not cards:
        raise SystemExit(f"{run} holds no exports/*/card.json; give the folder of a run that has exported")
    with np.load(run / "test_split.npz", allow_pickle=False) as arrays:
        split = dict(arrays)
    files = []
    for path in cards:
        card = json.loads(path.read_text())
        model = path.with_name(card["file"])
        found = {
            "name": card["name"],
            "quantized": card["quantized"],
            "same_file": hashlib.sha256(model.read_bytes()).hexdigest() == card["sha256"],
            "images": len(split["labels"]),
            "correct": correct_images(model, split),
            "reported_images": card["test_total"],
            "reported_correct": card["test_correct"],
            "fp32_difference": None
            if options.files_only
            else rebuilt_difference(path.parent, split, resolution=card["resolution"]),
        }
        files.append(found)
        difference = "" if options.files_only else f", fp32 difference {found['fp32_difference']:.1e}"
        print(
            f"{found['name']}: {found['correct']} of {found['images']} right, reported "
            f"{found['reported_correct']} of {found['reported_images']}{difference}"
        )
    ours = sorted(name for name in sys.modules if name.partition(".")[0] == "nestling")
    return {"run": run.name, "files": files, "nestling_modules_loaded": ours}


def misses(figures: Figures) -> list[str]:
    """What of `figures` is not as the cards say."""
    found = []
    for file in figures["files"]:
        if not file["same_file"]:
            found.append(f"{file['name']}: the file's SHA-256 is not the card's")
        got, reported = ((file[f"{p}correct"], file[f"{p}images"]) for p in ("", "reported_"))
        if got != reported:
            found.append(
                f"{file['name']}: {got[0]} of {got[1]} right, reported {reported[0]} of {reported[1]}"
            )
        difference = file["fp32_difference"]
        if difference is not None and not difference <= TOLERANCE:
            found.append(f"{file['name']}: fp32 difference {difference:.1e}, at most {TOLERANCE:.0e}")
    if figures["nestling_modules_loaded"]:
        found.append(f"Nestling itself was loaded: {', '.join(figures['nestling_modules_loaded'])}")
    return found


def sentence(figures: Figures) -> str:
    """The figures in one line."""
    files = figures["files"]
    total = sum(file["reported_images"] for file in files)
    off = sum(abs(file["correct"] - file["reported_correct"]) for file in files)
    differences = [file["fp32_difference"] for file in files if file["fp32_difference"] is not None]
    worst = f"{max(differences):.1e}" if differences else "not measured"
    return f"{len(files)} files: {total - off} of {total} images agree; worst fp32 difference {worst}"


BENCHMARK = Benchmark("verify_export", __doc__, measure, sentence, misses)


def main(words: list[str] | None = None) -> int:
    parser = BENCHMARK.parser()
    parser.add_argument("run", type=Path, nargs="?", help="the folder of a run that has exported")
    parser.add_argument(
        "--files-only", action="store_true", help="leave out the comparison with rebuilt networks"
    )
    options = parser.parse_args(words)
    if options.run is None and not options.stored:
        parser.error("give the folder of a run that has exported, or --stored")
    return BENCHMARK.run(options)


if __name__ == "__main__":
    sys.exit(main())
