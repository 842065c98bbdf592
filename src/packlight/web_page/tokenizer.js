// Text to token ids from a tokenizer.json, the same ids as the library "tokenizers" gives.
//
// Covers what the text towers of dual encoders use: byte-level BPE (CLIP), WordPiece (BERT), Unigram (SigLIP) and whole
// words. `packlight web` refuses tokenizers with other parts, see web_text.py, which lists these names too.

import { precompiled } from "./charsmap.js";
import { MODELS } from "./models.js";

const lower = (text) => Array.from(text, (c) => c.toLowerCase()).join(""); // by character: no final sigma, as there
const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\/-]/g, "\\$&");

/** A pattern of a tokenizer.json as a regular expression; white space is Unicode's, not JavaScript's. */
function expression(pattern) {
  if (pattern.String !== undefined) return new RegExp(escaped(pattern.String), "gu");
  return new RegExp(pattern.Regex.replaceAll("\\s", "\\p{White_Space}").replaceAll("\\S", "\\P{White_Space}"), "gu");
}

// Normalizers: parameters -> (text -> text) ---------------------------------------------------------------------------

const NORMALIZERS = {
  Sequence: ({ normalizers }) => {
    const all = normalizers.map(normalizer);
    return (text) => all.reduce((t, f) => f(t), text);
  },
  NFC: () => (text) => text.normalize("NFC"),
  NFD: () => (text) => text.normalize("NFD"),
  NFKC: () => (text) => text.normalize("NFKC"),
  NFKD: () => (text) => text.normalize("NFKD"),
  Lowercase: () => lower,
  StripAccents: () => (text) => text.replace(/\p{M}/gu, ""),
  Strip: ({ strip_left: left, strip_right: right }) => (text) => {
    const begun = left ? text.replace(/^\p{White_Space}+/u, "") : text;
    return right ? begun.replace(/\p{White_Space}+$/u, "") : begun;
  },
  Prepend: ({ prepend }) => (text) => (text ? prepend + text : text),
  Replace: ({ pattern, content }) => {
    const wanted = expression(pattern);
    return (text) => text.replace(wanted, () => content);
  },
  Precompiled: ({ precompiled_charsmap: map }) => precompiled(map),
  BertNormalizer: (n) => (text) => bert(text, n),
};

const HAN = /[\u4e00-\u9fff\u3400-\u4dbf\u{20000}-\u{2a6df}\u{2a700}-\u{2b73f}\u{2b740}-\u{2b81f}\u{2b920}-\u{2ceaf}\uf900-\ufaff\u{2f800}-\u{2fa1f}]/gu;

function bert(text, settings) {
  let t = text;
  if (settings.clean_text) {
    t = t.replace(/(?![\t\n\r])[\0\ufffd\p{Cc}\p{Cf}\p{Co}]/gu, "").replace(/\p{White_Space}/gu, " ");
  }
  if (settings.handle_chinese_chars) t = t.replace(HAN, " $& ");
  if (settings.strip_accents ?? settings.lowercase) t = t.normalize("NFD").replace(/\p{Mn}/gu, "");
  return settings.lowercase ? lower(t) : t;
}

function normalizer(settings) {
  return settings ? known(NORMALIZERS, settings)(settings) : (text) => text;
}

// Pre-tokenizers: parameters -> (text, whether it begins the input -> pieces) -----------------------------------------

