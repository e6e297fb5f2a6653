"""Joint vision-text pretraining of a mixture-of-experts language model with MuonClip."""

# Has to come before megatron-core is imported anywhere: see there.
from pretrain.runtime import cpu as cpu
