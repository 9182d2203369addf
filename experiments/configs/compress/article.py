"""The 128-64-32 classifier on digits, made smaller, over 2 devices."""

from bmjax.data import Data
from bmjax.jobs.common import Machine
from bmjax.jobs.compress import Config
from bmjax.jobs.search import Pruning
from bmjax.models import Plain
from bmjax.train.loop import Every
from bmjax.train.optimizer import Optimizer
from bmjax.train.run import Run


def get_config() -> Config:
    """The preset."""
    adam, every = Optimizer(name="adam", learning_rate=1e-3), Every(log=50, evaluate=200)
    return Config(
        title="digits, 128-64-32 classifier",
        machine=Machine(devices=2),
        data=Data(source="digits", batch=256),
        model=Plain(hidden=(128, 64, 32)),
        big=Run(steps=1000, optimizer=adam, every=every),
        prune=Pruning(ratios=(2.0, 4.0, 8.0), run=Run(steps=600, optimizer=adam, every=every)),
        retrain=Run(steps=600, optimizer=adam, every=every),
    )
