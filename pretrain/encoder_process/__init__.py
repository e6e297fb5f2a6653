"""DEP, the Decoupled Encoder Process: the vision encoder's work, spread evenly over all ranks."""

from pretrain.encoder_process.encoder import ColocatedEncoder as ColocatedEncoder
from pretrain.encoder_process.encoder import EncoderProcess as EncoderProcess
