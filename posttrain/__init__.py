"""Post-training of exported models: SFT, joint RL, Toggle and the agent swarm."""
