// What the page shows: the text, the map, the charts, the table of layers.

const $ = id => document.getElementById(id);
const make = (tag, props = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), props);
  element.append(...children);
  return element;
};
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const percent = x => x === 0 || x >= .0995 ? `${Math.round(100 * x)} %`
  : `${+(100 * x).toPrecision(2)} %`;
const bytes = x => {
  const unit = x < 1024 ? 0 : Math.min(4, Math.floor(Math.log2(x) / 10));
  return `${+(x / 1024 ** unit).toFixed(unit ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
};
const number = x => Math.abs(x) >= 100 ? x.toFixed(0) : String(+x.toPrecision(3));
const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;
const shown = text => text === "" ? "(rest of the character before)"
  : text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
const stepsOf = column => {
  const first = column * data.stride, last = Math.min(first + data.stride, data.steps) - 1;
  return first === last ? `${first}` : `${first} – ${last}`;
};

let layer = ALL;      // what is shown
let marked = -1;      // the token that is outlined in the text and on the map
let cursor = null;    // {column, token} under the pointer; token is -1 on a chart
const layerName = () => layer === ALL ? "all layers" : `layer ${layer}`;

// --- Colours ------------------------------------------------------------------------------------

let ramp, colours;
function readColours() {
  const style = getComputedStyle(document.documentElement);
  const rgb = name => style.getPropertyValue(name).trim().match(/^#(..?)(..?)(..?)$/).slice(1)
    .map(hex => parseInt(hex.length === 1 ? hex + hex : hex, 16));
  colours = name => `rgb(${rgb("--" + name)})`;
  const stops = ["--frozen", "--warm", "--hot"].map(rgb);
  // A square root, because most tokens are hot for a small share of their lives.
  ramp = Array.from({length: FULL + 1}, (_, i) => {
    const x = 2 * Math.sqrt(i / FULL), k = Math.min(1, Math.floor(x));
    return stops[k].map((from, j) => Math.round(from + (stops[k + 1][j] - from) * (x - k)));
  });
  ramp.recall = rgb("--recall");
  ramp.none = rgb("--panel");
}

const rampColour = share => ramp[Math.round(FULL * share)];
const inkOn = ([r, g, b]) => .3 * r + .59 * g + .11 * b > 125 ? "#14202b" : "#f2f5f8";

function drawLegends() {
  for (const canvas of [$("text-ramp"), $("map-ramp")]) {
    const g = canvas.getContext("2d");
    for (let x = 0; x < canvas.width; ++x) {
      g.fillStyle = `rgb(${rampColour((x / (canvas.width - 1)) ** 2)})`;
      g.fillRect(x, 0, 1, canvas.height);
    }
  }
  for (const swatch of document.querySelectorAll("[data-share]")) {
    swatch.style.background = `rgb(${rampColour(swatch.dataset.share)})`;
  }
}

// A canvas as large as it is shown, in device pixels, to be drawn on in CSS pixels.
function surface(canvas) {
  const scale = Math.min(2, devicePixelRatio || 1);
  const width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = Math.round(width * scale), canvas.height = Math.round(height * scale);
  const g = canvas.getContext("2d");
  g.scale(scale, scale);
  g.font = "12px " + getComputedStyle(document.body).fontFamily;
  return {g, width, height, scale};
}

// --- What the pointer is on ---------------------------------------------------------------------

let tipOwner = null;  // the part of the page that shows it
function showTip(owner, x, y, title, rows) {
  tipOwner = owner;
  const tip = $("tip");
  const list = make("dl");
  for (const [name, value] of rows) {
    list.append(make("dt", {textContent: name}), make("dd", {textContent: value}));
  }
  tip.replaceChildren(make("b", {textContent: title}), list);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${clamp(x + 16, 8, innerWidth - box.width - 8)}px`;
  tip.style.top = `${y + 20 + box.height > innerHeight ? y - box.height - 14 : y + 20}px`;
}
function hideTip(owner = tipOwner) {
  if (owner === tipOwner) $("tip").hidden = true;
}
function say(title, rows) {
  $("live").textContent = [title, ...rows.map(row => row.join(": "))].join("; ");
}

