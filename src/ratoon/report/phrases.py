"""Every phrase of the page, English and Chinese side by side: one table, so that neither can lack what the other says.

Decides wording and how numbers are written. `{name}` stands for a value.
"""

from __future__ import annotations

import math
import re
from typing import Literal

Language = Literal["en", "zh"]

PHRASES: dict[str, tuple[str, str]] = {
    # -- frame -------------------------------------------------------------------------------------------------
    "html_lang": ("en", "zh-Hans"),
    "page_of": ("Training report", "训练报告"),
    "contents": ("Contents", "目录"),
    "offline": (
        "This page is one file: it asks nothing of the network and runs no script from elsewhere.",
        "本页是单个文件：不访问网络，也不运行任何外来脚本。",
    ),
    "written": (
        "Written by Ratoon from the records in the run’s folder.",
        "由 Ratoon 根据该次运行文件夹中的记录生成。",
    ),
    "copy": ("Copy", "复制"),
    "copied": ("Copied", "已复制"),
    "none_yet": ("Nothing is on record yet.", "尚无记录。"),
    # -- status ------------------------------------------------------------------------------------------------
    "status_done": ("finished", "已完成"),
    "status_running": ("not ended", "尚未结束"),
    "status_interrupted": ("interrupted", "已中断"),
    "status_failed": ("failed", "失败"),
    "status_unknown": ("status unknown", "状态未知"),
    "banner_running": (
        "This run has no end on record: it was still at work when the page was written, or it was killed.",
        "该次运行没有结束记录：生成本页时它仍在进行，或者已被强行终止。",
    ),
    "banner_interrupted": (
        "This run was interrupted before its end; what is shown is what it had reached.",
        "该次运行在结束前被中断；以下是中断时的进展。",
    ),
    "banner_failed": (
        "This run failed; what is shown is what it had reached.",
        "该次运行失败；以下是失败前的进展。",
    ),
    "banner_untrained": (
        "The time was over before the first step of training: this model has learned nothing.",
        "在第一个训练步之前时间就已用完：该模型什么也没有学到。",
    ),
    "banner_unknown": (
        "The run’s manifest does not say how it stands.",
        "运行清单没有说明其状态。",
    ),
    "reason": ("Reason: {text}", "原因：{text}"),
    "no_reason": ("no reason is on record", "没有记录原因"),
    "reached": ("Reached: step {step}, {percent} of the plan.", "进度：第 {step} 步，计划的 {percent}。"),
    "reached_step": ("Reached: step {step}.", "进度：第 {step} 步。"),
    "reached_nothing": ("No training step is on record.", "尚无训练步的记录。"),
    "torn": (
        "Lines of metrics.jsonl that could not be read (a crash cuts a line) and are left out: {count}.",
        "metrics.jsonl 中无法读取（程序崩溃会截断一行）而未计入的行数：{count}。",
    ),
    "not_finite": (
        "Values on record that are not finite numbers and are not drawn: {count}.",
        "记录中不是有限数而未绘出的值：{count} 个。",
    ),
    # -- lead --------------------------------------------------------------------------------------------------
    "lead_scratch": (
        "A GPT with {parameters} parameters, trained from scratch on {sources}.",
        "一个有 {parameters} 个参数的 GPT，在 {sources} 上从零训练。",
    ),
    "lead_init": (
        "A GPT with {parameters} parameters: {init}, trained further on {sources}.",
        "一个有 {parameters} 个参数的 GPT：以 {init} 为起点，在 {sources} 上继续训练。",
    ),
    "lead_no_model": (
        "The run ended before a model was made.",
        "在建立模型之前，运行就已停止。",
    ),
    "lead_seen": (
        "It learned from {tokens} tokens in {time} of training.",
        "它在 {time} 的训练中学习了 {tokens} 个词元。",
    ),
    "lead_seen_passes": (
        "It learned from {tokens} tokens ({passes} passes over the training part) in {time} of training.",
        "它在 {time} 的训练中学习了 {tokens} 个词元（训练部分的 {passes} 遍）。",
    ),
    "lead_bits": (
        "For text that it has never seen it needs {bits} bits per byte; before training it needed {before}.",
        "对从未见过的文本，它每字节需要 {bits} 比特；训练前需要 {before} 比特。",
    ),
    "list_and": (", ", "、"),
    "gap": (" ", ""),
    # -- headings ----------------------------------------------------------------------------------------------
    "h_result": ("Result", "结果"),
    "h_curves": ("Curves", "曲线"),
    "h_samples": ("Samples", "样本"),
    "h_ledger": ("Ledger of the data", "数据账目"),
    "h_derived": ("Derived settings", "推导出的设置"),
    "h_recipe": ("Recipe", "配方"),
    "h_machine": ("Machine", "机器"),
    "h_next": ("Next commands", "接下来的命令"),
    "h_log": ("Log", "日志"),
    # -- result ------------------------------------------------------------------------------------------------
    "held_out_loss": ("Held-out loss", "留出损失"),
    "perplexity": ("Perplexity", "困惑度"),
    "bits_per_byte": ("Bits per byte", "每字节比特数"),
    "interval": ("95 % interval {low} – {high}", "95 % 区间 {low} – {high}"),
    "measured_on": (
        "Measured on {n} of {all} held-out tokens, from {documents} documents, {bytes} bytes.",
        "在 {all} 个留出词元中的 {n} 个上测得，来自 {documents} 篇文档，{bytes} 字节。",
    ),
    "measured_on_tokens": ("Measured on {n} held-out tokens.", "在 {n} 个留出词元上测得。"),
    "signature": ("Measured as: {text}", "测量方式：{text}"),
    "interval_of_documents": (
        "The intervals say how far another draw of documents from the same source would differ.",
        "区间表示从同一来源另取一批文档时结果会有多大差异。",
    ),
    "interval_of_other": ("The intervals are over {units}.", "区间取自{units}。"),
    "nats": ("nats per token", "奈特／词元"),
    "training_time": ("Training time", "训练用时"),
    "speed": ("Speed", "速度"),
    "speed_unit": ("tokens/s", "词元/秒"),
    "speed_note": ("median, n = {n}", "中位数，n = {n}"),
    "peak_memory": ("Peak memory", "内存峰值"),
    "peak_note": ("highest, n = {n}", "最高值，n = {n}"),
    "tokens_learned": ("Tokens learned", "学习的词元"),
    "steps_note": ("steps: {n}", "步数：{n}"),
    "compare": ("How good is that?", "这有多好？"),
    "compare_note": (
        "Lower is better. Loss is the mean negative log-likelihood of a held-out token in nats; perplexity is its "
        "exponential; bits per byte divide by the text’s bytes and so compare across tokenizers. The bars show the "
        "loss.",
        "越低越好。损失是留出部分每个词元的平均负对数似然（奈特）；困惑度是其指数；每字节比特数除以文本的字节数，"
        "因此可在不同分词器之间比较。条形表示损失。",
    ),
    "row_uniform": ("Uniform guess over {n} tokens", "在 {n} 个词元上均匀猜测"),
    "row_untrained": ("Before training (step 0)", "训练前（第 0 步）"),
    "row_start": ("The model it started from (step 0)", "作为起点的模型（第 0 步）"),
    "row_final": ("The model of this run (step {step})", "本次运行的模型（第 {step} 步）"),
    "row_latest": ("Latest measurement (step {step})", "最近一次测量（第 {step} 步）"),
    "col_who": ("Predictor", "预测者"),
    "col_n": ("n (tokens)", "n（词元）"),
    "col_interval": ("95 % interval of the loss", "损失的 95 % 区间"),
    "by_definition": ("by definition", "按定义"),
    "best_step": (
        "The model that was kept is that of step {best}, the best on held-out text; the last step was {last}.",
        "保留的是第 {best} 步的模型，它在留出文本上最好；最后一步是第 {last} 步。",
    ),
    "no_evaluation": ("No held-out measurement is on record.", "没有留出测量的记录。"),
    # -- curves ------------------------------------------------------------------------------------------------
    "loss": ("Loss", "损失"),
    "learning_rate": ("Learning rate", "学习率"),
    "throughput": ("Throughput", "吞吐量"),
    "memory": ("Memory of the process", "进程内存"),
    "gradient_norm": ("Gradient norm", "梯度范数"),
    "rank": ("Rank", "秩"),
    "unit_loss": ("nats per token", "奈特／词元"),
    "unit_learning_rate": ("of AdamW", "AdamW"),
    "muon": (
        "Muon, for the hidden matrices, follows the same course up to {peak}",
        "用于隐藏层矩阵的 Muon 走势相同，峰值 {peak}",
    ),
    "unit_throughput": ("tokens per second", "词元每秒"),
    "unit_memory": ("MB", "MB"),
    "unit_gradient_norm": ("before clipping", "裁剪之前"),
    "unit_rank": ("of a matrix, on average", "各矩阵的平均值"),
    "legend_train": ("training", "训练"),
    "legend_smooth": ("mean of {n} neighbouring records", "相邻 {n} 条记录的平均"),
    "legend_held_out": ("held-out", "留出"),
    "legend_best": ("best held-out: {loss} at step {step}", "最佳留出：第 {step} 步，{loss}"),
    "legend_uniform": ("uniform guess: {loss}", "均匀猜测：{loss}"),
    "log_axis": ("logarithmic axis", "对数轴"),
    "axis_step": ("step", "步"),
    "thinned": ("n = {n}; of each stretch the lowest and the highest are drawn", "n = {n}；每一段绘出最低与最高者"),
    "records": ("n = {n}", "n = {n}"),
    "curve_label": (
        "{title} by step: from {first} at step {start} to {last} at step {end}; lowest {low}, highest {high}.",
        "{title}随步数的变化：从第 {start} 步的 {first} 到第 {end} 步的 {last}；最低 {low}，最高 {high}。",
    ),
    "eval_table": ("Held-out measurements as a table", "留出测量表"),
    "col_step": ("Step", "步"),
    "col_tokens": ("Tokens", "词元"),
    "col_time": ("Time", "时间"),
    "skipped": (
        "Steps left out because the float16 loss scale was too high for them: {n}.",
        "因 float16 损失缩放过高而被跳过的步数：{n}。",
    ),
    # -- samples -----------------------------------------------------------------------------------------------
    "samples_note": (
        "The same prompts before and after training. The prompt is underlined; everything after it is the model’s.",
        "训练前后使用相同的提示。下划线部分是提示，其后均由模型写出。",
    ),
    "before": ("Before", "训练前"),
    "after": ("After", "训练后"),
    "at_step": ("step {step}", "第 {step} 步"),
    "between": ("In between ({n})", "训练中（{n}）"),
    "empty_sample": ("(nothing)", "（无输出）"),
    # -- ledger ------------------------------------------------------------------------------------------------
    "ledger_note": (
        "Everything that was read is booked once, under one reason.",
        "读入的一切都只记一次账，并各有一个理由。",
    ),
    "col_account": ("Account", "科目"),
    "col_documents": ("Documents", "文档"),
    "col_bytes": ("Bytes", "字节"),
    "col_share": ("Share of bytes", "字节占比"),
    "read": ("Read", "读入"),
    "sum": ("Sum of the accounts", "各科目之和"),
    "adds_up": ("The sum equals what was read.", "总和与读入相等。"),
    "does_not_add_up": (
        "The sum differs from what was read: something was lost or booked twice.",
        "总和与读入不相等：有内容丢失或被重复记账。",
    ),
    "account_train": ("Training part", "训练部分"),
    "account_held_out": ("Held-out part", "留出部分"),
    "account_duplicate": ("Exact duplicates", "完全重复"),
    "account_empty": ("Empty", "空白"),
    "account_too_short": ("Too short", "过短"),
    "account_broken_row": ("Broken rows", "损坏的行"),
    "account_missing_field": ("Field missing", "缺少字段"),
    "account_wrong_encoding": ("Wrong encoding", "编码错误"),
    "places": ("Where: {account} ({n})", "位置：{account}（{n}）"),
    "places_more": ("{shown} of {n} places are shown; all are in {file}", "显示 {n} 处中的 {shown} 处；全部见 {file}"),
    "ledger_missing": (
        "The ledger is not written yet: the data was not prepared.",
        "尚无账目：数据还没有准备好。",
    ),
    # -- derived, recipe, machine, next ------------------------------------------------------------------------
    "derived_note": (
        "Nobody gave these values; they follow from the others.",
        "这些值并未给出，而是由其他值推导而来。",
    ),
    "derived_none": ("Every value was given.", "所有值均已给出。"),
    "col_key": ("Key", "键"),
    "col_value": ("Value", "值"),
    "col_why": ("Why", "原因"),
    "recipe_note": (
        "Resolved: every setting, given or derived. Saved as a file it repeats the run.",
        "完整解析后的配方：包含给定与推导出的每一项设置。存为文件即可重复该次运行。",
    ),
    "recipe_missing": ("The recipe was not settled yet.", "配方尚未确定。"),
    "machine_missing": ("The machine is not on record.", "没有机器的记录。"),
    "next_note": ("Type these in the folder where the run was started.", "请在启动该次运行的文件夹中输入。"),
    "m_system": ("System", "系统"),
    "m_processor": ("Processor", "处理器"),
    "m_cores": ("Cores", "核心"),
    "m_threads": ("Threads", "线程"),
    "m_memory_bytes": ("Memory", "内存"),
    "m_gpu": ("GPU", "GPU"),
    "m_gpu_memory_bytes": ("Memory of the GPU", "显存"),
    "m_python": ("Python", "Python"),
    "m_torch": ("PyTorch", "PyTorch"),
    "m_model": ("Model", "模型"),
    "model_line": (
        "{family}, {layers} layers, {width} wide, {heads} heads, context of {context} tokens, vocabulary of {vocab}",
        "{family}，{layers} 层，宽 {width}，{heads} 个头，上下文 {context} 个词元，词表 {vocab}",
    ),
    "log_tail": ("End of log.txt", "log.txt 末尾"),
    # -- units -------------------------------------------------------------------------------------------------
    "u_seconds": ("{n}\u00a0s", "{n}\u00a0秒"),
    "u_minutes": ("{m}\u00a0min {s}\u00a0s", "{m} 分 {s} 秒"),
    "u_hours": ("{h}\u00a0h {m}\u00a0min", "{h} 小时 {m} 分"),
}

