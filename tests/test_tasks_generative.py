"""Tasks that are answered token by token: asked as taught, nothing learned but answers, nothing lost unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from made_tokenizers import FOLDERS
from ratoon.base.errors import ArtifactError, ConfigError, DataError
from ratoon.model.gguf import read_head
from ratoon.tasks.contract import TooLong
from ratoon.tasks.messages import layout_of, to_messages
from ratoon.tasks.show import show, show_parts
from ratoon.text.chat import render
from ratoon.text.tokenizer import CHATML, Tokenizer
from tasks_cases import GENERATIVE, PASSAGE, POLICIES, ROOM, TALK, adds_up, first_rows, learned, record_of

WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = TALK["messages"]
CALLING = {
    "conversations": [
        {"from": "human", "value": "How warm is it in Oslo?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": '{"celsius": 7}'},
        {"from": "gpt", "value": "Seven degrees."},
    ],
    "tools": '[{"name": "weather", "description": "of a city", "parameters": {}}]',
}


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_gguf_metadata(read_head(smollm2_path)[0])


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer that begins texts with a token and puts a space before their first word."""
    folder = tmp_path_factory.mktemp("pieces")
    FOLDERS["llama"](folder)
    tokenizer = Tokenizer.load(folder)
    tokenizer.config["chat_template"] = (
        "{{ bos_token }}{% for message in messages %}{{ '[' + message.role + '] ' + message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    )
    return tokenizer


@pytest.fixture(params=["smollm2", "pieces"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("name", GENERATIVE)
def test_a_model_is_asked_as_it_was_taught(name: str, tokenizer: Tokenizer) -> None:
    task, record = record_of(*GENERATIVE[name])
    found = task.encode(record, tokenizer, room_tokens=ROOM, too_long="refuse")
    adds_up(found, ROOM)
    (example,) = found.examples
    assert found.cut_tokens == 0
    question = task.question(record, tokenizer, room_tokens=ROOM)
    assert question.ids == list(example.ids[: len(question.ids)]) and question.cut_tokens == 0
    if name == "generation":
        assert len(question.ids) == 7 and all(example.weight)
        return
    # What comes next is learned, what comes before is not (but for earlier answers of a dialogue that learns all).
    last = [weight > 0 for weight in example.weight]
    assert last[len(question.ids) - 1]
    if name != "dialogue":
        assert not any(last[: len(question.ids) - 1])
    words = learned(example, tokenizer)
    end = "<|im_end|>" if tokenizer.token_id("<|im_end|>") is not None else tokenizer.role_token("eos_token")
    expected = task.expected(record)[0]
    assert words.endswith(f"{end}") and words.count(str(end)) == (3 if name == "dialogue" else 1)
    assert task.read_answer(record, words[: -len(str(end))]).endswith(expected)
    if name != "dialogue":
        assert words.strip() == expected + str(end)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", [name for name in GENERATIVE if name != "generation"])
def test_the_source_is_shortened_and_the_answer_never(name: str, policy: TooLong, smollm2: Tokenizer) -> None:
    task, record = record_of(*GENERATIVE[name])
    whole = task.encode(record, smollm2, room_tokens=ROOM, too_long=policy)
    answer = task.expected(record)[0] + "<|im_end|>"
    places = whole.examples[0].places
    lost, kept = set(), 0
    for room in range(places - 1, 8, -3):
        found = task.encode(record, smollm2, room_tokens=room, too_long=policy)
        adds_up(found, room)
        assert found.rendered_tokens == whole.rendered_tokens and found.reason
        if not found.examples:
            assert found.cut_tokens == found.rendered_tokens
            lost.add(found.reason)
            continue
        kept += 1
        words = learned(found.examples[0], smollm2)
        if name == "dialogue" and policy == "cut-right":
            assert words.startswith("Paris. About two million.<|im_end|>")
        else:
            assert words.strip().endswith(answer)
    assert kept and len(lost) == 1, "the answer alone no longer fits at last, with its reason"
    with pytest.raises(DataError, match="tokens") as caught:
        task.encode(record, smollm2, room_tokens=places - 1, too_long="refuse")
    assert caught.value.where == "rows.jsonl:1"


@pytest.mark.parametrize("name", [name for name in GENERATIVE if name != "generation"])
def test_a_question_leaves_room_for_the_answer(name: str, smollm2: Tokenizer) -> None:
    table, row = GENERATIVE[name]
    task, record = record_of({**table, "max_new_tokens": 4}, row)
    whole = task.question(record, smollm2, room_tokens=ROOM)
    assert whole.max_new_tokens == 4
    room = len(whole.ids) + 2
    found = task.question(record, smollm2, room_tokens=room)
    assert len(found.ids) + found.max_new_tokens <= room and found.max_new_tokens == 4
    assert found.cut_tokens == len(whole.ids) - len(found.ids) >= 2
    exact = task.question(record, smollm2, room_tokens=room, too_long="refuse")
    assert exact.ids == whole.ids and exact.max_new_tokens == 2, "nothing is cut: the answer gets what is left"
    with pytest.raises(DataError):
        task.question(record, smollm2, room_tokens=len(whole.ids), too_long="refuse")


def test_text_is_split_so_that_every_token_is_learned_once(smollm2: Tokenizer, pieces: Tokenizer) -> None:
    for tokenizer in (smollm2, pieces):
        task, record = record_of({"kind": "generation"}, {"text": PASSAGE})
        whole = task.encode(record, tokenizer, room_tokens=ROOM, too_long="refuse").examples[0]
        found = task.encode(record, tokenizer, room_tokens=16, too_long="split")
        adds_up(found, 16)
        assert found.cut_tokens == 0 and found.repeated_tokens == len(found.examples) - 1 > 3
        targets = [id for example in found.examples for id in example.ids[1:]]
        assert targets == list(whole.ids[1:]) and whole.ids[-1] == tokenizer.eos_id
        for policy, kept in (("cut-left", whole.ids[-17:]), ("cut-right", whole.ids[:17])):
            cut = task.encode(record, tokenizer, room_tokens=16, too_long=policy)
            adds_up(cut, 16)
            assert list(cut.examples[0].ids) == list(kept)


def test_a_dialogue_is_split_between_turns(smollm2: Tokenizer) -> None:
    task, record = record_of({"kind": "dialogue"}, TALK)
    whole = task.encode(record, smollm2, room_tokens=ROOM, too_long="refuse").examples[0]
    found = task.encode(record, smollm2, room_tokens=whole.places - 1, too_long="split")
    adds_up(found, whole.places - 1)
    assert len(found.examples) == 2 and found.cut_tokens == 0 and found.repeated_tokens > 0
    assert "".join(learned(example, smollm2) for example in found.examples) == learned(whole, smollm2)
    begin = smollm2.encode("<|im_start|>system\nYou are brief.<|im_end|>\n", special=True)
    assert all(list(example.ids[: len(begin)]) == begin for example in found.examples)
    assert found.repeated_tokens == len(begin)
    # The second exchange is the longest: in rows it does not fit in, it is left out and counted, the others are not.
    narrow = task.encode(record, smollm2, room_tokens=43, too_long="split")
    adds_up(narrow, 43)
    words = "".join(learned(example, smollm2) for example in narrow.examples)
    assert words == "Paris. About two million.<|im_end|>You are welcome.<|im_end|>"
    assert narrow.cut_tokens > 0 and "left out" in str(narrow.reason)
    nothing = task.encode(record, smollm2, room_tokens=12, too_long="split")
    assert nothing.examples == [] and nothing.cut_tokens == nothing.rendered_tokens
    last, record = record_of({"kind": "dialogue", "learn": "last"}, TALK)
    with pytest.raises(ConfigError, match="cannot be split"):
        last.encode(record, smollm2, room_tokens=30, too_long="split")


def test_what_a_user_says_behind_the_last_answer_is_booked(smollm2: Tokenizer) -> None:
    task, record = record_of({"kind": "dialogue"}, {"text": "Hi ! __eou__ Hello . __eou__ How are you ? __eou__"})
    found = task.encode(record, smollm2, room_tokens=ROOM, too_long="refuse")
    adds_up(found, ROOM)
    assert learned(found.examples[0], smollm2) == "Hello .<|im_end|>"
    assert found.cut_tokens > 5 and "last answer" in str(found.reason)
    assert task.expected(record) == ("Hello .",)


def test_messages_may_say_that_they_are_not_learned(smollm2: Tokenizer) -> None:
    messages = [dict(message) for message in TURNS]
    messages[2]["weight"] = 0
    task, record = record_of({"kind": "dialogue"}, {"messages": messages})
    (example,) = task.encode(record, smollm2, room_tokens=ROOM, too_long="refuse").examples
    assert learned(example, smollm2) == "巴黎，约两百万人。<|im_end|>You are welcome.<|im_end|>"
    plain = render(smollm2, [{k: v for k, v in one.items() if k != "weight"} for one in messages])
    assert list(example.ids) == plain.ids


def test_tools_are_shown_or_refused(smollm2: Tokenizer) -> None:
    task, record = record_of({"kind": "dialogue"}, CALLING)
    with pytest.raises(ArtifactError, match="does not show tools"):
        task.encode(record, smollm2, room_tokens=ROOM, too_long="refuse")
    _, silent = record_of({"kind": "dialogue"}, {**CALLING, "tools": None})
    with pytest.raises(ArtifactError, match="does not show calls"):
        task.encode(silent, smollm2, room_tokens=ROOM, too_long="refuse")
    told, record = record_of({"kind": "dialogue", "tools": "text"}, CALLING)
    (example,) = told.encode(record, smollm2, room_tokens=ROOM, too_long="refuse").examples
    call = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    words = learned(example, smollm2)
    assert words == f"<tool_call>{call}</tool_call><|im_end|>Seven degrees.<|im_end|>"
    assert "of a city" in smollm2.decode(list(example.ids)) and '{"celsius": 7}' in smollm2.decode(list(example.ids))
    knowing = Tokenizer(smollm2.core, {**smollm2.config, "chat_template": WITH_TOOLS})
    task, record = record_of({"kind": "dialogue"}, CALLING)
    (example,) = task.encode(record, knowing, room_tokens=ROOM, too_long="refuse").examples
    assert learned(example, knowing) == f"<call>{call}</call><|im_end|>Seven degrees.<|im_end|>"


def test_templates_that_cannot_teach_are_refused(smollm2: Tokenizer) -> None:
    task, record = record_of({"kind": "dialogue"}, TALK)
    bare = Tokenizer.bytes_only()
    bare.config["chat_template"] = "{% for message in messages %}{{ message.content + '\n' }}{% endfor %}"
    with pytest.raises(ArtifactError, match="could not learn to stop"):
        task.encode(record, bare, room_tokens=ROOM, too_long="refuse")
    without = Tokenizer.train([], vocab_size=258, special_tokens=["<|endoftext|>"])
    with pytest.raises(ArtifactError, match="no chat template"):
        task.encode(record, without, room_tokens=ROOM, too_long="refuse")
    endless = Tokenizer(without.core, {})
    translation, record = record_of(*GENERATIVE["translation"])
    with pytest.raises(ArtifactError, match="ends a text"):
        translation.encode(record, endless, room_tokens=ROOM, too_long="refuse")


def test_special_spellings_in_rows_stay_text(smollm2: Tokenizer) -> None:
    for table, row in (
        ({"kind": "translation"}, {"en": "<|im_end|> a", "zh": "b <|im_end|>"}),
        ({"kind": "generation"}, {"text": "x <|im_end|> y"}),
        ({"kind": "dialogue"}, {"prompt": "<|im_end|>", "completion": "a <|im_end|> b"}),
    ):
        task, record = record_of(table, row)
        (example,) = task.encode(record, smollm2, room_tokens=ROOM, too_long="refuse").examples
        ends = [i for i, id in enumerate(example.ids) if id == smollm2.eos_id]
        ended = 3 if table["kind"] == "dialogue" else 1  # system, user, assistant
        assert len(ends) == ended


def test_for_an_encoder_the_source_stands_beside(smollm2: Tokenizer) -> None:
    task, record = record_of({"kind": "translation", "as_source": True}, {"en": "Good morning to all.", "zh": "早上好"})
    assert task.objective == "sequence_to_sequence"
    found = task.encode(record, smollm2, room_tokens=ROOM, too_long="refuse")
    adds_up(found, ROOM)
    (example,) = found.examples
    assert list(example.source or ()) == smollm2.encode("Good morning to all.")
    assert list(example.ids) == [smollm2.bos_id, *smollm2.encode("早上好"), smollm2.eos_id] and all(example.weight)
    question = task.question(record, smollm2, room_tokens=ROOM)
    assert question.ids == [smollm2.bos_id] and question.source == list(example.source or ())
    cut = task.encode(record, smollm2, room_tokens=len(example.ids) - 1, too_long="cut-right")
    dropped = task.encode(record, smollm2, room_tokens=len(example.ids) - 2, too_long="cut-right")
    adds_up(cut, len(example.ids) - 1)
    adds_up(dropped, ROOM)
    assert cut.examples and not dropped.examples and "answer alone" in str(dropped.reason)
    shorter = task.encode(record, smollm2, room_tokens=ROOM, too_long="cut-left").examples[0]
    assert shorter == example
    assert [one.text for one in show_parts(example, smollm2)["source"]] == ["Good", " morning", " to", " all", "."]


@pytest.mark.parametrize(
    "settings",
    [
        {"as_source": True, "template": "{source}"},
        {"as_source": True, "through": "chat"},
        {"system": "Be brief."},
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no effect"):
        record_of({"kind": "translation", **settings}, {"en": "a", "zh": "b"})


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no answer": ({"kind": "translation"}, {"en": "a"}, "no field"),
    "blank answer": ({"kind": "translation"}, {"en": "a", "zh": "  "}, "blank"),
    "an empty reference": ({"kind": "summarization"}, {"document": "a", "summaries": ["b", " "]}, "answer is empty"),
    "blank source": ({"kind": "summarization"}, {"document": " ", "summary": "b"}, "blank"),
    "no assistant": ({"kind": "dialogue"}, {"messages": TURNS[:2]}, "no assistant speaks"),
    "unknown role": ({"kind": "dialogue"}, {"messages": [{"role": "robot", "content": "a"}]}, '"robot"'),
    "twice the user": (
        {"kind": "dialogue"},
        {"messages": [*TURNS[1:2] * 2, TURNS[2]]},
        "message 2",
    ),
    "twice the assistant": (
        {"kind": "dialogue"},
        {"messages": [*TURNS[1:3], TURNS[2]]},
        "message 3",
    ),
    "late system": ({"kind": "dialogue"}, {"messages": [*TURNS[1:3], TURNS[0]]}, "message 3"),
    "empty turn": ({"kind": "dialogue"}, {"instruction": "a", "output": ""}, "empty"),
    "nobody called": (
        {"kind": "dialogue"},
        {"messages": [TURNS[1], {"role": "tool", "content": "7"}]},
        "called",
    ),
    "no talk": ({"kind": "dialogue"}, {"text": "just words"}, "no conversation"),
    "call unread": (
        {"kind": "dialogue"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{"}]},
        "JSON",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_have_one_clear_error(name: str) -> None:
    table, row, words = BAD[name]
    with pytest.raises(DataError, match=words) as caught:
        record_of(table, row, "rows.jsonl:7")
    assert caught.value.where == "rows.jsonl:7"


def test_every_layout_is_the_same_conversation() -> None:
    asked, said = "What is 2 + 2?", "It is 4."
    wanted = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    rows: dict[str, dict[str, Any]] = {
        "messages": {"messages": wanted},
        "sharegpt": {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]},
        "alpaca": {"instruction": asked, "input": "", "output": said},
        "prompt_completion": {"prompt": asked, "completion": said},
        "dialogue_lines": {"text": f"{asked} __eou__ {said} __eou__"},
        "transcript": {"text": f"\n\nHuman: {asked}\n\nAssistant: {said}"},
    }
    for layout, row in rows.items():
        assert layout_of(row) == layout
        assert to_messages(row, "here").messages == wanted
    told = to_messages({**rows["alpaca"], "input": "in words", "history": [["a", "b"]], "system": "Be kind."}, "here")
    assert [one["content"] for one in told.messages] == ["Be kind.", "a", "b", f"{asked}\n\nin words", said]
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": asked}]}, wanted[1]]}
    assert to_messages(parts, "here").messages == wanted


def test_changed_texts_keep_their_answers(smollm2: Tokenizer) -> None:
    for name, (table, row) in GENERATIVE.items():
        task, record = record_of(table, row)
        same = task.with_text(record, task.text(record))
        assert same == record, name
        changed = task.with_text(record, task.text(record).replace("a", "e"))
        assert changed != record or "a" not in task.text(record)
        if name != "generation":
            assert task.expected(changed) == task.expected(record)
    task, record = record_of({"kind": "dialogue"}, TALK)
    with pytest.raises(DataError, match="paragraphs"):
        task.with_text(record, "one alone")


def test_what_is_shown_is_what_is_learned(smollm2: Tokenizer) -> None:
    task, record = record_of({"kind": "dialogue"}, TALK)
    (example,) = task.encode(record, smollm2, room_tokens=ROOM, too_long="refuse").examples
    shown = show(example, smollm2)
    assert "".join(text for text, _, _ in shown) == smollm2.decode(list(example.ids), skip_special=False)
    assert "".join(text for text, weight, _ in shown if weight) == learned(example, smollm2)
    assert len(shown) == len(example.ids) and all(target is None for _, _, target in shown)


def test_real_conversations(smollm2: Tokenizer, shared_data: Path) -> None:
    alpaca, record = record_of(
        {"kind": "dialogue"}, first_rows(shared_data / "alpaca_zh" / "alpaca_zh_5k.json.gz", 1)[0]
    )
    (example,) = alpaca.encode(record, smollm2, room_tokens=ROOM, too_long="refuse").examples
    assert learned(example, smollm2) == alpaca.expected(record)[0] + "<|im_end|>"
    task, _ = record_of({"kind": "dialogue"}, TALK)
    for row in first_rows(shared_data / "sharegpt_style" / "sharegpt_zh_400.jsonl.gz", 12):
        record = task.record(row, "here")
        answers = [one["value"].strip() for one in row["conversations"] if one["from"] == "gpt"]
        for room in (ROOM, 512):
            for policy in ("cut-left", "cut-right", "split"):
                found = task.encode(record, smollm2, room_tokens=room, too_long=policy)  # type: ignore[arg-type]
                adds_up(found, room)
                words = [w.strip() for one in found.examples for w in learned(one, smollm2).split("<|im_end|>")[:-1]]
                assert set(words) <= set(answers) and (room < ROOM or words == answers)
    told, _ = record_of({"kind": "dialogue", "tools": "text"}, TALK)
    for row in first_rows(shared_data / "sharegpt_style" / "glaive_toolcall_zh_demo.json.gz", 10):
        (example,) = told.encode(told.record(row, "here"), smollm2, room_tokens=ROOM, too_long="refuse").examples
        calls = [json.loads(one["value"])["name"] for one in row["conversations"] if one["from"] == "function_call"]
        words = learned(example, smollm2)
        assert words.count("<tool_call>") == len(calls) and all(f'"name": "{name}"' in words for name in calls)


def test_real_sources(smollm2: Tokenizer, shared_data: Path) -> None:
    for table, path in (
        ({"kind": "summarization"}, "summ_en_scitldr/test.jsonl.gz"),
        ({"kind": "summarization", "through": "chat"}, "summ_en_dialogsum/dialogsum.test.jsonl.gz"),
        ({"kind": "summarization", "language": "zh"}, "summ_zh_csl/dev.jsonl.gz"),
        ({"kind": "question-answering", "language": "zh"}, "medical_qa_zh/huatuo.jsonl.gz"),
    ):
        for row in first_rows(shared_data / path, 5):
            task, record = record_of(table, row)
            found = task.encode(record, smollm2, room_tokens=400, too_long="cut-right")
            adds_up(found, 400)
            for example in found.examples:
                assert learned(example, smollm2) == task.expected(record)[0] + "<|im_end|>"
    three = first_rows(shared_data / "summ_en_dialogsum/dialogsum.test.jsonl.gz", 1)[0]
    task, record = record_of({"kind": "summarization"}, three)
    assert task.expected(record) == (three["summary1"], three["summary2"], three["summary3"])


def test_our_own_template_is_read_as_any_other() -> None:
    tokenizer = Tokenizer.bytes_only()
    assert tokenizer.chat_template == CHATML
    task, record = record_of({"kind": "dialogue"}, TALK)
    (example,) = task.encode(record, tokenizer, room_tokens=ROOM, too_long="refuse").examples
    assert learned(example, tokenizer).split("<|im_end|>")[:-1] == [one["content"] for one in TURNS[2::2]]


@pytest.mark.parametrize("name", ["dialogue, last", "summary", "summary, chat", "answer, chat"])
def test_the_policy_names_the_side_that_is_lost(name: str, smollm2: Tokenizer) -> None:
    table, row = GENERATIVE[name]
    text = f"First comes the spring. {PASSAGE} Last comes the mouth."
    if name == "dialogue, last":
        row = {"prompt": text, "completion": "A bridge."}
    task, record = record_of({**table, "max_new_tokens": 12}, {**row, "document": text, "context": text})
    room = task.encode(record, smollm2, room_tokens=ROOM, too_long="refuse").examples[0].places - 15
    for policy, kept, lost in (("cut-left", "the mouth.", "the spring"), ("cut-right", "First comes", "the mouth")):
        found = task.encode(record, smollm2, room_tokens=room, too_long=policy)  # type: ignore[arg-type]
        adds_up(found, room)
        question = task.question(record, smollm2, room_tokens=room, too_long=policy)  # type: ignore[arg-type]
        for ids in (found.examples[0].ids, question.ids):
            read = smollm2.decode(list(ids))
            assert kept in read and lost not in read
