"""A teacher of digits, over 2 devices, all 10 classes."""

from bmjax.data import Data
from bmjax.jobs.cache import Config


def get_config() -> Config:
    """The preset."""
    return Config(data=Data(source="digits", batch=256), devices=2)
