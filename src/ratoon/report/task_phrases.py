"""Every phrase of a task's page, English and Chinese side by side, the names of figures, and how they are written.

Decides wording, also that of the verdict on floors, which the terminal's table says too. `{name}` stands for a value.
Phrases of the frame that all pages share stand in `phrases.py`.
"""

from __future__ import annotations

from ratoon.report.phrases import PHRASES as SHARED
from ratoon.report.phrases import Language, duration, figure, whole
from ratoon.report.task_records import Difference, Evaluation, Figure

PHRASES: dict[str, tuple[str, str]] = {
    # -- frame -------------------------------------------------------------------------------------------------
    "task_page": ("Evaluation report", "评测报告"),
    "task_written": (
        "Written by Ratoon from evaluation.json and predictions.jsonl beside this page.",
        "由 Ratoon 根据本页旁边的 evaluation.json 与 predictions.jsonl 生成。",
    ),
    "lead_task": (
        "Task {task}, measured on {n} records{seconds}.",
        "任务：{task}，在 {n} 条记录上测得{seconds}。",
    ),
    "lead_seconds": (" in {time}", "，用时 {time}"),
    "torn_lines": (
        "Lines of predictions.jsonl that could not be read and are left out: {n}.",
        "predictions.jsonl 中无法读取而未计入的行数：{n}。",
    ),
    "nothing_measured": (
        "Nothing was measured: these records have no right answers beside them.",
        "没有测量结果：这些记录没有标准答案。",
    ),
    "h_figures": ("Result", "结果"),
    "h_base": ("Its base", "基础模型"),
    "h_floors": ("Floors", "基线"),
    "h_compare": ("Against other models", "与其他模型比较"),
    "h_classes": ("By class", "各类别"),
    "h_entities": ("By entity and tag", "各实体与标签"),
    "h_confusion": ("Confusions", "混淆"),
    "h_confidence": ("Calibration", "校准"),
    "h_numbers": ("Numbers against numbers", "预测与真实"),
    "h_robust": ("Robustness", "鲁棒性"),
    "h_learned": ("How it learned", "学习过程"),
    "h_accounts": ("Ledger of the data", "数据账目"),
    "h_records": ("Records and errors", "记录与错误"),
    # -- result ------------------------------------------------------------------------------------------------
    "interval_of_95": ("95 % interval {low} – {high}", "95 % 区间 {low} – {high}"),
    "no_interval": ("no interval", "无区间"),
    "undefined": ("undefined", "无定义"),
    "n_of": ("n = {n} {unit}", "n = {n} {unit}"),
    "unit_record": ("records", "条记录"),
    "unit_token": ("tokens", "个词元"),
    "lower_better": ("lower is better", "越低越好"),
    "all_values": ("All figures, with what another program needs to count the same", "全部指标及其计算方式"),
    "col_figure": ("Figure", "指标"),
    "col_figure_value": ("Value", "数值"),
    "col_95": ("95 % interval", "95 % 区间"),
    "col_n_short": ("n", "n"),
    "col_signature": ("Counted as", "计算方式"),
    "col_without": ("Without copies", "去除重复后"),
    "interval_told": ("Intervals: {text}.", "区间：{text}。"),
    "copies": (
        "{n} of these records also stand in training. Without them: {name} {value}{interval}, with them {before}.",
        "其中 {n} 条记录也出现在训练数据中。去除后：{name} {value}{interval}；未去除：{before}。",
    ),
    "copies_all": (
        "All {n} records also stand in training: nothing here says how good the model is on new ones.",
        "全部 {n} 条记录都出现在训练数据中：本页无法说明模型在新数据上的表现。",
    ),
    # -- floors ------------------------------------------------------------------------------------------------
    "floors_note": (
        "What cheap classics reach on the same records, trained in seconds.",
        "廉价的经典方法在相同记录上的成绩，几秒即可训练完成。",
    ),
    "col_predictor": ("Predictor", "预测者"),
    "col_ahead": ("Model ahead by", "模型领先"),
    "col_seconds": ("Time", "用时"),
    "this_model": ("This model", "本模型"),
    "beats": (
        "The model beats the best floor, {floor}, by {gap}: {name} {ours} against {theirs}{interval}.",
        "模型超过最好的基线 {floor}，领先 {gap}：{name} {ours}，基线 {theirs}{interval}。",
    ),
    "loses": (
        "The model does NOT beat the best floor: {floor} reaches {name} {theirs}{seconds}, the model {ours}{interval}.",
        "模型没有超过最好的基线：{floor} 的 {name} 为 {theirs}{seconds}，模型为 {ours}{interval}。",
    ),
    "unsure": (
        "The model is NOT surely better than the best floor, {floor}: {name} {ours} against {theirs}{interval}.",
        "尚不能确定模型优于最好的基线 {floor}：{name} {ours}，基线 {theirs}{interval}。",
    ),
    "loses_seconds": (" in {time}", "（用时 {time}）"),
    "difference_interval": (
        " (difference {low} to {high}, 95 % interval)",
        "（差值的 95 % 区间 {low} 至 {high}）",
    ),
    # -- base --------------------------------------------------------------------------------------------------
    "base_note": (
        "What the model was before its fine-tuning, on the same records; paired bootstrap, the difference is this "
        "model less its base.",
        "微调之前的模型在相同记录上的成绩；成对自助法，差值为本模型减去其基础模型。",
    ),
    "moved_note": (
        "Training moved the margin (log-likelihood of the chosen answer less the rejected one's) by {by} nats "
        "per token.",
        "训练使差距（优选回答与落选回答的对数似然之差）变化了每词元 {by} 纳特。",
    ),
    # -- other models ------------------------------------------------------------------------------------------
    "against_note": (
        "Paired bootstrap on the same records: the difference is this model less the other one.",
        "在相同记录上的成对自助法：差值为本模型减去另一模型。",
    ),
    "col_model": ("Model", "模型"),
    "col_ours": ("This model", "本模型"),
    "col_theirs": ("The other", "另一模型"),
    "col_difference": ("Difference", "差值"),
    "from_to": ("{low} to {high}", "{low} 至 {high}"),
    "col_p": ("p", "p"),
    "certain_yes": ("differ", "有差异"),
    "certain_no": ("unsure", "不确定"),
    # -- classes, entities -------------------------------------------------------------------------------------
    "classes_note": (
        "F1 of each class as a bar; the weakest first.",
        "条形为各类别的 F1；最弱的在前。",
    ),
    "weakest_of": (": the weakest {n} of {all}", "：{all} 类中最弱的 {n} 类"),
    "all_classes": ("The other {n} classes", "其余 {n} 个类别"),
    "col_class": ("Class", "类别"),
    "col_entity": ("Entity", "实体"),
    "col_tag": ("Tag", "标签"),
    "col_precision": ("Precision", "精确率"),
    "col_recall": ("Recall", "召回率"),
    "col_f1": ("F1", "F1"),
    "col_support": ("Expected", "应有"),
    "col_predicted": ("Answered", "预测"),
    "per_entity": ("Entities, whole", "实体（整体）"),
    "per_entity_strict": ("Entities, strict reading (only B- begins one)", "实体（严格：仅 B- 起始）"),
    "per_tag": ("Tags of tokens", "词元标签"),
    # -- confusions --------------------------------------------------------------------------------------------
    "confusion_note": (
        "Rows: what was expected. Columns: what was answered. The shade is the share of the row.",
        "行：应有的标签。列：模型的回答。颜色深浅为该行中的占比。",
    ),
    "pairs_note": (
        "The most frequent confusions",
        "最常见的混淆",
    ),
    "col_expected": ("Expected", "应为"),
    "col_answered": ("Answered", "回答"),
    "col_times": ("Times", "次数"),
    "col_share_of": ("Of the class", "占该类"),
    "show_records": ("Show records", "查看记录"),
    "more_pairs": ("All {n} confusions", "全部 {n} 种混淆"),
    "whole_matrix": ("The whole matrix ({n} × {n})", "完整矩阵（{n} × {n}）"),
    "no_confusion": ("Nothing was confused.", "没有混淆。"),
    # -- calibration -------------------------------------------------------------------------------------------
    "calibration_note": (
        "How often the model is right when it is so sure. On the dashed line it is as right as it is sure; above, it "
        "is too modest, below, too sure. The area of a point is its number of records.",
        "模型在给定置信度下的正确率。在虚线上表示置信度与正确率一致；高于虚线为过于保守，低于虚线为过于自信。"
        "点的面积表示记录数。",
    ),
    "decisions_note": (
        "Counted over all decisions, a label being there or not.",
        "按所有判断计数（每个标签有或无）。",
    ),
    "axis_confidence": ("confidence", "置信度"),
    "axis_accuracy": ("share that is right", "正确的比例"),
    "axis_expected": ("expected", "真实值"),
    "axis_answered": ("answered", "预测值"),
    "axis_strength": ("strength", "强度"),
    "calibration_table": ("Bins as a table", "分箱表"),
    "col_bin": ("Confidence", "置信区间"),
    "col_mean_confidence": ("Mean", "均值"),
    "col_right": ("Right", "正确"),
    "picture_calibration": (
        "Share that is right by confidence, {n} bins.",
        "各置信度下的正确率，共 {n} 个分箱。",
    ),
    "picture_numbers": ("Answered by expected number, n = {n}.", "预测值与真实值，n = {n}。"),
    "numbers_note_groups": (
        "A dot for each record, each group on its own scale from its lowest number (0) to its highest (1); on the "
        "dashed line answer and truth are equal.",
        "每条记录一个点，各组按自身的最小值（0）到最大值（1）缩放；虚线上预测与真实相等。",
    ),
    "numbers_note": (
        "A dot for each record; on the dashed line answer and truth are equal.",
        "每条记录一个点；虚线上预测与真实相等。",
    ),
    # -- robustness --------------------------------------------------------------------------------------------
    "robust_note": (
        "{name} by the share of places that were changed, on the texts that a perturbation can touch; the band is the "
        "95 % interval, the dashed line the score of the same texts as they are.",
        "{name} 随被改动位置比例的变化（仅计可被该扰动影响的文本）；色带为 95 % 区间，虚线为同一批文本未改动时的得分。",
    ),
    "robust_table": ("Curves as a table", "曲线数据表"),
    "robust_examples": ("Answers that turned ({n})", "被改变的回答（{n}）"),
    "robust_label_moves": (
        "the label need not survive: read the turned answers, not the score",
        "标签可能随之改变：应看被改变的回答，而非得分",
    ),
    "col_strength": ("Strength", "强度"),
    "col_flipped": ("Turned answers", "被改变的回答"),
    "col_perturbation": ("Perturbation", "扰动"),
    "attack": ("Greedy word substitution", "贪心替换攻击"),
    "attack_note": (
        "At most {budget} queries a text. Right before: {before}; right under attack: {after}. Of {attacked} attacked "
        "texts {success} fell, after {queries} queries on average.",
        "每条文本最多 {budget} 次查询。攻击前正确：{before}；攻击下正确：{after}。在 {attacked} 条被攻击的文本中，"
        "{success} 被攻破，平均 {queries} 次查询。",
    ),
    # -- training ----------------------------------------------------------------------------------------------
    "legend_validation": ("validation", "验证"),
    "legend_kept": ("kept: step {step}, {value}", "保留：第 {step} 步，{value}"),
    "legend_epoch": ("end of an epoch, {n} steps", "一轮结束（{n} 步）"),
    "legend_epochs": ("end of every {every} epochs, {n} steps", "每 {every} 轮结束（{n} 步）"),
    "legend_rank": ("asked for at the end: {n}", "最终要求：{n}"),
    "learned_mean": ("mean over what is learned", "对所学内容取平均"),
    "learned_rows": ("on the validation rows", "在验证数据上"),
    "learned_at": ("step {step} ({epochs} epochs)", "第 {step} 步（{epochs} 轮）"),
    "learned_loss": ("validation loss", "验证损失"),
    "learned_overfit": (
        "Overfitting: the validation loss was lowest, {low}, at {at}; at the end, {end}, it was {percent} higher.",
        "过拟合：验证损失在{at}最低，为 {low}；结束时为 {end}，高出 {percent}。",
    ),
    "learned_worse": (
        "The validation loss was lowest, {low}, before training; at the end, {end}, it was {percent} higher.",
        "验证损失在训练之前最低，为 {low}；结束时为 {end}，高出 {percent}。",
    ),
    "learned_falling": (
        "The validation loss was still falling at the end: {before} at {there}, {end} at {at}. Longer training may "
        "help.",
        "验证损失在结束时仍在下降：{there}为 {before}，{at}为 {end}。延长训练可能会有帮助。",
    ),
    "learned_nothing": (
        "The validation loss never fell below what it was before training, {low}: nothing was learned that the "
        "validation rows show.",
        "验证损失从未低于训练前的 {low}：没有学到在验证数据上看得见的东西。",
    ),
    "learned_level": (
        "The validation loss came to rest: lowest, {low}, at {at}; {end} at the end.",
        "验证损失趋于平稳：在{at}最低，为 {low}；结束时为 {end}。",
    ),
    "learned_kept": (
        "The weights that were kept are those of {at}, the best on the validation rows by {name}; the last step was "
        "{last}.",
        "保留的是{at}的权重，按验证数据上的{name}为最好；最后一步是第 {last} 步。",
    ),
    "learned_kept_last": (
        "The weights that were kept are those of the last step, {at}, the best on the validation rows by {name}.",
        "保留的是最后一步的权重，即{at}，按验证数据上的{name}为最好。",
    ),
    "learned_kept_other": (
        "The weights that were kept are those of {at}.",
        "保留的是{at}的权重。",
    ),
    "learned_unwatched": (
        "No rows were set aside for validation: the weights that were kept are those of the last step.",
        "没有留出验证数据：保留的是最后一步的权重。",
    ),
    "learned_filled": (
        "Examples fill {share} of the places in the rows; the rest is padding, which tokens per second leave out.",
        "样本占各行位置的 {share}；其余为填充，不计入每秒词元数。",
    ),
    "learned_table": ("Measurements on the validation rows as a table", "验证数据上的测量表"),
    "col_epochs": ("Epochs", "轮次"),
    "col_learned": ("Learned places", "所学位置"),
    # -- a run of which nothing was measured -------------------------------------------------------------------
    "lead_tuned": (
        "Task {task}: {base}, trained by {method}; {trained} of its {parameters} parameters learn.",
        "任务：{task}。以 {base} 为基础，训练方法为 {method}；{parameters} 个参数中有 {trained} 个参与学习。",
    ),
    "lead_tuned_new": (
        "Task {task}: an encoder-decoder of new weights; {trained} of its {parameters} parameters learn.",
        "任务：{task}。权重全新的编码器－解码器；{parameters} 个参数中有 {trained} 个参与学习。",
    ),
    "h_unmeasured": ("Nothing was measured", "没有测量"),
    "why_no_test": (
        "The recipe sets no rows aside for a test: there is no score. Measure the model on a file of the task, FILE.",
        "配方没有留出测试数据，因此没有得分。请用该任务的文件（FILE）测量模型。",
    ),
    "why_no_model": (
        "The run ended before its model was written.",
        "在写出模型之前，运行就已结束。",
    ),
    "why_model_left": (
        "A model was written (that of step {step}), and it is not measured yet.",
        "模型已写出（第 {step} 步），但尚未测量。",
    ),
    "why_earlier": (
        "The run had been measured before it went on. Until it comes to its end, its model is the earlier one (that of "
        "step {step}), and what was measured of that stands in {page}.",
        "该次运行在继续之前测量过。在它到达终点之前，模型仍是较早的那个（第 {step} 步），其测量结果见 {page}。",
    ),
    "why_not_yet": (
        "The run has not come to its end.",
        "运行尚未到达终点。",
    ),
    "what_to_type": ("What to type", "请输入"),
    "type_again": (
        "There is nothing to go on with: put right what the reason says, and type the same command again.",
        "没有可以继续的内容：请按上述原因改正，然后重新输入同一条命令。",
    ),
    "shape_tuned": ("{family}, {layers} layers, {width} wide", "{family}，{layers} 层，宽 {width}"),
    "unmeasured_written": (
        "Written by Ratoon from what lies in the folder of the run.",
        "由 Ratoon 根据该次运行的文件夹内容生成。",
    ),
    # -- ledger ------------------------------------------------------------------------------------------------
    "accounts_note": (
        "Each row and each token that was read is booked once: trained + cut + split + dropped + duplicate + masked = "
        "read.",
        "读入的每一行、每个词元都只记一次：训练 + 截断 + 拆分 + 舍弃 + 重复 + 遮蔽 = 读入。",
    ),
    "part_train": ("Training", "训练"),
    "part_validation": ("Validation", "验证"),
    "part_test": ("Test", "测试"),
    "col_fate": ("Fate", "去向"),
    "col_rows": ("Rows", "行"),
    "col_token_count": ("Tokens", "词元"),
    "fate_read": ("Read", "读入"),
    "fate_trained": ("Trained", "训练"),
    "fate_cut": ("Cut", "截断"),
    "fate_split": ("Split", "拆分"),
    "fate_dropped": ("Dropped", "舍弃"),
    "fate_duplicate": ("Duplicate", "重复"),
    "fate_masked": ("Masked", "遮蔽"),
    "reasons": ("Reasons ({n})", "原因（{n}）"),
    "col_reason": ("Reason", "原因"),
    "col_first": ("First places", "首批位置"),
    # -- records -----------------------------------------------------------------------------------------------
    "records_note": (
        "What the model answered to each record.",
        "模型对每条记录的回答。",
    ),
    "records_held": (
        "This page holds {n} of {all} records, {what}; predictions.jsonl beside it holds all.",
        "本页包含 {all} 条记录中的 {n} 条（{what}）；全部见旁边的 predictions.jsonl。",
    ),
    "held_errors_first": ("errors first", "错误优先"),
    "held_as_sorted": ("those that come first in this order", "按此顺序排在前面的"),
    "no_predictions": ("No predictions are on record.", "没有预测记录。"),
    "no_script": (
        "Searching and filtering need JavaScript, which this page cannot run here. All records stand in "
        "predictions.jsonl beside it.",
        "搜索与筛选需要 JavaScript，而此处无法运行。全部记录见旁边的 predictions.jsonl。",
    ),
    "f_search": ("Search", "搜索"),
    "f_search_hint": ("text, answer or place", "文本、回答或位置"),
    "f_show": ("Show", "显示"),
    "f_errors": ("errors", "错误"),
    "f_right": ("right ones", "正确"),
    "f_all": ("all", "全部"),
    "f_expected": ("Expected", "应为"),
    "f_answer": ("Answered", "回答"),
    "f_any": ("any", "不限"),
    "f_none": ("(none)", "（无）"),
    "f_sort": ("Order", "排序"),
    "sort_sure": ("surest first", "最有把握的在前"),
    "sort_unsure": ("least sure first", "最没把握的在前"),
    "sort_wrong": ("most wrong entities first", "错误实体最多的在前"),
    "sort_far": ("largest error first", "误差最大的在前"),
    "sort_worst": ("lowest score first", "得分最低的在前"),
    "sort_best": ("highest score first", "得分最高的在前"),
    "sort_surprise": ("most surprising first", "最意外的在前"),
    "sort_file": ("as in the file", "按文件顺序"),
    "r_found": ("{n} of {all} records", "{all} 条记录中的 {n} 条"),
    "r_none": ("No record is like that.", "没有符合条件的记录。"),
    "r_more": ("Show more", "显示更多"),
    "r_clear": ("Clear filters", "清除筛选"),
    "r_long": ("Show the whole text", "展开全文"),
    "r_short": ("Fold", "收起"),
    "r_input": ("Input", "输入"),
    "r_reference": ("Reference", "参考"),
    "r_chosen": ("Chosen answer", "被选中的回答"),
    "r_expected": ("Expected", "应为"),
    "r_answer": ("Answer", "回答"),
    "r_model": ("Model", "模型"),
    "r_error": ("error", "误差"),
    "r_nothing": ("(nothing)", "（无）"),
    "r_right": ("right", "正确"),
    "r_wrong": ("wrong", "错误"),
    "r_missed": ("missed", "漏报"),
    "r_invented": ("not there", "误报"),
}

