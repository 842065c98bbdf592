"""Where the time of an answer goes: by stage, by kind of operation, by layer, by number of threads. No torch.

Stages are timed around the graphs of a bundle that answers as it always does. What happens inside a graph is read from
the runtime's own profiler in a second pass, whose cost is large on small operations; its shares are applied to the time
that the graph takes without it.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from packlight.audio import RATE
from packlight.bundle import Bundle, open_bundle, verify
from packlight.evaluate import Asked, threads_or_all
from packlight.measure import machine
from packlight.runtimes.onnx import Opened, read_graph
from packlight.runtimes.onnx_trace import Spent, read_trace
from packlight.serve import Served, open_parts, serve_parts

Progress = Callable[[str, int, int], None]
STAGES = {
    "speech": ("features", "encoder", "decoder prefill", "decoder steps", "search", "tokenizer"),
    "pairs": ("picture", "image tower", "sound", "audio tower", "tokenizer", "text tower"),
}
_ROUNDS = 3  # answers to each sample
_DEAREST = 5


@dataclass
class _Clock:
    """Seconds that the graphs took, by stage, and tokens made, added up as answers go by."""

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def around(self, name: str, part: Opened) -> Opened:
        def run(feed: Mapping[str, Any]) -> dict[str, Any]:
            start = time.perf_counter()
            found = part.run(feed)
            self.add(_stage(name, feed), time.perf_counter() - start)
            return found

        return replace(part, run=run)


def _stage(graph: str, feed: Mapping[str, Any]) -> str:
    if graph != "decoder":
        return {"image": "image tower", "audio": "audio tower", "text": "text tower"}.get(graph, graph)
    return "decoder prefill" if feed["input_ids"].shape[1] > 1 or not _length(feed) else "decoder steps"


def _length(feed: Mapping[str, Any]) -> int:
    """Positions in the decoder's past."""
    past = next((v for k, v in feed.items() if k.startswith("past_")), None)
    shape = [] if past is None else list(past.shape() if callable(past.shape) else past.shape)
    return int(shape[2]) if len(shape) > 2 else 0


def profile(path: Path, contents: Sequence[Any], asked: Asked, progress: Progress | None = None) -> dict[str, Any]:
    """Say where the time of a bundle's answers goes.

    Args:
        path: the bundle's folder.
        contents: inputs as `Served.open_input` gives them; the first also warms up.
        asked: language, task and threads.
        progress: called with (what, done, total).

    Returns:
        what docs/reference/profile.md describes.

    Raises:
        BundleError: no bundle, or a changed one.
    """
    bundle = open_bundle(path)
    verify(bundle)
    threads = threads_or_all(asked.threads)
    stages, count, wall = _stages(bundle, contents, asked, threads)
    if progress:
        progress("profiling", 1, 3)
    inside = _inside(bundle, contents, asked, threads)
    if progress:
        progress("profiling", 2, 3)
    found: dict[str, Any] = {"answers": count["answers"], "wall": wall, "threads": threads, "machine": machine()}
    found["stages"] = [_row(name, seconds, wall, count) for name, seconds in stages.items()]
    graphs = {name: sum(s for k, s in stages.items() if k.startswith(name)) for name in inside}
    found["graphs"] = {name: _graph(inside[name], graphs[name], wall) for name in inside}
    nodes = [{"graph": g, **n} for g, row in found["graphs"].items() for n in row.pop("nodes")]
    found["dearest"] = sorted(nodes, key=lambda n: -n["share"])[:_DEAREST]
    found["verdict"] = verdict(found["stages"], nodes)
    found["by_threads"] = [_timed(bundle, contents, asked, n) for n in _thread_counts()]
    found["best_threads"] = min(found["by_threads"], key=lambda row: row["seconds"])["threads"]
    if progress:
        progress("profiling", 3, 3)
    return found


