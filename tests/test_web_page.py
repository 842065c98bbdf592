"""The page in a real browser: the bundle's own ranking, its own origin alone, both languages, damage named."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from packlight.answering import Question, ask
from packlight.errors import RuntimeMissing
from packlight.serve import open_served
from packlight.texts import TextSettings, tokenizer_of
from packlight.web import Page, write_site
from packlight.web_runtime import runtime_files
from small_web import browsing, draw_shapes, queries, save_bundle, serving

pytestmark = pytest.mark.slow
READY = "body[data-state=ready]"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """(bundle opened, folder of pictures, the site written, its address, a browser)."""
    try:
        runtime_files()
    except RuntimeMissing as error:
        pytest.skip(str(error))
    base = tmp_path_factory.mktemp("page")
    with browsing() as browser:
        served = open_served(save_bundle(base), 1)
        images = draw_shapes(base / "shapes")
        made = write_site(served, images, base / "deep" / "down" / "site", Page(examples=("a red square",)))
        with serving(base) as address:
            yield served, images, made, f"{address}deep/down/site/", browser


def opened(browser, address, **context):
    page = browser.new_context(**{"locale": "en-US", **context}).new_page()
    page.set_default_timeout(60_000)
    page.goto(address)
    return page


def search(page, words):
    page.fill("#words", words)
    page.wait_for_function("words => document.body.dataset.answered === words", arg=words)


def shown(page):
    site = json.loads(page.evaluate("fetch('site.json').then((r) => r.text())"))
    found = page.evaluate("[...document.querySelectorAll('#found li')].map((e) => Number(e.dataset.picture))")
    return [site["pictures"][i]["name"] for i in found]


def native(served, images, words):
    (row, _), *_ = ask(served, Question((words,), images, top=10))
    return [Path(r["file"]).stem for r in row["found"]]


def test_the_page_ranks_as_packlight_run_does_and_asks_no_other_origin(shop, tmp_path):
    served, images, made, address, browser = shop
    asked = []
    context = browser.new_context(locale="en-US")
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector(READY, timeout=60_000)
    times = []
    for words in queries(50):
        start = time.perf_counter()
        search(page, words)
        times.append(time.perf_counter() - start)
        assert shown(page)[:10] == native(served, images, words), words
    assert np.median(times[1:]) <= 0.15, times
    assert "in this tab" in page.inner_text("#status")
    local = [url for url in asked if not url.startswith("data:")]
    assert len(local) > 15 and all(url.startswith(address) for url in local), local
    assert not errors
    names = {url.removeprefix(address).split("#")[0] for url in local}
    fetched = {n for n in names if not n.startswith("pictures/")}
    assert fetched <= {str(f.relative_to(made.path)) for f in made.path.rglob("*")} | {""}
    # What stays behind: the picture tower. What comes on top: the page itself, and the runtime, which is compressed.
    sizes = [len(part) for part in runtime_files()]
    assert made.bytes_without_pictures <= served.bundle.size + sum(sizes)
    context.close()


def test_similar_pictures_the_keyboard_the_address_and_the_language(shop, tmp_path):
    served, images, _, address, browser = shop
    page = opened(browser, f"{address}#a%20red%20square", locale="zh-CN", viewport={"width": 390, "height": 844})
    page.wait_for_function("() => document.body.dataset.answered === 'a red square'")
    assert page.evaluate("document.documentElement.lang") == "zh-Hans"
    assert "最匹配的在前" in page.inner_text("#status")
    page.screenshot(path=tmp_path / "phone.png")
    # Nothing is cut off at the side of a phone.
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("#language")
    assert page.evaluate("document.documentElement.lang") == "en"
    assert "best first" in page.inner_text("#status")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "words"
    first = shown(page)[0]
    page.locator("#found button").first.focus()
    page.keyboard.press("Enter")
    assert page.inner_text("#name") == first
    page.click("#like")
    page.wait_for_function("() => document.querySelector('#status').textContent.startsWith('Similar')")
    assert shown(page)[0] == first  # nothing is as similar to a picture as itself
    picture = served.encoder.embed_content(served.open_input(images / f"{first}.png", ())[0])
    vectors = [served.encoder.embed_content(served.open_input(f, ())[0]) for f in sorted(images.glob("*.png"))]
    order = np.argsort(-(np.array(vectors) @ picture), kind="stable")[:10]
    assert shown(page)[:10] == [sorted(images.glob("*.png"))[i].stem for i in order]
    page.reload()
    page.wait_for_selector(READY)
    assert page.evaluate("document.documentElement.lang") == "en"  # what was chosen is remembered


@pytest.mark.parametrize("damage", ["flip", "cut", "lost"])
def test_a_damaged_site_says_so_in_one_sentence(shop, tmp_path, damage):
    _, _, made, _, browser = shop
    site = tmp_path / "site"
    shutil.copytree(made.path, site)
    weights = site / "model" / "weights.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 4
    if damage == "lost":
        weights.unlink()
    else:
        weights.write_bytes(raw if damage == "flip" else raw[:-100])
    with serving(site) as address:
        page = opened(browser, address)
        page.wait_for_selector("#failure:not([hidden])")
        said = page.inner_text("#failure")
        assert "weights.safetensors" in said
        assert ("could not be fetched" if damage == "lost" else "damaged") in said
        page.close()


def test_the_decoder_finds_damage_that_no_checksum_saw(shop):
    _, _, _, address, browser = shop
    page = opened(browser, address)
    found = page.evaluate("""async () => {
      const { decodeWeights } = await import('./codec.js');
      const file = new Uint8Array(await (await fetch('model/weights.safetensors')).arrayBuffer());
      const header = JSON.parse(new TextDecoder().decode(file.subarray(8, 8 + Number(new DataView(file.buffer).getBigUint64(0, true)))));
      const chunk = Object.keys(header).find((name) => name.startsWith('ans/'));
      const start = 8 + Number(new DataView(file.buffer).getBigUint64(0, true)) + header[chunk].data_offsets[0];
      const said = [];
      for (const at of [start + 6, start + 3000, start + 9000, 20, file.length]) {
        const bytes = at < file.length ? file.slice() : file.slice(0, -40);
        if (at < file.length) bytes[at] ^= 1;
        said.push(await decodeWeights(bytes).then(() => 'nothing', (error) => error.constructor.name));
      }
      return said;
    }""")
    assert found == ["Damaged"] * 5
    page.close()


def test_a_page_that_is_opened_as_a_file_says_how_to_serve_it(shop):
    _, _, made, _, browser = shop
    page = opened(browser, (made.path / "index.html").as_uri())
    page.wait_for_timeout(2500)
    assert page.locator("#unserved").is_visible() and "http.server" in page.inner_text("#unserved")
    page.close()


# Tokenizers ---------------------------------------------------------------------------------------------------------

TEXTS = [
    "", " ", "a", "A photo of a CAT.", "Two dogs, one ball!", "图片 é 1234", "红色的方块，和English混排。", "a\t b\r\n  c ",
    "naïve café Ångström ﬁne ½ Ⅷ", "don't can't I'll we've S'RE", "emoji 😀👩‍👩‍👧‍👦🇨🇳 flags", "ΑΣ ΣΑΣ İstanbul ß", "한국어 テスト",
    "العربية עברית हिन्दी ไทย", "\x00\ufffd\u200b\u200d\u00ad\ufeffx", "[CLS] hi [SEP] [MASK]", "<|endoftext|> a </s> <unk>",
    "hello " * 10_000, "x" * 10_000, "é" * 200, "!?.,;:—–‘’“”…", "3.14 1,000", "▁mark ##ing </w>", "tab\u2028\x85\xa0\u3000",
    "à́ê̂ äö e\u0301", "𝒜𝓁𝓅𝒽𝒶 𠀀𠮷",
]  # fmt: skip


def word_piece(lines):
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(lines, trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def byte_pair(lines):
    made = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1500, end_of_word_suffix="</w>", special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(lines, trainer)
    made.post_processor = processors.RobertaProcessing(("<|endoftext|>", 1), ("<|startoftext|>", 0))
    return made


def unigram(lines):
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "</s>"]
    made.train_from_iterator(lines, trainers.UnigramTrainer(vocab_size=1200, unk_token="<unk>", special_tokens=special))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made


@pytest.mark.parametrize("make", [word_piece, byte_pair, unigram])
@pytest.mark.parametrize("canonical", [False, True])
def test_the_page_makes_the_ids_that_the_library_makes(shop, make, canonical):
    _, _, _, address, browser = shop
    root = Path(__file__).resolve().parent.parent
    lines = [line for file in sorted(root.rglob("*.md")) for line in file.read_text(encoding="utf-8").splitlines()]
    made = make([line for line in lines if line]).to_str()
    random = np.random.default_rng(0)
    blocks = [(32, 127), (0xA0, 0x250), (0x370, 0x530), (0x4E00, 0x9FFF), (0x3040, 0x30FF), (0xAC00, 0xD7A3),
              (0x1F300, 0x1F650), (0x2000, 0x2060), (0xFF00, 0xFF60)]  # fmt: skip
    made_up = []
    for _ in range(500):
        low, high = blocks[int(random.integers(len(blocks)))]
        made_up.append("".join(chr(c) if random.random() > 0.2 else " " for c in random.integers(low, high, 12)))
    texts = [*TEXTS, *lines[:300], *made_up]
    settings = TextSettings(24, 24 if canonical else 0, 3, canonical)
    page = opened(browser, address)
    found = page.evaluate(
        """async ([file, settings, texts]) => {
          const { tokenizer } = await import('./tokenizer.js');
          return texts.map(tokenizer(JSON.parse(file), settings));
        }""",
        [made, settings.to_dict(), texts],
    )
    ids = tokenizer_of(made, settings)
    different = [(t, mine, ids(t)) for t, mine in zip(texts, found, strict=True) if mine != ids(t)]
    assert not different
    page.close()
