"""A teacher of colour images at 16 pixels, 10,000 of them; give the file or folder: --config.data.source=images:<path>."""

from bmjax.data import Data
from bmjax.jobs.cache import Config


def get_config() -> Config:
    """The preset."""
    return Config(data=Data(source="images:", batch=128, size=16, limit=10000), devices=1)
