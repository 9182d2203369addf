"""Shipping: files that run without bmjax."""

from bmjax.deploy.export import export as export
from bmjax.deploy.export import load as load
