"""Data by name: `load("digits")`, and batches whose position is one integer, the step."""

from bmjax.data.dataset import Dataset, Split, build, stratified
from bmjax.data.pipeline import Augment, Data, eval_batches, train_batches
from bmjax.data.sources import SOURCES, load

__all__ = [
    "SOURCES",
    "Augment",
    "Data",
    "Dataset",
    "Split",
    "build",
    "eval_batches",
    "load",
    "stratified",
    "train_batches",
]
