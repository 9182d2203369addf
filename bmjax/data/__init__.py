"""Data by name: `load("digits")`, and batches whose position is one integer, the step."""

from bmjax.data.augment import Augment
from bmjax.data.augment import check as check_augment
from bmjax.data.dataset import Dataset, Split, build, limited, stratified
from bmjax.data.packing import Documents, sequences
from bmjax.data.pipeline import Data, eval_batches, train_batches
from bmjax.data.sources import SOURCES, Source, load
from bmjax.data.stream import stream
from bmjax.data.teacher_cache import TeacherCache, open_cache
from bmjax.data.teacher_plan import CachePlan, plan_cache
from bmjax.data.teacher_record import RecordLayout
from bmjax.data.teacher_shards import write as write_cache

__all__ = [
    "SOURCES",
    "Augment",
    "CachePlan",
    "Data",
    "Dataset",
    "Documents",
    "RecordLayout",
    "Source",
    "Split",
    "TeacherCache",
    "build",
    "check_augment",
    "eval_batches",
    "limited",
    "load",
    "open_cache",
    "plan_cache",
    "sequences",
    "stratified",
    "stream",
    "train_batches",
    "write_cache",
]
