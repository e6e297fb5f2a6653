"""What the model reads: the standard library's text, and images of lines of it."""

from pretrain.data.dataset import Data as Data
from pretrain.data.dataset import prepare as prepare
from pretrain.data.packing import CAPTION as CAPTION
from pretrain.data.packing import NOTHING as NOTHING
from pretrain.data.packing import TEXT as TEXT
from pretrain.data.packing import Document as Document
from pretrain.data.packing import PackedSample as PackedSample
from pretrain.data.tokenizer import MEDIA_PAD as MEDIA_PAD
