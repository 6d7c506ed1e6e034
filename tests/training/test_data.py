"""Training data: packing keeps every example whole, the position in the data is exact, and errors name their line."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from icarus_jax.tasks import TASKS
from icarus_jax.training import data, packing
from tests import tiny
from tests.training.test_step import PREFIX, make_examples, packed


def contents(batch):
    """Every example in a batch of rows, as (its inputs after the prefix, its targets)."""
    found = []
    for row in range(batch.tokens.shape[0]):
        for segment in range(1, batch.segments[row].max() + 1):
            mine = batch.segments[row] == segment
            goal = batch.target_segments[row] == segment
            assert (batch.positions[row, mine] == np.arange(mine.sum()) + len(PREFIX)).all()
            inputs = batch.tokens[row, mine]
            readers = batch.readers[row, goal] - np.flatnonzero(mine)[0]
            assert (readers == np.arange(len(inputs) - goal.sum(), len(inputs))).all()
            found.append((tuple(inputs.tolist()), tuple(batch.targets[row, goal].tolist())))
    return found


def test_packing_keeps_every_example_whole():
    examples = make_examples(50)
    want = sorted((tuple(e.tokens[3:-1].tolist()), tuple(e.tokens[e.num_prompt :].tolist())) for e in examples)
    assert sorted(found for batch in packed(examples, 4, 40) for found in contents(batch)) == want
    shape = packing.row_shape(examples, PREFIX, 4, 40)
    batches = packing.take(packing.train_batches(examples, PREFIX, shape, seed=0, accumulate=2), 4)
    seen = [e for batch in batches for i in (0, 1) for e in contents(jax.tree.map(lambda a, i=i: a[i], batch))]
    assert set(seen) == set(want)


def test_data_position_is_exact():
    examples = make_examples(40)
    shape = packing.row_shape(examples, PREFIX, 2, 40)
    fresh = lambda: packing.train_batches(examples, PREFIX, shape, seed=5, accumulate=1)  # noqa: E731
    iterator = fresh()
    packing.take(iterator, 17)
    state = json.loads(json.dumps(iterator.get_state()))
    want, resumed = packing.take(iterator, 5), fresh()
    resumed.set_state(state)
    for a, b in zip(want, packing.take(resumed, 5), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_validation_is_of_the_whole_file():
    """A file that is sorted by class must not be validated on its first classes alone."""
    examples = make_examples(400)
    training, validation = data.split(examples, 10)
    at = {id(e): i for i, e in enumerate(examples)}
    assert [at[id(e)] for e in validation] == [19 + 40 * i for i in range(10)]
    assert len(training) == 380 and not {id(e) for e in training} & {id(e) for e in validation}
    assert [len(data.split(examples, n)[1]) for n in (0, 3, 99)] == [0, 3, 20]


def test_common_prefix_is_less_than_a_prompt():
    examples = [data.Example(np.array(t, np.int32), n, 1) for t, n in [([1, 2, 3, 9], 3), ([1, 2, 3, 4, 9], 4)]]
    assert data.common_prefix(examples).tolist() == [1, 2]


ENCODER = data.Encoder(tiny.tiny_tokenizer(), frozenset({258}), 64)


def read(tmp_path, *lines, task=None, **options):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(lines) + "\n", errors="surrogateescape")
    return data.read_examples(file, ENCODER, task, **options)


GOOD = '{"prompt": "ab", "completion": "c"}'


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"prompt": "a", ', "broken JSON"),
        ('["a"]', "not a JSON object"),
        ('{"text": "a"}', "needs"),
        ('{"prompt": "a", "completion": ""}', "completion is empty"),
        ('{"prompt": "", "completion": "a"}', "prompt is empty"),
        ('{"prompt": 1, "completion": "a"}', "not both strings"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "assistant"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}', "empty"),
        ('{"messages": "hi"}', "not a list"),
        (json.dumps({"prompt": "a" * 60, "completion": "b" * 20}), "81 tokens"),
        ('{"prompt": "a", "completion": " "}', "completion is empty"),
        ('{"prompt": "\\ud800", "completion": "a"}', "surrogates not allowed"),
        ('{"prompt": "\udcff", "completion": "a"}', "can't decode byte 0xff"),  # written as the byte 0xff
        ('{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "a"}]}', "string"),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}', "string"),
        ('{"messages": [{"role": "x", "content": "a"}, {"role": "assistant", "content": "a"}]}', "template.*not x"),
    ],
)
def test_bad_data_names_file_and_line(tmp_path, line, words, monkeypatch):
    template = "{% if messages[0].role == 'x' %}{{ raise_exception('users come first, not x') }}{% endif %}"
    monkeypatch.setattr(ENCODER.tokenizer, "chat_template", template + ENCODER.tokenizer.chat_template)
    with pytest.raises(ValueError, match=rf"data\.jsonl:3: .*{words}") as error:
        read(tmp_path, GOOD, "", line)
    assert "\n" not in str(error.value)


def test_a_base_model_has_no_chat_template(tmp_path, monkeypatch):
    """Plain prompts need none."""
    monkeypatch.setattr(ENCODER.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match=r"data\.jsonl:1: .* has none.*chat_template\.jinja"):
        read(tmp_path, '{"text": "a", "category": "b"}', task=TASKS["intent"])
    assert len(read(tmp_path, GOOD)) == 1


def test_data_that_is_missing_or_empty(tmp_path):
    with pytest.raises(ValueError, match=r"data\.jsonl is empty"):
        read(tmp_path, "")
    with pytest.raises(ValueError, match="no such file"):
        data.read_examples(tmp_path / "none.jsonl", ENCODER, None)
    with pytest.raises(ValueError, match=r":1: is not of the task's format: KeyError 'category'"):
        read(tmp_path, '{"text": "a"}', task=TASKS["intent"])


def test_long_examples_can_be_skipped(tmp_path):
    long = json.dumps({"prompt": "a" * 60, "completion": "bbbbbb"})
    first, second = read(tmp_path, GOOD, long, skip_long=True)
    assert first is not None and second is None
    with pytest.raises(ValueError, match=r"no examples \(2 too long\)"):
        read(tmp_path, long, long, skip_long=True)


def test_which_rows_are_held_out_does_not_depend_on_those_that_are_left_out():
    """Else runs of two lengths hold out different rows, and copies of a row may lie on both sides."""
    examples = make_examples(400)
    some = [None if i % 7 == 0 else e for i, e in enumerate(examples)]
    for all_of, left in zip(data.split(examples, 20), data.split(some, 20), strict=True):
        assert {id(e) for e in left} == {id(e) for e in some if e} & {id(e) for e in all_of}


def test_chat_is_what_the_server_prompts_with(tmp_path):
    """The prompt is the template's, up to where the model writes; the completion ends with the end of the turn."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (example,) = read(tmp_path, json.dumps({"messages": messages}))
    tokenizer = ENCODER.tokenizer
    want = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert example.tokens[: example.num_prompt].tolist() == want
    assert tokenizer.decode(example.tokens[example.num_prompt :]) == "yo<eos>"


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"name": "weather", "arguments": '{"town": "Ulm"}'}