FIGURES: dict[str, tuple[str, str]] = {
    "accuracy": ("Accuracy", "准确率"),
    "precision": ("Precision", "精确率"),
    "recall": ("Recall", "召回率"),
    "f1": ("F1", "F1"),
    "matthews": ("Matthews’ correlation", "马修斯相关系数"),
    "calibration_error": ("Calibration error", "校准误差"),
    "brier": ("Brier score", "Brier 分数"),
    "f1_samples": ("F1 by record", "逐条 F1"),
    "subset_accuracy": ("Subset accuracy", "全对率"),
    "hamming_loss": ("Hamming loss", "汉明损失"),
    "token_accuracy": ("Token accuracy", "词元准确率"),
    "kappa_quadratic": ("Quadratic weighted kappa", "二次加权 Kappa"),
    "spearman": ("Spearman’s correlation", "Spearman 相关系数"),
    "pearson": ("Pearson’s correlation", "Pearson 相关系数"),
    "rmse": ("RMSE", "均方根误差"),
    "mae": ("MAE", "平均绝对误差"),
    "exact_match": ("Exact match", "完全匹配"),
    "average": ("Mean of F1 and exact match", "F1 与完全匹配的平均"),
    "bleu": ("BLEU", "BLEU"),
    "chrf": ("chrF", "chrF"),
    "chrfpp": ("chrF++", "chrF++"),
    "meteor": ("METEOR", "METEOR"),
    "rouge1": ("ROUGE-1", "ROUGE-1"),
    "rouge2": ("ROUGE-2", "ROUGE-2"),
    "rougeL": ("ROUGE-L", "ROUGE-L"),
    "rougeLsum": ("ROUGE-Lsum", "ROUGE-Lsum"),
    "perplexity": ("Perplexity", "困惑度"),
    "loss": ("Loss", "损失"),
    "margin": ("Margin, nats per token", "差距（纳特/词元）"),
}
TASKS: dict[str, tuple[str, str]] = {
    "classification": ("classification", "文本分类"),
    "multi-label": ("classification with several labels", "多标签分类"),
    "tagging": ("tagging", "序列标注"),
    "pairs": ("sentence pairs", "句对分类"),
    "pair-scoring": ("scores of sentence pairs", "句对评分"),
    "scoring": ("scoring", "评分"),
    "extractive": ("extractive question answering", "抽取式问答"),
    "question-answering": ("question answering", "问答"),
    "translation": ("translation", "翻译"),
    "summarization": ("summarization", "摘要"),
    "dialogue": ("dialogue", "对话"),
    "generation": ("text generation", "文本生成"),
    "preference": ("preference", "偏好"),
}
PREFIXES: dict[str, tuple[str, str]] = {
    "entity": ("Entity", "实体"),
    "strict": ("Strict entity", "严格实体"),
    "token": ("Token", "词元"),
}
SUFFIXES: dict[str, tuple[str, str]] = {
    "micro": ("micro", "微平均"),
    "macro": ("macro", "宏平均"),
    "weighted": ("weighted", "加权"),
    "positive": ("positive label", "正类"),
}


