"""The devices of these tests."""

import pytest

DEVICES = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"], scope="module"
)
