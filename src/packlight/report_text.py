"""What the report says: every word in English and Simplified Chinese, numbers as people read them.

`TABLE` holds each phrase once as a pair, so that neither language can lack one. The readers (`number`,
`text`, `group`, `rows`) take values out of a result in which any field may be missing or of the wrong kind.
"""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, Literal

Language = Literal["en", "zh"]
Words = dict[str, str]
Mark = Literal["same", "ins", "del", "sub"]

# Chinese characters and kana are compared one by one, each with the punctuation after it; else words.
_WORD = re.compile(r"[㐀-鿿豈-﫿぀-ヿ][^\w\s]*|[^\s㐀-鿿豈-﫿぀-ヿ]+")

QUANTITIES = ("size", "latency", "memory", "drop")

TABLE: dict[str, tuple[str, str]] = {
    "not_measured": ("not measured", "未测量"),
    "colon": (": ", "："),
    "comma": (", ", "，"),
    "stop": (".", "。"),
    # verdict
    "met": ("MEETS TARGET", "达到目标"),
    "missed": ("DOES NOT MEET TARGET", "未达到目标"),
    "unjudged": ("NOT JUDGED", "未判定"),
    "untargeted": ("NO TARGET SET", "未设目标"),
    "binding": ("Binding constraint", "限制因素"),
    "rung": ("Verified up to", "已验证到"),
    "crosses": (
        "The interval of the quality difference crosses the allowed limit: more samples would settle it.",
        "质量差异的置信区间跨过了允许的界限：增加评估样本才能定论。",
    ),
    "nearest": ("Nearest feasible point", "最近的可行方案"),
    "relax": ("relax {name} to {value}", "将{name}放宽到 {value}"),
    "change": ("{name} {before} to {after} ({how})", "{name} {before} 变为 {after}（{how}）"),
    # the four quantities
    "size": ("size", "大小"),
    "latency": ("latency", "延迟"),
    "memory": ("memory", "内存"),
    "drop": ("quality drop", "质量下降"),
    "metric": ("quality", "质量"),
    "card.size": ("Bundle size", "模型包大小"),
    "card.metric": ("Quality", "质量"),
    "card.latency": ("Latency per sample", "单样本延迟"),
    "card.memory": ("Peak memory", "内存峰值"),
    "before": ("original", "原模型"),
    "after": ("bundle", "模型包"),
    "from": ("from {value}", "原为 {value}"),
    "target": ("target", "目标"),
    "at_most": ("≤ {value}", "≤ {value}"),
    "within": ("met", "达标"),
    "over": ("over by {value}", "超出 {value}"),
    "no_target": ("no target set", "未设目标"),
    "size.better": ("{ratio} smaller", "缩小 {ratio}"),
    "size.worse": ("{ratio} larger", "增大 {ratio}"),
    "latency.better": ("{ratio} faster", "加快 {ratio}"),
    "latency.worse": ("{ratio} slower", "减慢 {ratio}"),
    "memory.better": ("{ratio} less", "减少 {ratio}"),
    "memory.worse": ("{ratio} more", "增多 {ratio}"),
    "same": ("unchanged", "不变"),
    "pp": ("pp", "个百分点"),
    "interval": ("{level} interval {low} to {high}", "{level} 置信区间 {low} 至 {high}"),
    "interval_short": ("interval {low} to {high}", "区间 {low} 至 {high}"),
    "paired": ("n = {n}, paired", "n = {n}，配对"),
    "median_of": ("median of {n}", "{n} 次的中位数"),
    "interleaved": ("interleaved", "交替测量"),
    "more.mean": ("mean latency", "平均延迟"),
    "more.load": ("load time", "加载时间"),
    "more.energy": ("energy per sample", "单样本能耗"),
    "more.agreement": ("same tokens", "词元一致"),
    "more.identical": ("identical outputs", "输出完全相同"),
    # pictures
    "front": ("Size against fidelity", "大小与保真度"),
    "front.lead": (
        "Every point is a plan. Lower is closer to the original, further left is smaller; the line joins the "
        "predictions, and a short stroke leads to the size that was measured.",
        "每个点是一个方案：越低越接近原模型，越靠左越小。连线为预测值，短线指向实测大小。",
    ),
    "size.axis": ("bundle size, {unit}", "模型包大小，{unit}"),
    "kl": ("KL divergence to the original, log scale", "与原模型的 KL 散度，对数坐标"),
    "chosen": ("chosen", "已选"),
    "measured": ("measured", "已测量"),
    "predicted": ("predicted", "仅预测"),
    "parts": ("Where the bytes are", "字节分布"),
    "parts.lead": (
        "The first two bars share one scale; the third shows the bundle again, enlarged. "
        "Weights only: the bundle's files hold its graphs and the tokenizer too.",
        "前两条同一比例；第三条是放大后的模型包。仅含权重：模型包文件还包括计算图和分词器。",
    ),
    "enlarged": ("bundle, enlarged {ratio}", "模型包，放大 {ratio}"),
    "part": ("Part", "部分"),
    "parameters": ("Parameters", "参数量"),
    "with_parameters": ("{n} parameters", "{n} 参数"),
    "rate": ("Bits per weight", "每权重位数"),
    "share": ("Multiply-adds", "乘加占比"),
    "total": ("Total", "合计"),
    "smaller": ("Ratio", "压缩比"),
    "sensitivity": ("What hurts, part by part", "各部分敏感度"),
    "sensitivity.lead": (
        "One part at a time at the given level, everything else untouched. Shorter is safer.",
        "每次只压缩一个部分，其余不变。线越短越安全。",
    ),
    "flips": ("{value} of top tokens changed", "{value} 的首选词元改变"),
    "layers": ("Layer by layer", "逐层结果"),
    "layers.lead": (
        "Each column is one layer, in the order of the model, coloured by part.",
        "每一列是一层，按模型顺序排列，颜色表示所属部分。",
    ),
    "distortion": ("Relative output error", "相对输出误差"),
    "distortion.axis": ("relative output error, log scale", "相对输出误差，对数坐标"),
    "rate.axis": ("bits per weight", "每权重位数"),
    "layer": ("Layer", "层"),
    "all_layers": ("All {n} layers", "全部 {n} 层"),
    # certificate
    "certificate": ("Distance to the theoretical limit", "与理论极限的距离"),
    "certificate.lead": (
        "The limit is reverse water-filling for Gaussian weights: the rate that no code goes below at the error "
        "that was reached.",
        "极限按高斯权重的反注水定理计算：在已达到的误差下，任何编码都不会低于这个码率。",
    ),
    "certificate.above": (
        "The linear layers of this file take {rate} bits per weight, {gap} above the theoretical limit of {limit}.",
        "本文件的线性层每权重 {rate} 位，比理论极限 {limit} 位高 {gap} 位。",
    ),
    "certificate.below": (
        "The linear layers of this file take {rate} bits per weight, {gap} below the {limit} that Gaussian weights "
        "would need: these are easier to code than Gaussian ones.",
        "本文件的线性层每权重 {rate} 位，比高斯权重所需的 {limit} 位低 {gap} 位：这些权重比高斯权重更容易编码。",
    ),
    "certificate.mean": (
        "Counting every layer once instead of every weight, the mean gap is {gap}.",
        "若每层只计一次而不按权重数计，平均差距为 {gap} 位。",
    ),
    "certificate.covers": (
        "This covers codes and scales of the {n} of {all} layers whose inputs were observed on the calibration data, "
        "{share} of the weights in layers, without norms, biases and graphs.",
        "统计范围：{all} 层中在校准数据上观测到输入的 {n} 层（占各层权重的 {share}）的整数码与缩放系数；不含归一化参数、偏置和计算图。",
    ),
    "certificate.finest": (
        "{n} of them were given no number of bits but the finest grid: that buys exactness rather than size, so their "
        "gap is large.",
        "其中 {n} 层未指定位数，而是用能放下的最细网格：换来的是精确而不是体积，所以差距大。",
    ),
    "certificate.solid": ("full colour: the limit", "深色：理论极限"),
    "certificate.pale": ("pale: what the file spends above it", "浅色：文件超出极限的部分"),
    "limit": ("Limit", "极限"),
    "gap": ("Gap", "差距"),
    "bytes": ("Bytes", "字节数"),
    "bytes.limit": ("Bytes at the limit", "极限字节数"),
    "layers.count": ("Layers", "层数"),
    # sweep
    "sweep": ("SIZE AGAINST QUALITY", "大小与质量"),
    "sweep.original": (
        "The original takes {size} and has a {metric} of {value}.",
        "原模型大小 {size}，{metric} 为 {value}。",
    ),
    "sweep.within": (
        "The smallest point within the allowed drop is {plan}, {size}.",
        "在允许的下降之内，最小的方案是 {plan}（{size}）。",
    ),
    "sweep.none": ("No point is within the allowed drop.", "没有方案在允许的下降之内。"),
    "sweep.curve": ("The curve", "曲线"),
    "sweep.lead": (
        "Above, what was measured in the runtime, with 95 % intervals: lower is better. Differences beyond a "
        "percentage point are drawn by their logarithm. Below, what was predicted for every plan of the front.",
        "上图为在运行时中的实测值及 95 % 置信区间，越低越好；超过一个百分点的差异按对数绘制。下图为前沿上每个方案的预测值。",
    ),
    "sweep.axis": ("{metric} minus the original's, percentage points", "{metric} 与原模型之差，百分点"),
    "sweep.points": ("The points", "各点"),
    "sweep.kl": ("KL predicted", "预测 KL"),
    "sweep.misses": ("missed", "超出"),
    "sweep.kept": ("bundle kept", "已保留模型包"),
    "sweep.apply": ("Build any of them:", "构建其中任意一个："),
    # utterances
    "worst": ("Where it got worse", "变差最多的样本"),
    "worst.lead": (
        "The samples that lost most, against the reference. The counts are the metric's own; the marks "
        "compare words without regard to case and punctuation.",
        "损失最大的样本，与参考文本对比。错误数取自指标本身；标记按词对比，忽略大小写和标点。",
    ),
    "reference": ("reference", "参考"),
    "errors": ("{before} → {after} errors in {words} words", "{words} 个词中错误 {before} → {after}"),
    "ins": ("inserted", "多出"),
    "del": ("missing", "缺失"),
    "sub": ("substituted", "替换"),
    "instead": ("reference: {words}", "参考：{words}"),
    "nothing": ("(nothing)", "（空）"),
    "more_samples": ("More samples ({n})", "更多样本（{n}）"),
    # plan, tries, ladder
    "plan": ("The plan", "方案"),
    "plan_name": ("plan", "方案"),
    "technique": ("Technique", "技术"),
    "config": ("Settings", "设置"),
    "scope": ("Scope", "范围"),
    "reason": ("Reason", "理由"),
    "tries": ("What was tried", "尝试过的方案"),
    "difference": ("Quality difference", "质量差异"),
    "result": ("Result", "结果"),
    "misses": ("misses: {names}", "未满足：{names}"),
    "ladder": ("Verification", "验证阶梯"),
    "passed": ("passed", "通过"),
    "failed": ("failed", "未通过"),
    "not_run": ("not run", "未运行"),
    # method
    "how": ("How it was measured", "测量方法"),
    "command": ("Command", "命令"),
    "model": ("Model", "模型"),
    "licence": ("Licence", "许可证"),
    "revision": ("Revision", "版本"),
    "asked": ("Target", "目标"),
    "strict": ("strict: the interval must meet it too", "严格：置信区间也须满足"),
    "calibration": ("Calibration data", "校准数据"),
    "evaluation": ("Evaluation data", "评估数据"),
    "samples": ("{n} samples", "{n} 个样本"),
    "words_from": ("words from {value}", "文本来自 {value}"),
    "runtimes": ("Runtimes", "运行时"),
    "timing": ("Timing", "计时"),
    "threads": ("{n} threads", "{n} 线程"),
    "bootstrap": ("Interval", "置信区间"),
    "resamples": ("{n} resamples", "{n} 次重采样"),
    "machine": ("Machine", "机器"),
    "versions": ("Versions", "软件版本"),
    "date": ("Date", "日期"),
    "took": ("It took", "用时"),
    "seed": ("Seed", "随机种子"),
    "files": ("Files of the bundle", "模型包文件"),
    "file": ("File", "文件"),
    "notes": ("Notes and limits", "说明与局限"),
    "as_recorded": (
        "Reasons, details and notes are shown as recorded.",
        "理由、细节与说明按记录原文（英文）显示。",
    ),
    "made_by": ("Made by packlight {version}", "由 packlight {version} 生成"),
    # names that the rest of the program writes into a result
    "name.encoder attention": ("encoder attention", "编码器注意力"),
    "name.encoder mlp": ("encoder mlp", "编码器前馈"),
    "name.encoder feed-forward": ("encoder feed-forward", "编码器前馈"),
    "name.encoder convolutions": ("encoder convolutions", "编码器卷积"),
    "name.decoder self-attention": ("decoder self-attention", "解码器自注意力"),
    "name.decoder cross-attention": ("decoder cross-attention", "解码器交叉注意力"),
    "name.decoder mlp": ("decoder mlp", "解码器前馈"),
    "name.decoder feed-forward": ("decoder feed-forward", "解码器前馈"),
    "name.vocabulary table and head": ("vocabulary table and head", "词表与输出头"),
    "name.positions": ("positions", "位置编码"),
    "name.other": ("other", "其他"),
    "name.finest": ("finest", "最细"),
    "name.8-bit groups": ("8-bit groups", "8 位分组"),
    "bits": ("{n} bits", "{n} 位"),
    "name.files intact": ("files intact", "文件完好"),
    "name.graphs load": ("graphs load", "计算图可加载"),
    "name.each part agrees with torch": ("each part agrees with torch", "各部分与 torch 一致"),
    "name.the whole agrees": ("the whole agrees", "整体一致"),
    "name.task metric in the runtime": ("task metric in the runtime", "运行时中的任务指标"),
    "name.on the target": ("on the target", "目标设备上"),
    "name.original model": ("the original model", "原模型"),
    "name.transcripts": ("the transcripts", "转写文本"),
}


