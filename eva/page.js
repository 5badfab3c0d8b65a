"use strict";

// All numbers of the page. Runs are told by their index in the table of runs, images by their row in their set.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 24; // cards that are shown at a time,
const HARD_PAGE = 12; // of images that nearly every run gets wrong, which have a picture a run
const SIZE = 128; // pixels of a painted picture
const PANELS = 6; // confusion matrices beside each other
const LINES = 24; // runs that are drawn at first
const byId = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;

// A new element with properties and children. Text from users comes in as text nodes only.
function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

function bytes(text) {
  const binary = atob(text);
  const array = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) array[i] = binary.charCodeAt(i);
  return array;
}

// ---- Tables: a click on a title sorts by it, a second click the other way round.

function sortable(table) {
  const titles = [...table.querySelectorAll("thead th")];
  const key = (row, column) => {
    const cell = row.cells[column];
    return "sort" in cell.dataset ? cell.dataset.sort : cell.textContent;
  };
  titles.forEach((title, column) => {
    title.querySelector("button")?.addEventListener("click", () => {
      const falling = title.getAttribute("aria-sort") === "ascending";
      titles.forEach((other) => other.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const order = (a, b) => {
        const [x, y] = [key(a, column), key(b, column)];
        const [m, n] = [x, y].map((text) => (text === "-inf" ? -Infinity : Number(text)));
        return x === "" || y === "" || Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y) : m === n ? 0 : m - n;
      };
      const rows = [...table.tBodies[0].rows].sort(order);
      table.tBodies[0].append(...(falling ? rows.reverse() : rows));
    });
  });
}

document.querySelectorAll("table.sortable").forEach(sortable);

for (const select of document.querySelectorAll(".pairs-with")) {
  const table = select.closest("p").nextElementSibling;
  const choose = () => {
    for (const row of table.querySelectorAll("tbody tr")) {
      row.hidden = select.value !== "" && row.dataset.a !== select.value && row.dataset.b !== select.value;
    }
  };
  select.addEventListener("change", choose);
  choose();
}

// ---- Charts

const coarse = matchMedia("(pointer: coarse)").matches;
const CONFIG = {
  responsive: true,
  displaylogo: false,
  typesetMath: false, // a $ in a name is a $
  showSendToCloud: false,
  plotlyServerURL: "",
  modeBarButtonsToRemove: ["select2d", "lasso2d"],
};

function draw(place, figure) {
  const style = getComputedStyle(document.body);
  figure.layout.font = { color: style.color, family: style.fontFamily, size: 12 };
  figure.layout.dragmode = coarse ? false : "zoom"; // a finger scrolls the page
  // Labels stand on the lines of a chart.
  const surface = style.getPropertyValue("--surface");
  for (const annotation of figure.layout.annotations ?? []) annotation.bgcolor = surface;
  return Plotly.newPlot(place, figure.data, figure.layout, CONFIG);
}

for (const chart of data.charts) draw(chart.id, chart.figure);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  const color = getComputedStyle(document.body).color;
  document.querySelectorAll(".js-plotly-plot").forEach((place) => Plotly.relayout(place, { "font.color": color }));
});

byId("axis").addEventListener("change", (event) => {
  const axis = event.target.value;
  for (const chart of data.charts.filter((one) => one.xs[axis])) {
    Plotly.update(chart.id, { x: chart.xs[axis] }, { "xaxis.title.text": axis, "xaxis.autorange": true });
  }
});

// One legend for all charts.
const visible = data.runs.map((_, run) => run < LINES);
const legend = byId("legend");

function show(runs) {
  runs.forEach((wanted, run) => {
    visible[run] = wanted;
    legend.querySelector(`[data-run="${run}"]`).setAttribute("aria-pressed", wanted);
  });
  for (const chart of data.charts.filter((one) => one.runs.length)) {
    Plotly.restyle(chart.id, { visible: chart.runs.map((run) => visible[run]) });
  }
  byId("num-visible").textContent = `(${visible.filter(Boolean).length} of ${visible.length})`;
}

