"""Knowledge distillation: what a student can learn from a teacher, as pure functions on arrays.

Batch first, images NHWC. Losses on logits return a value for each item; those on features, and those that relate examples, one
number. `losses.on_logits` and `losses.on_features` make terms of them.
"""

from bmjax.distill import vocabulary as vocabulary
from bmjax.distill.activations import activation_boundary as activation_boundary
from bmjax.distill.activations import vid as vid
from bmjax.distill.activations import vid_variance as vid_variance
from bmjax.distill.cached import cached_kd as cached_kd
from bmjax.distill.cached import cached_soft_cross_entropy as cached_soft_cross_entropy
from bmjax.distill.cached import coarse as coarse
from bmjax.distill.cached import on_top_k as on_top_k
from bmjax.distill.cached import on_top_k_head as on_top_k_head
from bmjax.distill.cached_objective import cached_terms as cached_terms
from bmjax.distill.classes import OfClasses as OfClasses
from bmjax.distill.consistency import consistency as consistency
from bmjax.distill.contrast import crd as crd
from bmjax.distill.contrast import crd_embedding as crd_embedding
from bmjax.distill.contrast import crd_term as crd_term
from bmjax.distill.decoupled import dkd as dkd
from bmjax.distill.divergences import jsd as jsd
from bmjax.distill.divergences import reverse_kl as reverse_kl
from bmjax.distill.divergences import skew_kl as skew_kl
from bmjax.distill.divergences import skew_reverse_kl as skew_reverse_kl
from bmjax.distill.divergences import tvd as tvd
from bmjax.distill.features import cosine as cosine
from bmjax.distill.features import hint as hint
from bmjax.distill.layer_map import auto as auto
from bmjax.distill.layer_map import last as last
from bmjax.distill.layer_map import stride as stride
from bmjax.distill.layer_map import uniform as uniform
from bmjax.distill.logits import kd as kd
from bmjax.distill.logits import kl_divergence as kl_divergence
from bmjax.distill.logits import label_smoothing_teacher as label_smoothing_teacher
from bmjax.distill.logits import logit_standardized_kd as logit_standardized_kd
from bmjax.distill.logits import soft_cross_entropy as soft_cross_entropy
from bmjax.distill.low_precision import low_precision as low_precision
from bmjax.distill.maps import attention_transfer as attention_transfer
from bmjax.distill.maps import factor_transfer as factor_transfer
from bmjax.distill.maps import fsp as fsp
from bmjax.distill.maps import nst as nst
from bmjax.distill.objective import Distill as Distill
from bmjax.distill.relations import correlation as correlation
from bmjax.distill.relations import dist as dist
from bmjax.distill.relations import pkt as pkt
from bmjax.distill.relations import rkd as rkd
from bmjax.distill.relations import similarity as similarity
from bmjax.distill.review import review_fusion as review_fusion
from bmjax.distill.review import review_kd as review_kd
from bmjax.distill.rollout import Rollouts as Rollouts
from bmjax.distill.rollout import off_policy as off_policy
from bmjax.distill.rollout import on_policy as on_policy
from bmjax.distill.teachers import Ensemble as Ensemble
from bmjax.distill.teachers import confident as confident
from bmjax.distill.teachers import ensemble as ensemble
from bmjax.distill.teachers import right as right
from bmjax.distill.transformers import attention_relation as attention_relation
from bmjax.distill.transformers import attention_scores as attention_scores
from bmjax.distill.transformers import hidden_states as hidden_states
from bmjax.distill.transformers import value_relation as value_relation
from bmjax.distill.vocabulary import same_vocabulary as same_vocabulary
