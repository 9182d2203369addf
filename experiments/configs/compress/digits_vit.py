"""A vision transformer on digits: heads, FFN neurons and layers are removed."""

from bmjax.data import Augment, Data
from bmjax.distill import Distill
from bmjax.jobs.common import Machine
from bmjax.jobs.compress import Config
from bmjax.jobs.search import Pruning
from bmjax.models import Transformer
from bmjax.train.loop import Every
from bmjax.train.optimizer import Optimizer
from bmjax.train.run import Run


def get_config() -> Config:
    """The preset."""
    every = Every(log=50, evaluate=250)
    adamw = Optimizer(learning_rate=1.5e-3, weight_decay=1e-2)
    augment = Augment(shift=1, shifted=0.5, noise=0.1)
    return Config(
        title="digits, vision transformer",
        machine=Machine(devices=2),
        data=Data(source="digits", batch=64),
        model=Transformer(patch=2, layers=4, width=64, heads=4, neurons=256),
        distill=Distill(share=0.9, temperature=2.0),
        big=Run(steps=1200, optimizer=adamw, augment=augment, every=every),
        prune=Pruning(ratios=(2.0, 4.0), end=0.5, run=Run(steps=400, optimizer=adamw, augment=augment, every=every)),
        retrain=Run(steps=400, optimizer=adamw, augment=augment, every=every),
    )
