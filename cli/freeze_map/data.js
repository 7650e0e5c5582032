"use strict";
// The data of the page and what follows from it; cli/cell_stream.h says how cells are coded.

const data = JSON.parse(document.getElementById("data").textContent);
const nColumns = data.length.length;
const nTokens = data.tokens.length;
const ALL = -1;  // in place of a layer
const FULL = 240;  // a cell that is hot in all heads and steps
const EMPTY = 255;  // a token that is not there yet

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; ++i) bytes[i] = text.charCodeAt(i);
  return bytes;
}

function halfToNumber(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

// Series of every layer: series.entropy[layer] is an array with a number for each column.
const series = {};
for (const [name, base64] of Object.entries(data.series)) {
  const bytes = bytesOf(base64);
  const half = i => halfToNumber(bytes[2 * i] | bytes[2 * i + 1] << 8);
  series[name] = Array.from({length: data.layers}, (_, layer) =>
    Float32Array.from({length: nColumns}, (_, c) => half(c * data.layers + layer)));
  series[name].mean = Float32Array.from({length: nColumns}, (_, c) =>
    series[name].reduce((sum, column) => sum + column[c], 0) / data.layers);
}

function seriesOf(name, layer) { return layer === ALL ? series[name].mean : series[name][layer]; }

// The cells of a layer, in arrays; those of column c are start[c] .. start[c + 1].
const decoded = [];
function cellsOf(layer) {
  if (decoded[layer]) return decoded[layer];
  const bytes = bytesOf(data.cells[layer]);
  const start = new Uint32Array(nColumns + 1);
  const token = [], level = [], recalled = [], detail = [];
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let shift = 0;; shift += 7) {
      const byte = bytes[at++];
      value += (byte & 127) * 2 ** shift;
      if (byte < 128) return value;
    }
  };
  for (let c = 0; c < nColumns; ++c) {
    let previous = -1;
    for (let n = varint(); n > 0; --n) {
      previous += 1 + varint();
      const bits = bytes[at++];
      token.push(previous), level.push(bits & 31), recalled.push(bits >> 5 & 1);
      detail.push(bits & 64 ? [bytes[at++], varint(), varint(), varint()] : null);
    }
    start[c + 1] = token.length;
  }
  return decoded[layer] = {start, token, level, recalled, detail};
}

// Pictures are arrays of nColumns x nRows; a row is `bin` tokens, so that very long contexts fit.
const bin = Math.max(1, Math.ceil(nTokens * nColumns / 40e6));
const nRows = Math.ceil(nTokens / bin);

// hot: 0 .. FULL, or EMPTY; recalls: in how many layers some token of the row was recalled.
const pictures = new Map();
function pictureOf(layer) {
  if (pictures.has(layer)) return pictures.get(layer);
  const cells = cellsOf(layer);
  const hot = new Uint8Array(nColumns * nRows).fill(EMPTY);
  const recalls = new Uint8Array(nColumns * nRows);
  const level = new Uint8Array(nTokens), sum = new Float64Array(nRows);
  for (let c = 0; c < nColumns; ++c) {
    for (let i = cells.start[c]; i < cells.start[c + 1]; ++i) {
      const t = cells.token[i], row = Math.floor(t / bin);
      if (t >= nTokens) continue;
      sum[row] += cells.level[i] - level[t];
      level[t] = cells.level[i];
      if (cells.recalled[i]) recalls[c * nRows + row] = 1;
    }
    const rows = Math.min(nRows, Math.ceil(data.length[c] / bin));
    const scale = FULL / data.levels / bin;
    for (let row = 0; row < rows; ++row) hot[c * nRows + row] = Math.min(FULL, sum[row] * scale);
  }
  const picture = {hot, recalls, layers: 1};
  if (layer !== ALL) {  // keep few of them: each may take megabytes
    if (pictures.size > 6) pictures.delete([...pictures.keys()].find(key => key !== ALL));
    pictures.set(layer, picture);
  }
  return picture;
}

// The mean of all layers, made a layer at a time so that the page stays alive.
async function pictureOfAll(progress) {
  if (pictures.has(ALL)) return pictures.get(ALL);
  const sum = new Uint32Array(nColumns * nRows), recalls = new Uint16Array(nColumns * nRows);
  let hot = null;
  for (let layer = 0; layer < data.layers; ++layer) {
    progress(layer);
    await new Promise(resolve => setTimeout(resolve));
    const picture = pictureOf(layer);
    for (let i = 0; i < sum.length; ++i) {
      sum[i] += picture.hot[i];
      recalls[i] += picture.recalls[i];
    }
    hot = picture.hot;
  }
  const mean = Uint8Array.from(sum, (value, i) =>
    hot[i] === EMPTY ? EMPTY : value / data.layers);
  pictures.set(ALL, {hot: mean, recalls, layers: data.layers});
  return pictures.get(ALL);
}

// Share of a token's life in which it was hot: exact over all layers, from the cells for one.
function sharesOf(layer) {
  if (layer === ALL) return data.hot.map(permille => permille / 1000);
  const {hot} = pictureOf(layer);
  const sum = new Float64Array(nRows), life = new Float64Array(nRows);
  for (let c = 0; c < nColumns; ++c) {
    for (let row = 0; row < nRows; ++row) {
      const value = hot[c * nRows + row];
      if (value === EMPTY) break;
      sum[row] += value, ++life[row];
    }
  }
  return data.hot.map((_, t) => {
    const row = Math.floor(t / bin);
    return life[row] ? sum[row] / life[row] / FULL : 1;
  });
}

// What is known of a token in a column of a layer.
function cellAt(layer, token, column) {
  const cells = cellsOf(layer);
  const at = {level: 0, recalled: false, event: null};
  let found = false;
  for (let i = cells.start[column + 1] - 1; i >= 0; --i) {
    if (cells.token[i] !== token) continue;
    if (!found) {
      at.level = cells.level[i];
      at.recalled = i >= cells.start[column] && cells.recalled[i] === 1;
    }
    found = true;
    if (!cells.detail[i]) continue;
    const [code, hits, timer, step] = cells.detail[i];
    const c = upperBound(cells.start, i) - 1;
    at.event = {probability: code ? 2 ** ((code - 255) / 16) : 0, hits, timer,
      step: c * data.stride + step};
    break;
  }
  return at;
}

// The first index whose value is above x, in an ascending array.
function upperBound(values, x) {
  let low = 0, high = values.length;
  while (low < high) {
    const middle = low + high >> 1;
    if (values[middle] <= x) low = middle + 1; else high = middle;
  }
  return low;
}
