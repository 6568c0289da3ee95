"""Notes that other parts write beside figures, in the language of the page."""

from __future__ import annotations

import re

from ratoon.report.phrases import Language

NOTES_ZH: tuple[tuple[str, str], ...] = (
    (r"a single record: no interval", "只有一条记录：无区间"),
    (r"no interval", "无区间"),
    (r"(\d+) records", r"\1 条记录"),
    (r"(\d+) entities in (\d+) sentences", r"\2 个句子中的 \1 个实体"),
    (r"(\d+) tokens in (\d+) sentences", r"\2 个句子中的 \1 个词元"),
    (r"(\d+) entities", r"\1 个实体"),
    (r"undefined in (\d+) of (\d+) resamples", r"\2 次重采样中有 \1 次无定义"),
    (r"undefined on these records", "在这些记录上无定义"),
    (r"undefined: both sides hold one and the same grade", "无定义：两侧只有同一个等级"),
    (r"undefined: all numbers of one side are the same", "无定义：一侧的数值全部相同"),
    (
        r"every resample gives the same: the interval is a point and says nothing of unseen records",
        "每次重采样结果相同：区间退化为一点，不能说明未见记录",
    ),
    (r"left out of the mean, undefined there: (\d+) groups \((.*)\)", r"\1 组无定义，未计入平均（\2）"),
    (r"(\d+) of (\d+) labels stand on no record here \((.*)\)", r"\2 个标签中有 \1 个在此没有记录（\3）"),
    (r"(\d+) predictions are none of the labels and count as wrong", r"\1 个预测不属于任何标签，按错误计"),
    (r"(\d+) of (\d+) records have no answer: an empty prediction is right", r"\2 条中有 \1 条没有答案：空预测为正确"),
    # -- floors, bases and perturbations
    (r"the commonest label", "最常见的标签"),
    (r"the commonest set of labels", "最常见的标签组合"),
    (r"TF-IDF of n-grams, linear SVM", "n 元组的 TF-IDF，线性支持向量机"),
    (r"TF-IDF of n-grams, a linear SVM for each label", "n 元组的 TF-IDF，每个标签一个线性支持向量机"),
    (r"what the two texts share, logistic regression", "两段文本的共同部分，逻辑回归"),
    (r"TF-IDF of both texts and what they share, linear SVM", "两段文本及其共同部分的 TF-IDF，线性支持向量机"),
    (r"the mean of training", "训练集的均值"),
    (r"the mean of training, by group", "训练集各组的均值"),
    (r"TF-IDF of both texts and what they share, ridge regression", "两段文本及其共同部分的 TF-IDF，岭回归"),
    (r"TF-IDF of n-grams and length, ridge regression by group", "n 元组的 TF-IDF 与长度，分组岭回归"),
    (r"the same, stretched to the spread of training", "同上，拉伸到训练集的离散程度"),
    (r"the commonest tag", "最常见的标记"),
    (r"each word's commonest tag, O if unseen", "每个词最常见的标记，未见过则为 O"),
    (r"each word's commonest tag, that of its shape if unseen", "每个词最常见的标记，未见过则按词形"),
    (r"names of training found again", "在文中找回训练集里的名称"),
    (r"the source itself", "原文本身"),
    (r"the target of the nearest training source by TF-IDF", "按 TF-IDF 最近的训练原文的译文或答案"),
    (r"the first sentence", "第一句"),
    (r"the first 3 sentences", "前三句"),
    (r"the sentence that shares most with the question", "与问题共同内容最多的句子"),
    (
        r"a span of that sentence, by nearness and the looks of training's answers",
        "该句中的一段，按邻近程度和训练答案的样子选取",
    ),
    (r"how often each token was learned", "每个词元被学习的频次"),
    (r"counts of three tokens, two and one, discounted", "三元、二元、一元词元计数，带折扣"),
    (r"a letter becomes one whose key touches its own", "字母换成键盘上相邻的字母"),
    (r"a letter changes between small and capital", "字母大小写互换"),
    (r"a space is lost or put inside a word", "丢失空格，或在词内插入空格"),
    (r"half-width characters become full-width, and back", "半角字符变全角，或反之"),
    (r"a Latin letter becomes a look-alike, Cyrillic or Greek", "拉丁字母换成形似的西里尔或希腊字母"),
    (r"a Chinese character becomes a common one of its sound", "汉字换成常见的同音字"),
    (r"a character is lost", "丢失一个字符"),
    (r"two characters beside each other change places", "相邻两个字符互换"),
    (r"a negation is put in or taken out", "加入或去掉否定"),
    (r"a name becomes another of the data", "名称换成数据中的另一个"),
    (r"untrained, the same prompts and decoding", "未经训练，相同的提示与解码"),
    (r"untrained, the same tokens", "未经训练，相同的词元"),
    (r"untrained here, by a head of its own", "未在此训练，用它自带的输出头"),
    (
        r"untrained, the label of the highest mean log-likelihood per token after “(.+)”",
        r"未经训练，取“\1”之后每词元平均对数似然最高的标签",
    ),
)
"""Notes that `evaluate/` and `text/perturb.py` write beside figures, and what the Chinese page says in their place."""


def note_words(text: str, language: Language) -> str:
    """A note beside a figure in the page's language where it is known, else as it stands."""
    if language == "en":
        return text
    parts = []
    for part in text.split("; "):
        found = next((match.expand(zh) for en, zh in NOTES_ZH if (match := re.fullmatch(en, part))), part)
        parts.append(found)
    return "；".join(parts)
