"""The step that everything trains in, and the loop around it."""

from bmjax.train.step import Problem as Problem
from bmjax.train.step import init_state as init_state
from bmjax.train.step import make_step as make_step
