// The normalization that SentencePiece compiles into a tokenizer: a trie from byte sequences to what replaces them.

const encoder = new TextEncoder();
const decoder = new TextDecoder();

/** Makes a function from text to text out of a base64 charsmap: trie size, double-array trie, replacements. */
export function precompiled(base64) {
  if (!base64) return (text) => text;
  const raw = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const view = new DataView(raw.buffer);
  const size = view.getUint32(0, true);
  const trie = Uint32Array.from({ length: size / 4 }, (_, i) => view.getUint32(4 + 4 * i, true));
  const texts = raw.subarray(4 + size);
  const clusters = new Intl.Segmenter(undefined, { granularity: "grapheme" });

  const replaced = (bytes) => {
    const at = shortest(trie, bytes);
    return at < 0 ? undefined : decoder.decode(texts.subarray(at, texts.indexOf(0, at)));
  };
  const known = new Map();
  const character = (c) => {
    if (!known.has(c)) known.set(c, replaced(encoder.encode(c)) ?? c);
    return known.get(c);
  };
  return (text) =>
    Array.from(clusters.segment(text), ({ segment }) => {
      const bytes = encoder.encode(segment);
      const whole = bytes.length < 6 ? replaced(bytes) : undefined;
      return whole ?? Array.from(segment, character).join("");
    }).join("");
}

/** The value of the shortest prefix that the trie holds, -1 when there is none. */
function shortest(trie, bytes) {
  const offset = (unit) => (unit >>> 10) << ((unit & 512) >>> 6);
  let at = offset(trie[0]);
  for (const byte of bytes) {
    if (byte === 0) return -1;
    at ^= byte;
    const unit = trie[at];
    if ((unit & 0x800000ff) >>> 0 !== byte) return -1;
    at ^= offset(unit);
    if ((unit >>> 8) & 1) return trie[at] & 0x7fffffff;
  }
  return -1;
}
