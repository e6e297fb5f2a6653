"""Muon over many processes: matrices are rebuilt on the ranks that orthogonalize them."""

from muonclip.distributed.sharded_state import ShardedState as ShardedState
from muonclip.distributed.sharding import Sharding as Sharding
from muonclip.distributed.sharding import TensorShard as TensorShard