SENTENCES_ZH: tuple[tuple[str, str], ...] = (
    (r"the dial `minutes`", "来自 `minutes`"),
    (r"the recipe's seed", "配方的种子"),
    (r"no minutes given", "未给出分钟数"),
    (r"nothing else is said", "没有另外说明"),
    (r"the catalogue says so of (.+)", r"目录对 \1 的规定"),
    (r"(.+) is given in its place", r"已给出 \1 代替它"),
    (r"size (\w+)", r"规格 \1"),
    (r"what learns most in ([\d.e+-]+) minutes on two cores", r"在双核上 \1 分钟内学得最多的规格"),
    (
        r"(\d+) tokens for each of about ([\d.]+) million parameters \((.+)\)",
        r"约 \2 百万参数，每个参数 \1 个词元（\3）",
    ),
    (r"about ([\d,]+) examples a step, ([\d.]+) a row", r"每步约 \1 个样本，每行 \2 个"),
    (r"([\d.]+) epochs of ([\d,]+) rows", r"\1 轮，每轮 \2 行"),
    (r"new weights", "全新权重"),
    (r"fine-tuning", "微调"),
    (r"a tenth of the steps", "步数的十分之一"),
    (r"each epoch", "每轮一次"),
    (r"method ([\w-]+)", r"方法 \1"),
    (r"method ([\w-]+): half the memory of AdamW's state", r"方法 \1：AdamW 状态的内存减半"),
    (
        r"method ([\w-]+): ([\d.e+-]+), less by (\d+) / (\d+) for the model's width",
        r"方法 \1：\2，因模型宽度乘以 \3 / \4",
    ),
    (r"it was set for ([\w-]+), not for ([\w-]+)", r"它是为 \1 设定的，不适用于 \2"),
    (r"stopped by the user; `(.+)` goes on", r"由用户停止；`\1` 可继续"),
    (r"not read, kind unknown: (.+) and ([\d,]+) more of its kind", r"未读取，类型未知：\1 及另外 \2 个同类文件"),
    (r"not read, kind unknown: (.+)", r"未读取，类型未知：\1"),
    (r"not read, written by Ratoon: (.+)", r"未读取，由 Ratoon 写成：\1"),
    (r"nothing stands in the file: (.+)", r"文件是空的：\1"),
    (r"text is taken from the field '(.+)' of (.+)", r"文本取自 \2 的字段 '\1'"),
    (r"runs of (\d+) tokens", r"每 \1 个词元的片段"),
    (r"one document only: its last part, from (.+) on, is held out", r"只有一篇文档：自 \1 起的最后部分被留出"),
)
"""Sentences that other floors write into the records, and what the Chinese page says in their place."""


