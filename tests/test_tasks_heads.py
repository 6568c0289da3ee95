"""Tasks that are answered by a head, and pairs of answers: what is asked where, in which numbers, and back again."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from ratoon.base.errors import ArtifactError, ConfigError, DataError
from ratoon.model.gguf import read_head
from ratoon.tasks.contract import Encoded, Task
from ratoon.tasks.registry import TASKS, class_of, restored, task_of
from ratoon.tasks.show import show, show_parts
from ratoon.text.tokenizer import Tokenizer
from tasks_cases import PASSAGE, POLICIES, ROOM, TALK, adds_up, first_rows, learned, record_of


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_gguf_metadata(read_head(smollm2_path)[0])


# -- an answer that stands in the text ---------------------------------------------------------------------------------

QA = {
    "id": "q1",
    "question": "How long is the bridge?",
    "context": PASSAGE,
    "answers": [{"text": "三百米", "answer_start": PASSAGE.index("三百米")}],
}


def scores_for(found: Encoded) -> list[Any]:
    """Scores of a model that knows: high where the examples say, as `read_scores` takes them."""
    pairs = []
    for example, places in zip(found.examples, found.places, strict=True):
        allowed = [i for i, target in enumerate(example.targets or ()) if target]
        assert len(allowed) == len(places) + 1 and allowed[-1] == len(example.ids) - 1
        scores = np.random.default_rng(len(places)).normal(size=(len(allowed), 2))
        for side in (0, 1):
            assert example.vector is not None
            scores[allowed.index(int(example.vector[side])), side] += 20
        pairs.append((places, scores))
    return pairs


def test_an_answer_is_found_by_its_characters(smollm2: Tokenizer) -> None:
    task, record = record_of({"kind": "extractive"}, QA)
    sentences = task.settle([record])
    assert "3 characters" in sentences[0]
    found = task.encode(record, smollm2, room_tokens=ROOM, too_long="refuse")
    adds_up(found, ROOM)
    (example,) = found.examples
    assert example.vector is not None and example.targets is not None
    begin, end = map(int, example.vector)
    assert smollm2.decode(list(example.ids[begin : end + 1])) == "三百米"
    assert [i for i, w in enumerate(example.weight) if w] == [len(example.ids) - 1]
    asked = smollm2.encode("How long is the bridge?\n")
    assert list(example.ids[: len(asked)]) == asked and example.ids[-1] == smollm2.eos_id
    assert list(example.targets) == [0] * len(asked) + [1] * (len(example.ids) - len(asked))
    assert task.read_scores(record, scores_for(found)) == "三百米"
    marks = {target for _, weight, target in show(example, smollm2, ("begin", "end")) if weight}
    assert marks == {"begin", "end"}


@pytest.mark.parametrize("room", [48, 64, 100])
@pytest.mark.parametrize("overlap", [0, 12])
def test_a_long_text_is_read_in_windows(room: int, overlap: int, smollm2: Tokenizer) -> None:
    task, record = record_of({"kind": "extractive", "overlap_tokens": overlap}, QA)
    task.settle([record])
    found = task.encode(record, smollm2, room_tokens=room, too_long="split")
    adds_up(found, room)
    assert len(found.examples) > 1 and found.cut_tokens == 0
    context = smollm2.encode_plain_spans(PASSAGE)[1]
    asked = len(smollm2.encode("How long is the bridge?\n"))
    assert found.repeated_tokens == (len(found.examples) - 1) * (asked + 1 + overlap)
    seen = Counter(place for places in found.places for place in places)
    assert seen.keys() == set(context), "every token of the text stands in a window"
    held = 0
    for example in found.examples:
        assert example.vector is not None
        begin, end = map(int, example.vector)
        if begin == len(example.ids) - 1:
            assert end == begin, "a window without the answer asks for its marker"
        else:
            held += 1
            assert smollm2.decode(list(example.ids[begin : end + 1])) == "三百米"
    assert held >= 1
    assert task.read_scores(record, scores_for(found)) == "三百米"


def test_a_loud_window_without_the_answer_does_not_win(smollm2: Tokenizer) -> None:
    task, record = record_of({"kind": "extractive", "overlap_tokens": 8}, QA)
    task.settle([record])
    pairs = scores_for(task.encode(record, smollm2, room_tokens=60, too_long="split"))
    loud = [(places, scores + 100 * (int(scores.argmax(0)[0]) == len(scores) - 1)) for places, scores in pairs]
    assert task.read_scores(record, loud) == "三百米"


def test_an_answer_begins_before_it_ends_and_is_not_too_long() -> None:
    task, record = record_of({"kind": "extractive", "max_answer_characters": 4}, {**QA, "context": "ab cd ef三百米"})
    task.settle([record])
    places = [(0, 2), (2, 5), (5, 8), (8, 11)]
    scores = np.array([[3.0, 9.0], [1.0, 0.0], [9.0, 0.5], [0.0, 4.0], [-9.0, -9.0]])
    # Begin at the third and end at the first is more, but backwards; third to fourth is more, but has six characters.
    assert task.read_scores(record, [(places, scores)]) == "ab"
    scores[0, 1] = -5.0
    assert task.read_scores(record, [(places, scores)]) == "ef"


def test_questions_without_an_answer(smollm2: Tokenizer) -> None:
    table = {"kind": "extractive", "unanswerable": True}
    task, with_answer = record_of(table, QA)
    _, without = record_of(table, {**QA, "answers": [], "is_impossible": True})
    assert len(task.settle([with_answer, without])) == 2 and task.expected(without) == ()
    found = task.encode(without, smollm2, room_tokens=64, too_long="split")
    assert all(example.vector == (len(example.ids) - 1.0,) * 2 for example in found.examples)
    assert task.read_scores(without, scores_for(found)) == ""
    kept = task.encode(with_answer, smollm2, room_tokens=64, too_long="split")
    assert task.read_scores(with_answer, scores_for(kept)) == "三百米"
    with pytest.raises(DataError, match="no answer"):
        record_of({"kind": "extractive"}, {**QA, "answers": {"text": [], "answer_start": []}})


def test_an_answer_at_the_wrong_place_is_searched_for() -> None:
    first, last = PASSAGE.index("Ann Lee"), PASSAGE.rindex("Ann Lee")
    for start, wanted in ((first, first), (first + 3, first), (last - 2, last), (-1, first), (10**6, last)):
        _, record = record_of({"kind": "extractive"}, {**QA, "answers": [{"text": "Ann Lee", "answer_start": start}]})
        assert record.span == (wanted, wanted + 7)
    absent = {**QA, "answers": [{"text": "Bob", "answer_start": 3}]}
    with pytest.raises(DataError, match="'Bob' is not in the text"):
        record_of({"kind": "extractive"}, absent)
    _, record = record_of({"kind": "extractive", "absent_answer": "no-answer"}, absent)
    assert record.span is None and record.answers == ("Bob",)
    _, record = record_of({"kind": "extractive"}, {**QA, "answers": [absent["answers"][0], *QA["answers"]]})
    assert record.answers == ("Bob", "三百米") and record.span is not None


def test_cutting_a_text_says_when_the_answer_is_lost(smollm2: Tokenizer) -> None:
    row = {
        **QA,
        "context": "The bridge is long. " * 20 + "It has three hundred metres.",
        "answers": "three hundred metres",
    }
    task, record = record_of({"kind": "extractive"}, row)
    right = task.encode(record, smollm2, room_tokens=40, too_long="cut-right")
    left = task.encode(record, smollm2, room_tokens=40, too_long="cut-left")
    for found in (left, right):
        adds_up(found, 40)
    assert "answer with it" in str(right.reason) and right.examples[0].vector == (39.0, 39.0)
    assert "answer" not in str(left.reason) and left.examples[0].vector != (39.0, 39.0)
    none = task.encode(record, smollm2, room_tokens=8, too_long="split")
    adds_up(none, 8)
    assert none.examples == [] and "no room" in str(none.reason)
    with pytest.raises(DataError, match="tokens"):
        task.encode(record, smollm2, room_tokens=40, too_long="refuse")


@pytest.mark.parametrize("path", ["squad_v11/train_part.json.gz", "clue/cmrc2018/cmrc2018_dev.json.gz"])
def test_real_answers(path: str, smollm2: Tokenizer, shared_data: Path) -> None:
    import json

    articles = json.loads(gzip.decompress((shared_data / path).read_bytes()))["data"]
    rows = [
        {"context": paragraph["context"], **question}
        for article in articles[: 40 if "squad" in path else 300]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    task = task_of({"kind": "extractive"})
    wrong = misplaced = 0
    records = []
    answers = [(row, answer) for row in rows for answer in row["answers"]]
    for asked, answer in answers:
        start = answer["answer_start"]
        misplaced += start < 0 or not asked["context"].startswith(answer["text"], start)
        try:
            records.append(task.record({**asked, "answers": [answer]}, "here"))
        except DataError:
            wrong += 1
    assert wrong <= misplaced and wrong < len(answers) / 20
    if "cmrc" in path:
        assert misplaced > wrong, "CMRC has answers at other places than it says: they are found"
    task.settle(records)
    split = 0
    for record in records[:: len(records) // 80]:
        found = task.encode(record, smollm2, room_tokens=384, too_long="split")
        adds_up(found, 384)
        split += len(found.examples) > 1
        answer = task.read_scores(record, scores_for(found))
        right = record.context[slice(*record.span)]
        assert right in answer and len(answer) <= len(right) + 6, "whole tokens: a sign may stick to the last word"
    assert split > 0


# -- labels and numbers of one text or two -----------------------------------------------------------------------------


def settled(table: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[Task[Any], list[Any], list[str]]:
    task = task_of(table)
    records = [record for i, row in enumerate(rows) if (record := task.record(row, f"rows:{i + 1}")) is not None]
    return task, records, task.settle(records)


PAIRS = [
    {"sentence1": "花呗可以提前还款吗", "sentence2": "提前还花呗", "label": "1"},
    {"sentence1": "借款", "sentence2": "how can I pay my bill back before the month ends", "label": "0"},
]


def test_two_texts_have_one_label(smollm2: Tokenizer) -> None:
    task, records, _ = settled({"kind": "pairs"}, PAIRS)
    found = task.encode(records[0], smollm2, room_tokens=ROOM, too_long="refuse")
    adds_up(found, ROOM)
    (example,) = found.examples
    assert smollm2.decode(list(example.ids)) == "花呗可以提前还款吗\n提前还花呗"
    assert example.targets is not None and example.targets[-1] == 1 == example.weight[-1] and sum(example.weight) == 1
    assert task.read_scores(records[0], np.array([0.1, 0.3])) == "1"
    changed = task.with_text(records[0], "a\nb")
    assert task.text(changed) == "a\nb" and task.expected(changed) == "1"
    with pytest.raises(DataError, match="lines"):
        task.with_text(records[0], "one")


@pytest.mark.parametrize("policy", POLICIES)
def test_the_longer_text_of_a_pair_is_shortened(policy: Any, smollm2: Tokenizer) -> None:
    task, records, _ = settled({"kind": "pairs"}, PAIRS)
    first, second = (smollm2.encode_plain_spans(PAIRS[1][name])[0] for name in ("sentence1", "sentence2"))
    room = len(first) + 1 + 8
    found = task.encode(records[1], smollm2, room_tokens=room, too_long=policy)
    adds_up(found, room)
    kept = second[-8:] if policy == "cut-left" else second[:8]
    assert list(found.examples[0].ids) == [*first, *smollm2.encode("\n"), *kept]
    assert found.cut_tokens == len(second) - 8 > 0
    even = task.encode(records[1], smollm2, room_tokens=5, too_long=policy)
    assert len(even.examples[0].ids) == 5 and even.examples[0].ids[2] == smollm2.encode("\n")[0]
    nothing = task.encode(records[1], smollm2, room_tokens=2, too_long=policy)
    adds_up(nothing, 2)
    assert nothing.examples == [] and nothing.reason
    for refused, error in (("refuse", DataError), ("split", ConfigError)):
        with pytest.raises(error):
            task.encode(records[1], smollm2, room_tokens=room, too_long=refused)


def test_pairs_of_clue(smollm2: Tokenizer, shared_data: Path) -> None:
    clue = shared_data / "clue"
    rows = first_rows(clue / "ocnli" / "dev.json.gz", 600)
    without = [row for row in rows if row["label"] == "-"]
    task, records, sentences = settled({"kind": "pairs"}, rows)
    assert without and len(records) == len(rows) - len(without) and "3 labels" in sentences[0]
    task, records, _ = settled({"kind": "pairs"}, first_rows(clue / "csl" / "dev.json.gz", 60))
    assert all(" / " in record.second for record in records)
    task, records, _ = settled({"kind": "pairs"}, first_rows(clue / "afqmc" / "dev.json.gz", 60))
    assert task.labels == ("0", "1")  # type: ignore[attr-defined]
    rows = first_rows(clue / "cluewsc2020" / "train.json.gz", 300)
    task, records, _ = settled({"kind": "pairs"}, rows)
    for row, record in zip(rows, records, strict=True):
        target = row["target"]
        assert f"[{target['span1_text']}]" in record.text and f"_{target['span2_text']}_" in record.text
        assert record.text.translate({ord(c): None for c in "[]_"}) == row["text"].translate(
            {ord("["): None, ord("]"): None, ord("_"): None, ord("\n"): " "}
        )
        assert record.second == f"{target['span2_text']} = {target['span1_text']}"
    assert "有些这样的“[洋人]”" in task.record(first_rows(clue / "cluewsc2020" / "dev.json.gz", 1)[0], "here").text


def test_labels_of_real_rows(smollm2: Tokenizer, shared_data: Path) -> None:
    text = gzip.decompress((shared_data / "banking77" / "train.csv.gz").read_bytes()).decode()
    task, records, _ = settled({"kind": "classification"}, list(csv.DictReader(io.StringIO(text))))
    assert len(task.labels) == 77  # type: ignore[attr-defined]
    example = task.encode(records[0], smollm2, room_tokens=64, too_long="refuse").examples[0]
    assert task.labels[example.targets[-1]] == "card_arrival"  # type: ignore[attr-defined, index]
    assert show(example, smollm2, task.head().labels)[-1].target == "card_arrival"  # type: ignore[union-attr]
    bank = gzip.decompress((shared_data / "financial_phrasebank" / "Sentences_AllAgree.txt.gz").read_bytes()).decode()
    rows = [dict(zip(("text", "label"), line.rsplit("@", 1), strict=True)) for line in bank.splitlines()]
    task, records, _ = settled({"kind": "classification"}, rows)
    assert task.labels == ("negative", "neutral", "positive")  # type: ignore[attr-defined]
    titles = gzip.decompress((shared_data / "thucnews_titles" / "dev.txt.gz").read_bytes()).decode()
    rows = [dict(zip(("title", "class"), line.rsplit("\t", 1), strict=True)) for line in titles.splitlines()]
    names = gzip.decompress((shared_data / "thucnews_titles" / "class.txt.gz").read_bytes()).decode().split()
    table = {"kind": "classification", "label_names": {str(i): name for i, name in enumerate(names)}}
    task, records, _ = settled(table, rows)
    assert set(task.labels) == set(names) and records[0].text == "体验2D巅峰 倚天屠龙记十大创新概览"  # type: ignore[attr-defined]
    tnews, records, _ = settled(
        {"kind": "classification", "fields": {"label": "label_desc"}},
        first_rows(shared_data / "clue" / "tnews" / "dev.json.gz", 400),
    )
    assert "news_travel" in tnews.labels  # type: ignore[attr-defined]
    template = "{question} Reference: {reference} Answer: {answer}"
    graded, records, _ = settled(
        {"kind": "classification", "template": template},
        first_rows(shared_data / "semeval2013_task7" / "beetle_train.jsonl.gz", 100),
    )
    assert "Reference: Terminal 1 and the positive terminal are separated by the gap / Terminal" in records[0].text


def test_an_unknown_label_names_the_known(smollm2: Tokenizer) -> None:
    task, _, _ = settled({"kind": "pairs"}, PAIRS)
    with pytest.raises(DataError, match="'2' is not known"):
        task.check(task.record({**PAIRS[0], "label": "2"}, "rows:9"))
    with pytest.raises(ConfigError, match="nothing to tell apart"):
        settled({"kind": "pairs"}, PAIRS[:1])
    with pytest.raises(DataError, match="blank"):
        task.record({**PAIRS[0], "sentence2": " "}, "rows:9")


ESSAYS = [{"text": f"essay {score}", "score": score} for score in (2, 8, 12, 5)]


def test_numbers_there_and_back(smollm2: Tokenizer) -> None:
    task, records, sentences = settled({"kind": "scoring"}, ESSAYS)
    assert sentences == ["numbers in steps of 1, 2 to 12"]
    mean, spread = 6.75, float(np.std([2, 8, 12, 5]))
    for record in records:
        (example,) = task.encode(record, smollm2, room_tokens=ROOM, too_long="refuse").examples
        assert example.vector is not None and example.vector[0] == pytest.approx((record.score - mean) / spread)
        assert example.weight[-1] == 1 == sum(example.weight)
        assert task.read_scores(record, np.array(example.vector)) == record.score
    for number, read in ((-2.0, 2), (19.0, 12), (3.49, 3), (3.51, 4), (4.5, 5)):
        assert task.read_scores(records[0], np.array([(number - mean) / spread])) == read
    any_size, records, _ = settled({"kind": "scoring", "low": 0, "high": 20, "step": 0}, ESSAYS)
    assert any_size.read_scores(records[0], np.array([-1.0])) == pytest.approx(mean - spread)
    half, records, _ = settled({"kind": "scoring", "step": 0.5}, ESSAYS)
    assert half.read_scores(records[0], np.array([(6.7 - mean) / spread])) == 6.5
    with pytest.raises(DataError, match="outside of 3 to 12"):
        settled({"kind": "scoring", "low": 3}, ESSAYS)
    with pytest.raises(DataError, match="no number"):
        settled({"kind": "scoring"}, [{"text": "a", "score": "good"}])
    with pytest.raises(ConfigError, match="all 2"):
        settled({"kind": "scoring"}, ESSAYS[:1])
    with pytest.raises(ConfigError, match="below"):
        task_of({"kind": "scoring", "low": 5, "high": 5})


def test_a_template_says_how_long_the_text_is() -> None:
    table = {
        "kind": "scoring",
        "template": "{text} ({words} words, {characters} characters)",
        "fields": {"text": "essay"},
    }
    rows = [{"essay": "an  essay of\nfive words", "score": 1}, {"essay": "短文", "score": 2}]
    task, records, _ = settled(table, rows)
    assert records[0].text == "an  essay of\nfive words (5 words, 18 characters)"
    assert records[1].text == "短文 (1 words, 2 characters)"
    own = task.record({"essay": "a b", "score": 1, "words": "many"}, "rows:3")
    assert own.text == "a b (many words, 2 characters)", "a row's own field comes first"


def test_numbers_of_pairs_there_and_back(smollm2: Tokenizer) -> None:
    rows = [{"sentence1": f"one {n}", "sentence2": "two", "score": n} for n in (0.5, 3.0, 4.5)]
    task, records, _ = settled({"kind": "pair-scoring", "low": 0, "high": 5}, rows)
    again = restored(task.facts())
    for record in records:
        (example,) = task.encode(record, smollm2, room_tokens=ROOM, too_long="refuse").examples
        assert example.vector is not None and abs(example.vector[0]) < 2 and example.weight[-1] == 1
        assert again.read_scores(record, np.array(example.vector)) == pytest.approx(record.score)
    assert (
        again.read_scores(records[0], np.array([99.0])) == 5 and again.read_scores(records[0], np.array([-99.0])) == 0
    )


def test_a_group_of_one_number_has_a_scale(smollm2: Tokenizer) -> None:
    rows = [{**row, "set": "all"} for row in ESSAYS] + [{"text": "alone", "score": 7, "set": "one"}]
    task, records, _ = settled({"kind": "scoring", "group": "set", "low": 0, "high": 20}, rows)
    (example,) = task.encode(records[-1], smollm2, room_tokens=ROOM, too_long="refuse").examples
    assert example.vector == (0.0,) and task.read_scores(records[-1], np.array([0.4])) == 7


def test_essays_of_several_scales(smollm2: Tokenizer, shared_data: Path) -> None:
    text = gzip.decompress((shared_data / "asap_aes" / "essays.tsv.gz").read_bytes()).decode()
    names = ("essay_id", "essay_set", "essay", "rater1", "rater2", "_", "score")
    rows = [dict(zip(names, line.split("\t"), strict=False)) for line in text.splitlines()]
    table = {"kind": "scoring", "group": "essay_set", "fields": {"text": "essay"}}
    task, records, sentences = settled(table, rows)
    ranges = task.ranges  # type: ignore[attr-defined]
    assert len(ranges) == 8 and ranges["1"][1] <= 12 and ranges["8"][1] > 30 and "1: " in sentences[0]
    scales = task.scales()  # type: ignore[attr-defined]
    assert scales["1"] == (*ranges["1"], 1.0) and len(scales) == 8
    again = restored(task.facts())
    for record in records[:30]:
        found = task.encode(record, smollm2, room_tokens=256, too_long="cut-right")
        adds_up(found, 256)
        assert again.read_scores(record, np.array(found.examples[0].vector)) == record.score
    with pytest.raises(DataError, match="group '9'"):
        task.check(task.record({**rows[0], "essay_set": "9"}, "here"))


SETS = [
    {"text": "t", "score": score, "set": group} for group, score in ((1, 3), (1, 5), (2, 40), (2, 44), (3, 1), (3, 2))
]


def test_a_scale_for_each_group() -> None:
    """YAML's {1: 2} are names; what is not told is that of the training rows."""
    table = {"kind": "scoring", "group": "set", "low": {1: 2, 2: 30}, "high": {"2": 60}}
    task, records, _ = settled(table, SETS)
    scales = task.scales()  # type: ignore[attr-defined]
    assert scales == {"1": (2, 5, 1), "2": (30, 60, 1), "3": (1, 2, 1)}
    assert restored(task.facts()).scales() == scales  # type: ignore[attr-defined]
    assert task.read_scores(records[2], np.array([99.0])) == 60
    task.check(task.record({"text": "t", "score": 59, "set": 2}, "here"))
    with pytest.raises(DataError, match=r"number 61 is outside of 30 to 60\n(.*\n)*.*task.low=\{2: 0\}"):
        task.check(task.record({"text": "t", "score": 61, "set": 2}, "here"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": None}, "need task.group"),
        ({"high": {1: 1}}, r"low must be below high \(group 1\)"),
        ({"low": {9: 0}}, "no training row has the group '9'"),
    ],
)
def test_scales_of_groups_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        settled({"kind": "scoring", "group": "set", "low": {1: 2}, **changes}, SETS)


