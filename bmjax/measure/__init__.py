"""Measuring: quality, whether it was lost, and speed."""

from bmjax.measure.latency import interleaved as interleaved
from bmjax.measure.metrics import Evaluation as Evaluation
from bmjax.measure.metrics import Tally as Tally
from bmjax.measure.metrics import evaluate as evaluate
from bmjax.measure.metrics import summary as summary
from bmjax.measure.metrics import tally as tally
from bmjax.measure.significance import Verdict as Verdict
from bmjax.measure.significance import accuracy_interval as accuracy_interval
from bmjax.measure.significance import non_inferiority as non_inferiority
from bmjax.measure.significance import tango_interval as tango_interval
