"""One prompt, several heads, one prefill: offline fan-out.

    python examples/fan_out.py

Every head answers from the trunk's K/V. The first one computes the prompt, the others find it in the cache.
"""

from icarus_jax import LLM, SamplingParams

HEADS = {"intent": "heads/intent", "slots": "heads/slots", "sql": "heads/sql"}
MESSAGES = [{"role": "user", "content": "Please play some jazz from the nineties on Spotify."}]


def main(heads: dict[str, str] = HEADS, **engine) -> None:
    with LLM(heads=heads, **engine) as llm:
        params = SamplingParams(temperature=0, max_tokens=40)
        (answer,) = llm.chat(MESSAGES, models=llm.models, sampling_params=params)
        print(f"{len(answer.prompt_token_ids)} prompt tokens")
        for output in answer.outputs:
            print(f"{output.model}: {output.cached_tokens} from the cache: {output.text!r}")


if __name__ == "__main__":
    main()