def test_two_texts_have_one_number(smollm2: Tokenizer) -> None:
    rows = [{"sentence1": "a cat sat", "sentence2": "a cat", "score": s} for s in (0.0, 2.5, 5.0)]
    task, records, _ = settled({"kind": "pair-scoring"}, rows)
    (example,) = task.encode(records[1], smollm2, room_tokens=ROOM, too_long="refuse").examples
    assert example.vector == (0.0,) and smollm2.decode(list(example.ids)) == "a cat sat\na cat"
    cut = task.encode(records[1], smollm2, room_tokens=5, too_long="cut-right")
    adds_up(cut, 5)
    assert smollm2.decode(list(cut.examples[0].ids)) == "a cat\na cat"


# -- pairs of answers --------------------------------------------------------------------------------------------------

TURNS = TALK["messages"]
CHOICES: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": TURNS[:4],
        "chosen": {"role": "assistant", "content": "好的。"},
        "rejected": {"role": "assistant", "content": "No, I will not do that."},
    },
    "prompt": {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "Why should I?"},
    "whole": {
        "prompt": TURNS[3]["content"],
        "chosen": TURNS[:5],
        "rejected": [*TURNS[:4], {**TURNS[4], "content": "Non."}],
    },
    "transcripts": {
        "chosen": "\n\nHuman: a?\n\nAssistant: b.\n\nHuman: c?\n\nAssistant: d.",
        "rejected": "\n\nHuman: a?\n\nAssistant: b.\n\nHuman: c?\n\nAssistant: e, f.",
    },
}


