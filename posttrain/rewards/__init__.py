"""Rewards: functions of an answer and the truth, each in [0, 1]."""
