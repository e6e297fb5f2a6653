"""Sizes of elements in bytes."""

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
FLOAT32 = ITEMSIZE["float32"]
INT64 = 8
