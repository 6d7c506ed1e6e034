"""Two agents of the OpenAI Agents SDK on one cache: a planner hands over to a head that writes SQL.

    pip install openai-agents
    python examples/agents_sdk.py --base_url=http://127.0.0.1:8000/v1     (a server: make serve)

Each agent is a model of the server. Both have the same instructions and the same tools, which stand at the start of
every prompt. So what one of them has read or written is cached for the other, and each computes what is new only.
"""

import argparse

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, RunHooks, Runner, set_tracing_disabled
from openai import AsyncOpenAI

INSTRUCTIONS = "You answer questions about the geography of the United States with SQL."
QUESTIONS = ("How many rivers are in Colorado?", "What is the capital of Texas?")


class Tokens(RunHooks):
    async def on_llm_end(self, context, agent, response) -> None:
        usage = response.usage
        cached = usage.input_tokens_details.cached_tokens
        print(f"{agent.name}: {usage.input_tokens} prompt tokens, {cached} cached, {usage.input_tokens - cached} new")


def main(base_url: str, planner: str = "smollm2-135m-instruct", writer: str = "sql") -> None:
    set_tracing_disabled(True)  # the SDK sends traces to OpenAI
    client = AsyncOpenAI(base_url=base_url, api_key="none")

    def agent(name: str, model: str, **settings) -> Agent:
        return Agent(
            name,
            instructions=INSTRUCTIONS,
            model=OpenAIChatCompletionsModel(model, client),
            model_settings=ModelSettings(temperature=0, max_tokens=48, **settings),
        )

    plans = agent("planner", planner, tool_choice="transfer_to_writer")  # a small model would not call it by itself
    writes = agent("writer", writer)
    plans.handoffs = writes.handoffs = [plans, writes]  # each handoff is a tool: both agents have the same ones
    history = []
    for question in QUESTIONS:
        result = Runner.run_sync(plans, [*history, {"role": "user", "content": question}], hooks=Tokens())
        print(result.final_output)
        history = result.to_input_list()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--base_url", default="http://127.0.0.1:8000/v1")
    main(parser.parse_args().base_url)
