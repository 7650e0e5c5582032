// The map of tokens over steps, and what starts the page.

const [canvas, overlay] = $("map").querySelectorAll("canvas");
const kMapLeft = 64, kMapBottom = 24;
const whole = () => ({c0: 0, c1: Math.max(1, nColumns), r0: 0, r1: Math.max(1, nRows)});
let view = whole();  // columns c0 .. c1 and rows r0 .. r1 of the picture
let picture = null;

const plot = () => ({
  w: overlay.clientWidth - kMapLeft, h: overlay.clientHeight - kMapBottom,
});

function drawMap() {
  const {g, width, height, scale} = surface(canvas);
  if (!picture || nColumns === 0) {
    g.fillStyle = colours("soft"), g.textAlign = "center";
    g.fillText(nColumns === 0 ? "no decode step was recorded" : "", width / 2, height / 2);
    return;
  }
  const {w, h} = plot();
  if (w < 10) return;
  const image = paint(Math.round(w * scale), Math.round(h * scale));
  g.putImageData(image, Math.round(kMapLeft * scale), 0);
  drawTokenAxis(g, h);
  stepTicks(g, kMapLeft, w, h + 13, view.c0, view.c1);
  for (const [step] of data.recovery) {
    const x = kMapLeft + (step / data.stride - view.c0) / (view.c1 - view.c0) * w;
    if (x < kMapLeft || x > width) continue;
    g.fillStyle = colours("alarm");
    g.fillRect(x - .5, 0, 1, h);
    triangle(g, x, 6);
  }
  drawOverlay();
}

// The picture in the view, averaged over the cells that share a pixel.
function paint(width, height) {
  const image = new ImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const rgba = ([r, g, b]) => 255 << 24 | b << 16 | g << 8 | r;
  const table = Uint32Array.from(ramp, rgba), none = rgba(ramp.none);
  const marks = $("show-recalls").checked;
  const edge = (from, to, i, n, limit) => Math.min(limit, Math.floor(from + (to - from) * i / n));
  for (let x = 0; x < width; ++x) {
    const a = edge(view.c0, view.c1, x, width, nColumns - 1);
    const b = Math.max(a + 1, edge(view.c0, view.c1, x + 1, width, nColumns));
    for (let y = 0; y < height; ++y) {
      const top = edge(view.r0, view.r1, y, height, nRows - 1);
      const end = Math.max(top + 1, edge(view.r0, view.r1, y + 1, height, nRows));
      let sum = 0, n = 0, recalls = 0;
      for (let c = a; c < b; ++c) {
        for (let i = c * nRows + top; i < c * nRows + end; ++i) {
          if (picture.hot[i] === EMPTY) break;
          sum += picture.hot[i], ++n;
          recalls += picture.recalls[i];
        }
      }
      let colour = n ? table[Math.round(sum / n)] : none;
      if (marks && recalls) {
        const share = Math.min(1, .25 * (picture.layers === 1) + 3 * recalls / n / picture.layers);
        const base = ramp[Math.round(sum / n)];
        colour = rgba(base.map((v, j) => Math.round(v + (ramp.recall[j] - v) * share)));
      }
      pixels[y * width + x] = colour;
    }
  }
  return image;
}

function drawTokenAxis(g, h) {
  g.fillStyle = colours("soft"), g.textAlign = "right", g.textBaseline = "middle";
  const tall = h / (view.r1 - view.r0);  // pixels of a row
  const tokens = (view.r1 - view.r0) * bin;
  const step = tall >= 14 && bin === 1 ? 1 : Math.max(1, niceStep(tokens, h / 45));
  const end = Math.min(view.r1 * bin, nTokens);
  for (let t = Math.ceil(view.r0 * bin / step) * step; t < end; t += step) {
    const y = ((t + .5) / bin - view.r0) * tall;
    if (y < 6 || y > h - 6) continue;
    g.fillText(step === 1 ? shown(data.tokens[t]).trim().slice(0, 9) || t : t, kMapLeft - 6, y);
  }
}

function drawOverlay() {
  const {g, width} = surface(overlay);
  const {w, h} = plot();
  const y = token => ((token + .5) / bin - view.r0) / (view.r1 - view.r0) * h;
  const x = column => kMapLeft + (column + .5 - view.c0) / (view.c1 - view.c0) * w;
  g.fillStyle = colours("ink");
  g.globalAlpha = .45;
  if (cursor && x(cursor.column) >= kMapLeft) g.fillRect(x(cursor.column) - .5, 0, 1, h);
  if (cursor?.token >= 0) g.fillRect(kMapLeft, y(cursor.token) - .5, w, 1);
  g.globalAlpha = 1;
  if (marked >= 0 && y(marked) >= 0 && y(marked) <= h) {
    g.fillStyle = colours("accent");
    g.fillRect(kMapLeft, y(marked) - 1, w, 2);
    g.beginPath();
    g.moveTo(kMapLeft - 5, y(marked) - 5), g.lineTo(kMapLeft, y(marked));
    g.lineTo(kMapLeft - 5, y(marked) + 5);
    g.fill();
  }
  g.clearRect(width, 0, 1, h);
}

