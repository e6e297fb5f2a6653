"""DEP, the Decoupled Encoder Process: the vision encoder's work, spread evenly over all ranks."""

from pretrain.encoder_process.stages import ColocatedEncoder as ColocatedEncoder
from pretrain.encoder_process.stages import EncoderProcess as EncoderProcess
