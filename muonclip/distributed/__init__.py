"""Muon's matrices over many processes: whole matrices are rebuilt on owners, and updates return."""

from muonclip.distributed.sharding import Block as Block
from muonclip.distributed.sharding import Sharding as Sharding
