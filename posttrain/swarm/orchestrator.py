"""An orchestrator with sub-agents: an environment with two more tools.

``create_subagent`` defines a sub-agent; ``assign_task`` starts one with a task and returns its
answer. Tasks that are assigned in the same turn run at the same time, each in a separate context:
the orchestrator sees nothing but the answers. Sub-agents have no sub-agents.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from posttrain.environment.chat import Chat
from posttrain.environment.core import Environment, Message, Step, Task
from posttrain.environment.episode import Episode, Model, run_episode
from posttrain.environment.rollouts import Generate, Rollouts
from posttrain.environment.tools import Tool, ToolError, Toolset
from posttrain.swarm.parl import Stage, critical_steps


@dataclass(frozen=True)
class Limits:
    """Bounds of a swarm; the report does not publish its values.

    Attributes:
        critical_steps: of an episode.
        sub_steps: replies of a sub-agent.
        context: tokens of the orchestrator's trajectory.
        sub_context: tokens of each sub-agent's trajectory.
        assignments: tasks that are assigned in one turn; more are errors for the model.
        agents: sub-agents that are defined in an episode.

    Raises:
        ValueError: a limit is not positive.
    """

    critical_steps: int = 8
    sub_steps: int = 4
    context: int = 1024
    sub_context: int = 512
    assignments: int = 8
    agents: int = 8

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"swarm.{name}={value}: must be at least 1")


@dataclass
class _Assignment:
    steps: int = 0
    finished: bool = False


class Orchestrator(Environment):
    """The environment of an orchestrator.

    Args:
        tasks: see :data:`posttrain.environment.core.Tasks`.
        tools: the tools of a task, which sub-agents have, too; a new list for each agent.
        rollouts: runs the sub-agents.
        sub_agent: the model of sub-agents, which is not trained.
        chat: format of their conversations.
        judge, diversify: see :class:`Environment`.

    Attributes:
        stages: of the episode so far.
        sub_episodes: episodes of sub-agents; their tokens are outside the objective.
    """

    def __init__(
        self,
        tasks: Callable[[int], Task],
        tools: Callable[[Task], list[Tool]],
        rollouts: Rollouts,
        sub_agent: Model,
        chat: Chat,
        limits: Limits,
        **options: Any,
    ) -> None:
        super().__init__(tasks, tools=self._all_tools, max_turns=limits.critical_steps, **options)
        self._domain_tools = tools
        self._rollouts, self._sub_agent, self._chat = rollouts, sub_agent, chat
        self._limits = limits

    async def reset(self, *, seed: int) -> tuple[list[Message], dict[str, Any]]:
        self._agents: dict[str, str] = {}
        self._turn: list[_Assignment] = []
        self.stages: list[Stage] = []
        self.sub_episodes: list[Episode] = []
        return await super().reset(seed=seed)

    async def step(self, action: str) -> Step:
        self._turn = []
        step = await super().step(action)
        steps = tuple(assignment.steps for assignment in self._turn)
        finished = sum(assignment.finished for assignment in self._turn)
        self.stages.append(Stage(steps, finished))
        limit = self._limits.critical_steps
        if critical_steps(self.stages) >= limit and not (step.terminated or step.truncated):
            return self.truncate(step.observation, f"no answer within {limit} critical steps")
        return step

    def _all_tools(self, task: Task) -> Toolset:
        own = [Tool(self.create_subagent), Tool(self.assign_task, self._limits.assignments, None)]
        return Toolset([*own, *self._domain_tools(task)], gather=self._rollouts.gather)

    def create_subagent(self, name: str, system_prompt: str) -> str:
        """Define a sub-agent.

        Args:
            name: for assign_task.
            system_prompt: its instructions.
        """
        if name not in self._agents and len(self._agents) >= self._limits.agents:
            raise ToolError(f"there are {len(self._agents)} sub-agents, which is the limit")
        self._agents[name] = system_prompt
        return f"created {name}"

    async def assign_task(self, agent: str, prompt: str) -> str:
        """Let a sub-agent work on a task, and return its answer.

        Args:
            agent: name of a sub-agent.
            prompt: the task.
        """
        if agent not in self._agents:
            raise ToolError(f"there is no sub-agent {agent}; create it first")
        steps = self._steps_left()
        if steps < 1:
            raise ToolError("no steps are left for a sub-agent")
        assignment = _Assignment()
        self._turn.append(assignment)
        messages = (
            [{"role": "system", "content": self._agents[agent]}] if self._agents[agent] else []
        )
        messages.append({"role": "user", "content": prompt})
        environment = _SubTask(messages, Toolset(self._domain_tools(self.task)), steps)
        (episode,) = await self._rollouts.gather(
            run_episode(
                environment, self._sub_agent, self._chat, seed=0, context=self._limits.sub_context
            )
        )
        self.sub_episodes.append(episode)
        assignment.steps, assignment.finished = episode.turns, bool(episode.answer)
        if not episode.answer:
            raise ToolError(f"{agent} was stopped: {episode.failure or 'an empty answer'}")
        return episode.answer

    def _steps_left(self) -> int:
        """Limit of the replies of a sub-agent that starts in this turn."""
        used = critical_steps(self.stages) + 1
        return min(self._limits.sub_steps, self._limits.critical_steps - used)


class _SubTask(Environment):
    """The environment of a sub-agent, whose answers nobody judges."""

    def __init__(self, messages: list[Message], tools: Toolset, max_turns: int) -> None:
        task = Task("", "agentic", messages[-1]["content"], None, lambda _answer, _truth: 0.0)
        super().__init__(lambda _seed: task, tools=lambda _task: tools, max_turns=max_turns)
        self._messages = messages

    async def reset(self, *, seed: int) -> tuple[list[Message], dict[str, Any]]:
        _, info = await super().reset(seed=seed)
        return self._messages, info


@dataclass(frozen=True)
class SwarmEpisode:
    """The result of an orchestrator.

    Attributes:
        task: its task.
        episode: its own tokens and reward.
        stages: its turns.
        sub_episodes: those of its sub-agents.
    """

    task: Task
    episode: Episode
    stages: tuple[Stage, ...]
    sub_episodes: tuple[Episode, ...] = field(repr=False)

    @property
    def assigned(self) -> int:
        """Tasks that were assigned to sub-agents."""
        return len(self.sub_episodes)


def run_swarms(
    tasks: Callable[[int], Task],
    tools: Callable[[Task], list[Tool]],
    seeds: list[int],
    *,
    orchestrator: Generate,
    sub_agent: Generate,
    chat: Chat,
    limits: Limits,
    **options: Any,
) -> list[SwarmEpisode]:
    """Run one orchestrator for each seed, all at the same time.

    Whenever all agents wait, the model of the orchestrators is called once for all of them, and
    that of the sub-agents once for all of them; once for both if it is the same.

    Args:
        tasks: the task of a seed.
        tools: the tools of a task; a new list for each agent.
        orchestrator: the trained model.
        sub_agent: the frozen model.
        chat: format of the conversations.
        limits: bounds of each episode.
        options: of :class:`Environment`.
    """
    rollouts = Rollouts()

    def model(generate: Generate) -> Model:
        return lambda prompt: rollouts.generate(generate, prompt)

    async def one(seed: int) -> SwarmEpisode:
        environment = Orchestrator(
            tasks, tools, rollouts, model(sub_agent), chat, limits, **options
        )
        episode = await run_episode(
            environment, model(orchestrator), chat, seed=seed, context=limits.context
        )
        # A reply that the context cut off had no effect, and is a step nevertheless.
        cut_off = [Stage()] * (episode.turns - len(environment.stages))
        stages = (*environment.stages, *cut_off)
        sub_episodes = tuple(environment.sub_episodes)
        return SwarmEpisode(environment.task, episode, stages, sub_episodes)

    return rollouts.run(*map(one, seeds))
