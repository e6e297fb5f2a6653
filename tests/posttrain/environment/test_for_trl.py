"""TRL's GRPOTrainer trains with an environment of this project."""

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers.utils import get_json_schema
from trl import GRPOConfig, GRPOTrainer

from posttrain import model
from posttrain.environment.abilities import mixture, tools
from posttrain.environment.core import Environment
from posttrain.environment.for_trl import RESPONSE_TEMPLATE, environment_factory, judged
from posttrain.environment.markup import render_calls
from pretrain.data import chat
from pretrain.export import chat_templates


def get(key: str) -> str:
    """Return the content of a record.

    Args:
        key: name of the record.
    """
    raise NotImplementedError


def create(**options: Any) -> Environment:
    return Environment(mixture({"follow": 1}), tools=tools, **options)


def test_methods_are_tools() -> None:
    environment = environment_factory(create, [get])()
    assert environment.reset(seed=1, prompt="ignored") == mixture({"follow": 1})(1).question
    schema = get_json_schema(environment.get)["function"]
    assert schema["name"] == "get"
    assert schema["parameters"]["properties"]["key"]["description"] == "name of the record."
    name = mixture({"follow": 1})(1).question.removeprefix("get:")
    assert asyncio.run(environment.get(key=name)) == mixture({"follow": 1})(1).data[name]
    with pytest.raises(Exception, match="no record"):
        asyncio.run(environment.get(key="none"))


def test_the_final_message_is_judged() -> None:
    def reward(message: dict[str, Any], **options: Any) -> float | None:
        environment = environment_factory(lambda: create(**options), [get])()
        environment.reset(seed=1)
        return asyncio.run(judged([[message]], [environment]))[0]

    truth = mixture({"follow": 1})(1).truth
    assert reward({"role": "assistant", "content": f" {truth}\n"}) == 1
    assert reward({"role": "assistant", "content": "wrong"}) == 0
    assert reward({"role": "assistant", "content": truth, "tool_calls": [{}]}) == 0
    assert reward({"role": "tool", "content": truth}) == 0
    failing: Any = lambda _task, _answer: math.nan  # noqa: E731
    assert reward({"role": "assistant", "content": truth}, judge=failing) is None


def test_replies_are_read(text_export: Path) -> None:
    tokenizer = model.load(text_export).hf_tokenizer
    tokenizer.response_template = RESPONSE_TEMPLATE
    prefix = "<|im_assistant|>assistant<|im_middle|>"
    calls = render_calls([("get", {"key": "a"}), ("get", {"key": "b"})])
    reply = tokenizer.parse_response(f"<think>why</think>so{calls}<|im_end|>", prefix=prefix)
    assert reply["role"] == "assistant"
    assert (reply["reasoning_content"], reply["content"]) == ("why", "so")
    functions = [call["function"] for call in reply["tool_calls"]]
    assert functions == [{"name": "get", "arguments": {"key": key}} for key in "ab"]
    assert tokenizer.parse_response("7<|im_end|>", prefix=prefix)["content"] == "7"


def test_a_step_of_trl(text_export: Path, tmp_path: Path) -> None:
    exported = model.load(text_export)
    template = chat.template(exported.tokenizer, chat_templates.content(None, is_chat=True))
    exported.hf_tokenizer.chat_template = template
    exported.hf_tokenizer.response_template = RESPONSE_TEMPLATE
    trainer = GRPOTrainer(
        model=exported.model,
        processing_class=exported.hf_tokenizer,
        reward_funcs=[judged],
        environment_factory=environment_factory(create, [get]),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=4,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": ""}]] * 2, "seed": [1, 2]}
        ),
    )
    trainer.train()
    assert trainer.state.log_history[0]["reward"] == 0
