"""Knowledge distillation: what a student can learn from a teacher, as loss terms."""

from bmjax.distill.features import hint as hint
from bmjax.distill.logits import kd as kd
from bmjax.distill.logits import kl_divergence as kl_divergence
from bmjax.distill.objective import Distill as Distill
