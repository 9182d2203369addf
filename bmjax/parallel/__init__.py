"""Devices: meshes from a string, rules that partition parameters, collectives over the batch."""

from bmjax.parallel import collectives as collectives
from bmjax.parallel.launch import check_processes as check_processes
from bmjax.parallel.launch import join as join
from bmjax.parallel.launch import simulate as simulate
from bmjax.parallel.mesh import batch_sharding as batch_sharding
from bmjax.parallel.mesh import check_batch as check_batch
from bmjax.parallel.mesh import feed as feed
from bmjax.parallel.mesh import is_partitioned as is_partitioned
from bmjax.parallel.mesh import make_mesh as make_mesh
from bmjax.parallel.mesh import parse_mesh as parse_mesh
from bmjax.parallel.mesh import put_batch as put_batch
from bmjax.parallel.mesh import replicated as replicated
from bmjax.parallel.rules import like_params as like_params
from bmjax.parallel.rules import partition as partition
