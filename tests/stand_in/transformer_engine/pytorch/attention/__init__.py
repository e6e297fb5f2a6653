from transformer_engine.pytorch.attention import rope as rope
