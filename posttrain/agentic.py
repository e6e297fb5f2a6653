"""Responses to agentic tasks: episodes, in which the model calls tools."""

from collections.abc import Sequence
from typing import Any

from posttrain.environment import abilities
from posttrain.environment.chat import KimiChat
from posttrain.environment.core import Environment, Task
from posttrain.environment.episode import Episode, run_episode
from posttrain.environment.rollouts import Rollouts, Sample
from posttrain.model import Exported
from posttrain.sampling import Sampler


def play(
    exported: Exported,
    model: Any,
    tasks: Sequence[Task],
    *,
    max_tokens: int,
    temperature: float,
) -> list[Episode]:
    """Run one episode for each task, all at the same time.

    Prompts do not declare the tools, which a model learns from demonstrations or rewards.

    Args:
        exported: the model's tokenizer.
        model: samples the replies.
        max_tokens: limit of a trajectory, without its prompt.
        temperature: of the samples.
    """
    tokenizer, rollouts = exported.tokenizer, Rollouts()
    chat = KimiChat(tokenizer, declare_tools=False)
    sampler = Sampler.of_chat(model, tokenizer, temperature=temperature, max_tokens=max_tokens)

    async def reply(prompt: list[int]) -> Sample:
        return await rollouts.generate(sampler, prompt)

    async def one(number: int) -> Episode:
        environment = Environment(lambda seed: tasks[seed], tools=abilities.tools)
        prompt = chat.prompt([{"role": "user", "content": tasks[number].question}])
        context = len(prompt) + max_tokens
        return await run_episode(environment, reply, chat, seed=number, context=context)

    return rollouts.run(*map(one, range(len(tasks))))