def phrase(key: str, language: Language) -> str:
    """The phrase of that key."""
    return PHRASES[key][0 if language == "en" else 1]


def sentence(text: str, language: Language) -> str:
    """A sentence from the records in the page's language where it is known, else as it stands."""
    if language == "zh":
        for pattern, chinese in SENTENCES_ZH:
            found = re.fullmatch(pattern, text)
            if found:
                return found.expand(chinese)
    return text


def whole(value: float) -> str:
    """A count with thousands separated."""
    return f"{value:,.0f}"


def figure(value: float, digits: int = 4) -> str:
    """A measured value: `digits` significant digits at least, thousands separated, never an exponent below 1e15."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    after = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{after}f}"


def plain(value: object) -> str:
    """A setting's value as a recipe would say it, long numbers separated."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return whole(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:g}"
    return "–" if value is None else str(value)


def size(value: float) -> str:
    """Bytes with a decimal unit: 1 MB = 1,000,000 bytes."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= unit:
            return f"{value / unit:,.{1 if value / unit < 100 else 0}f}\u00a0{name}"
    return f"{value:,.0f}\u00a0B"


def duration(seconds: float, language: Language) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return phrase("u_seconds", language).format(n=f"{seconds:.1f}")
    total = round(seconds)
    if total < 3600:
        return phrase("u_minutes", language).format(m=total // 60, s=total % 60)
    return phrase("u_hours", language).format(h=whole(total // 3600), m=total % 3600 // 60)
