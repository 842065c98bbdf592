// Everything that computes: loads the text tower, and ranks the pictures for words. Runs beside the page, never in it.

import { Damaged, decodeWeights, inflate } from "./codec.js";
import { tokenizer } from "./tokenizer.js";

let model; // what `load` returned

const say = (message) => self.postMessage(message);

self.onmessage = async ({ data }) => {
  try {
    if (data.site) {
      const start = performance.now();
      model = await load(data.site);
      await vectorOf("a");
      say({ ready: performance.now() - start });
    } else {
      const start = performance.now();
      const query = data.like === undefined ? await vectorOf(data.words) : row(data.like);
      const found = ranked(query);
      say({ id: data.id, ...found, milliseconds: performance.now() - start });
    }
  } catch (error) {
    say({ id: data.id, failed: error instanceof Damaged ? "damaged" : error.kind ?? "other", detail: error.message });
  }
};

async function load(site) {
  const files = await fetchAll(site.files);
  const take = (role) => {
    const found = files.get(role);
    files.delete(role);
    return found;
  };
  const ort = await import(new URL(site.runtime, self.location.href).href);
  ort.env.wasm.wasmBinary = take("wasm");
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = "error";
  const vectors = pictureVectors(take("pictures"), site.pictures.length, site.dimensions);
  const ids = tokenizer(JSON.parse(new TextDecoder().decode(take("tokenizer"))), site.text);
  const weights = await decodeWeights(take("weights"), (share) => say({ step: "decode", share }));
  say({ step: "start" });
  const externalData = site.weights.map(([name, path]) => {
    if (!weights.has(name)) throw new Damaged(`the weights ${name} are missing`);
    return { path, data: weights.get(name) };
  });
  const session = await ort.InferenceSession.create(take("graph"), { executionProviders: ["wasm"], externalData });
  return { ort, session, ids, vectors, width: site.dimensions, count: site.pictures.length };
}

// Fetching: every file is checked, and the page told how far it is ----------------------------------------------------

async function fetchAll(files) {
  const total = files.reduce((sum, f) => sum + f.bytes, 0);
  let done = 0;
  const report = (bytes) => {
    done += bytes;
    say({ step: "fetch", share: Math.min(1, done / total), done, total });
  };
  const found = await Promise.all(files.map(async (file) => [file.role, await fetched(file, report)]));
  return new Map(found);
}

async function fetched({ path, content, crc32: due }, report) {
  const response = await fetch(new URL(path, self.location.href)).catch(() => undefined);
  if (!response?.ok) throw Object.assign(new Error(path), { kind: "missing" });
  const parts = [];
  const reader = response.body.getReader();
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
    parts.push(value);
    report(value.length);
  }
  const raw = new Uint8Array(await new Blob(parts).arrayBuffer());
  // Some servers undo the compression of .gz files on the way.
  const packed = path.endsWith(".gz") && raw[0] === 0x1f && raw[1] === 0x8b;
  const bytes = packed ? await inflate(raw, content, "gzip").catch(() => raw) : raw;
  if (bytes.length !== content || crc32(bytes) !== due) throw new Damaged(path);
  return bytes;
}

const CRC = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

function crc32(bytes) {
  let value = 0xffffffff;
  for (let i = 0; i < bytes.length; i++) value = CRC[(value ^ bytes[i]) & 255] ^ (value >>> 8);
  return (value ^ 0xffffffff) >>> 0;
}

// Vectors -------------------------------------------------------------------------------------------------------------

/** Float32 [count, width] out of one float32 step per picture, then int16 codes. */
function pictureVectors(bytes, count, width) {
  const steps = new Float32Array(bytes.buffer, 0, count);
  const codes = new Int16Array(bytes.buffer, 4 * count, count * width);
  return Float32Array.from(codes, (code, i) => code * steps[Math.floor(i / width)]);
}

async function vectorOf(words) {
  const ids = model.ids(words);
  if (!ids.length) throw Object.assign(new Error("no token"), { kind: "empty" });
  const input = new model.ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
  const { text_vector: vector } = await model.session.run({ input_ids: input });
  if (vector.data.some((v) => !Number.isFinite(v))) throw new Error("the model gave a vector that is no number");
  return vector.data;
}

const row = (picture) => model.vectors.subarray(picture * model.width, (picture + 1) * model.width);

/** All pictures, best first; of equal ones the first. */
function ranked(query) {
  const scores = new Float32Array(model.count);
  for (let i = 0; i < model.count; i++) {
    let sum = 0;
    for (let j = 0, at = i * model.width; j < model.width; j++) sum += model.vectors[at + j] * query[j];
    scores[i] = sum;
  }
  const order = Uint32Array.from(scores, (_, i) => i).sort((a, b) => scores[b] - scores[a] || a - b);
  return { order, scores };
}
