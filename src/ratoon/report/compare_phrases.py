"""Every phrase of the page of runs side by side, English and Chinese, and of the terminal's table.

Decides wording. Names of figures and tasks, and how numbers are written, are `task_phrases.py`'s, phrases that all
pages share `phrases.py`'s.
"""

from __future__ import annotations

from ratoon.report import task_phrases
from ratoon.report.compare_records import Note
from ratoon.report.phrases import Language

PHRASES: dict[str, tuple[str, str]] = {
    "compare_page": ("Runs side by side", "各次运行对比"),
    "compare_title": ("{n} runs side by side", "{n} 次运行对比"),
    "lead_compare": (
        "Task {task}, measured on the same {n} rows: {name}{lower}.",
        "任务：{task}，在相同的 {n} 行上测得：{name}{lower}。",
    ),
    "compare_written": (
        "Written by Ratoon from the folders of these runs.",
        "由 Ratoon 根据这些运行的文件夹生成。",
    ),
    "note_rows": (
        "{one} and {other} are taken to have the same test rows by their number and the names of the files: not both "
        "kept their predictions.",
        "{one} 与 {other} 并非都保留了预测：仅凭行数与文件名视为相同的测试行。",
    ),
    "note_types": (
        "The runs were measured in different number types ({types}).",
        "各次运行以不同的数值类型测得（{types}）。",
    ),
    "note_not_paired": (
        "{run} stands without a paired bootstrap: {reason}.",
        "{run} 没有成对自助法：{reason}。",
    ),
    "lower": (" (lower is better)", "（越低越好）"),
    "h_runs": ("Score and cost", "得分与代价"),
    "h_plot": ("Score by trained parameters", "得分与训练的参数"),
    "plot_note": (
        "The score of each run with its 95 % interval; the trained parameters stand on a logarithmic axis, runs of "
        "one size side by side.",
        "各次运行的得分与 95 % 区间；训练的参数为对数坐标，参数量相同的运行并排画出。",
    ),
    "picture_compare": (
        "Scores of {n} runs by trained parameters: best {best}, last {last}.",
        "{n} 次运行的得分与训练的参数：最好 {best}，最后 {last}。",
    ),
    "best_note": (
        "To the best: the run less the best one, by a paired bootstrap on the same rows, with its 95 % interval and p.",
        "与最好的差：该次运行减去最好的一次（在相同行上的成对自助法），附 95 % 区间与 p 值。",
    ),
    "memory_note": (
        "Speed is the median of the log, memory the most of it, the disk what was saved.",
        "速度为日志的中位数，内存为日志中的最大值，磁盘为所保存内容的大小。",
    ),
    "seeds_note": (
        "Scores of several seeds are means, ± their standard deviation over the seeds; the interval is that of the "
        "mean over the test rows alone. Cost is the mean as well, memory the most.",
        "多个种子的得分为均值，± 为各种子间的标准差；区间为均值在测试行上的区间。代价也取均值，内存取最大值。",
    ),
    "best": ("best", "最好"),
    "col_run": ("Run", "运行"),
    "col_method": ("Method", "方法"),
    "col_score": ("Score", "得分"),
    "col_to_best": ("To the best", "与最好的差"),
    "col_trainable": ("Trained parameters", "训练的参数"),
    "col_trained_short": ("Trained", "训练参数"),
    "col_speed": ("Tokens/s", "词元/秒"),
    "col_memory": ("Memory", "内存"),
    "col_disk": ("On disk", "磁盘占用"),
    "col_took": ("Time", "用时"),
    "col_passes": ("Epochs", "轮数"),
    "n_steps": ("{n} steps", "{n} 步"),
    "col_steps": ("Steps", "步数"),
    "col_seed": ("Seed", "种子"),
    "col_settings": ("Other settings", "其他设置"),
}


def phrase(key: str, language: Language) -> str:
    """The phrase of that key: this page's own, or one of the pages of tasks."""
    return PHRASES[key][0 if language == "en" else 1] if key in PHRASES else task_phrases.phrase(key, language)


def told(note: Note, language: Language) -> str:
    """A note as a sentence."""
    return phrase(note.key, language).format(**note.values)
