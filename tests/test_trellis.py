"""Codes along a trellis: the nearest path, fewer bits for the same error, read back exactly, damage found."""

import itertools
import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from packlight import trellis
from packlight.chunks import coded_rate, spread_of
from packlight.codec import read_weights, write_weights
from packlight.errors import BundleError, PlanError
from packlight.quant import LIMIT, column_grid, distortion, error_feedback, rate_of, rescaled
from packlight.sinusoids import sinusoids
from packlight.techniques.codes import CodesConfig, feedback
from packlight.viterbi import nearest_path

CODEC = Path(__file__).parents[1] / "src" / "packlight" / "web_page" / "codec.js"


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def path_codes(inputs: int, outputs: int, width: float = 3.0) -> np.ndarray:
    """[inputs, outputs], as the file has them."""
    values = gaussian(inputs, outputs) * width
    return torch.stack([nearest_path(row, LIMIT) for row in values]).to(torch.int8).numpy()


# The trellis --------------------------------------------------------------------------------------------------------


def test_the_trellis_has_one_way_from_every_state_to_every_other_in_three_steps() -> None:
    for begin in range(trellis.STATES):
        ends = set()
        for bits in itertools.product((0, 1), repeat=3):
            state = begin
            for bit in bits:
                state = int(trellis.FOLLOWING[state, bit])
            ends.add(state)
        assert len(ends) == trellis.STATES


def test_two_paths_that_part_differ_by_the_free_distance_of_the_eight_state_code() -> None:
    # Ungerboeck 1982, table 1: squared free distance 10, in steps of the finest grid, of the code for amplitudes.
    def distance(a: int, b: int) -> int:  # between two remainders by 4, as near as their codes can be
        return min(abs(a - b), 4 - abs(a - b)) ** 2

    best = {}
    for first, second in itertools.permutations((0, 1), 2):
        for s in range(trellis.STATES):
            pair = (int(trellis.FOLLOWING[s, first]), int(trellis.FOLLOWING[s, second]))
            best[pair] = min(best.get(pair, 99), distance(2 * first + (s & 1), 2 * second + (s & 1)))
    least = 16  # two codes of one remainder: parallel ways
    for _ in range(30):
        after: dict[tuple[int, int], int] = {}
        for (a, b), cost in best.items():
            for x, y in itertools.product((0, 1), repeat=2):
                pair = (int(trellis.FOLLOWING[a, x]), int(trellis.FOLLOWING[b, y]))
                total = cost + distance(2 * x + (a & 1), 2 * y + (b & 1))
                after[pair] = min(after.get(pair, 99), total)
        least = min([least, *(c for (a, b), c in after.items() if a == b)])
        best = {pair: c for pair, c in after.items() if pair[0] != pair[1]}
    assert least == 10


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_nearest_path_is_the_best_of_all(seed: int) -> None:
    values = torch.randn(7, generator=torch.Generator().manual_seed(seed)) * 2
    found = nearest_path(values, 5)
    best = math.inf
    for codes in itertools.product(range(-5, 6), repeat=3):  # all beginnings; the rest by what is allowed and nearest
        best = min(best, _cost(codes, values.tolist(), 5))
    assert float((found - values).square().sum()) == pytest.approx(best, rel=1e-5)
    assert trellis.follows(found.to(torch.int8).numpy()[None])


def _cost(codes: tuple[int, ...], values: list[float], limit: int) -> float:
    """The least cost of a path that begins with these codes, by search of every path after them."""
    states = {0: 0.0}
    for t, value in enumerate(values):
        after: dict[int, float] = {}
        for state, cost in states.items():
            for code in [codes[t]] if t < len(codes) else range(-limit, limit + 1):
                if (code ^ state) & 1 == 0:
                    then = int(trellis.FOLLOWING[state, (code >> 1) & 1])
                    after[then] = min(after.get(then, math.inf), cost + (code - value) ** 2)
        states = after
    return min(states.values(), default=math.inf)


def test_codes_stay_within_the_limit_and_paths_may_end_anywhere() -> None:
    for count in (1, 2, 47, 48, 49, 100):
        codes = nearest_path(gaussian(count) * 100, 9)
        assert codes.shape == (count,) and float(codes.abs().max()) <= 9
        assert trellis.follows(codes.to(torch.int8).numpy()[None])


@pytest.mark.parametrize("rate", [1.0, 2.25, 3.5])
def test_at_equal_rates_paths_come_nearer_to_the_theoretical_limit(rate: float) -> None:
    weight, gram = gaussian(960, 96), torch.eye(96)
    gap = {}
    for path in (False, True):
        grid = column_grid(weight, gram, rate, 1e-6, path=path)
        codes = error_feedback(weight, gram, grid, 1e-6)
        loss = distortion(weight, rescaled(grid, weight, codes, gram).values(codes), gram)
        assert rate_of(codes) == pytest.approx(rate, abs=0.06)
        gap[path] = rate_of(codes) - 0.5 * math.log2(1 / loss)
    assert gap[False] == pytest.approx(0.25, abs=0.04)
    assert gap[True] < gap[False] - 0.11


