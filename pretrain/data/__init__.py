"""What the model reads: a user's own data, or the standard library's text and images of it."""

from pretrain.data.builtin.dataset import prepare as prepare
from pretrain.data.builtin.dataset import settings as settings
from pretrain.data.interface import Data as Data
from pretrain.data.own import RankShare as RankShare
from pretrain.data.packing import CAPTION as CAPTION
from pretrain.data.packing import NOTHING as NOTHING
from pretrain.data.packing import TEXT as TEXT
from pretrain.data.packing import Document as Document
from pretrain.data.packing import PackedSample as PackedSample
