// A weights file of packlight to arrays: docs/reference/bundle.md, "Weights". Every check of the reader in Python is here.

const WIDTHS = { int8: 1, uint8: 1, bool: 1, float16: 2, int32: 4, float32: 4, int64: 8 };
const TABLES = 56;
const OFFSET = 16;
const BITS = 12;
const LANES = 4096;
const LOW = 0x10000;
const MOST = 2 ** 31;
const COMPUTED = 2 ** 26; // bytes of sinusoids, which come from none
const SEGMENT = 48;
// The state after each of the trellis's eight and the second lowest bit of a code.
const FOLLOWING = [0, 2, 5, 7, 1, 3, 4, 6, 2, 0, 7, 5, 3, 1, 6, 4];

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
    if (entry.coding === "ans" || entry.coding === "path") {
      const members = chunks.get(entry.chunk) ?? [];
      members.push({ name, shape: entry.shape, coded: data(name), path: entry.coding === "path" });
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
  const halves = coding === "float16" || coding === "planes";
  const width = halves ? 2 : WIDTHS[dtype];
  const well = width && Array.isArray(shape) && shape.every((n) => Number.isInteger(n) && n >= 0);
  refuse(!well || (halves && dtype !== "float32"), "it holds an array of unknown kind");
  const size = width * shape.reduce((product, n) => product * n, 1);
  refuse(size > MOST, "it names an array that is too large");
  refuse(!["raw", "huffman", "float16", "planes", "sinusoids"].includes(coding), `it uses the coding ${coding}`);
  if (coding === "sinusoids") {
    const table = dtype === "float32" && shape.length === 2 && shape[1] >= 4 && shape[1] % 2 === 0 && size <= COMPUTED;
    refuse(!table || data.length, "it names sinusoids that can't be right");
    return widened(sinusoids(...shape));
  }
  if (coding === "planes") return widened(woven(await inflate(data, size, "deflate-raw")));
  const raw = coding === "huffman" ? await inflate(data, size, "deflate-raw") : data.slice();
  refuse(raw.length !== size, "an array is too short or too long");
  return coding === "float16" ? widened(raw) : raw;
}

/** The upper bytes of numbers and then the lower ones, to the numbers' bytes. */
function woven(planes) {
  const count = planes.length / 2;
  const found = new Uint8Array(planes.length);
  for (let i = 0; i < count; i++) {
    found[2 * i] = planes[count + i];
    found[2 * i + 1] = planes[i];
  }
  return found;
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

/** Sines, then cosines, of every position, as the bytes of float16 numbers. */
function sinusoids(positions, width) {
  const half = width / 2;
  const table = new Uint16Array(positions * width);
  for (let i = 0; i < half; i++) {
    const slow = Math.exp((-Math.log(10000) / (half - 1)) * i);
    for (let p = 0; p < positions; p++) {
      table[p * width + i] = halved(Math.sin(p * slow));
      table[p * width + half + i] = halved(Math.cos(p * slow));
    }
  }
  return new Uint8Array(table.buffer);
}

/** The bits of the float16 nearest to a number from -1 to 1, halves to even. */
function halved(value) {
  const size = Math.abs(value);
  const exponent = size < 2 ** -14 ? -14 : Math.min(0, Math.floor(Math.log2(size)));
  const steps = size / 2 ** (exponent - 10);
  const down = Math.floor(steps);
  const up = steps - down > 0.5 || (steps - down === 0.5 && down % 2);
  const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0;
  return sign | (((exponent + 14) << 10) + down + (up ? 1 : 0)); // what is carried goes on into the exponent
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
  const count = TABLES * (members.some(({ path }) => path) ? 3 : 1);
  const raw = await inflate(data.subarray(4, 4 + size), 512 * count, "deflate");
  const total = members.reduce((sum, { shape }) => sum + shape[0] * shape[1], 0);
  const stream = opened(data.subarray(4 + size), total, slots(new Uint16Array(raw.buffer), count));
  let before = 0;
  const found = members.map(({ name, shape: [rows, columns], path }, m) => {
    const codes = (path ? decodePath : decodePlain)(stream, rows, columns, levels[m], (done) => report(before + done));
    before += codes.length;
    return [name, new Uint8Array(codes.buffer)];
  });
  stream.end();
  return found;
}

/** The table of a code: the level of its row plus that of its column. */
const tableOf = (level) => Math.min(TABLES - 1, Math.max(0, level + OFFSET));

/** Codes one row after the other. Centres are added modulo 256, as they were taken off. */
function decodePlain(stream, rows, columns, levels, report) {
  const codes = new Int8Array(rows * columns);
  for (let row = 0, at = 0; row < rows; row++) {
    for (let j = 0; j < columns; j++) {
      codes[at++] = stream.next(tableOf(levels[rows + row] + levels[2 * rows + j])) + levels[row];
    }
    if (row % 64 === 0) report(at);
  }
  return codes;
}

/** Codes along a trellis: the first of every segment of every row, then the second; the state says which parity is next. */
function decodePath(stream, rows, columns, levels, report) {
  const codes = new Int8Array(rows * columns);
  const segments = Math.ceil(columns / SEGMENT);
  const states = new Uint8Array(rows * segments);
  for (let step = 0; step < Math.min(SEGMENT, columns); step++) {
    for (let row = 0; row < rows; row++) {
      for (let j = step, at = row * segments; j < columns; j += SEGMENT, at++) {
        const table = tableOf(levels[rows + row] + levels[2 * rows + j]) + TABLES * (1 + (states[at] & 1));
        const code = (stream.next(table) + levels[row]) & 255;
        codes[row * columns + j] = code;
        states[at] = FOLLOWING[2 * states[at] + ((code >> 1) & 1)];
      }
    }
    report(Math.floor((codes.length * step) / SEGMENT));
  }
  return codes;
}

/** For every table and slot: symbol << 24 | frequency << 12 | distance from the symbol's first slot. */
function slots(frequencies, count) {
  const lookup = new Uint32Array(count << BITS);
  let at = 0;
  for (let table = 0; table < count; table++) {
    for (let symbol = 0; symbol < 256; symbol++) {
      const frequency = frequencies[256 * table + symbol];
      refuse(at + frequency > (table + 1) << BITS, "its tables are damaged");
      for (let i = 0; i < frequency; i++) lookup[at++] = (symbol << 24) | (frequency << BITS) | i;
    }
    refuse(at !== (table + 1) << BITS, "its tables are damaged");
  }
  return lookup;
}

/** Range asymmetric numeral systems (Duda 2013) with interleaved lanes: `next` gives the next symbol of a table. */
function opened(data, count, lookup) {
  const lanes = Math.max(1, Math.min(LANES, Math.floor(count / 64)));
  refuse(data.length < 4 * lanes || data.length % 2, "coded weights are too short");
  const aligned = data.slice().buffer;
  const state = new Uint32Array(aligned, 0, lanes);
  const words = new Uint16Array(aligned, 4 * lanes);
  let position = 0;
  let lane = 0;
  const next = (table) => {
    const before = state[lane];
    const entry = lookup[(table << BITS) | (before & 4095)];
    let after = (Math.imul((entry >>> BITS) & 4095, before >>> BITS) + (entry & 4095)) >>> 0;
    if (after < LOW) after = ((after << 16) | words[position++]) >>> 0;
    state[lane] = after;
    lane = lane + 1 === lanes ? 0 : lane + 1;
    return entry >>> 24;
  };
  const end = () => {
    refuse(position > words.length, "coded weights end too early");
    refuse(position !== words.length || state.some((s) => s !== LOW), "coded weights do not end where they should");
  };
  return { next, end };
}
