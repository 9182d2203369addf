"""Teacher 128-64-32, student 32-16, on digits over 2 devices; the student's exported file predicts the test split."""

import dataclasses

from bmjax.distill import Distill
from bmjax.jobs.train import Config, Teacher
from bmjax.models import Plain
from experiments.configs.train import article


def get_config() -> Config:
    """The preset."""
    base = article.get_config()
    teacher = Teacher(model=base.model, run=base.run, distill=Distill(share=0.9, temperature=4.0))
    return dataclasses.replace(base, model=Plain(hidden=(32, 16)), teacher=teacher, predict=True)
