"""A residual MLP of half a million parameters on scikit-learn's digits; the quickstart.

The big model is trained on shifted and noisy images. All that follows, the small model and both baselines alike, sees the plain
training images: the case of a big model that comes from elsewhere with a recipe of its own.
"""

from bmjax.data import Augment, Data
from bmjax.distill import Distill
from bmjax.jobs.common import Machine
from bmjax.jobs.compress import Config
from bmjax.jobs.search import Pruning
from bmjax.models import Residual
from bmjax.train.loop import Every
from bmjax.train.optimizer import Optimizer
from bmjax.train.run import Run


def get_config() -> Config:
    """The preset."""
    every = Every(log=50, evaluate=250)
    adamw = Optimizer(learning_rate=1e-3, weight_decay=1e-2)
    augment = Augment(shift=1, shifted=0.5, noise=0.15)
    return Config(
        machine=Machine(devices=2),
        data=Data(source="digits", batch=128),
        model=Residual(layers=4, width=128, neurons=512),
        distill=Distill(share=0.9, temperature=4.0),
        big=Run(steps=1500, optimizer=adamw, augment=augment, every=every),
        prune=Pruning(ratios=(5.0, 10.5), end=0.5, run=Run(steps=600, optimizer=adamw, every=every)),
        retrain=Run(steps=1500, optimizer=adamw, every=every),
    )
