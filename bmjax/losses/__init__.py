"""Task losses, and the terms that are made of pure functions on arrays."""

from bmjax.losses.makers import on_features as on_features
from bmjax.losses.makers import on_logits as on_logits
from bmjax.losses.task import Task as Task
from bmjax.losses.task import as_term as as_term
from bmjax.losses.task import cross_entropy as cross_entropy
from bmjax.losses.task import cross_entropy_term as cross_entropy_term
