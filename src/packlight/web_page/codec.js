// A weights file of packlight to arrays: docs/reference/bundle.md, "Weights". Every check of the reader in Python is here.

const WIDTHS = { int8: 1, uint8: 1, bool: 1, float16: 2, int32: 4, float32: 4, int64: 8 };
const TABLES = 56;
const OFFSET = 16;
const BITS = 12;
const LANES = 4096;
const LOW = 0x10000;
const MOST = 2 ** 31;

/** What is wrong with the bytes that came. */
export class Damaged extends Error {}

const refuse = (condition, message) => {
  if (condition) throw new Damaged(message);
};

/**
 * Decodes a weights file.
 *
 * @param {Uint8Array} file
 * @param {(done: number) => void} report told the share that is decoded, 0 to 1
 * @returns {Promise<Map<string, Uint8Array>>} the bytes of each array by name, little-endian and in C order
 */
export async function decodeWeights(file, report = () => {}) {
  const { index, data } = contents(file);
  const chunks = new Map();
  const arrays = new Map();
  for (const name of Object.keys(index).sort(byCodePoint)) {
    const entry = index[name];
    if (entry.coding === "ans") {
      const members = chunks.get(entry.chunk) ?? [];
      members.push({ name, shape: entry.shape, coded: data(name) });
      chunks.set(entry.chunk, members);
    } else if (entry.coding !== "chunk") {
      arrays.set(name, await plain(data(name), entry));
    }
  }
  const total = [...chunks.values()].flat().reduce((sum, { shape }) => sum + shape[0] * shape[1], 0);
  let before = 0;
  for (const [chunk, members] of chunks) {
    refuse(index[chunk]?.coding !== "chunk", `the chunk ${chunk} is missing`);
    const found = await decodeChunk(data(chunk), members, (done) => report((before + done) / total));
    for (const [name, codes] of found) {
      arrays.set(name, codes);
      before += codes.length;
    }
  }
  report(1);
  return arrays;
}

/** The order in which Python sorts names: by code point, not by UTF-16 unit. */
function byCodePoint(a, b) {
  const [one, two] = [Array.from(a), Array.from(b)];
  const at = one.findIndex((c, i) => c !== two[i]);
  if (at < 0) return one.length - two.length;
  return at >= two.length ? 1 : one[at].codePointAt(0) - two[at].codePointAt(0);
}

/** The index of a safetensors file, and a function from a name to its bytes. */
function contents(file) {
  let header;
  let size;
  try {
    size = Number(new DataView(file.buffer, file.byteOffset).getBigUint64(0, true));
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(file.subarray(8, 8 + size)));
    const index = JSON.parse(header.__metadata__.packlight);
    const names = Object.keys(header).filter((name) => name !== "__metadata__");
    refuse(names.sort().join("\n") !== Object.keys(index).sort().join("\n"), "its index does not match its arrays");
    const data = (name) => {
      const [from, to] = header[name].data_offsets;
      refuse(!(from >= 0 && from <= to && 8 + size + to <= file.length), `${name} lies outside the file`);
      return file.subarray(8 + size + from, 8 + size + to);
    };
    return { index, data };
  } catch (error) {
    if (error instanceof Damaged) throw error;
    throw new Damaged("its header can't be read");
  }
}

async function plain(data, { coding, dtype, shape }) {
  const width = coding === "float16" ? 2 : WIDTHS[dtype];
  const well = width && Array.isArray(shape) && shape.every((n) => Number.isInteger(n) && n >= 0);
  refuse(!well || (coding === "float16" && dtype !== "float32"), "it holds an array of unknown kind");
  const size = width * shape.reduce((product, n) => product * n, 1);
  refuse(size > MOST, "it names an array that is too large");
  refuse(!["raw", "huffman", "float16"].includes(coding), `it uses the coding ${coding}`);
  const raw = coding === "huffman" ? await inflate(data, size, "deflate-raw") : data.slice();
  refuse(raw.length !== size, "an array is too short or too long");
  return coding === "float16" ? widened(raw) : raw;
}

/** Bytes of float16 numbers to bytes of the same numbers as float32. */
function widened(raw) {
  const half = new Uint16Array(raw.buffer, 0, raw.length / 2);
  const bits = new Uint32Array(half.length);
  const value = new Float32Array(bits.buffer);
  for (let i = 0; i < half.length; i++) {
    const [exponent, mantissa] = [(half[i] >> 10) & 31, half[i] & 1023];
    if (exponent) bits[i] = ((exponent === 31 ? 255 : exponent + 112) << 23) | (mantissa << 13);
    else value[i] = mantissa * 2 ** -24;
    bits[i] |= (half[i] & 0x8000) << 16;
  }
  return new Uint8Array(bits.buffer);
}