def words(language: Language) -> Words:
    """Every phrase of `TABLE` in one language."""
    index = 0 if language == "en" else 1
    return {key: pair[index] for key, pair in TABLE.items()}


def named(w: Words, name: Any) -> str:
    """A name the program writes (a part, a rung, a quantity) in the language of `w`; others as they are."""
    known = text(name)
    return w.get(f"name.{known}", w[known] if known in QUANTITIES else known)


def number(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -1e300 < value < 1e300 else None


def text(value: Any) -> str:
    """A string, a number or a truth value as text; nothing and containers as ''."""
    return str(value) if isinstance(value, str | int | float) else ""


def group(value: Any) -> dict[str, Any]:
    """An object, else an empty one."""
    return value if isinstance(value, dict) else {}


def rows(value: Any) -> list[dict[str, Any]]:
    """The objects of a list; an empty list for anything else."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def percent(value: float, digits: int = 1) -> str:
    """A ratio as a percentage: 0.148 is '14.8 %'."""
    return f"{100 * value:.{digits}f} %"


def signed(value: float, digits: int = 1) -> str:
    """A difference of ratios in percentage points with its sign, without the unit: 0.003 is '+0.3'."""
    rounded = round(100 * value, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"


def ratio(value: float) -> str:
    """A ratio above one as people say it: '3.8×'; whole numbers from a hundred on."""
    return f"{value:.1f}×" if value < 100 else f"{value:.0f}×"


def count(value: float) -> str:
    """A count as people read it: 980, 20.5 k, 37.8 M, 1.5 G."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:.0f}"


def small(value: float) -> str:
    """A number near zero with two digits: 0.0031, 0.00050, 3.1 × 10⁻⁵."""
    if value == 0 or abs(value) >= 9.95:
        return f"{value:.0f}"
    if abs(value) >= 1e-4:
        return f"{value:#.2g}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')} × 10{superscript(int(power))}"


def superscript(power: int) -> str:
    """A whole number as an exponent: -5 is '⁻⁵'."""
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def differences(reference: str, said: str) -> list[tuple[Mark, str, str]]:
    """What a transcript changed, word by word, without regard to case and punctuation.

    Args:
        reference: the correct transcript.
        said: the transcript to judge.

    Returns:
        (mark, word, reference word) in reading order; 'same' and 'ins' lack the latter, 'del' the former.
    """
    right, heard = _split(reference), _split(said)
    matcher = SequenceMatcher(None, [key for key, _ in right], [key for key, _ in heard], autojunk=False)
    marked: list[tuple[Mark, str, str]] = []
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        old, new = [word for _, word in right[i1:i2]], [word for _, word in heard[j1:j2]]
        if tag == "equal":
            marked += [("same", word, "") for word in new]
            continue
        paired = min(len(old), len(new))
        marked += [("sub", word, instead) for word, instead in zip(new[:paired], old[:paired], strict=True)]
        marked += [("ins", word, "") for word in new[paired:]]
        marked += [("del", "", word) for word in old[paired:]]
    return marked


def _split(said: str) -> list[tuple[str, str]]:
    """(what is compared, what is shown) per word; a dash that stands alone belongs to the word before it."""
    found: list[tuple[str, str]] = []
    for word in _WORD.findall(said):
        key = re.sub(r"[^\w']", "", word.casefold())
        if key or not found:
            found.append((key, word))
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]} {word}")
    return found


def joined(pieces: Sequence[tuple[str, str]]) -> str:
    """Join (text, HTML) pieces with spaces, but none between two pieces of Chinese or Japanese."""
    body = ""
    for i, (said, html) in enumerate(pieces):
        tight = i and pieces[i - 1][0][-1:] > "⺀" and said[:1] > "⺀"
        body += html if not i or tight else f" {html}"
    return body
