"""A LangGraph graph whose nodes are heads on one cache: a planner, and a head that writes SQL.

    pip install langchain-openai langgraph
    python examples/agents_langgraph.py --base_url=http://127.0.0.1:8000/v1     (a server: make serve)

Both nodes read and extend one conversation. What one of them has read or written is cached for the other, and each
computes what is new only.
"""

import argparse

from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

QUESTIONS = ("How many rivers are in Colorado?", "What is the capital of Texas?")


def node(name: str, base_url: str, model: str):
    chat = ChatOpenAI(base_url=base_url, api_key="none", model=model, temperature=0, max_tokens=48)

    def call(state: MessagesState) -> dict:
        answer = chat.invoke(state["messages"])
        prompt, cached = (
            answer.usage_metadata["input_tokens"],
            answer.usage_metadata["input_token_details"]["cache_read"],
        )
        print(f"{name}: {prompt} prompt tokens, {cached} cached, {prompt - cached} new")
        return {"messages": [answer]}

    return name, call


def main(base_url: str, planner: str = "smollm2-135m-instruct", writer: str = "sql") -> None:
    graph = StateGraph(MessagesState)
    graph.add_sequence([node("planner", base_url, planner), node("writer", base_url, writer)])
    graph.add_edge(START, "planner")
    agents = graph.compile(InMemorySaver())  # keeps the conversation
    for question in QUESTIONS:
        state = agents.invoke({"messages": [("user", question)]}, {"configurable": {"thread_id": "geography"}})
        print(state["messages"][-1].content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--base_url", default="http://127.0.0.1:8000/v1")
    main(parser.parse_args().base_url)