function drawCursor() {
  drawOverlay();
  charts.forEach(drawChart);
}

// --- Zoom and pan -------------------------------------------------------------------------------

function setView(next) {
  const all = whole();
  const fit = (from, to, least, limit) => {
    const size = clamp(to - from, Math.min(least, limit), limit);
    const start = clamp((from + to - size) / 2, 0, limit - size);
    return [start, start + size];
  };
  [view.c0, view.c1] = fit(next.c0, next.c1, 8, all.c1);
  [view.r0, view.r1] = fit(next.r0, next.r1, 8, all.r1);
  const zoomed = view.c1 - view.c0 < all.c1 || view.r1 - view.r0 < all.r1;
  overlay.style.touchAction = zoomed ? "none" : "pan-y";  // else a finger scrolls the page
  drawMap();
}

// By `factor` about a point of the plot, 0 .. 1 from its left and top.
function zoom(factor, fx = .5, fy = .5) {
  const c = view.c0 + (view.c1 - view.c0) * fx, r = view.r0 + (view.r1 - view.r0) * fy;
  setView({c0: c + (view.c0 - c) / factor, c1: c + (view.c1 - c) / factor,
    r0: r + (view.r0 - r) / factor, r1: r + (view.r1 - r) / factor});
}

function pan(dx, dy) {  // in shares of the plot
  const dc = clamp((view.c1 - view.c0) * dx, -view.c0, whole().c1 - view.c1);
  const dr = clamp((view.r1 - view.r0) * dy, -view.r0, whole().r1 - view.r1);
  setView({c0: view.c0 + dc, c1: view.c1 + dc, r0: view.r0 + dr, r1: view.r1 + dr});
}

function pointAt(event) {
  const box = overlay.getBoundingClientRect(), {w, h} = plot();
  return {x: (event.clientX - box.left - kMapLeft) / w, y: (event.clientY - box.top) / h};
}

function cellUnder(point) {
  const column = Math.floor(view.c0 + (view.c1 - view.c0) * point.x);
  const token = Math.floor((view.r0 + (view.r1 - view.r0) * point.y) * bin);
  const inside = point.x >= 0 && point.x < 1 && point.y >= 0 && point.y < 1;
  return inside && column < nColumns && token < data.length[column] ? {column, token} : null;
}

function inspect(cell, x, y) {
  cursor = cell;
  drawCursor();
  if (!cell) return hideTip(overlay);
  showTip(overlay, x, y, shown(data.tokens[cell.token]), cellRows(cell.token, cell.column));
}

function listenToPointers() {
  const fingers = new Map();
  let moved = 0;
  overlay.addEventListener("pointerdown", event => {
    fingers.set(event.pointerId, pointAt(event));
    overlay.setPointerCapture(event.pointerId);
    if (fingers.size === 1) moved = 0;
  });
  overlay.addEventListener("pointermove", event => {
    const before = fingers.get(event.pointerId), now = pointAt(event);
    if (!before) return inspect(cellUnder(now), event.clientX, event.clientY);
    moved += Math.hypot(now.x - before.x, now.y - before.y);
    const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
    fingers.set(event.pointerId, now);
    if (!other) return pan(before.x - now.x, before.y - now.y);
    const distance = p => Math.hypot(p.x - other.x, p.y - other.y) || 1e-3;
    zoom(distance(now) / distance(before), (now.x + other.x) / 2, (now.y + other.y) / 2);
  });
  const up = event => {
    const single = fingers.size === 1;
    fingers.delete(event.pointerId);
    if (event.type !== "pointerup" || !single || moved > .01) return;
    const cell = cellUnder(pointAt(event));
    inspect(cell, event.clientX, event.clientY);
    if (cell) mark(cell.token, true);
  };
  overlay.addEventListener("pointerup", up);
  overlay.addEventListener("pointercancel", up);
  overlay.addEventListener("pointerleave", event => {
    if (event.pointerType === "mouse" && fingers.size === 0) inspect(null);
  });
  overlay.addEventListener("dblclick", event => zoom(2, pointAt(event).x, pointAt(event).y));
  overlay.addEventListener("wheel", event => {
    if (!event.ctrlKey && document.activeElement !== overlay) return;  // the page scrolls
    event.preventDefault();
    zoom(2 ** (-event.deltaY / 300), pointAt(event).x, pointAt(event).y);
  }, {passive: false});
}

