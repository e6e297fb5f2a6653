"""Training data: packed sequences of the sources that a run names, or of the built-in data."""

from pretrain.data.interface import Data as Data
from pretrain.data.interface import RankShare as RankShare
from pretrain.data.open import data_config as data_config
from pretrain.data.open import open_data as open_data
from pretrain.data.packing import Category as Category
from pretrain.data.packing import Document as Document
from pretrain.data.packing import PackedSample as PackedSample