@pytest.mark.parametrize("name", CHOICES)
def test_both_answers_stand_behind_one_prompt(name: str, smollm2: Tokenizer) -> None:
    task, record = record_of({"kind": "preference"}, CHOICES[name])
    found = task.encode(record, smollm2, room_tokens=ROOM, too_long="refuse")
    adds_up(found, ROOM)
    (chosen,) = found.examples
    rejected = chosen.beside
    assert rejected is not None and rejected.name == chosen.name
    begin = list(chosen.weight).index(1.0) + 1
    assert begin == list(rejected.weight).index(1.0) + 1
    assert list(chosen.ids[:begin]) == list(rejected.ids[:begin])
    words = [learned(example, smollm2) for example in (chosen, rejected)]
    answers = [side[0]["content"] + "<|im_end|>" for side in (record.chosen, record.rejected)]
    assert words == answers and words[0] != words[1]
    parts = show_parts(chosen, smollm2)
    assert "".join(one.text for one in parts["beside"] if one.weight) == answers[1]
    room = chosen.places - 2  # both sides
    for policy in POLICIES:
        cut = task.encode(record, smollm2, room_tokens=room, too_long=policy)  # type: ignore[arg-type]
        adds_up(cut, room)
        if cut.examples:
            assert [learned(cut.examples[0], smollm2), learned(cut.examples[0].beside, smollm2)] == answers  # type: ignore[arg-type]
            assert cut.cut_tokens > 0 and cut.cut_tokens % 2 == 0, "the prompt is cut for both alike"
    narrow = task.encode(record, smollm2, room_tokens=12, too_long="cut-left")
    adds_up(narrow, 12)
    assert narrow.examples == [] and "answers alone" in str(narrow.reason)
    with pytest.raises(ConfigError, match="split"):
        task.encode(record, smollm2, room_tokens=ROOM, too_long="split")


