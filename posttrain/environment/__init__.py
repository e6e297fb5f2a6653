"""Environments: asynchronous tasks of tools, judge and prompts, and their rollouts."""