const GPT2 = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
const PUNCTUATION = /[!-/:-@[-`{-~\p{P}]/gu;
const WORD = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]+|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}\p{White_Space}]+/gu;
const BYTES = byteCharacters();

const PRE_TOKENIZERS = {
  Sequence: ({ pretokenizers }) => {
    const all = pretokenizers.map(preTokenizer);
    return (text, first) =>
      all.reduce((pieces, f) => pieces.flatMap((p, i) => f(p, first && i === 0)), [text]);
  },
  BertPreTokenizer: () => (text) =>
    cut(text, /\p{White_Space}/gu, "Removed").flatMap((word) => cut(word, PUNCTUATION, "Isolated")),
  Whitespace: () => (text) => text.match(WORD) ?? [],
  WhitespaceSplit: () => (text) => cut(text, /\p{White_Space}/gu, "Removed"),
  Punctuation: ({ behavior = "Isolated" }) => (text) => cut(text, PUNCTUATION, behavior),
  Digits: ({ individual_digits: each }) => (text) => cut(text, /\p{N}/gu, each ? "Isolated" : "Contiguous"),
  Split: ({ pattern, behavior, invert }) => {
    const wanted = expression(pattern);
    return (text) => cut(text, wanted, behavior, invert);
  },
  ByteLevel: ({ add_prefix_space: prefix, use_regex: split = true }) => {
    const encoder = new TextEncoder();
    const asBytes = (piece) => Array.from(encoder.encode(piece), (b) => BYTES[b]).join("");
    return (text) => {
      const whole = prefix && !text.startsWith(" ") ? ` ${text}` : text;
      return (split ? cut(whole, GPT2, "Isolated") : [whole]).map(asBytes);
    };
  },
  Metaspace: ({ replacement: mark, prepend_scheme: scheme = "always", split = true }) => {
    const wanted = new RegExp(escaped(mark), "gu");
    return (text, first) => {
      const marked = text.replaceAll(" ", mark);
      const begins = scheme === "always" || (scheme === "first" && first);
      const whole = begins && !marked.startsWith(mark) ? mark + marked : marked;
      return split ? cut(whole, wanted, "MergedWithNext") : [whole];
    };
  },
};

function preTokenizer(settings) {
  return settings ? known(PRE_TOKENIZERS, settings)(settings) : (text) => [text];
}

/** The pieces of a text around the matches of a pattern; `behavior` says where the matches go. */
function cut(text, pattern, behavior, invert = false) {
  const parts = [];
  let end = 0;
  const take = (from, to, match) => to > from && parts.push([text.slice(from, to), match !== invert]);
  for (const found of text.matchAll(pattern)) {
    take(end, found.index, false);
    take(found.index, found.index + found[0].length, true);
    end = found.index + found[0].length;
  }
  take(end, text.length, false);
  return JOIN[behavior](parts);
}

const texts = (parts) => parts.map(([text]) => text);
const JOIN = {
  Removed: (parts) => texts(parts.filter(([, match]) => !match)),
  Isolated: texts,
  Contiguous: (parts) => joined(parts, (before, part) => before === part),
  MergedWithPrevious: (parts) => joined(parts, (before, part) => part && !before),
  MergedWithNext: (parts) => joined(parts, (before, part) => before && !part),
};

/** Joins a part to the one before where `wanted` says so of the two flags. */
function joined(parts, wanted) {
  const found = [];
  parts.forEach(([text, match], i) => {
    if (i && wanted(parts[i - 1][1], match)) found[found.length - 1] += text;
    else found.push(text);
  });
  return found;
}

/** The visible character that stands for each byte in byte-level vocabularies. */
function byteCharacters() {
  const plain = (b) => (b > 32 && b < 127) || (b > 160 && b < 173) || b > 173;
  let next = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCodePoint(plain(b) ? b : next++));
}

// Special tokens around the text, and in it ---------------------------------------------------------------------------

const PROCESSORS = {
  ByteLevel: () => [[], []],
  BertProcessing: ({ cls, sep }) => [[cls[1]], [sep[1]]],
  RobertaProcessing: ({ cls, sep }) => [[cls[1]], [sep[1]]],
  TemplateProcessing: ({ single, special_tokens: special }) => {
    const text = single.findIndex((part) => part.Sequence);
    const ids = (parts) => parts.flatMap((part) => special[part.SpecialToken.id].ids);
    return [ids(single.slice(0, text)), ids(single.slice(text + 1))];
  },
  Sequence: ({ processors }) =>
    processors.map(processor).reduce(([b, a], [before, after]) => [[...before, ...b], [...a, ...after]], [[], []]),
};

function processor(settings) {
  return settings ? known(PROCESSORS, settings)(settings) : [[], []];
}

/** Splits a text at added tokens, leftmost and longest first: a list of texts and ids. */
function splitter(tokens, asWritten) {
  if (!tokens.length) return (text) => (text ? [text] : []);
  const named = new Map(tokens.map((t) => [asWritten(t.content), t]));
  const longest = [...named.keys()].filter(Boolean).sort((a, b) => b.length - a.length);
  const pattern = new RegExp(longest.map(escaped).join("|"), "gu");
  return (text) => {
    const found = [];
    let end = 0;
    for (const match of text.matchAll(pattern)) {
      const token = named.get(match[0]);
      let [from, to] = [match.index, match.index + match[0].length];
      const inWord = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]$/u.test(text.slice(0, from)) ||
        /^[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]/u.test(text.slice(to));
      if (token.single_word && inWord) continue;
      if (token.lstrip) from = Math.max(end, from - /\p{White_Space}*$/u.exec(text.slice(0, from))[0].length);
      if (token.rstrip) to += /^\p{White_Space}*/u.exec(text.slice(to))[0].length;
      if (from > end) found.push(text.slice(end, from));
      found.push(token.id);
      end = to;
    }
    if (end < text.length) found.push(text.slice(end));
    return found;
  };
}

function known(table, settings) {
  const made = table[settings.type];
  if (!made) throw new Error(`this page knows no ${settings.type}`);
  return made;
}

/** Makes a function from a text to its ids. `file` is the parsed tokenizer.json, `settings` the bundle's. */
export function tokenizer(file, settings) {
  const normal = normalizer(file.normalizer);
  const split = preTokenizer(file.pre_tokenizer);
  const model = known(MODELS, { type: modelType(file.model) })(file.model);
  const [before, after] = processor(file.post_processor);
  const added = file.added_tokens ?? [];
  const raw = splitter(added.filter((t) => !t.normalized), (t) => t);
  const normalized = splitter(added.filter((t) => t.normalized), normal);
  const room = Math.max(0, settings.max_tokens - before.length - after.length);

  const ids = (text) => {
    const found = [];
    const add = (piece, first) => {
      if (typeof piece === "number") found.push(piece);
      else for (const part of split(piece, first)) if (part) for (const id of model(part)) found.push(id);
    };
    raw(text).forEach((piece, i) => {
      if (typeof piece === "number") found.push(piece);
      else normalized(normal(piece)).forEach((inner, j) => add(inner, i + j === 0));
    });
    return found;
  };

  return (words) => {
    const well = Array.from(words.toWellFormed?.() ?? words).slice(0, 1_000_000).join("");
    const found = [...before, ...ids(settings.canonical ? canonical(well) : well).slice(0, room), ...after];
    while (found.length < settings.pad_to) found.push(settings.pad);
    return found;
  };
}

function modelType(model) {
  return model.type ?? (model.merges ? "BPE" : Array.isArray(model.vocab) ? "Unigram" : "WordPiece");
}

/** Lower case, no ASCII punctuation, single spaces: as SigLIP reads texts. */
function canonical(text) {
  const bare = text.toLowerCase().replace(/[!-/:-@[-`{-~]/g, "");
  return bare.split(/[\p{White_Space}\x1c-\x1f]+/u).filter(Boolean).join(" ");
}
