"""Measurements behind the claims of the READMEs: ``python -m benchmarks`` lists them."""