function tokenRows(t) {
  const rows = [["position", `${t}${t < data.prompt ? ", prompt" : ", generated"}`],
    [`hot, ${layerName()}`, percent(shares[t])],
    ["recalled, all heads", `${data.recalls[t]} times`],
    ["needed, most in a head", `${data.hits[t]} times`]];
  if (data.probability[t] > 0) rows.push(["last probability", number(data.probability[t])]);
  return rows;
}

function cellRows(t, column) {
  const rows = [["position", t], [data.stride > 1 ? "steps" : "step", stepsOf(column)]];
  if (layer === ALL) {
    const picture = pictures.get(ALL), i = column * nRows + Math.floor(t / bin);
    if (picture) {
      rows.push(["hot, mean of layers", percent(picture.hot[i] / FULL)],
        ["recalled in", plural(picture.recalls[i], "layer")]);
    }
    return rows;
  }
  const {level, recalled, event} = cellAt(layer, t, column);
  const share = level / data.levels;
  rows.push(["state", recalled ? "recalled" : share === 0 ? "frozen" : "hot"]);
  if (data.heads > 1 || data.stride > 1) {
    rows.push(["hot", data.stride > 1 ? percent(share)
      : `${Math.round(share * data.heads)} of ${data.heads} heads`]);
  }
  if (event) {
    rows.push(["last event", `step ${event.step}`],
      ["its probability", event.probability ? number(event.probability) : "none"],
      ["timer", `${plural(event.timer, "step")}`], ["hits", event.hits]);
  }
  return rows;
}

// --- The text -----------------------------------------------------------------------------------

let shares = [];
const spans = [];

function buildText() {
  const box = $("text");
  data.tokens.forEach((text, t) => {
    if (t === data.prompt) {
      box.append(make("span", {className: "start", textContent: "generated from here"}));
    }
    const span = make("span", {className: text === "" ? "empty" : ""});
    span.dataset.token = t;
    text.split("\n").forEach((line, i) => {
      if (i > 0) span.append(make("i", {textContent: "↵"}), "\n");
      span.append(line);
    });
    spans.push(span);
    box.append(span);
  });
  const tokenOf = event => event.target.closest("[data-token]");
  box.addEventListener("pointermove", event => {
    const span = tokenOf(event);
    if (!span) return hideTip(box);
    const t = +span.dataset.token;
    showTip(box, event.clientX, event.clientY, shown(data.tokens[t]), tokenRows(t));
  });
  box.addEventListener("pointerleave", () => hideTip(box));
  box.addEventListener("click", event => {
    const span = tokenOf(event);
    if (!span) return;
    mark(+span.dataset.token, false);
    showTip(box, event.clientX, event.clientY, shown(data.tokens[marked]), tokenRows(marked));
  });
  box.addEventListener("keydown", event => {
    const by = {ArrowRight: 1, ArrowLeft: -1, Home: -nTokens, End: nTokens}[event.key];
    if (!by) return;
    event.preventDefault();
    mark(clamp(marked + by, 0, nTokens - 1), true);
    const where = spans[marked].getBoundingClientRect();
    showTip(box, where.left, where.bottom - 8, shown(data.tokens[marked]), tokenRows(marked));
    say(shown(data.tokens[marked]), tokenRows(marked));
  });
  box.addEventListener("blur", () => hideTip(box));
}

function mark(token, scroll) {
  spans[marked]?.classList.remove("on");
  marked = token;
  const span = spans[marked], box = $("text");
  span?.classList.add("on");
  if (span && scroll) {
    const above = span.offsetTop - box.scrollTop;
    if (above < 20 || above > box.clientHeight - 40) {
      box.scrollTop = span.offsetTop - box.clientHeight / 2;
    }
  }
  drawOverlay();
}

function colourText() {
  shares = sharesOf(layer);
  spans.forEach((span, t) => {
    const colour = rampColour(shares[t]);
    span.style.background = `rgb(${colour})`;
    span.style.color = inkOn(colour);
  });
}

// --- Charts -------------------------------------------------------------------------------------

const charts = [];
const kLeft = 62, kRight = 10, kTop = 8, kBottom = 20;

