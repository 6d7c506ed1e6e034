"""Answers each row of a table with several heads by Ray Data: one prefill a row, and a stopped run goes on.

    pip install 'icarus-jax[ray]'
    python examples/ray_data.py --input=rows.parquet --output=answers --heads sql=heads/sql math=heads/math

Rows have a prompt and an id of their own. The input is Parquet, or lines of JSON (.jsonl). A file of OpenAI's batches
is one too, with --id=custom_id: the prompt is in its body. (launch/evaluate.py --config.ray.workers=N answers any such
file, with all that a request may ask for.) The output is Parquet: the id, and a column with each head's answers.
"""

import argparse

import numpy as np
import ray
from ray.data.checkpoint import CheckpointConfig

from icarus_jax import LLM, SamplingParams


class Heads:
    """An engine with all heads. Ray Data starts one on each worker, and a new one if a worker dies."""

    def __init__(self, heads: dict[str, str], max_tokens: int, options: dict):
        self.llm = LLM(heads=heads, **options)
        self.heads, self.params = list(heads), SamplingParams(max_tokens=max_tokens, temperature=0)

    def __call__(self, batch: dict) -> dict:
        prompts = batch["prompt"] if "prompt" in batch else [body["prompt"] for body in batch["body"]]
        answers = self.llm.generate([str(p) for p in prompts], self.heads, self.params, use_tqdm=False)
        for i, head in enumerate(self.heads):
            batch[head] = np.array([answer.outputs[i].text for answer in answers], object)
        return {name: column for name, column in batch.items() if name not in ("prompt", "body", "method", "url")}


def main(
    input: str, output: str, heads: dict[str, str], workers: int = 2, id: str = "id", max_tokens: int = 32, **options
) -> None:
    # What has been written is noted beside the output; the next run leaves it out.
    ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
        id_column=id, checkpoint_path=f"{output.rstrip('/')}-done", delete_checkpoint_on_success=False
    )
    rows = ray.data.read_parquet(input) if input.endswith(".parquet") else ray.data.read_json(input, lines=True)
    answered = rows.map_batches(
        Heads,
        fn_constructor_args=[heads, max_tokens, options],
        batch_size=64,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
    )
    answered.write_parquet(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--heads", nargs="+", required=True, help="NAME=PATH or NAME=PATH:KV")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--id", default="id")
    args = parser.parse_args()
    main(args.input, args.output, dict(head.split("=", 1) for head in args.heads), args.workers, args.id)
