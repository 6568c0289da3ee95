"""Perturbations of texts: what each may touch, how strength counts, and that chance comes from the generator alone."""

from __future__ import annotations

import re
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratoon.base.errors import ConfigError
from ratoon.text import homophones, negation
from ratoon.text.edits import Edited, Site, edit, free_sites
from ratoon.text.lookalikes import HOMOGLYPHS, KEYBOARD
from ratoon.text.names import Names, capitalised
from ratoon.text.perturb import PERTURBATIONS, Material, perturbation, perturbed_copies

ENGLISH = (
    "The bank has raised its forecast, and Angela Merkel said in Berlin that profits are expected to grow by 12 % this "
    "year; John Smith of IBM can't agree with it, though he wouldn't say so in New York on Friday afternoon."
)
CHINESE = "中国银行行长今天在北京宣布，明年的经济增长不会低于百分之五，但是股市可能会下跌，投资者没有信心。"
TEXTS = [ENGLISH, CHINESE, "We met Mary Jones in Paris and then John Smith near Rome."]
MATERIAL = Material.of(TEXTS)
EVERY = sorted(PERTURBATIONS)


def chance(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def applied(name: str, text: str, strength: float = 1.0, seed: int = 0) -> Edited:
    return PERTURBATIONS[name].apply(text, strength, chance(seed), None, MATERIAL)


@pytest.mark.parametrize("name", EVERY)
def test_strength_0_changes_nothing_and_1_touches_every_place(name: str) -> None:
    touched = 0
    for text in TEXTS:
        none, every = applied(name, text, 0.0), applied(name, text, 1.0)
        assert none.text == text and none.changed == 0
        assert every.changed == every.eligible == len(PERTURBATIONS[name].sites(text, None, MATERIAL))
        assert (every.text != text) == (every.eligible > 0) == PERTURBATIONS[name].applies_to(text, None, MATERIAL)
        touched += every.changed
    assert touched > 2


@pytest.mark.parametrize("name", EVERY)
def test_the_generator_decides_and_nothing_else(name: str) -> None:
    for text in TEXTS:
        assert PERTURBATIONS[name](text, 0.5, chance(7), None, MATERIAL) == applied(name, text, 0.5, 7).text
    if name in ("negation", "entities"):
        return  # too few places for two seeds to be sure to differ
    assert len({applied(name, ENGLISH + CHINESE, 0.5, seed).text for seed in range(20)}) > 15


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("strength", [0.1, 0.4])
def test_strength_is_the_expected_share(name: str, strength: float) -> None:
    edited = [applied(name, text, strength, seed) for seed in range(300) for text in TEXTS]
    eligible, changed = sum(one.eligible for one in edited), sum(one.changed for one in edited)
    spread = (strength * (1 - strength) / eligible) ** 0.5
    assert abs(changed / eligible - strength) < 4 * spread


@pytest.mark.parametrize("name", EVERY)
def test_mistakes_only_grow_in_number_with_strength(name: str) -> None:
    for text in TEXTS:
        for weak, strong in ((0.1, 0.3), (0.3, 0.9)):
            assert set(applied(name, text, weak).edits) <= set(applied(name, text, strong).edits)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_a_strength_outside_of_0_and_1_is_refused(name: str, wrong: float) -> None:
    with pytest.raises(ConfigError, match="strength"):
        applied(name, ENGLISH, wrong)


@pytest.mark.parametrize("name", EVERY)
@given(data=st.data())
def test_protected_spans_stay_and_are_found_again(name: str, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([ENGLISH, CHINESE, ENGLISH[:60] + CHINESE[:30]]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=6)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    seed = data.draw(st.integers(0, 100))
    edited = PERTURBATIONS[name].apply(text, 0.8, chance(seed), spans, MATERIAL)
    for start, end in spans:
        if start < end:
            place = edited.place(start)
            assert edited.text[place : place + end - start] == text[start:end]


@given(st.text(), st.sampled_from([name for name in EVERY if name != "entities"]), st.floats(0, 1), st.integers(0, 50))
def test_any_text_comes_back_with_exactly_the_edits_told(text: str, name: str, strength: float, seed: int) -> None:
    edited = applied(name, text, strength, seed)
    rebuilt, done = "", 0
    for start, end, new in edited.edits:
        assert text[start:end] != new and start >= done
        rebuilt += text[done:start] + new
        done = end
    assert rebuilt + text[done:] == edited.text
    assert bool(edited.text) or not text


def test_typos_are_keys_that_touch() -> None:
    assert set(KEYBOARD["g"]) == set("fhtyvb")
    assert set(KEYBOARD["q"]) == set("wa")
    assert set(KEYBOARD["M"]) == set("NJK")
    for key, near in KEYBOARD.items():
        assert all(key in KEYBOARD[other] for other in near), "touching goes both ways"
    found = applied("typos", "Pay 20 now!")
    assert len(found.text) == 11 and found.text[3:7] == " 20 " and found.text[0].isupper()
    assert found.eligible == 6


def test_case_turns_letters_over_and_leaves_what_would_not_come_back() -> None:
    assert applied("case", "aB1 ß ŉ 中").text == "Ab1 ß ŉ 中"


def test_spacing_tears_and_joins_words_and_loses_no_letter() -> None:
    texts = {applied("spacing", "one two", 1.0, seed).text for seed in range(60)}
    assert {"o ne t wo", "on e tw o", "o netwo", "on etwo"} == texts - {"o ne tw o", "on e t wo"}
    assert all(text.replace(" ", "") == "onetwo" for text in texts)
    chinese = applied("spacing", "经济 增长").text
    assert chinese == "经 济增 长"


def test_width_goes_both_ways_as_unicode_has_it() -> None:
    full = applied("width", "A-1~!").text
    assert full == "Ａ－１～！" and unicodedata.normalize("NFKC", full) == "A-1~!"
    assert applied("width", full).text == "A-1~!"


def test_homoglyphs_are_letters_of_other_scripts() -> None:
    for latin, others in HOMOGLYPHS.items():
        for other in others:
            assert unicodedata.name(other).split()[0] in ("CYRILLIC", "GREEK")
            assert other.isupper() == latin.isupper() and other.islower() == latin.islower()
    assert applied("homoglyphs", "sap 12").text.encode("ascii", "ignore") == b" 12"


def test_homophones_sound_the_same_and_are_common() -> None:
    from pypinyin import lazy_pinyin

    level = [bytes([row, cell]) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF)]
    common = {code.decode("gb2312", "ignore") for code in level} | set(CHINESE)
    sounds = [sound for run in re.split("[，。]", CHINESE) for sound in [*lazy_pinyin(run), ""]]
    for seed in range(20):
        edited = applied("homophones", CHINESE, 1.0, seed)
        assert edited.eligible > 35
        for start, end, new in edited.edits:
            assert end == start + 1 and new in common and new != CHINESE[start]
            assert lazy_pinyin(new) == [sounds[start]]
    # A character of several readings is read as its word has it: hang, not xing.
    assert lazy_pinyin(PERTURBATIONS["homophones"].sites("银行")[1].choices[0]) == ["hang"]


def test_homophones_prefer_what_the_texts_themselves_use_and_keep_to_the_script() -> None:
    habit = homophones.Homophones.of(["权利权利权利权利权利权利"])
    assert dict(habit.choices("力"))[0][0] == "利"
    assert "沥" not in dict(homophones.Homophones().choices("力"))[0], "the five most frequent alone"
    own = homophones.Homophones.of(["喆" * 5])
    assert "喆" not in dict(homophones.Homophones().choices("哲"))[0] and "喆" not in dict(own.choices("哲"))[0]
    rare = homophones.Homophones.of(["佘" * 9])
    assert dict(rare.choices("蛇"))[0][0] == "佘" and "佘" not in dict(homophones.Homophones().choices("蛇"))[0]
    traditional = dict(homophones.Homophones().choices("臺灣的經濟發展與網路"))
    for alike in traditional.values():
        for character in alike:
            character.encode("big5")
    assert homophones.is_traditional("臺灣的經濟") and not homophones.is_traditional("台湾的经济")


def test_without_pypinyin_the_cure_is_named_and_english_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypinyin", None)
    with pytest.raises(ConfigError, match=r"ratoon\[eval\]"):
        applied("homophones", "银行")
    assert not PERTURBATIONS["homophones"].applies_to(ENGLISH)


def test_drops_spare_the_first_of_a_word_and_digits() -> None:
    assert applied("drops", "Hello, 1234 worlds 中国银行").text == "H, 1234 w 中"


def test_swaps_keep_the_letters_of_a_word() -> None:
    for seed in range(10):
        edited = applied("swaps", "hello aa world 中国银行啊", 1.0, seed)
        assert [sorted(word) for word in edited.text.split()] == [
            sorted(word) for word in ("hello", "aa", "world", "中国银行啊")
        ]
        assert edited.eligible == 4 and "国中行银" in edited.text


NEGATED = [
    ("He is here.", "He is not here."),
    ("She isn't here.", "She is here."),
    ("I can't come and won't try.", "I can come and will try."),
    ("We cannot pay.", "We can pay."),
    ("They do not like it.", "They do like it."),
    ("They don\u2019t like it.", "They do like it."),
    ("Sales have risen by 3 %.", "Sales have not risen by 3 %."),
    ("It's fine and I'm glad.", "It's not fine and I'm not glad."),
    ("他是老师。", "他不是老师。"),
    ("没有人知道这件事", "有人不知道这件事"),
    ("这个酒店不好，没有热水", "这个酒店好，有热水"),
    ("味道不错，有点辣", "味道不好，有点辣"),
    ("为什么无法开通，可能会涨", "为什么无法开通，可能不会涨"),
]


@pytest.mark.parametrize(("text", "wanted"), NEGATED)
def test_negation_follows_its_rules(text: str, wanted: str) -> None:
    assert applied("negation", text).text == wanted


@pytest.mark.parametrize(
    "text",
    [
        "Is he here?",
        "How are you?",
        "How can I pay?",
        "What is the rate?",
        "It is not only good but cheap.",
        "an open can and a last will",
        "We have a dog.",
        "In May and June",
        "差不多的机会，所有社会都重要，只有可能性",
        "是不是要不要能不能",
        "但是还是于是，不过不但不仅",
        "不好意思",
    ],
)
def test_negation_leaves_alone_what_no_rule_fits(text: str) -> None:
    assert negation.sites(text) == []
    assert not PERTURBATIONS["negation"].applies_to(text)


def test_names_are_runs_of_capitals_inside_sentences() -> None:
    text = "The chief of IBM's board met Angela Merkel in New York. Then I've seen Rome, OK? Maybe he was there too."
    assert [text[a:b] for a, b in capitalised(text)] == ["IBM", "Angela Merkel", "New York", "Rome"]
    pool = Names.of([text, "We saw The Company and the company, the Bank of the bank and Rome."]).by_kind["found"]
    assert pool == ("Angela Merkel", "IBM", "New York", "Rome", "The Company")
    assert capitalised("EVERY WORD IS SHOUTED IN HERE") == []


def test_names_are_swapped_for_others_of_their_kind_as_whole_words() -> None:
    names = Names.of([], {"person": ["Ann", "Bob", "Annabel"], "city": ["Rome", "Bonn"], "lonely": ["X"]})
    material = Material(names)
    seen = set()
    for seed in range(40):
        edited = PERTURBATIONS["entities"].apply("Ann from Rome, Annie, X", 1.0, chance(seed), None, material)
        assert edited.eligible == 2
        person, _, rest = edited.text.partition(" from ")
        assert rest == "Bonn, Annie, X"
        seen.add(person)
    assert seen == {"Bob", "Annabel"}
    chinese = Material(Names.of([], {"公司": ["腾讯", "阿里巴巴"]}))
    assert PERTURBATIONS["entities"]("腾讯公司收购", 1.0, chance(), None, chinese) == "阿里巴巴公司收购"


def test_entities_without_names_are_an_error_not_silence() -> None:
    with pytest.raises(ConfigError, match="no names"):
        PERTURBATIONS["entities"](ENGLISH, 0.5, chance())


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'typos'"):
        perturbation("typo")


def test_only_two_kinds_may_change_the_label() -> None:
    assert {name for name, one in PERTURBATIONS.items() if not one.keeps_label} == {"negation", "entities"}


def test_sites_and_spans() -> None:
    sites = [Site(0, 1, ("x",)), Site(1, 1, ("y",)), Site(3, 5, ("z",)), Site(5, 5, ("w",))]
    assert free_sites(sites, [(1, 3)]) == sites
    assert free_sites(sites, [(0, 4), (2, 4)]) == sites[3:]
    assert free_sites(sites, [(4, 5)]) == [sites[0], sites[1], sites[3]]
    edited = edit("abcdef", sites, 1.0, chance())
    assert edited.text == "xybczwf"
    assert [edited.place(i) for i in (1, 2, 5, 6)] == [2, 3, 6, 7]


def test_copies_for_training() -> None:
    texts = ["12 34", *(f"a text of some words, number {i}" for i in range(40))]
    found = perturbed_copies(texts, ["typos", "drops", "homophones"], 0.3, seed=3, rounds=2)
    assert len(found.copies) + found.unchanged == 2 * len(texts) and found.unchanged >= 2
    assert {copy.name for copy in found.copies} == {"typos", "drops"}, "no Chinese, no homophones"
    assert all(copy.source > 0 and copy.edited.text != texts[copy.source] for copy in found.copies)
    assert found == perturbed_copies(texts, ["typos", "drops", "homophones"], 0.3, seed=3, rounds=2)
    assert found != perturbed_copies(texts, ["typos", "drops", "homophones"], 0.3, seed=4, rounds=2)
    alone = perturbed_copies(texts[:5], ["typos", "drops", "homophones"], 0.3, seed=3)
    assert alone.copies == [copy for copy in found.copies if copy.source < 5][: len(alone.copies)]
    kept = perturbed_copies(texts, ["drops"], 1.0, seed=3, protected=[[(0, len(text))] for text in texts])
    assert kept.copies == [] and kept.unchanged == len(texts)


def test_copies_with_a_doubtful_label_are_refused() -> None:
    with pytest.raises(ConfigError, match="negation"):
        perturbed_copies(["It is so."], ["typos", "negation"], 0.3, seed=1)
    with pytest.raises(ConfigError, match="no perturbation"):
        perturbed_copies(["It is so."], [], 0.3, seed=1)
