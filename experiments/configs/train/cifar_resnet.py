"""ResNet-8 on colour images at 16 pixels, 10,000 of them; give the file or folder: --config.data.source=images:<path>."""

from bmjax.data import Augment, Data
from bmjax.jobs.common import Machine
from bmjax.jobs.train import Config
from bmjax.models import ResNet
from bmjax.train.loop import Every
from bmjax.train.optimizer import Optimizer
from bmjax.train.run import Run


def get_config() -> Config:
    """The preset."""
    return Config(
        machine=Machine(devices=1),
        data=Data(source="images:", batch=128, size=16, limit=10000),
        model=ResNet(depth=8, width=16),
        run=Run(
            steps=1000,
            optimizer=Optimizer(name="sgdw", learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
            augment=Augment(crop=2, flip=0.5),
            every=Every(log=50, evaluate=250),
        ),
    )
