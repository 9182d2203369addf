"""Shipping: files that run without bmjax."""

from bmjax.deploy.export import export as export
from bmjax.deploy.export import load as load
from bmjax.deploy.export import load_params as load_params
from bmjax.deploy.export import load_state as load_state
from bmjax.deploy.export import map_params as map_params
from bmjax.deploy.export import place as place
