"""The devices of these tests."""

import pytest

ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = pytest.mark.parametrize("device", [ON_GPU, "cpu"], scope="module")