@pytest.mark.parametrize("knows", [True, False])
def test_tools_and_calls_are_rendered_as_they_are_served(tmp_path, knows, monkeypatch):
    """Rows of OpenAI's fine-tuning form, and those of the task, for templates with and without tools."""
    template = (
        "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for call in m.tool_calls or [] %}!{{ call.function.arguments.town }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    if knows:
        monkeypatch.setattr(ENCODER.tokenizer, "chat_template", template)
    answer = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]}
    row = {"messages": [{"role": "user", "content": "hi"}, answer], "tools": [WEATHER]}
    task_row = {"query": "hi", "tools": [WEATHER], "calls": [{"name": "weather", "arguments": {"town": "Ulm"}}]}
    encoder = data.Encoder(ENCODER.tokenizer, ENCODER.eos_ids, 600)
    one, two = encoder.encode(row, None, 1), encoder.encode(task_row, TASKS["tools"], 1)
    assert one.tokens.tolist() == two.tokens.tolist() and one.num_prompt == two.num_prompt
    prompt, completion = (encoder.tokenizer.decode(part) for part in np.split(one.tokens, [one.num_prompt]))
    if knows:
        assert prompt == "[weather]<user>hi<assistant>" and completion == "!Ulm<eos>"
    else:
        assert '{"name": "weather", "parameters"' in prompt and "hi" in prompt
        assert completion == '{"name": "weather", "arguments": {"town": "Ulm"}}<eos>'


def test_task_formats():
    pieces = [{"text": "play "}, {"text": "Ça", "entity": "song"}, {"text": " and "}, {"text": " b ", "entity": "song"}]
    row = {"intent": "PlayMusic", "data": pieces}
    assert TASKS["slots"].prompt(row) == [{"role": "user", "content": "play Ça and  b"}]
    assert TASKS["slots"].answer(row)["content"] == '{"intent":"PlayMusic","slots":{"song":["Ça","b"]}}'
    assert TASKS["math"].answer({"answer": "2*3=<<2*3=6>>6\n#### 6"})["content"] == "2*3=6\n#### 6"
    assert TASKS["intent"].answer({"text": "x", "category": "card_arrival"})["content"] == "card_arrival"
    assert TASKS["sql"].prompt({"question": "how big", "sql": "SELECT 1 ;"})[0]["content"] == "how big"
