"""The launcher's defaults for its processes; settings of users stay."""

import os

import pytest
from torch.distributed import run

from pretrain.runtime import launcher


@pytest.mark.parametrize(
    ("name", "default"),
    [("OMP_NUM_THREADS", "1"), ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")],
)
def test_defaults_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str, default: str
) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(run, "main", lambda _: seen.append(os.environ.get(name)))
    environment = {n: value for n, value in os.environ.items() if n not in (name, "RANK")}
    for setting in ({name: "of the user"}, {}):
        monkeypatch.setattr(os, "environ", environment | setting)
        launcher.launch(["train"], 2)
    assert seen == ["of the user", default]