function makeLegend() {
  const swatches = document.querySelectorAll("#runs tbody .swatch");
  data.runs.forEach((label, run) => {
    const button = element("button", { type: "button", title: label });
    button.append(swatches[run].cloneNode(true), element("span", {}, label));
    button.dataset.run = run;
    button.addEventListener("click", () => show(visible.map((now, other) => (other === run ? !now : now))));
    legend.append(button);
  });
  for (const [text, wanted] of [["all", true], ["none", false]]) {
    const button = element("button", { type: "button" }, text);
    button.addEventListener("click", () => show(visible.map(() => wanted)));
    legend.append(button);
  }
  show(visible);
}

makeLegend();

// ---- Image sets

class ImageSet {
  constructor(raw) {
    const indices = (text) => (raw.wide ? new Uint16Array(bytes(text).buffer) : bytes(text));
    Object.assign(this, { title: raw.title, classes: raw.classes, hard: raw.hard, heatmap: raw.heatmap });
    this.labels = indices(raw.labels);
    this.runs = new Map(
      raw.runs.map((run) => [
        run.run,
        {
          predicted: indices(run.predicted),
          confidence: new Uint16Array(bytes(run.confidence).buffer),
          layer: run.layer,
          maps: run.maps,
        },
      ]),
    );
    this.ids = new Map(raw.rows.map((row, i) => [row, raw.ids[i]]));
    this.pictures = raw.pictures;
    this.place = new Map(raw.pictured.map((row, i) => [row, i]));
  }

  // The raw Grad-CAM map of a run for an image: levels from 0 to 255, of which 255 is `top`; null if there is none.
  map(run, row) {
    const maps = this.runs.get(run).maps;
    if (maps === null || !this.place.has(row)) return null;
    maps.values ??= { levels: bytes(maps.levels), top: new Float32Array(bytes(maps.top).buffer) };
    const { height, width } = maps;
    const at = this.place.get(row);
    const levels = maps.values.levels.subarray(at * height * width, (at + 1) * height * width);
    return { height, width, levels, top: maps.values.top[at] };
  }
}

const sets = data.sets.map((raw) => new ImageSet(raw));
const paired = sets.filter((set) => set.runs.size > 1);

// ---- Pictures, painted as eva.gradcam.overlay has them: the image enlarged bicubically, the map bilinearly.

const COLORS = bytes(data.colors);
const KERNELS = {
  linear: { reach: 1, weight: (x) => Math.max(0, 1 - x) },
  // Keys's kernel with OpenCV's a.
  cubic: {
    reach: 2,
    weight: (x, a = -0.75) =>
      x < 1 ? ((a + 2) * x - (a + 3)) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0,
  },
};

// For each of `size` pixels along one side: the source pixels that it is made of, and their weights.
function taps(from, size, { reach, weight }) {
  const [indices, weights] = [new Int32Array(2 * reach * size), new Float32Array(2 * reach * size)];
  for (let i = 0; i < size; i++) {
    const centre = ((i + 0.5) * from) / size - 0.5;
    for (let k = 0; k < 2 * reach; k++) {
      const index = Math.floor(centre) - reach + 1 + k;
      indices[2 * reach * i + k] = Math.min(from - 1, Math.max(0, index));
      weights[2 * reach * i + k] = weight(Math.abs(centre - index));
    }
  }
  return { indices, weights, count: 2 * reach };
}

// Resizes one side of an array of lines of `from` entries of `channels` values each.
function resizeLines(values, lines, from, to, channels, kernel) {
  const { indices, weights, count } = taps(from, to, kernel);
  const out = new Float32Array(lines * to * channels);
  for (let line = 0; line < lines; line++)
    for (let i = 0; i < to; i++)
      for (let k = 0; k < count; k++) {
        const source = (line * from + indices[count * i + k]) * channels;
        const weight = weights[count * i + k];
        for (let c = 0; c < channels; c++) out[(line * to + i) * channels + c] += weight * values[source + c];
      }
  return out;
}

// Resizes an image, first its columns, which are lines of one entry per row, then its rows.
function resize(values, width, height, channels, toWidth, toHeight, kernel) {
  const tall = resizeLines(values, 1, height, toHeight, width * channels, kernel);
  return resizeLines(tall, toHeight, width, toWidth, channels, kernel);
}

