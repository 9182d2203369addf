"""Task losses, and the terms that are made of pure functions on arrays."""

from bmjax.losses.cached import on_cached as on_cached
from bmjax.losses.cached import on_cached_head as on_cached_head
from bmjax.losses.coarse import head_coarse as head_coarse
from bmjax.losses.deviation import head_deviation as head_deviation
from bmjax.losses.features import on_features as on_features
from bmjax.losses.fused import Summand as Summand
from bmjax.losses.fused import head_cross_entropy as head_cross_entropy
from bmjax.losses.fused import head_divergence as head_divergence
from bmjax.losses.heads import on_head as on_head
from bmjax.losses.makers import on_logits as on_logits
from bmjax.losses.schedules import Schedule as Schedule
from bmjax.losses.schedules import ramp as ramp
from bmjax.losses.task import Task as Task
from bmjax.losses.task import as_term as as_term
from bmjax.losses.task import cross_entropy as cross_entropy
from bmjax.losses.task import cross_entropy_term as cross_entropy_term
from bmjax.losses.tiles import Chunks as Chunks
from bmjax.losses.tiles import Head as Head
