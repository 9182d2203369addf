"""A residual MLP of half a million parameters on scikit-learn's digits; the quickstart."""

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
    return Config(
        machine=Machine(devices=2),
        data=Data(source="digits", batch=128, augment=Augment(shift=1, shifted=0.5, noise=0.15)),
        model=Residual(layers=4, width=128, neurons=512),
        distill=Distill(share=0.9, temperature=2.0),
        big=Run(steps=800, optimizer=Optimizer(learning_rate=1e-3, weight_decay=1e-2), every=Every(log=50, evaluate=200)),
        prune=Pruning(
            ratios=(12.0,),
            run=Run(steps=400, optimizer=Optimizer(learning_rate=1e-3), every=Every(log=25, evaluate=100)),
        ),
        retrain=Run(steps=800, optimizer=Optimizer(learning_rate=2e-3), every=Every(log=50, evaluate=200)),
    )