const decoded = new Map();

// The pixels (RGBA) of an image, enlarged. Decoding takes a moment, so this is a promise.
async function enlarged(uri) {
  if (!decoded.has(uri)) {
    const image = new Image();
    image.src = uri;
    await image.decode();
    const [width, height] = [image.naturalWidth, image.naturalHeight];
    const context = element("canvas", { width, height }).getContext("2d");
    context.drawImage(image, 0, 0);
    const scale = SIZE / Math.max(width, height);
    const [toWidth, toHeight] = [Math.round(width * scale), Math.round(height * scale)];
    const pixels = context.getImageData(0, 0, width, height).data;
    if (decoded.size > 200) decoded.clear();
    decoded.set(uri, {
      width: toWidth,
      height: toHeight,
      pixels: resize(pixels, width, height, 4, toWidth, toHeight, KERNELS.cubic),
    });
  }
  return decoded.get(uri);
}

// Paints an image, under its map if there is one; `scale` is the raw value that has the last colour.
async function paint(canvas, uri, map, scale) {
  const { width, height, pixels } = await enlarged(uri);
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const painted = context.createImageData(width, height);
  painted.data.set(pixels.map(Math.round));
  if (map !== null) {
    const levels = resize(map.levels, map.width, map.height, 1, width, height, KERNELS.linear);
    const factor = scale > 0 ? map.top / scale : 0;
    levels.forEach((level, i) => {
      const color = Math.min(255, Math.max(0, Math.round(level * factor)));
      for (let c = 0; c < 3; c++) {
        const under = painted.data[4 * i + c];
        painted.data[4 * i + c] = Math.round((1 - data.opacity) * under + data.opacity * COLORS[3 * color + c]);
      }
    });
  }
  context.putImageData(painted, 0, 0);
  canvas.dataset.painted = "yes";
}

// Pictures are painted when they are about to be seen.
const waiting = new WeakMap();
const observer = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      observer.unobserve(target);
      waiting.get(target)();
    }
  },
  { rootMargin: "600px" },
);

function whenNear(canvas, work) {
  waiting.set(canvas, work);
  observer.observe(canvas);
}

// One picture with what stands below it: the image itself (`run` null) or what a run says about it.
function view(set, row, run, name, scale) {
  const place = set.place.get(row);
  const label = set.classes[set.labels[row]];
  const caption = element("figcaption");
  let described = `Image of ${label}`;
  let map = null;
  if (run === null) {
    caption.append(element("span", { className: "muted" }, name));
  } else {
    const said = set.runs.get(run);
    const right = said.predicted[row] === set.labels[row];
    const answer = `${right ? "✓" : "✗"} ${set.classes[said.predicted[row]]}`;
    const confidence = percent(said.confidence[row] / 65535);
    caption.append(element("span", { className: "muted", title: data.runs[run] }, `${name} `));
    caption.append(element("span", { className: right ? "right" : "wrong" }, answer), ` ${confidence}`);
    map = set.map(run, row);
    if (map === null && place !== undefined) caption.append(element("span", { className: "muted" }, ", no Grad-CAM"));
    described = `${data.runs[run]}: ${answer}, ${confidence}` + (map === null ? "" : `, Grad-CAM of ${said.layer}`);
  }
  if (place === undefined) {
    return element("figure", { className: "view" }, element("div", { className: "nothing" }, "no picture"), caption);
  }
  const canvas = element("canvas", { width: SIZE, height: SIZE });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", described);
  whenNear(canvas, () => paint(canvas, set.pictures[place], map, scale ?? (map === null ? 0 : map.top)));
  return element("figure", { className: "view" }, canvas, caption);
}

// The largest raw value of some runs' maps of an image.
function sharedScale(set, row, runs) {
  return Math.max(0, ...runs.map((run) => set.map(run, row)?.top ?? 0));
}

