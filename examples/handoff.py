"""A planner hands over to an actor in the middle of a text, with no prefill in between.

    python examples/handoff.py

The trunk plans; behind "Action:" the sql head writes on, from the K/V that is there.
"""

import itertools

from icarus_jax import LLM, SamplingParams

PROMPT = """Question: how many rivers are in colorado
Thought: I count the rivers of Colorado.
Action: SELECT count(river_name) FROM river WHERE traverse = "colorado"

Question: what is the capital of texas
Thought:"""


def main(actor: str = "sql", path: str = "heads/sql", on: str | int = "Action:", **engine) -> None:
    with LLM(heads={actor: path}, **engine) as llm:
        params = SamplingParams(temperature=0, max_tokens=60, stop=("\n\n",))
        (answer,) = llm.generate(PROMPT, sampling_params=params, handoff=[{"on": on, "model": actor}])
        (output,) = answer.outputs
        borders = [(0, output.model), *output.handoffs, (len(output.token_ids), "")]
        for (begin, model), (end, _) in itertools.pairwise(borders):
            print(f"{model}: {llm.tokenizer.decode(output.token_ids[begin:end])!r}")


if __name__ == "__main__":
    main()