def _stages(
    bundle: Bundle, contents: Sequence[Any], asked: Asked, threads: int
) -> tuple[dict[str, float], dict[str, float], float]:
    """(seconds of an answer by stage, what was answered, seconds of an answer), means over all answers."""
    clock = _Clock()
    parts = open_parts(bundle, threads)
    served = serve_parts(bundle, {name: clock.around(name, part) for name, part in parts.items()})
    answer = _speech if served.encoder is None else _pair
    answer(served, contents[0], asked, clock)
    clock.seconds.clear()
    clock.tokens = 0
    wall = seconds = 0.0
    for content in [c for _ in range(_ROUNDS) for c in contents]:
        start = time.perf_counter()
        seconds += answer(served, content, asked, clock)
        wall += time.perf_counter() - start
    n = _ROUNDS * len(contents)
    order = STAGES["speech" if served.encoder is None else "pairs"]
    stages = {name: clock.seconds.get(name, 0.0) / n for name in order if name in clock.seconds}
    return stages, {"answers": n, "audio": seconds / n, "tokens": clock.tokens / n}, wall / n


def _speech(served: Served, audio: Any, asked: Asked, clock: _Clock) -> float:
    """Answer, and add what the transcript says of features, search and the rest. Returns seconds of audio."""
    decoder = ("decoder prefill", "decoder steps")
    before = sum(clock.seconds.get(s, 0.0) for s in decoder)
    start = time.perf_counter()
    said = served.answer(audio, asked.language, asked.task)
    wall = time.perf_counter() - start
    graphs = sum(clock.seconds.get(s, 0.0) for s in decoder) - before
    clock.add("features", said.seconds["features"])
    clock.add("search", said.seconds["decoder"] - graphs)
    clock.add("tokenizer", wall - sum(said.seconds.values()))
    clock.tokens += len(said.tokens) + said.windows  # the token that ends each window was searched for too
    return len(audio) / RATE


def _pair(served: Served, pair: Any, asked: Asked, clock: _Clock) -> float:
    """Embed a picture or sound and its texts, and add what goes on around the towers."""
    encoder = served.encoder
    assert encoder is not None
    content, texts = pair
    first = ("sound", "audio tower") if encoder.settings.kind == "audio" else ("picture", "image tower")
    todo: list[tuple[str, str, Callable[..., Any], Any]] = [(*first, encoder.embed_content, content)]
    if encoder.text is not None:
        todo += [("tokenizer", "text tower", encoder.embed_text, text) for text in texts]
    for around, tower, embed, given in todo:
        before, start = clock.seconds.get(tower, 0.0), time.perf_counter()
        embed(given)
        clock.add(around, time.perf_counter() - start - (clock.seconds[tower] - before))
    return 0.0