function card(set, row, views, ...more) {
  const title = element("h3", {}, element("span", {}, set.classes[set.labels[row]], ...more));
  title.append(element("small", {}, set.ids.get(row)));
  const made = element("article", { className: "card" }, title, element("div", { className: "views" }, ...views));
  made.dataset.row = row;
  return made;
}

// Shows a list of rows, a page of cards at a time.
function pager(cards, more, shown, size, make) {
  let rows = [];
  const add = () => {
    const from = cards.childElementCount;
    cards.append(...rows.slice(from, from + size).map(make));
    more.hidden = cards.childElementCount >= rows.length;
    shown.textContent = rows.length ? `${cards.childElementCount} of ${rows.length}` : "None.";
  };
  more.addEventListener("click", add);
  return (wanted) => {
    rows = wanted;
    cards.replaceChildren();
    add();
  };
}

for (const canvas of document.querySelectorAll("canvas.scale")) {
  const context = canvas.getContext("2d");
  for (let i = 0; i < 256; i++) {
    context.fillStyle = `rgb(${COLORS[3 * i]}, ${COLORS[3 * i + 1]}, ${COLORS[3 * i + 2]})`;
    context.fillRect(i, 0, 1, canvas.height);
  }
}

function options(select, entries, chosen) {
  select.replaceChildren(
    ...entries.map(([value, text]) => element("option", { value, selected: value === chosen }, text)),
  );
}

// ---- Error diff

function errorDiff() {
  const [selectA, selectB, selectClass] = ["run-a", "run-b", "class"].map(byId);
  const ownScale = byId("own-scale");
  let set = paired[0];
  let [a, b] = data.first;

  const show = pager(byId("diff-cards"), byId("diff-more"), byId("diff-shown"), PAGE, (row) => {
    const scale = ownScale.checked ? undefined : sharedScale(set, row, [a, b]);
    return card(set, row, [
      view(set, row, null, "image"),
      view(set, row, a, "A", scale),
      view(set, row, b, "B", scale),
    ]);
  });

  function runsOf(which) {
    return [...which.runs.keys()].map((run) => [run, `#${run + 1} ${data.runs[run]}`]);
  }

  // Rows by what became of them, those of the chosen class only, the surest mistakes first.
  function rowsByKind() {
    const [runA, runB] = [set.runs.get(a), set.runs.get(b)];
    const kinds = { fixed: [], broken: [], both: [], same: [] };
    const wanted = selectClass.value === "" ? null : Number(selectClass.value);
    for (const row of set.ids.keys()) {
      const label = set.labels[row];
      if (wanted !== null && label !== wanted) continue;
      const [wrongA, wrongB] = [runA.predicted[row] !== label, runB.predicted[row] !== label];
      if (wrongA && !wrongB) kinds.fixed.push(row);
      if (!wrongA && wrongB) kinds.broken.push(row);
      if (wrongA && wrongB) {
        kinds.both.push(row);
        if (runA.predicted[row] === runB.predicted[row]) kinds.same.push(row);
      }
    }
    const sure = (row) =>
      Math.max(
        runA.predicted[row] === set.labels[row] ? 0 : runA.confidence[row],
        runB.predicted[row] === set.labels[row] ? 0 : runB.confidence[row],
      );
    const pictured = (row) => (set.place.has(row) ? 1 : 0);
    for (const rows of Object.values(kinds)) {
      rows.sort((x, y) => pictured(y) - pictured(x) || sure(y) - sure(x) || x - y);
    }
    return kinds;
  }

  function update() {
    const kinds = rowsByKind();
    for (const [kind, rows] of Object.entries(kinds)) byId(`num-${kind}`).textContent = rows.length;
    const kind = document.querySelector("#filter input:checked").value;
    const words = {
      fixed: "A is wrong and B is right.",
      broken: "A is right and B is wrong.",
      both: "A and B are wrong.",
      same: "A and B are wrong, with the same answer.",
    };
    byId("diff-words").textContent = `${words[kind]} The surest mistakes come first.`;
    byId("scale-words").textContent = ownScale.checked
      ? "from 0 to the maximum of each map alone"
      : "from 0 to the maximum of both runs' raw maps of the image: equal colours are equal values";
    show(kinds[kind]);
  }

  function choose() {
    set = paired.find((one) => one.runs.has(a));
    if (!set.runs.has(b) || b === a) b = [...set.runs.keys()].find((run) => run !== a);
    options(selectA, paired.flatMap(runsOf), a);
    options(selectB, runsOf(set).filter(([run]) => run !== a), b);
    const classes = set.classes.map((name, index) => [String(index), name]);
    options(selectClass, [["", "all classes"], ...classes], selectClass.value);
    update();
  }

  selectA.addEventListener("change", () => {
    const before = a;
    a = Number(selectA.value);
    if (a === b) b = before;
    choose();
  });
  selectB.addEventListener("change", () => {
    b = Number(selectB.value);
    choose();
  });
  byId("swap").addEventListener("click", () => {
    [a, b] = [b, a];
    choose();
  });
  for (const id of ["class", "filter", "own-scale"]) byId(id).addEventListener("change", update);
  choose();
}

