"""Networks behind the `Model` protocol, and their configs."""

from bmjax.models import adapters as adapters
from bmjax.models.decoder import Decoder as Decoder
from bmjax.models.encoder import Encoder as Encoder
from bmjax.models.generate import generate as generate
from bmjax.models.generate import rollout as rollout
from bmjax.models.linen import LinenModel as LinenModel
from bmjax.models.mlp import Plain as Plain
from bmjax.models.mlp import Residual as Residual
from bmjax.models.resnet import ResNet as ResNet
from bmjax.models.vit import Transformer as Transformer