def _inside(bundle: Bundle, contents: Sequence[Any], asked: Asked, threads: int) -> dict[str, list[Spent]]:
    """What each node of each graph took, by the runtime's profiler. Its files are gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        clock = _Clock()
        parts = open_parts(bundle, threads, Path(folder))
        served = serve_parts(bundle, {name: clock.around(name, part) for name, part in parts.items()})
        answer = _speech if served.encoder is None else _pair
        for content in (contents[0], *contents):
            answer(served, content, asked, clock)
        spent = {}
        for name, part in parts.items():
            assert part.trace is not None
            graph = read_graph(bundle.path / bundle.manifest["graphs"][name])
            spent[name] = read_trace(Path(part.trace()), graph)
    return spent


def _timed(bundle: Bundle, contents: Sequence[Any], asked: Asked, threads: int) -> dict[str, Any]:
    """Seconds of an answer with that many threads."""
    stages, _, wall = _stages(bundle, contents, asked, threads)
    return {"threads": threads, "seconds": wall, "stages": stages}


def _thread_counts() -> list[int]:
    """1, 2, 3, 4, 6, 8, 12 and so on, and all cores."""
    cores = threads_or_all(0)
    steps = {n for k in range(cores.bit_length()) for n in (1 << k, 3 << k >> 1) if n <= cores}
    return sorted({*steps, cores})


def _row(name: str, seconds: float, wall: float, count: Mapping[str, float]) -> dict[str, Any]:
    per = {"second": count["audio"], "token": count["tokens"]}
    rest = {f"per_{unit}": seconds / n for unit, n in per.items() if n}
    return {"stage": name, "seconds": seconds, "share": seconds / wall, **rest}


def _graph(spent: Sequence[Spent], seconds: float, wall: float) -> dict[str, Any]:
    """One graph: its kinds of operation and its nodes, with their shares of the whole answer."""
    total = sum(s.seconds for s in spent) or 1.0
    ops: dict[str, float] = {}
    for s in spent:
        ops[s.op] = ops.get(s.op, 0.0) + s.seconds

    def share(value: float) -> dict[str, float]:
        return {"seconds": value / total * seconds, "share": value / total * seconds / wall}

    rows = [{"op": op, **share(t)} for op, t in sorted(ops.items(), key=lambda item: -item[1])]
    nodes = [{"node": s.node, "op": s.op, "layer": s.layer, **share(s.seconds)} for s in spent]
    return {"seconds": seconds, "share": seconds / wall, "ops": rows, "nodes": nodes}


# Words --------------------------------------------------------------------------------------------------------------

_PRODUCTS = ("MatMul", "DynamicQuantizeMatMul", "Gemm", "FusedMatMul", "Conv", "QGemm", "QLinear")
_TABLES = ("embed_tokens", "token_embedding", "word_embeddings", "proj_out", "lm_head")
_ADVICE = {
    "head": "fewer tokens in the vocabulary or 4-bit groups would help",
    "attention": "a shorter audio context or fewer heads would help",
    "convolutions": "separable convolutions or 8-bit codes would help",
    "layers": "fewer layers, narrower ones or 8-bit codes would help",
    "small operations": "fewer layers would help; weights are not what costs here",
    "features": "no compression of the model helps there",
    "picture": "no compression of the model helps there; smaller pictures do",
    "sound": "no compression of the model helps there; shorter sounds do",
    "search": "fewer tokens in the vocabulary would help",
    "tokenizer": "no compression of the model helps there",
}


def kind_of(op: str, layer: str) -> str:
    """What a node counts as in the verdict."""
    if op.startswith(_PRODUCTS) and layer:
        last = layer.rpartition(".")[2]
        return "head" if last in _TABLES else "convolutions" if "conv" in last else "layers"
    return "attention" if "Attention" in op or op == "Softmax" else "small operations"


def verdict(stages: Sequence[Mapping[str, Any]], nodes: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: what most of the time goes to, and what would help."""
    shares: dict[tuple[str, str], float] = {}
    for node in nodes:
        key = (node["graph"], kind_of(node["op"], node["layer"]))
        shares[key] = shares.get(key, 0.0) + node["share"]
    shares.update((("", row["stage"]), row["share"]) for row in stages if row["stage"] in _ADVICE)
    graph, kind = max(shares, key=lambda key: shares[key])
    what = f"the {graph}'s {kind}" if graph else f"the {kind}" if kind != "search" else "the search of the next token"
    return f"{shares[graph, kind]:.0%} of the time is {what}: {_ADVICE[kind]}."


def node_name(node: Mapping[str, Any]) -> str:
    """A node as people know it: the layer where the graph says so, else its own name."""
    layer = node["layer"]
    head = layer and kind_of(node["op"], layer) == "head"
    return f"the head ({layer})" if head else layer or node["node"]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def profile_text(found: Mapping[str, Any]) -> str:
    """The same for people."""
    stages = found["stages"]
    units = [unit for unit in ("second", "token") if f"per_{unit}" in stages[0]]
    heads = {"second": "a second of audio", "token": "a token"}
    lines = [f"{'':18}{'share':>7}  {'an answer':>10}" + "".join(f"  {heads[u]:>17}" for u in units)]
    for row in stages:
        rest = "".join(f"  {_ms(row[f'per_{u}']):>17}" for u in units)
        lines.append(f"{row['stage']:18}{row['share']:7.1%}  {_ms(row['seconds']):>10}{rest}")
    for name, graph in found["graphs"].items():
        lines += ["", f"in {name} ({graph['share']:.1%})"]
        lines += [f"  {o['op']:32}{o['share']:7.1%}  {_ms(o['seconds']):>10}" for o in graph["ops"][:_DEAREST]]
    lines += ["", "dearest"]
    for node in found["dearest"]:
        lines.append(f"  {node['share']:6.1%}  {_ms(node['seconds']):>10}  {node_name(node)}, {node['op']}")
    lines += ["", found["verdict"]]
    timed = ", ".join(f"{row['threads']}: {_ms(row['seconds'])}" for row in found["by_threads"])
    return "\n".join([*lines, f"an answer by threads: {timed}; best {found['best_threads']}", f"{found['machine']}"])
