"""Tests that need an NVIDIA GPU: ``make gpu``.

A test has a parameter ``device``. On ``cuda`` it is skipped without a GPU. On ``cpu`` it rehearses:
the same code runs with small shapes, so that it works on the first machine with a GPU.
"""
