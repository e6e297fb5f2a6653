"""Joint vision-text pretraining of a mixture-of-experts language model with MuonClip."""