function listenToKeys() {
  overlay.addEventListener("keydown", event => {
    if (event.key === "+" || event.key === "=") zoom(1.5);
    else if (event.key === "-") zoom(1 / 1.5);
    else if (event.key === "0") setView(whole());
    else if (event.key.startsWith("Arrow")) moveCursor(event.key.slice(5), event.shiftKey ? 20 : 1);
    else return;
    event.preventDefault();
  });
  overlay.addEventListener("blur", () => inspect(null));
}

function moveCursor(direction, by) {
  if (nColumns === 0) return;
  const [dc, dt] = {Left: [-by, 0], Right: [by, 0], Up: [0, -by], Down: [0, by]}[direction];
  const from = cursor?.token >= 0 ? cursor : {column: Math.floor((view.c0 + view.c1) / 2),
    token: Math.floor((view.r0 + view.r1) / 2 * bin)};
  const column = clamp(from.column + dc, 0, nColumns - 1);
  const token = clamp(from.token + dt, 0, data.length[column] - 1);
  const outside = (at, from, to) => at < from ? at - from : Math.max(0, at + 1 - to);
  const dx = outside(column, view.c0, view.c1), dy = outside(token / bin, view.r0, view.r1);
  if (dx || dy) pan(dx / (view.c1 - view.c0), dy / (view.r1 - view.r0));
  const box = overlay.getBoundingClientRect(), {w, h} = plot();
  inspect({column, token},
    box.left + kMapLeft + (column + .5 - view.c0) / (view.c1 - view.c0) * w,
    box.top + (token / bin + .5 - view.r0) / (view.r1 - view.r0) * h);
  say(shown(data.tokens[token]), cellRows(token, column));
}

// --- The page -----------------------------------------------------------------------------------

async function show(which) {
  layer = which;
  $("layer").value = which;
  $("previous").disabled = which === ALL;
  $("next").disabled = which === data.layers - 1;
  [...$("layer-rows").children].forEach((row, l) => row.classList.toggle("on", l === which));
  colourText();
  charts.forEach(drawChart);
  if (which === ALL) {
    const made = await pictureOfAll(l => { $("busy").textContent = `reading layer ${l} …`; });
    $("busy").textContent = "";
    if (layer !== ALL) return;  // something else was chosen meanwhile
    picture = made;
  } else {
    picture = pictureOf(which);
  }
  drawMap();
}

function buildHeader() {
  document.title = `Freeze map · ${data.model}`;
  $("model").textContent = data.model;
  for (const [name, value] of data.parameters) {
    $("parameters").append(make("li", {}, `${name} `, make("b", {textContent: value})));
  }
  for (const [name, value, note] of data.figures) {
    $("figures").append(make("div", {}, make("dt", {textContent: name}),
      make("dd", {}, value, make("small", {textContent: note}))));
  }
  const wide = data.stride > 1
    ? ` A column is ${data.stride} steps: the whole history was too large for this page.` : "";
  $("map-note").textContent = "Down: the tokens of the context. To the right: decode steps. " +
    "A cell shows in how many KV heads the token was hot after that step." + wide;
  $("time-note").textContent = "Of what the line above names: all layers, or one (the others are " +
    "faint). Bytes are of the whole store." + (data.recovery.length ? " Red marks: recovery." : "");
}

function buildRecoveries() {
  if (data.recovery.length === 0) return;
  $("recoveries").hidden = $("recovery-key").hidden = false;
  for (const [step, rung, value] of data.recovery) {
    const t = data.length[Math.min(nColumns - 1, Math.floor(step / data.stride))] - 1;
    $("recovery-rows").append(make("tr", {}, ...[step, rung, number(value),
      `${t}: ${shown(data.tokens[t] ?? "")}`].map(text => make("td", {textContent: text}))));
  }
}

function buildFooter() {
  for (const text of data.notes) $("footer").append(make("p", {textContent: text}));
}

function redraw() {
  readColours();
  drawLegends();
  colourText();
  charts.forEach(drawChart);
  drawMap();
}

function start() {
  $("layer").append(make("option", {value: ALL, textContent: "all layers"}));
  for (let l = 0; l < data.layers; ++l) {
    $("layer").append(make("option", {value: l, textContent: `layer ${l}`}));
  }
  $("layer").addEventListener("change", event => show(+event.target.value));
  $("previous").addEventListener("click", () => show(Math.max(ALL, layer - 1)));
  $("next").addEventListener("click", () => show(Math.min(data.layers - 1, layer + 1)));
  $("zoom-in").addEventListener("click", () => zoom(1.5));
  $("zoom-out").addEventListener("click", () => zoom(1 / 1.5));
  $("fit").addEventListener("click", () => setView(whole()));
  $("show-recalls").addEventListener("change", drawMap);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("resize", redraw);
  addEventListener("scroll", () => hideTip(), {passive: true});
  readColours();
  buildHeader(), buildText(), buildRecoveries(), buildFooter();
  if (nColumns > 0) buildCharts(), buildLayers();
  listenToPointers(), listenToKeys();
  redraw();
  show(ALL);
}

start();
