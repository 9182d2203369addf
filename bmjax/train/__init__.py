"""The step that everything trains in, and the loop around it."""

from bmjax.train.step import Problem as Problem
from bmjax.train.step import abstract_state as abstract_state
from bmjax.train.step import init_state as init_state
from bmjax.train.step import make_step as make_step
from bmjax.train.step import shardings_of as shardings_of