def test_a_path_through_another_trellis_is_no_path_here() -> None:
    codes = path_codes(4, 96)
    assert trellis.follows(codes)
    for change in (1, 2):  # a code of the other parity, and one after which others must follow
        other = codes.copy()
        other[2, 10] += change
        assert not trellis.follows(other)


def test_a_layer_without_room_for_half_steps_gets_codes_one_by_one() -> None:
    weight, gram = gaussian(96, 96), torch.eye(96)
    assert column_grid(weight, gram, 3, path=True).path
    weight[:, 5] *= 40  # each row has a weight that takes all of the limit: twice the codes would not fit
    rows = torch.ones(96)
    assert not column_grid(weight, gram, 3, rows=rows, path=True).path


def test_the_technique_gives_a_path_and_says_what_the_values_are() -> None:
    weight, gram = gaussian(200, 64), torch.eye(64) + 0.5
    made = feedback(weight, gram, CodesConfig(rate=2.5, columns=True, trellis=True))
    codes = made.tensors["codes"]
    assert trellis.follows(codes.numpy()) and made.rate == pytest.approx(coded_rate(codes.numpy()))
    values = codes.T.float() * made.tensors["scale"][:, None] * made.tensors["columns"]
    assert torch.allclose(values, made.approximation, atol=1e-6)
    plain = feedback(weight, gram, CodesConfig(rate=2.5, columns=True))
    assert distortion(weight, made.approximation, gram) < 0.9 * distortion(weight, plain.approximation, gram)


def test_a_trellis_without_a_rate_is_refused() -> None:
    with pytest.raises(PlanError, match="needs a rate"):
        CodesConfig(trellis=True)


# The file -----------------------------------------------------------------------------------------------------------


def mixed() -> dict[str, np.ndarray]:
    """Paths and other codes of uneven shapes, with columns of another spread and rows with a mean."""
    spread = np.random.default_rng(0)
    plain = np.round(spread.normal(3, 4, (70, 130)) * spread.uniform(0.2, 2, 130)).clip(-63, 63)
    steep = path_codes(100, 1000) * 0
    for row in range(100):
        values = gaussian(1000) * torch.linspace(0.1, 6, 1000) + (9 if row % 3 else 0)
        steep[row] = nearest_path(values.roll(row), LIMIT).numpy()
    return {
        "a": path_codes(96, 96), "b": plain.astype(np.int8), "c": path_codes(80, 1537, 0.4), "d": steep,
        "e": np.zeros((64, 70), np.int8), "h": gaussian(3, 300).half().float().numpy(), "f": sinusoids(150, 64), "g": sinusoids(9, 8) + np.float32(0.25),
    }  # fmt: skip


def test_paths_and_other_codes_of_one_chunk_are_read_back(tmp_path: Path) -> None:
    arrays = mixed()
    write_weights(tmp_path / "w", arrays)
    found = dict(read_weights(tmp_path / "w"))
    assert {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in arrays.items()}
    again = dict(read_weights(tmp_path / "w", ["d"]))
    assert list(again) == ["d"] and np.array_equal(again["d"], arrays["d"])


def test_the_file_takes_no_more_for_a_path_than_its_rate(tmp_path: Path) -> None:
    codes = path_codes(384, 1536)
    assert spread_of(codes).path
    write_weights(tmp_path / "w", {"a": codes})
    bits = 8 * (tmp_path / "w").stat().st_size / codes.size
    assert coded_rate(codes) <= bits <= coded_rate(codes) + 0.28  # the lanes' states are shared by a whole model
    shuffled = codes[:, np.random.default_rng(0).permutation(codes.shape[1])]
    assert coded_rate(shuffled) > coded_rate(codes) + 0.8  # who does not know the path pays for the parity


def test_a_damaged_path_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "w"
    write_weights(file, {"a": path_codes(96, 960)})
    raw = bytearray(file.read_bytes())
    raw[-2000] ^= 16
    file.write_bytes(raw)
    with pytest.raises(BundleError, match="damaged"):
        list(read_weights(file))


def test_the_browser_reads_what_python_wrote(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node; the tests of the page run the same decoder in a browser")
    arrays = mixed() | {"i": sinusoids(1500, 384)}
    write_weights(tmp_path / "w", arrays)
    shutil.copy(CODEC, tmp_path / "codec.mjs")
    script = """
      import { readFileSync } from 'node:fs';
      import { createHash } from 'node:crypto';
      import { decodeWeights } from './codec.mjs';
      const found = await decodeWeights(new Uint8Array(readFileSync('w')));
      const hash = (bytes) => createHash('sha256').update(bytes).digest('hex');
      console.log(JSON.stringify(Object.fromEntries([...found].map(([name, bytes]) => [name, hash(bytes)]))));
    """
    (tmp_path / "read.mjs").write_text(script)
    out = subprocess.run([node, "read.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    import hashlib

    assert json.loads(out) == {k: hashlib.sha256(v.tobytes()).hexdigest() for k, v in arrays.items()}
