"""Agent swarm: PARL rewards, critical steps and rollouts with frozen sub-agents."""
