"""A language model of bytes, the 64 likeliest of each; --config.data.source=text:<file or folder> as for its student."""

from bmjax.data import Data
from bmjax.jobs.cache import Config


def get_config() -> Config:
    """The preset."""
    return Config(data=Data(source="text:", batch=8, length=256), devices=1)
