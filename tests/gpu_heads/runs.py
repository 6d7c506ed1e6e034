"""What the study runs: trainings and evaluations, each a command of its own.

The methods that are compared, heads of the same rank:

    conventional    a LoRA model with K/V of its own, trained as configs/train.py says
    frozen          an ICaRus head on the original trunk, likewise
    tuned           ICaRus heads and a LoRA of the trunk, trained together in two passes over intent, slots and sql (its
                    rows eight times); the head of math is then trained on the frozen result, as configs/train.py says
    left_out        tuned without the task in question; its head is then trained on the frozen result, likewise
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

SEEDS = (0, 1, 2)
FOLDS = 5
TUNED_FOR = {"intent": 1, "slots": 1, "sql": 8}  # task -> how often its rows are taken in a pass
FILES = {"intent": "banking77", "slots": "snips", "sql": "geography", "math": "gsm8k"}
TRUNK = "smollm2-135m-instruct"
TUNED_STEPS = 720  # two passes of all three tasks
TOKENS = {"intent": 0.21, "slots": 0.54, "sql": 0.25}  # their shares of a pass
MATH_ROWS = 200
CHATS = "chats.jsonl"  # written by examples/own_chats.py
ADAPTER = "adapter_config.json"  # what is written last of an adapter
CONTROL = ("slots", "sql")  # shipped heads whose scores are known
GROUPS = ("tuned", "original", "general", "left_out", "folds")


@dataclasses.dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        name: Its name, also that of its output.
        program: The file in launch/.
        flags: Its flags.
        output: What is there when it has ended.
        needs: The outputs that must be there before.
    """

    name: str
    program: str
    flags: tuple[str, ...]
    output: Path
    needs: tuple[Path, ...] = ()

    def command(self) -> list[str]:
        """Returns the command line, to run in the repository's root."""
        return [sys.executable, f"launch/{self.program}.py", *self.flags]


