"""The 128-64-32 classifier on digits, over 2 devices."""

from bmjax.data import Data
from bmjax.jobs.common import Machine
from bmjax.jobs.train import Config
from bmjax.models import Plain
from bmjax.train.loop import Every
from bmjax.train.optimizer import Optimizer
from bmjax.train.run import Run


def get_config() -> Config:
    """The preset."""
    return Config(
        machine=Machine(devices=2),
        data=Data(source="digits", batch=256),
        model=Plain(hidden=(128, 64, 32)),
        run=Run(steps=1000, optimizer=Optimizer(name="adam", learning_rate=1e-3), every=Every(log=50, evaluate=200)),
    )
