"""Data by name: `load("digits")`, and batches whose position is one integer, the step."""

from bmjax.data.augment import Augment
from bmjax.data.augment import check as check_augment
from bmjax.data.dataset import Dataset, Split, build, limited, stratified
from bmjax.data.packing import Documents, sequences
from bmjax.data.pipeline import Data, eval_batches, train_batches
from bmjax.data.sources import SOURCES, Source, load
from bmjax.data.stream import stream

__all__ = [
    "SOURCES",
    "Augment",
    "Data",
    "Dataset",
    "Documents",
    "Source",
    "Split",
    "build",
    "check_augment",
    "eval_batches",
    "limited",
    "load",
    "sequences",
    "stratified",
    "stream",
    "train_batches",
]