@dataclasses.dataclass(frozen=True)
class Study:
    """Where everything lies, and what is changed in all runs.

    Attributes:
        data: The folder of the data (shared/data), of CHATS, and of general texts (texts/).
        out: The folder of all results.
        flags: Flags of all commands.
        training: More flags of the trainings.
        answering: More flags of what asks an engine.
    """

    data: Path
    out: Path
    flags: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    answering: tuple[str, ...] = ()

    def jobs(self, group: str) -> list[Job]:
        """Returns the jobs of one of GROUPS, those that others need first."""
        return list(getattr(self, f"_{group}")())

    def _tuned(self) -> Iterator[Job]:
        for task in CONTROL:
            yield self._evaluate(f"{task}-control", task, {}, models=task)
        for seed in SEEDS:
            yield self._tune(f"tuned-s{seed}", seed, tuple(TUNED_FOR))
        for seed in SEEDS:
            trunk = self._trunk(f"tuned-s{seed}")
            yield self._loss(f"tuned-s{seed}", trunk)
            yield self._head("math", "tuned", seed, trunk)
            for task in FILES:
                run = f"tuned-s{seed}" if task in TUNED_FOR else f"{task}-tuned-s{seed}"
                yield self._evaluate(f"{task}-tuned-s{seed}", task, {f"tuned-s{seed}": self._of(run, task)}, trunk)

    def _original(self) -> Iterator[Job]:
        for seed in SEEDS:
            for task in FILES:
                names = [f"{method}-s{seed}" for method in ("frozen", "conventional")]
                yield self._head(task, "frozen", seed)
                yield self._head(task, "conventional", seed)
                heads = {name: self._of(f"{task}-{name}", task) for name in names}
                yield self._evaluate(f"{task}-original-s{seed}", task, heads)

    def _general(self) -> Iterator[Job]:
        """The losses of tuned trunks are in `_tuned`."""
        yield self._loss("original")
        yield self._evaluate("humaneval-original", "humaneval", {}, models=TRUNK)
        for seed in SEEDS:
            yield self._evaluate(
                f"humaneval-tuned-s{seed}", "humaneval", {}, self._trunk(f"tuned-s{seed}"), models=TRUNK
            )

    def _left_out(self) -> Iterator[Job]:
        """That of math is in `_tuned`."""
        for task in TUNED_FOR:
            run = f"without-{task}"
            yield self._tune(run, 0, tuple(name for name in TUNED_FOR if name != task))
            yield self._head(task, "left_out", 0, self._trunk(run))
            heads = {"left_out-s0": self._of(f"{task}-left_out-s0", task)}
            yield self._evaluate(f"{task}-left_out-s0", task, heads, self._trunk(run))

    def _folds(self) -> Iterator[Job]:
        for fold in range(FOLDS):
            train, dev = self._fold(fold)
            for method in ("frozen", "conventional"):
                yield self._head("sql", method, 0, rows=train, suffix=f"-f{fold}")
            yield self._tune(f"tuned-f{fold}", 0, tuple(TUNED_FOR), sql=train)
            heads = {f"{m}-f{fold}": self._of(f"sql-{m}-s0-f{fold}", "sql") for m in ("frozen", "conventional")}
            yield self._evaluate(f"sql-original-f{fold}", "sql", heads, rows=dev)
            heads = {f"tuned-f{fold}": self._of(f"tuned-f{fold}", "sql")}
            yield self._evaluate(f"sql-tuned-f{fold}", "sql", heads, self._trunk(f"tuned-f{fold}"), rows=dev)

    def _tune(self, name: str, seed: int, tasks: Sequence[str], sql: Path | None = None) -> Job:
        """Returns the training of a trunk together with its heads."""
        files = [str(sql) if sql and task == "sql" else str(self._train_file(task)) for task in tasks]
        return self._train(
            name,
            tasks,
            f"--config.data.path={','.join(files)}",
            f"--config.data.repeat={','.join(str(TUNED_FOR[task]) for task in tasks)}",
            f"--config.train.seed={seed}",
            f"--config.optimiser.steps={round(TUNED_STEPS * sum(TOKENS[task] for task in tasks))}",
            *("--config.data.rows=10", "--config.data.length=352", "--config.optimiser.lr=2e-3"),
            *(
                "--config.trunk.tune=True",
                "--config.trunk.rank=16",
                "--config.trunk.alpha=32",
                "--config.trunk.lr=1e-3",
            ),
            *(f"--config.trunk.text={self.data / CHATS}", "--config.trunk.text_rows=1"),
        )

    def _head(
        self,
        task: str,
        method: str,
        seed: int,
        trunk: Path | None = None,
        *,
        rows: Path | None = None,
        suffix: str = "",
    ) -> Job:
        """Returns the training of one head."""
        kv = "isolated" if method == "conventional" else "shared"
        flags = [f"--config.head.kv={kv}", f"--config.train.seed={seed}", *_adapter(trunk)]
        flags.append(f"--config.data.path={rows or self._train_file(task)}")
        return self._train(f"{task}-{method}-s{seed}{suffix}", [task], *flags, needs=[trunk] if trunk else [])

    def _train(self, name: str, tasks: Sequence[str], *flags: str, needs: Sequence[Path] = ()) -> Job:
        run = self.out / "runs" / name
        first = (f"--config=train.py:{','.join(tasks)}", f"--config.output={run}", "--config.head.dtype=bfloat16")
        all_flags = (*first, *flags, *self.flags, *self.training)
        return Job(name, "train", all_flags, run / "heads" / tasks[-1] / ADAPTER, _written(needs))

    def _evaluate(
        self,
        name: str,
        task: str,
        heads: Mapping[str, Path],
        trunk: Path | None = None,
        *,
        rows: Path | None = None,
        models: str = "",
    ) -> Job:
        """Returns the evaluation of heads on one trunk, or of `models` of configs/evaluate.py."""
        kind = {head: ":isolated" if head.startswith("conventional") else "" for head in heads}
        out = self.out / "answers" / f"{name}.jsonl"
        files = {"humaneval": "HumanEval.jsonl.gz"} | {of: f"{file}_dev.jsonl" for of, file in FILES.items()}
        flags = [
            f"--config=evaluate.py:{task}",
            f"--config.out={out}",
            f"--config.data.path={rows or self.data / files[task]}",
            f"--config.models={models or ','.join(heads)}",
            *_adapter(trunk),
        ]
        if task == "sql":
            flags.append(f"--config.data.database={self.data / 'geography.sqlite'}")
        if task == "math":
            flags.append(f"--config.limit={MATH_ROWS}")
        if heads:
            flags.append(f"--heads={','.join(f'{head}={path}{kind[head]}' for head, path in heads.items())}")
        needs = _written([*heads.values(), *([trunk] if trunk else [])])
        all_flags = (*flags, *self.flags, *self.answering)
        return Job(f"evaluate-{name}", "evaluate", all_flags, out.with_suffix(".json"), needs)

    def _loss(self, name: str, trunk: Path | None = None) -> Job:
        """Returns the measurement of how well a trunk predicts general text."""
        texts = ",".join(map(str, sorted((self.data / "texts").iterdir())))
        flags = ("loss", "--config=single.py", f"--texts={texts}", *_adapter(trunk), *self.flags, *self.answering)
        needs = _written([trunk] if trunk else [])
        return Job(f"loss-{name}", "bench", flags, self.out / "answers" / f"loss-{name}.json", needs)

    def _trunk(self, run: str) -> Path:
        return self.out / "runs" / run / "trunk"

    def _of(self, run: str, task: str) -> Path:
        return self.out / "runs" / run / "heads" / task

    def _train_file(self, task: str) -> Path:
        return self.data / f"{FILES[task]}_train.jsonl"

    def _fold(self, fold: int) -> tuple[Path, Path]:
        """Returns the files of sql's training rows without every fifth of them, and of these."""
        folder = self.out / "folds"
        train, dev = folder / f"train{fold}.jsonl", folder / f"dev{fold}.jsonl"
        if not dev.exists():
            folder.mkdir(parents=True, exist_ok=True)
            rows = [json.loads(line) for line in self._train_file("sql").read_bytes().splitlines()]
            for file, mine in ((train, False), (dev, True)):
                kept = [row for i, row in enumerate(rows) if (i % FOLDS == fold) == mine]
                file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        return train, dev


def _adapter(trunk: Path | None) -> tuple[str, ...]:
    return (f"--config.trunk.adapter={trunk}",) if trunk else ()


def _written(adapters: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(adapter / ADAPTER for adapter in adapters)
