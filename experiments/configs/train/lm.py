"""A byte decoder of about a million parameters on text, 8 x 256 bytes a step; --config.data.source=text:<file or folder>."""

from bmjax.data import Data
from bmjax.jobs.common import Machine
from bmjax.jobs.train import Config
from bmjax.models import Decoder
from bmjax.train.loop import Every
from bmjax.train.optimizer import Optimizer
from bmjax.train.run import Run


def get_config() -> Config:
    """The preset."""
    return Config(
        machine=Machine(devices=1),
        data=Data(source="text:", batch=8, length=256),
        model=Decoder(layers=5, width=128, heads=4, neurons=384),
        run=Run(
            steps=300,
            optimizer=Optimizer(name="adamw", learning_rate=3e-3, b2=0.95, weight_decay=0.1, warmup=0.1, end=0.1, clip=1.0),
            every=Every(log=20, evaluate=0),
        ),
    )