def test_pairs_that_are_none_are_refused() -> None:
    for change, words in (
        ({"rejected": "Hello!"}, "the same"),
        ({"rejected": ""}, "rejected"),
        ({"chosen": "  "}, "empty"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            record_of({"kind": "preference"}, {**CHOICES["prompt"], **change})
        assert caught.value.where == "rows.jsonl:1"
    with pytest.raises(DataError, match="same prompt"):
        record_of(
            {"kind": "preference"},
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        )


def test_real_pairs(smollm2: Tokenizer, shared_data: Path) -> None:
    task = task_of({"kind": "preference"})
    paths = ("dpo_en_demo.json.gz", "dpo_zh_demo.json.gz", "hh_harmless_base_test.jsonl.gz")
    for path in paths:
        made = dropped = 0
        for row in first_rows(shared_data / "preference" / path, 25):
            try:
                record = task.record(row, "here")
            except DataError:
                continue
            found = task.encode(record, smollm2, room_tokens=1024, too_long="cut-left")
            adds_up(found, 1024)
            made, dropped = made + len(found.examples), dropped + (not found.examples)
        assert made > 10, path


# -- the registry ------------------------------------------------------------------------------------------------------


def test_every_task_is_found_and_restored() -> None:
    for kind in TASKS:
        assert class_of(kind).kind == kind
    with pytest.raises(ConfigError, match="no task 'pair'") as caught:
        task_of({"kind": "pair"})
    assert "pairs" in str(caught.value.expected)
    with pytest.raises(ConfigError, match="no kind"):
        task_of({})
    with pytest.raises(ConfigError, match=r"unknown key 'task\.lern'") as caught:
        task_of({"kind": "dialogue", "lern": "last"}, where="recipe.yaml")
    assert "learn" in str(caught.value.expected) and caught.value.where == "recipe.yaml"
    for table, rows in (
        ({"kind": "pairs", "label_names": {"1": "same"}}, PAIRS),
        ({"kind": "scoring", "step": 0.5}, ESSAYS),
        ({"kind": "extractive"}, [QA]),
        ({"kind": "dialogue", "learn": "last"}, [TALK]),
    ):
        task, _, _ = settled(table, rows)
        facts = task.facts()
        assert restored(facts).facts() == facts
        with pytest.raises(ArtifactError, match="version 99"):
            restored({**facts, "version": 99})


def test_lines_of_a_recipe_are_kept(tmp_path: Path) -> None:
    from ratoon.base.settings import read_yaml

    path = tmp_path / "recipe.yaml"
    path.write_text("task:\n  kind: scoring\n\n  lowest: 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="lowest") as caught:
        task_of(read_yaml(path)["task"], where=path)
    assert str(caught.value.where).endswith("recipe.yaml:4")


# -- a tag for each word -----------------------------------------------------------------------------------------------

TAGGED = [{"id": "t1", "words": ["a", "b", "c", "d"], "tags": ["B-PER", "I-PER", "O", "B-LOC"]}]


def may_stand(tags: tuple[str, ...]) -> bool:
    """IOB2, told by the definition: I-X has B-X or I-X before it."""
    return all(
        not tag.startswith("I-") or before in (f"B-{tag[2:]}", f"I-{tag[2:]}")
        for before, tag in zip(("O", *tags), tags, strict=False)
    )


@pytest.mark.parametrize("seed", range(20))
def test_tags_are_the_likeliest_row_that_may_stand(seed: int) -> None:
    labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    task, records, _ = settled({"kind": "tagging", "labels": labels}, TAGGED)
    assert list(task.labels) == labels  # type: ignore[attr-defined]
    scores = np.random.default_rng(seed).normal(size=(4, 5)).astype(np.float32)
    rows = [row for row in itertools.product(labels, repeat=4) if may_stand(row)]
    best = max(rows, key=lambda row: sum(scores[word, labels.index(tag)] for word, tag in enumerate(row)))
    assert task.read_scores(records[0], scores) == best


def test_tags_one_by_one_where_that_is_asked_or_nothing_is_known() -> None:
    scores = np.array([[0.0, 1, 2], [0, 1, 2], [3, 0, 0], [0, 1, 2]])
    words = TAGGED[0]["words"]
    for settings, labels, tags in (
        ({"transitions": "any"}, ["O", "B-PER", "I-PER"], ("I-PER", "I-PER", "O", "I-PER")),
        ({"scheme": "as-is"}, ["O", "B-PER", "I-PER"], ("I-PER", "I-PER", "O", "I-PER")),
        ({}, ["O", "B-PER", "I-PER"], ("B-PER", "I-PER", "O", "B-PER")),
        ({}, ["O", "B-LOC", "I-PER"], ("I-PER", "I-PER", "O", "I-PER")),
    ):
        rows = [{"words": words, "tags": ["O"] * 4}]
        task, records, _ = settled({"kind": "tagging", "labels": labels, **settings}, rows)
        assert task.read_scores(records[0], scores) == tags, (settings, labels)
