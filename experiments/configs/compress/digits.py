"""A residual MLP of half a million parameters on scikit-learn's digits; the quickstart."""

from bmjax.data import Data
from bmjax.distill import Distill
from bmjax.jobs.common import Machine
from bmjax.jobs.compress import Config
from bmjax.jobs.search import Pruning
from bmjax.losses import Task
from bmjax.models import Residual
from bmjax.train.loop import Every
from bmjax.train.optimizer import Optimizer
from bmjax.train.run import Run


def get_config() -> Config:
    """The preset."""
    every = Every(log=50, evaluate=250)
    return Config(
        machine=Machine(devices=2),
        data=Data(source="digits", batch=128),
        model=Residual(layers=4, width=128, neurons=512, dropout=0.5),
        task=Task(label_smoothing=0.1),
        distill=Distill(share=0.7, temperature=2.0),
        big=Run(steps=1500, optimizer=Optimizer(learning_rate=1e-3, weight_decay=0.1), every=every),
        prune=Pruning(
            ratios=(10.5,), end=0.4, run=Run(steps=800, optimizer=Optimizer(learning_rate=1e-3, weight_decay=0.1), every=every)
        ),
        retrain=Run(steps=2000, optimizer=Optimizer(learning_rate=1e-3, weight_decay=0.1), every=every),
    )