/** Undoes zlib ("deflate"), gzip or raw DEFLATE into exactly that many bytes. */
export async function inflate(data, size, format) {
  const found = new Uint8Array(size);
  let at = 0;
  try {
    const reader = new Blob([data]).stream().pipeThrough(new DecompressionStream(format)).getReader();
    for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
      refuse(at + value.length > size, "coded bytes end too late");
      found.set(value, at);
      at += value.length;
    }
  } catch (error) {
    throw error instanceof Damaged ? error : new Damaged("coded bytes can't be expanded");
  }
  refuse(at !== size, "coded bytes end too early");
  return found;
}

// Chunks of integer codes ---------------------------------------------------------------------------------------------

async function decodeChunk(data, members, report) {
  const levels = [];
  for (const { shape, coded } of members) {
    const well = Array.isArray(shape) && shape.length === 2 && shape.every((n) => Number.isInteger(n) && n > 0);
    refuse(!well || shape[0] * shape[1] > MOST, "a coded matrix has an impossible shape");
    levels.push(new Int8Array((await inflate(coded, 2 * shape[0] + shape[1], "deflate")).buffer));
  }
  refuse(data.length < 4, "coded weights are too short");
  const size = new DataView(data.buffer, data.byteOffset).getUint32(0, true);
  const raw = await inflate(data.subarray(4, 4 + size), 512 * TABLES, "deflate");
  const lookup = slots(new Uint16Array(raw.buffer));
  const count = members.reduce((sum, { shape }) => sum + shape[0] * shape[1], 0);
  const codes = decodeStream(data.subarray(4 + size), tablesOf(members, levels, count), lookup, report);
  let at = 0;
  return members.map(({ name, shape: [rows, columns] }, m) => {
    for (let row = 0; row < rows; row++) {
      const centre = levels[m][row];
      for (let end = at + columns; at < end; at++) codes[at] += centre; // modulo 256, as they were coded
    }
    return [name, new Uint8Array(codes.buffer.slice(at - rows * columns, at))];
  });
}

/** The table of every code: the level of its row plus that of its column. */
function tablesOf(members, levels, count) {
  const tables = new Uint8Array(count);
  let at = 0;
  members.forEach(({ shape: [rows, columns] }, m) => {
    const byColumn = levels[m].subarray(2 * rows);
    for (let row = 0; row < rows; row++) {
      const base = levels[m][rows + row] + OFFSET;
      for (let j = 0; j < columns; j++) tables[at++] = Math.min(TABLES - 1, Math.max(0, base + byColumn[j]));
    }
  });
  return tables;
}

/** For every table and slot: symbol << 24 | frequency << 12 | distance from the symbol's first slot. */
function slots(frequencies) {
  const lookup = new Uint32Array(TABLES << BITS);
  let at = 0;
  for (let table = 0; table < TABLES; table++) {
    for (let symbol = 0; symbol < 256; symbol++) {
      const frequency = frequencies[256 * table + symbol];
      refuse(at + frequency > (table + 1) << BITS, "its tables are damaged");
      for (let i = 0; i < frequency; i++) lookup[at++] = (symbol << 24) | (frequency << BITS) | i;
    }
    refuse(at !== (table + 1) << BITS, "its tables are damaged");
  }
  return lookup;
}

/** Range asymmetric numeral systems (Duda 2013) with interleaved lanes: the codes, one per entry of `tables`. */
function decodeStream(data, tables, lookup, report) {
  const count = tables.length;
  const lanes = Math.max(1, Math.min(LANES, Math.floor(count / 64)));
  refuse(data.length < 4 * lanes || data.length % 2, "coded weights are too short");
  const aligned = data.slice().buffer;
  const state = new Uint32Array(aligned, 0, lanes);
  const words = new Uint16Array(aligned, 4 * lanes);
  const codes = new Int8Array(count);
  let position = 0;
  for (let at = 0, step = 0; at < count; at += lanes, step++) {
    const active = Math.min(lanes, count - at);
    for (let lane = 0; lane < active; lane++) {
      const before = state[lane];
      const entry = lookup[(tables[at + lane] << BITS) | (before & 4095)];
      codes[at + lane] = entry >>> 24;
      let after = (Math.imul((entry >>> BITS) & 4095, before >>> BITS) + (entry & 4095)) >>> 0;
      if (after < LOW) after = ((after << 16) | words[position++]) >>> 0;
      state[lane] = after;
    }
    refuse(position > words.length, "coded weights end too early");
    if (step % 64 === 0) report(at);
  }
  refuse(position !== words.length || state.some((s) => s !== LOW), "coded weights do not end where they should");
  return codes;
}
