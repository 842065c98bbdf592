// The models of a tokenizer.json: settings -> (piece of text -> ids).

const encoder = new TextEncoder();
const KEPT = 20_000; // pieces whose ids are remembered

export const MODELS = { WordLevel: wordLevel, WordPiece: wordPiece, BPE: bytePair, Unigram: unigram };

function wordLevel({ vocab, unk_token: unknown }) {
  const known = new Map(Object.entries(vocab));
  const otherwise = [known.get(unknown)].filter((id) => id !== undefined);
  return (piece) => (known.has(piece) ? [known.get(piece)] : otherwise);
}

/** Longest pieces first, from the left (Wu et al. 2016); a word that can't be covered is unknown as a whole. */
function wordPiece({ vocab, unk_token: unknown, continuing_subword_prefix: inner, max_input_chars_per_word: most }) {
  const known = new Map(Object.entries(vocab));
  return (word) => {
    const characters = Array.from(word);
    if (characters.length > most) return [known.get(unknown)];
    const ids = [];
    for (let start = 0; start < characters.length; ) {
      let end = characters.length;
      let id;
      for (; end > start; end--) {
        const part = characters.slice(start, end).join("");
        id = known.get(start ? inner + part : part);
        if (id !== undefined) break;
      }
      if (id === undefined) return [known.get(unknown)];
      ids.push(id);
      start = end;
    }
    return ids;
  };
}

/** Byte pair encoding (Sennrich et al. 2016): of all pairs the one learned first is merged first, from the left. */
function bytePair(settings) {
  const known = new Map(Object.entries(settings.vocab));
  const prefix = settings.continuing_subword_prefix ?? "";
  const suffix = settings.end_of_word_suffix ?? "";
  const merges = new Map();
  settings.merges.forEach((pair, rank) => {
    const [a, b] = Array.isArray(pair) ? pair : pair.split(" ");
    merges.set(key(known.get(a), known.get(b)), { rank, id: known.get(a + b.slice(prefix.length)) });
  });
  const cache = new Map();
  return (word) => {
    if (settings.ignore_merges && known.has(word)) return [known.get(word)];
    if (!cache.has(word)) {
      if (cache.size >= KEPT) cache.clear();
      cache.set(word, merged(characterIds(word, known, settings, prefix, suffix), merges));
    }
    return cache.get(word);
  };
}

const key = (a, b) => a * 0x4000000 + b;

/** The ids of a word's characters, before any merge. */
function characterIds(word, known, settings, prefix, suffix) {
  const unknown = known.get(settings.unk_token);
  const characters = Array.from(word);
  const ids = [];
  let open = false; // whether the last id is an unknown one that may be joined
  characters.forEach((c, i) => {
    const id = known.get((i ? prefix : "") + c + (i === characters.length - 1 ? suffix : ""));
    const fallback = id === undefined && settings.byte_fallback ? byteIds(c, known) : undefined;
    if (id !== undefined) ids.push(id);
    else if (fallback) ids.push(...fallback);
    else if (unknown !== undefined && !(open && settings.fuse_unk)) ids.push(unknown);
    open = id === undefined && !fallback;
  });
  return ids;
}

/** The ids of "<0xNN>" for every byte of a text, or nothing when one is missing. */
function byteIds(text, known) {
  const ids = Array.from(encoder.encode(text), (b) => known.get(`<0x${b.toString(16).toUpperCase().padStart(2, "0")}>`));
  return ids.includes(undefined) ? undefined : ids;
}

function merged(ids, merges) {
  const before = ids.map((_, i) => i - 1);
  const after = ids.map((_, i) => (i + 1 < ids.length ? i + 1 : -1));
  const queue = new Queue();
  const offer = (left) => {
    const right = left < 0 ? -1 : after[left];
    const found = right < 0 ? undefined : merges.get(key(ids[left], ids[right]));
    if (found) queue.push({ rank: found.rank, at: left, id: found.id, left: ids[left], right: ids[right] });
  };
  for (let i = 0; i < ids.length; i++) offer(i);
  for (let top = queue.pop(); top; top = queue.pop()) {
    const right = after[top.at];
    if (right < 0 || ids[top.at] !== top.left || ids[right] !== top.right) continue; // merged in the meantime
    ids[top.at] = top.id;
    ids[right] = -1;
    after[top.at] = after[right];
    if (after[right] >= 0) before[after[right]] = top.at;
    offer(before[top.at]);
    offer(top.at);
  }
  return ids.filter((id) => id >= 0);
}

/** A heap: lowest rank first, then leftmost. */
class Queue {
  items = [];

  before(a, b) {
    return a.rank - b.rank || a.at - b.at;
  }

  push(item) {
    let i = this.items.push(item) - 1;
    for (let up; i && this.before(item, this.items[(up = (i - 1) >> 1)]) < 0; i = up) this.items[i] = this.items[up];
    this.items[i] = item;
  }

  pop() {
    const top = this.items[0];
    const last = this.items.pop();
    if (!this.items.length) return top;
    let i = 0;
    for (let down; (down = 2 * i + 1) < this.items.length; i = down) {
      if (down + 1 < this.items.length && this.before(this.items[down + 1], this.items[down]) < 0) down++;
      if (this.before(last, this.items[down]) <= 0) break;
      this.items[i] = this.items[down];
    }
    this.items[i] = last;
    return top;
  }
}

/** The most probable pieces under a unigram model (Kudo 2018), by dynamic programming over the characters. */
function unigram({ vocab, unk_id: unknown, byte_fallback: bytes }) {
  const known = new Map(vocab.map(([piece], id) => [piece, id]));
  const lowest = vocab.reduce((low, [, score]) => Math.min(low, score), Infinity) - 10;
  const longest = vocab.reduce((most, [piece]) => Math.max(most, piece.length), 0);
  return (text) => {
    const best = bestPieces(text, vocab, known, { lowest, longest, unknown });
    const ids = [];
    for (const piece of fused(best, unknown)) {
      const id = known.get(piece);
      const fallback = id === undefined && bytes ? byteIds(piece, known) : undefined;
      if (fallback) ids.push(...fallback);
      else ids.push(id ?? unknown);
    }
    return ids;
  };
}

function bestPieces(text, vocab, known, { lowest, longest, unknown }) {
  const score = new Float64Array(text.length + 1).fill(-Infinity);
  const from = new Int32Array(text.length + 1).fill(-1);
  const by = new Int32Array(text.length + 1).fill(-1);
  score[0] = 0;
  const reach = (start, end, id, gain) => {
    if (from[end] >= 0 && score[start] + gain <= score[end]) return;
    [score[end], from[end], by[end]] = [score[start] + gain, start, id];
  };
  for (let start = 0, width; start < text.length; start += width) {
    width = text.codePointAt(start) > 0xffff ? 2 : 1;
    let single = false;
    for (let end = start + 1; end <= Math.min(text.length, start + longest); end++) {
      const id = known.get(text.slice(start, end));
      if (id === undefined) continue;
      reach(start, end, id, vocab[id][1]);
      single ||= end - start === width;
    }
    if (!single) reach(start, start + width, unknown, lowest);
  }
  const pieces = [];
  for (let end = text.length; end > 0; end = from[end]) pieces.push([text.slice(from[end], end), by[end]]);
  return pieces.reverse();
}

/** Neighbouring unknown pieces become one. */
function fused(pieces, unknown) {
  const found = [];
  pieces.forEach(([text, id], i) => {
    if (i && id === unknown && pieces[i - 1][1] === unknown) found[found.length - 1] += text;
    else found.push(text);
  });
  return found;
}