def phrase(key: str, language: Language) -> str:
    """The phrase of that key: a task's page's own, or one that all pages share."""
    return (PHRASES[key] if key in PHRASES else SHARED[key])[0 if language == "en" else 1]


def figure_name(name: str, language: Language) -> str:
    """What people call a figure; a name that is not known is written as it is."""
    side = 0 if language == "en" else 1
    if name.endswith("]") and "[" in name:
        of, _, group = name[:-1].partition("[")
        return f"{figure_name(of, language)}（{group}）" if side else f"{figure_name(of, language)}, {group}"
    if name in FIGURES:
        return FIGURES[name][side]
    start, _, rest = name.partition("_")
    prefix = ""
    if start in PREFIXES and rest:
        prefix, name = PREFIXES[start][side], rest
    core, _, suffix = name.rpartition("_")
    if core in FIGURES and suffix in SUFFIXES:
        core, suffix = FIGURES[core][side], SUFFIXES[suffix][side]
        if side:
            return f"{prefix}{' ' if prefix and core.isascii() else ''}{core}（{suffix}）"
        return f"{prefix} {core if core == 'F1' else core.lower()}, {suffix}" if prefix else f"{core}, {suffix}"
    return f"{prefix} {name}".strip().replace("_", " ")


def task_name(kind: str, language: Language) -> str:
    """What people call a task; a kind that is not known is written as it is."""
    return TASKS[kind][0 if language == "en" else 1] if kind in TASKS else kind


