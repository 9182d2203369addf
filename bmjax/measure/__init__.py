"""Measuring: quality, whether it was lost, and speed."""

from bmjax.measure.bigram import bigram_bits as bigram_bits
from bmjax.measure.evaluation import Evaluation as Evaluation
from bmjax.measure.evaluation import evaluate as evaluate
from bmjax.measure.latency import interleaved as interleaved
from bmjax.measure.metrics import Tally as Tally
from bmjax.measure.metrics import summary as summary
from bmjax.measure.metrics import tally as tally
from bmjax.measure.significance import Verdict as Verdict
from bmjax.measure.significance import accuracy_interval as accuracy_interval
from bmjax.measure.significance import examples_needed as examples_needed
from bmjax.measure.significance import non_inferiority as non_inferiority
from bmjax.measure.significance import tango_interval as tango_interval
from bmjax.measure.similarity import hsic as hsic
from bmjax.measure.similarity import linear_cka as linear_cka
from bmjax.measure.similarity import minibatch_cka as minibatch_cka
from bmjax.measure.tokens import TokenEvaluation as TokenEvaluation
from bmjax.measure.tokens import TokenTally as TokenTally
from bmjax.measure.tokens import summary_of_tokens as summary_of_tokens
from bmjax.measure.tokens import tally_tokens as tally_tokens