// lines: () => [{values, name, colour, area, dashed}]; values below are stacked when `area` is set.
function addChart(title, format, lines, faint = () => []) {
  const canvas = make("canvas", {tabIndex: 0});
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${title} over steps. Left and right arrow keys read values.`);
  const now = make("div", {className: "now"});
  const heading = make("h3", {textContent: title});
  $("charts").append(make("div", {className: "panel"}, heading, now, canvas));
  const chart = {canvas, now, format, lines, faint};
  charts.push(chart);
  const move = (column, event) => {
    cursor = {column, token: -1};
    drawCursor();
    if (event) say(`${title}, step ${stepsOf(column)}`, [[layerName(), now.textContent]]);
  };
  canvas.addEventListener("pointermove", event => {
    const x = event.offsetX - kLeft, width = canvas.clientWidth - kLeft - kRight;
    move(clamp(Math.floor(x / width * nColumns), 0, nColumns - 1));
  });
  canvas.addEventListener("pointerleave", () => { cursor = null; drawCursor(); });
  canvas.addEventListener("keydown", event => {
    const by = {ArrowRight: 1, ArrowLeft: -1, Home: -nColumns, End: nColumns}[event.key];
    if (!by) return;
    event.preventDefault();
    move(clamp((cursor?.column ?? 0) + by, 0, nColumns - 1), event);
  });
}

function niceStep(range, count, base = 10) {
  const unit = base === 1024 ? 1024 ** Math.floor(Math.log2(range / count) / 10) : 1;
  const raw = range / count / unit, power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].find(m => m * power >= raw * .999) * power * unit;
}

function drawChart(chart) {
  const {g, width, height} = surface(chart.canvas);
  const w = width - kLeft - kRight, h = height - kTop - kBottom;
  const lines = chart.lines(), faint = chart.faint();
  const all = [...lines.map(line => line.values), ...faint];
  const most = all.reduce((max, values) => values.reduce((m, v) => v > m ? v : m, max), 0);
  const top = 1.06 * most || 1;
  const x = column => kLeft + (column + .5) / nColumns * w;
  const y = value => kTop + h - value / top * h;
  g.textBaseline = "middle";
  const step = niceStep(top, 3, chart.format === bytes ? 1024 : 10);
  for (let value = 0; value <= top; value += step) {
    g.fillStyle = colours("line");
    g.fillRect(kLeft, y(value), w, 1);
    g.fillStyle = colours("soft"), g.textAlign = "right";
    g.fillText(chart.format(value), kLeft - 6, y(value));
  }
  stepTicks(g, kLeft, w, height - 9, 0, nColumns);
  for (const values of faint) stroke(g, values, x, y, colours("line"), 1);
  for (const line of lines) {
    if (line.area) fillArea(g, line.values, x, y, colours(line.colour));
    stroke(g, line.values, x, y, colours(line.colour), 1.5, line.dashed);
  }
  for (const [at] of data.recovery) {
    g.fillStyle = colours("alarm");
    g.fillRect(x(at / data.stride) - .5, kTop, 1, h);
    triangle(g, x(at / data.stride), kTop);
  }
  if (cursor) {
    g.fillStyle = colours("soft");
    g.fillRect(x(cursor.column), kTop, 1, h);
  }
  chart.now.replaceChildren(...lines.flatMap(line => {
    const value = cursor ? line.values[cursor.column] : line.values[nColumns - 1];
    const dot = make("span", {className: "swatch"});
    dot.style.background = colours(line.colour);
    return [dot, `${line.name}: ${isNaN(value) ? "–" : chart.format(value)}   `];
  }), cursor ? `at step ${stepsOf(cursor.column)}` : "at the end");
}

// A line over columns; where several share a pixel, their mean over their range.
function stroke(g, values, x, y, colour, width, dashed) {
  const per = Math.ceil(values.length / Math.max(1, x(values.length) - x(0)));
  g.strokeStyle = g.fillStyle = colour, g.lineWidth = width, g.lineJoin = "round";
  g.setLineDash(dashed ? [4, 4] : []);
  g.beginPath();
  for (let i = 0; i < values.length; i += per) {
    const part = values.slice(i, i + per).filter(value => !isNaN(value));
    if (part.length === 0) continue;
    const at = x(i + (part.length - 1) / 2);
    g.lineTo(at, y(part.reduce((a, b) => a + b) / part.length));
    if (per > 1 && width > 1) {
      g.globalAlpha = .25;
      g.fillRect(at - .5, y(Math.max(...part)), 1, y(Math.min(...part)) - y(Math.max(...part)));
      g.globalAlpha = 1;
    }
  }
  g.stroke();
  g.setLineDash([]);
}

function fillArea(g, values, x, y, colour) {
  g.fillStyle = colour, g.globalAlpha = .35;
  g.beginPath();
  g.moveTo(x(0), y(0));
  values.forEach((value, i) => g.lineTo(x(i), y(value)));
  g.lineTo(x(values.length - 1), y(0));
  g.fill();
  g.globalAlpha = 1;
}

function triangle(g, x, y) {
  g.beginPath();
  g.moveTo(x - 5, y - 6), g.lineTo(x + 5, y - 6), g.lineTo(x, y + 2);
  g.fill();
}

// Step numbers below [left, left + width), which shows columns from .. to.
function stepTicks(g, left, width, y, from, to) {
  const a = from * data.stride, b = to * data.stride;
  const step = Math.max(1, niceStep(b - a, width / 90));
  g.fillStyle = colours("soft"), g.textAlign = "center", g.textBaseline = "middle";
  for (let value = Math.ceil(a / step) * step; value < b; value += step) {
    const x = left + (value - a) / (b - a) * width;
    if (x < left + width - 14) g.fillText(value, x, y);
  }
}

function buildCharts() {
  const one = (name, label, colour) => () => [{values: seriesOf(name, layer),
    name: layer === ALL ? `${label}, mean of layers` : `${label}, layer ${layer}`, colour}];
  const others = name => () => data.layers > 1 ? series[name] : [];
  const all = data.hot_bytes.map((hot, c) => hot + data.ghost_bytes[c]);
  const some = values => values.some(value => value > 0);
  const bound = () => seriesOf("budget", layer).some((n, c) => n > 0 && n < data.length[c] - .5);
  addChart("Resident bytes", bytes, () => [
    {values: all, name: "hot + ghosts", colour: "hot", area: true},
    ...(some(data.ghost_bytes)
      ? [{values: data.ghost_bytes, name: "ghosts", colour: "ghost", area: true}] : [])]);
  addChart("Hot tokens", number, () => [...one("hot", "hot", "hot")(),
    ...(bound() ? [{...one("budget", "budget", "accent")()[0], dashed: true}] : [])],
  others("hot"));
  addChart("Recalled tokens", number, one("recalled", "recalled", "recall"), others("recalled"));
  addChart("Read from the cold tier", bytes, () => [
    {values: data.cold_bytes_read, name: "in a step", colour: "accent"}]);
  addChart("Attention entropy (nats)", number, one("entropy", "entropy", "accent"),
    others("entropy"));
  if (some(series.threshold.mean)) {
    addChart("Threshold", number, one("threshold", "threshold", "alarm"), others("threshold"));
  }
  if (some(series.ghost_mass.mean)) {
    addChart("Attention that fell on frozen tokens", percent,
      one("ghost_mass", "share", "ghost"), others("ghost_mass"));
  }
  if (data.output.some(value => value !== null)) {
    const values = data.output.map(value => value ?? NaN);
    addChart("Entropy of the next token (nats)", number,
      () => [{values, name: "entropy", colour: "accent"}]);
  }
}

// --- Layers -------------------------------------------------------------------------------------

function buildLayers() {
  const columns = [["entropy", "entropy", number], ["hot", "hot tokens", number],
    ["recalled", "recalled", number], ["ghost_mass", "on frozen", percent]]
    .filter(([name]) => series[name].mean.some(value => value > 0));
  $("layer-head").append(make("tr", {}, make("th", {textContent: "layer"}),
    ...columns.map(([, title]) => make("th", {textContent: title}))));
  const means = columns.map(([name]) => series[name].map(
    values => values.reduce((a, b) => a + b, 0) / (nColumns || 1)));
  for (let l = 0; l < data.layers; ++l) {
    const button = make("button", {textContent: l, onclick: () => show(l)});
    button.setAttribute("aria-label", `Show layer ${l}`);
    const cells = columns.map(([,, format], i) => {
      const fill = make("div", {className: "fill"});
      fill.style.width = `${55 * means[i][l] / Math.max(...means[i])}%`;
      return make("td", {}, make("div", {className: "track"}, fill, format(means[i][l])));
    });
    $("layer-rows").append(make("tr", {}, make("td", {}, button), ...cells));
  }
}
