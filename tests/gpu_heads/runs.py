"""What the study runs: trainings and evaluations, each a command of its own.

The methods that are compared, all of the same rank, with the rates and steps of configs/train.py:

    conventional    a LoRA model with K/V of its own
    frozen          an ICaRus head on the original trunk
    tuned           ICaRus heads and a LoRA of the trunk, trained together on intent, slots and sql; math, which the
                    trunk was not tuned for, on the frozen result
    left_out        tuned without the task in question; its head is then trained on the frozen result
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
CHATS = "chats.jsonl"  # written by examples/own_chats.py
GROUPS = ("tuned", "original", "left_out", "folds", "general")


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
        data: The folder of the data (shared/data) and of CHATS.
        out: The folder of all results.
        flags: Flags of all commands.
        training: More flags of the trainings.
        answering: More flags of what asks an engine.
        tuning: More flags of the trainings that tune the trunk.
        texts: Files of general text.
    """

    data: Path
    out: Path
    flags: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    answering: tuple[str, ...] = ()
    tuning: tuple[str, ...] = ("--config.optimiser.steps=720",)  # two passes
    texts: tuple[str, ...] = ()

    def jobs(self, group: str) -> list[Job]:
        """Returns the jobs of one of GROUPS, those that others need first."""
        return list(getattr(self, f"_{group}")())

    def _tuned(self) -> Iterator[Job]:
        for seed in SEEDS:
            yield self._tune(f"tuned-s{seed}", seed, tuple(TUNED_FOR))
        for seed in SEEDS:
            yield self._head("math", "tuned", seed, self._trunk(f"tuned-s{seed}"))
        for seed in SEEDS:
            for task in FILES:
                run = f"tuned-s{seed}" if task in TUNED_FOR else f"{task}-tuned-s{seed}"
                heads = {f"tuned-s{seed}": self._of(run, task)}
                yield self._evaluate(f"{task}-tuned-s{seed}", task, heads, self._trunk(f"tuned-s{seed}"))

    def _original(self) -> Iterator[Job]:
        for seed in SEEDS:
            for task in FILES:
                yield self._head(task, "frozen", seed)
                yield self._head(task, "conventional", seed)
        for task in FILES:
            names = [f"{method}-s{seed}" for method in ("frozen", "conventional") for seed in SEEDS]
            yield self._evaluate(f"{task}-original", task, {name: self._of(f"{task}-{name}", task) for name in names})

    def _left_out(self) -> Iterator[Job]:
        """That of math is in `_tuned`."""
        for task in TUNED_FOR:
            yield self._tune(f"without-{task}", 0, tuple(name for name in TUNED_FOR if name != task))
        for task in TUNED_FOR:
            yield self._head(task, "left_out", 0, self._trunk(f"without-{task}"))
            heads = {"left_out-s0": self._of(f"{task}-left_out-s0", task)}
            yield self._evaluate(f"{task}-left_out", task, heads, self._trunk(f"without-{task}"))

    def _folds(self) -> Iterator[Job]:
        for fold in range(FOLDS):
            train, dev = self._fold(fold)
            of_sql = (f"--config.data.path={train}",)
            for method in ("frozen", "conventional"):
                yield self._head("sql", method, 0, suffix=f"-f{fold}", more=of_sql)
            yield self._tune(f"tuned-f{fold}", 0, tuple(TUNED_FOR), sql=train)
            heads = {f"{m}-f{fold}": self._of(f"sql-{m}-s0-f{fold}", "sql") for m in ("frozen", "conventional")}
            yield self._evaluate(f"sql-original-f{fold}", "sql", heads, rows=dev)
            heads = {f"tuned-f{fold}": self._of(f"tuned-f{fold}", "sql")}
            yield self._evaluate(f"sql-tuned-f{fold}", "sql", heads, self._trunk(f"tuned-f{fold}"), dev)

    def _general(self) -> Iterator[Job]:
        trunks = {"original": None} | {f"tuned-s{seed}": self._trunk(f"tuned-s{seed}") for seed in SEEDS}
        for name, trunk in trunks.items():
            flags = ("loss", "--config=single.py", f"--texts={','.join(self.texts)}", *_adapter(trunk))
            output = self.out / "answers" / f"loss-{name}.json"
            yield Job(
                f"loss-{name}", "bench", (*flags, *self.flags, *self.answering), output, (trunk,) if trunk else ()
            )
            yield self._evaluate(f"humaneval-{name}", "humaneval", {}, trunk)

    def _tune(self, name: str, seed: int, tasks: Sequence[str], sql: Path | None = None) -> Job:
        """Returns the training of a trunk together with its heads."""
        files = [str(sql) if sql and task == "sql" else str(self._train_file(task)) for task in tasks]
        return self._train(
            name,
            tasks,
            f"--config.data.path={','.join(files)}",
            f"--config.data.repeat={','.join(str(TUNED_FOR[task]) for task in tasks)}",
            f"--config.train.seed={seed}",
            *("--config.data.rows=24", "--config.data.length=144", "--config.data.skip_long=True"),
            *("--config.data.validation=64", "--config.optimiser.lr=2e-3", "--config.trunk.tune=True"),
            *("--config.trunk.rank=16", "--config.trunk.alpha=32", "--config.trunk.lr=1e-3"),
            *(f"--config.trunk.text={self.data / CHATS}", "--config.trunk.text_rows=2"),
            *self.tuning,
        )

    def _head(
        self,
        task: str,
        method: str,
        seed: int,
        trunk: Path | None = None,
        suffix: str = "",
        more: tuple[str, ...] = (),
    ) -> Job:
        """Returns the training of one head."""
        kv = "isolated" if method == "conventional" else "shared"
        flags = (f"--config.head.kv={kv}", f"--config.train.seed={seed}", *_adapter(trunk))
        more = more or (f"--config.data.path={self._train_file(task)}",)
        job = self._train(f"{task}-{method}-s{seed}{suffix}", [task], *flags, *more)
        return dataclasses.replace(job, needs=(trunk,) if trunk else ())

    def _train(self, name: str, tasks: Sequence[str], *flags: str) -> Job:
        run = self.out / "runs" / name
        first = (f"--config=train.py:{','.join(tasks)}", f"--config.output={run}", "--config.head.dtype=bfloat16")
        return Job(name, "train", (*first, *flags, *self.flags, *self.training), run / "heads" / tasks[-1])

    def _evaluate(
        self, name: str, task: str, heads: Mapping[str, Path], trunk: Path | None = None, rows: Path | None = None
    ) -> Job:
        """Returns the evaluation of heads on one trunk; on the original one, or without heads, of the trunk too."""
        kind = {head: ":isolated" if head.startswith("conventional") else "" for head in heads}
        out = self.out / "answers" / f"{name}.jsonl"
        files = {"humaneval": "HumanEval.jsonl.gz"} | {of: f"{file}_dev.jsonl" for of, file in FILES.items()}
        flags = [
            f"--config=evaluate.py:{task}",
            f"--config.out={out}",
            f"--config.data.path={rows or self.data / files[task]}",
            f"--config.models={','.join([*heads, *([] if heads and trunk else [TRUNK])])}",
            *_adapter(trunk),
        ]
        if task == "sql":
            flags.append(f"--config.data.database={self.data / 'geography.sqlite'}")
        if heads:
            flags.append(f"--heads={','.join(f'{head}={path}{kind[head]}' for head, path in heads.items())}")
        needs = (*heads.values(), *([trunk] if trunk else []))
        return Job(
            f"evaluate-{name}", "evaluate", (*flags, *self.flags, *self.answering), out.with_suffix(".json"), needs
        )

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
