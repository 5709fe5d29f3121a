"""Labelled images: where they come from, how they are split, and how they reach a network.

`load_data` gives a `Data` with three disjoint splits. Images to learn from come augmented and without end
(`TrainImages.batches`); images to score by come plain, at any resolution (`EvalImages.at`).
"""

from nestling.data.batch import Batch
from nestling.data.eval_images import EvalImages
from nestling.data.load import Data, load_data
from nestling.data.pixels import DataError
from nestling.data.stream import TrainStream
from nestling.data.train_images import TrainImages

__all__ = ["Batch", "Data", "DataError", "EvalImages", "TrainImages", "TrainStream", "load_data"]