def shown(value: float | None, like: float | None = None) -> str:
    """A figure as it is written: four places for what lies between -1 and 1, then three, two for what is above 10;
    `like`: the figure whose places are taken (for the ends of its interval)."""
    if value is None:
        return "–"
    scale = abs(value if like is None else like)
    if scale <= 1:
        return f"{value:.4f}"
    return f"{value:.3f}" if scale < 10 else f"{value:,.2f}" if scale < 1000 else figure(value)


def signed(value: float, like: float | None = None) -> str:
    """A difference with its sign."""
    return f"{'+' if value >= 0 else '−'}{shown(abs(value), like)}"


def verdict(evaluation: Evaluation, language: Language) -> tuple[str, str] | None:
    """Whether the model beats its best floor: `good`, `bad` or `warn`, and the sentence that says it; None where no
    floor was measured. With a paired bootstrap beside the floor, ahead counts only where its interval leaves out 0."""
    main, floors = evaluation.main, evaluation.floors
    if main is None or main.value is None or not floors or floors[0].main.value is None:
        return None
    best = floors[0]
    theirs = best.main.value
    assert theirs is not None
    ahead = best.main.rank > main.rank
    sure = None if best.paired is None else best.paired.certain
    kind, key = ("warn", "unsure") if sure is False else ("good", "beats") if ahead else ("bad", "loses")
    time = (
        "" if best.seconds is None else phrase("loses_seconds", language).format(time=duration(best.seconds, language))
    )
    return kind, phrase(key, language).format(
        floor=best.name,
        gap=shown(abs(main.value - theirs), main.value),
        name=figure_name(main.name, language),
        ours=shown(main.value),
        theirs=shown(theirs, main.value),
        seconds=time,
        interval=difference_words(best.paired, main, language),
    )


def difference_words(paired: Difference | None, main: Figure, language: Language) -> str:
    """The interval of a difference in brackets, or nothing."""
    if paired is None or paired.interval is None:
        return ""
    low, high = (signed(end, main.value) for end in paired.interval)
    return phrase("difference_interval", language).format(low=low, high=high)


def count(value: float | None) -> str:
    """A count with thousands separated, or a dash."""
    return "–" if value is None else whole(value)
