"""Networks behind the `Model` protocol, and their configs."""

from bmjax.models.linen import LinenModel as LinenModel
from bmjax.models.mlp import Plain as Plain
from bmjax.models.mlp import Residual as Residual
from bmjax.models.vit import Transformer as Transformer
