"""The launches of Slurm and Kubernetes are valid, and train on two nodes.

Two torchrun agents on this machine are the two nodes; Slurm's commands are replaced by scripts.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.metrics import read
from tests.distributed import training
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "docs" / "examples" / "slurm.sh"
SERVICE, JOB = yaml.safe_load_all((ROOT / "docs" / "examples" / "kubernetes.yaml").read_text())
SETTINGS = ("steps=2", "optimizer.warmup_steps=1", "optimizer.decay_steps=0", "evaluation.every=99",
            "evaluation.sequences=1", "evaluation.captions=2",
            "evaluation.transcriptions=0")  # fmt: skip
SRUN = """#!/bin/bash
[[ $1 == --kill-on-bad-exit=1 ]] || exit 2
shift
for node in 0 1; do "$@" & nodes[$node]=$!; done
wait ${nodes[0]} && wait ${nodes[1]}
"""


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder with Slurm's commands, and this environment's torchrun."""
    folder = tmp_path / "bin"
    folder.mkdir()
    torchrun = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    # More than a pipe holds: a reader that stops after the first line would end it by SIGPIPE.
    nodes = "#!/bin/bash\nset -e\necho 127.0.0.1\nseq -f node%.0f 20000\n"
    for name, text in {"srun": SRUN, "scontrol": nodes, "torchrun": torchrun}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def run(command: Sequence[str | Path], commands: Path, environment: Mapping[str, str]) -> None:
    paths = {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, env={**os.environ, **paths, **environment}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def check_run(folder: Path) -> None:
    assert [record["step"] for record in read(folder / "run" / "metrics.jsonl")] == [0, 1, 2]
    (start,) = (folder / "run" / "starts.jsonl").read_text().splitlines()
    assert '"processes": 2' in start
    assert (folder / "run" / "curves.png").exists()


def settings(folder: Path, prepared: Path) -> list[str]:
    training.tiny_file(folder, prepared)
    return [str(folder / "tiny.yaml"), f"run_dir={folder}/run",
            f"data.cache_dir={folder}/cache", *SETTINGS]  # fmt: skip


def test_slurm(tmp_path: Path, prepared: Path, commands: Path) -> None:
    script = tmp_path / "slurm.sh"  # with another port
    script.write_text(SLURM.read_text().replace(":29500", f":{free_port()}"))
    assert subprocess.run(["bash", "-n", SLURM], check=False).returncode == 0
    slurm = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1",
             "SLURM_JOB_ID": "7"}  # fmt: skip
    run(["bash", script, *settings(tmp_path, prepared)], commands, slurm)
    check_run(tmp_path)


def container() -> Any:
    (only,) = JOB["spec"]["template"]["spec"]["containers"]
    return only


def environment() -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container()["env"]}


def test_kubernetes(tmp_path: Path, prepared: Path, commands: Path) -> None:
    replaced = {
        "--nproc-per-node=8": "--nproc-per-node=1",
        "--rdzv-endpoint=pretrain-0.pretrain:29500": f"--rdzv-endpoint=127.0.0.1:{free_port()}",
    }
    command = [replaced.pop(argument, argument) for argument in container()["command"]]
    assert not replaced and command[-2:] == ["configs/h200.yaml", "run_dir=/runs/h200"]
    run(
        ["srun", "--kill-on-bad-exit=1", *command[:-2], *settings(tmp_path, prepared)],
        commands,
        environment(),
    )
    check_run(tmp_path)


def test_the_parts_of_the_kubernetes_job_fit_together() -> None:
    job, pod = JOB["spec"], JOB["spec"]["template"]["spec"]
    name = JOB["metadata"]["name"]
    assert SERVICE["metadata"]["name"] == pod["subdomain"]
    assert SERVICE["spec"]["selector"] == {"job-name": name}
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"]
    arguments = dict(
        argument.removeprefix("--").split("=")
        for argument in container()["command"]
        if argument.startswith("--")
    )
    assert int(arguments["nnodes"]) == job["parallelism"]
    assert int(arguments["nproc-per-node"]) == container()["resources"]["limits"]["nvidia.com/gpu"]
    assert arguments["rdzv-endpoint"].startswith(f"{name}-0.{pod['subdomain']}:")
    patience = int(environment()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert patience < pod["terminationGracePeriodSeconds"]
    mounts = {mount["name"] for mount in container()["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