if (paired.length) errorDiff();

// ---- Images that nearly every run gets wrong

function hardImages() {
  const known = sets.filter((set) => set.hard.length > 0);
  const suspects = byId("suspects");
  const select = byId("hard-set");
  let set = known[0];
  options(select, known.map((one, i) => [String(i), one.title]), "0");
  byId("hard-set-field").hidden = known.length === 1;

  const [cards, more, shown] = ["hard-cards", "hard-more", "hard-shown"].map(byId);
  const show = pager(cards, more, shown, HARD_PAGE, ([row, numWrong, loss, consensus, suspect]) => {
    const runs = [...set.runs.keys()];
    const scale = sharedScale(set, row, runs);
    const views = runs.map((run) => view(set, row, run, `#${run + 1}`, scale));
    const badge = suspect
      ? element("span", { className: "badge" }, `perhaps ${set.classes[consensus]}: is the label right?`)
      : null;
    const agreed = consensus === null || suspect ? "" : `, agreed on ${set.classes[consensus]}`;
    const words = `wrong in ${numWrong} of ${runs.length} runs${agreed}, mean loss ${loss}`;
    const parts = [" ", badge, " ", element("small", {}, words)].filter((part) => part !== null);
    return card(set, row, [view(set, row, null, "image"), ...views], ...parts);
  });

  const update = () => {
    set = known[Number(select.value)];
    cards.style.setProperty("--least", `${6.7 * (set.runs.size + 1) + 1.5}rem`);
    show(suspects.checked ? set.hard.filter(([, , , , suspect]) => suspect) : set.hard);
  };
  suspects.addEventListener("change", update);
  select.addEventListener("change", update);
  update();
}

if (sets.some((set) => set.hard.length)) hardImages();

// ---- Confusion matrices

function confusionMatrices() {
  const runs = sets.flatMap((set) => [...set.runs.keys()].map((run) => [run, set])).sort((x, y) => x[0] - y[0]);

  function fill(place, run) {
    const set = runs.find(([other]) => other === run)[1];
    const size = set.classes.length;
    const counts = Array.from({ length: size }, () => new Array(size).fill(0));
    const { predicted } = set.runs.get(run);
    set.labels.forEach((label, row) => counts[label][predicted[row]]++);
    const figure = structuredClone(set.heatmap);
    figure.data[0].text = counts;
    figure.data[0].z = counts.map((row) => {
      const total = row.reduce((sum, count) => sum + count, 0);
      return row.map((count) => (total ? count / total : 0));
    });
    draw(place, figure);
  }

  runs.slice(0, PANELS).forEach(([first], panel) => {
    const select = element("select");
    select.setAttribute("aria-label", `Run of confusion matrix ${panel + 1}`);
    options(select, runs.map(([run]) => [run, `#${run + 1} ${data.runs[run]}`]), first);
    const place = element("div", { className: "chart" });
    byId("matrices").append(element("div", { className: "matrix" }, select, place));
    select.addEventListener("change", () => fill(place, Number(select.value)));
    fill(place, first);
  });
}

confusionMatrices();
document.documentElement.dataset.ready = "yes";
