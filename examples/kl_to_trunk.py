"""How far a head moves from its trunk: KL divergence, estimated from the head's own samples.

    python examples/kl_to_trunk.py

The trunk's log-probability of each token that the head draws costs one more row in the same step.
"""

from icarus_jax import LLM, SamplingParams

MESSAGES = [{"role": "user", "content": "I lost my card, can you freeze it?"}]


def main(heads: dict[str, str] = {"intent": "heads/intent"}, samples: int = 8, **engine) -> None:  # noqa: B006
    with LLM(heads=heads, **engine) as llm:
        params = SamplingParams(temperature=1.0, max_tokens=16, seed=0)
        (answer,) = llm.chat(MESSAGES, list(heads), params, n=samples, reference_logprobs=True)
        for name in heads:
            ours = [output for output in answer.outputs if output.model == name]
            ratios = [
                head.logprob - trunk
                for output in ours
                for head, trunk in zip(output.logprobs, output.reference_logprobs, strict=True)
            ]
            print(f"{name}: {sum(ratios) / len(ratios):.3f} nats a token over {len(ratios)} tokens")


if __name__ == "__main__":
    main()
