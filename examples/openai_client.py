"""The official `openai` client against a running server (`make serve`, or `icarus-serve`).

    python examples/openai_client.py

Streams one model's answer, then asks every served model the same thing in one request.
"""

from openai import OpenAI

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def main(base_url: str = "http://127.0.0.1:8000/v1") -> None:
    client = OpenAI(base_url=base_url, api_key="none")
    names = [model.id for model in client.models.list()]
    stream = client.chat.completions.create(model=names[0], messages=MESSAGES, max_tokens=24, stream=True)
    print(f"{names[0]}: ", end="")
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    # `models` is a field of ours: one prefill, one choice of each model.
    answer = client.chat.completions.create(
        model=names[0], messages=MESSAGES, max_tokens=24, temperature=0, extra_body={"models": names}
    )
    for choice in answer.choices:
        print(f"{choice.model}: {choice.message.content!r}")
    print(f"{answer.usage.prompt_tokens} prompt tokens, computed once for {len(names)} models")


if __name__ == "__main__":
    main()
