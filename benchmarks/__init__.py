"""Benchmarks behind the figures in the READMEs; ``python -m benchmarks`` lists them."""
