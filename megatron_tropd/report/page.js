"use strict";
// Draws the report from the JSON in #data. Text of the run is only ever set as textContent.

const DATA = JSON.parse(document.getElementById("data").textContent);
const COLUMNS = DATA.columns;
const STEPS = COLUMNS.step || [];
const SVG = "http://www.w3.org/2000/svg";
const crosshairs = [];  // one function a chart: show the line at a step, or hide it

// ---------------------------------------------------------------- small helpers

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function svg(tag, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const has = (name) => (COLUMNS[name] || []).some(isNumber);
const column = (name) => COLUMNS[name] || [];
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const mean = (values) => {
  const numbers = values.filter(isNumber);
  return numbers.length ? numbers.reduce((a, b) => a + b, 0) / numbers.length : null;
};
const median = (values) => values.filter(isNumber).sort((a, b) => a - b).at(Math.floor(values.filter(isNumber).length / 2)) ?? null;
// Thinned columns hold means: weigh each with the steps it stands for.
const totalOf = (name) => column(name).reduce((sum, value, i) => sum + (isNumber(value) ? value * (STEPS[i] - (i ? STEPS[i - 1] : 0)) : 0), 0);
// Mean over a tenth of the run at one of its ends: single steps are noisy.
const endMean = (name, end) => {
  const values = column(name), width = Math.max(1, Math.round(values.length / 10));
  return mean(end === "first" ? values.slice(0, width) : values.slice(-width));
};

const percent = (value, digits = 1) => isNumber(value) ? `${(100 * value).toFixed(digits)} %` : "–";
function short(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return `${(value / 1e9).toPrecision(3)} G`;
  if (size >= 1e6) return `${(value / 1e6).toPrecision(3)} M`;
  if (size >= 1e4) return `${(value / 1e3).toPrecision(3)} k`;
  if (size >= 100 || Number.isInteger(value)) return value.toFixed(0);
  if (size >= 1) return value.toFixed(2);
  if (size >= 0.001) return value.toFixed(3);
  return size === 0 ? "0" : value.toExponential(1);
}
function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 0.0995) return `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${seconds.toFixed(seconds < 1 ? 2 : seconds < 10 ? 1 : 0)} s`;
  const hours = Math.floor(whole / 3600), minutes = Math.floor(whole % 3600 / 60);
  return hours ? `${hours} h ${minutes} min` : `${minutes} min ${whole % 60} s`;
}

// Draw when the page is there and whenever the width changes, not when drawing changes the height.
const firstDraws = [];
function onWidth(holder, draw) {
  let drawn = 0;
  const check = () => {
    if (holder.clientWidth && holder.clientWidth !== drawn) { drawn = holder.clientWidth; draw(drawn); }
  };
  firstDraws.push(check);
  new ResizeObserver(() => requestAnimationFrame(check)).observe(holder);
}

// ---------------------------------------------------------------- tooltip

const tip = el("div", { class: "tip", hidden: "" });
document.body.append(tip);

function showTip(event, title, rows) {
  const table = el("table");
  for (const [color, name, value] of rows) {
    const first = el("td");
    if (color) first.append(el("i", { style: `background:${color}` }));
    first.append(name);
    table.append(el("tr", {}, first, el("td", {}, value)));
  }
  tip.replaceChildren(el("div", { class: "title" }, title), table);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 16 + box.width > innerWidth ? event.clientX - box.width - 16 : event.clientX + 16;
  tip.style.left = `${clamp(left, 6, innerWidth - box.width - 6)}px`;
  tip.style.top = `${clamp(event.clientY - box.height / 2, 6, innerHeight - box.height - 6)}px`;
}
function hideTip() { tip.hidden = true; }
addEventListener("scroll", hideTip, { passive: true });

// ---------------------------------------------------------------- scales

function niceTicks(low, high, count) {
  const span = high - low || 1, power = 10 ** Math.floor(Math.log10(span / count));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => span / s <= count);
  const ticks = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-6; t += step) ticks.push(Math.abs(t) < step / 1e6 ? 0 : t);
  return ticks;
}
const tickText = (t) => t !== 0 && (Math.abs(t) < 1e-3 || Math.abs(t) >= 1e4) ? short(t) : String(Number(t.toPrecision(6)));
function logTicks(low, high) {
  const ticks = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) ticks.push(10 ** e);
  return ticks.filter((t) => t >= low * 0.999 && t <= high * 1.001);
}

function yScale(spec, values, top, bottom) {
  let low = Math.min(...values), high = Math.max(...values);
  if (spec.log) {
    low = 10 ** Math.floor(Math.log10(low)); high = 10 ** Math.ceil(Math.log10(high));
    if (low === high) high *= 10;
    const place = (v) => bottom - (Math.log10(v) - Math.log10(low)) / (Math.log10(high) - Math.log10(low)) * (bottom - top);
    return { place, ticks: logTicks(low, high) };
  }
  if (spec.zero) low = Math.min(0, low);
  if (spec.unit) { low = 0; high = 1; }
  if (low === high) high = low + (Math.abs(low) || 1);
  const ticks = niceTicks(low, high, 4), step = ticks.length > 1 ? ticks[1] - ticks[0] : high - low;
  const bottomValue = spec.unit ? 0 : Math.floor(low / step + 1e-9) * step;
  const topValue = spec.unit ? 1 : Math.ceil(high / step - 1e-9) * step;
  const place = (v) => bottom - (v - bottomValue) / (topValue - bottomValue) * (bottom - top);
  return { place, ticks: niceTicks(bottomValue, topValue, 5) };
}

// ---------------------------------------------------------------- line and area charts

// Centred means, so that a bold line does not lag behind its steps.
function smooth(values) {
  const reach = Math.max(1, Math.round(values.length / 50));
  return values.map((value, i) => isNumber(value) ? mean(values.slice(Math.max(0, i - reach), i + reach + 1)) : null);
}

function path(xs, ys, placeX, placeY, good = isNumber) {
  let text = "", pen = false;
  ys.forEach((y, i) => {
    if (!good(y)) { pen = false; return; }
    text += `${pen ? "L" : "M"}${placeX(xs[i]).toFixed(1)},${placeY(y).toFixed(1)}`;
    pen = true;
  });
  return text;
}

// series: {name, color, x, y, low, high, dash, raw (draw the noise behind), points, fill}
function chart(spec) {
  const good = spec.log ? (v) => isNumber(v) && v > 0 : isNumber;
  const series = spec.series.filter((s) => s.y.some(good));
  const box = el("div", { class: `card chart ${spec.wide ? "wide" : ""}` });
  box.append(el("h3", {}, spec.title), el("div", { class: "note" }, spec.note || ""));
  if (!series.length) { box.append(el("p", { class: "empty" }, "Nothing recorded.")); return box; }
  const format = spec.format || short;
  box.append(legend(series, format, good));
  const holder = el("div", { class: "draw" });
  box.append(holder);
  const height = spec.height || 190;
  onWidth(holder, (width) => drawChart(holder, spec, series, height, good, format, width));
  return box;
}

function legend(series, format, good) {
  const node = el("div", { class: "legend" });
  for (const s of series) {
    const last = s.y.filter(good).at(-1);
    const mark = el("i", { style: `color:${s.color}${s.dash ? ";opacity:.75" : ""}`, class: s.fill ? "block" : "" });
    node.append(el("span", {}, mark, `${s.name} `, el("b", {}, format(last))));
  }
  return node;
}

function drawChart(holder, spec, series, height, good, format, width) {
  const left = 44, right = 10, top = 8, bottom = height - 22;
  const last = Math.max(...series.flatMap((s) => s.x), 1), first = 0;
  const placeX = (x) => left + (x - first) / (last - first) * (width - left - right);
  const values = series.flatMap((s) => [...s.y, ...(s.low || []), ...(s.high || [])]).filter(good);
  const { place: placeY, ticks } = yScale(spec, values, top, bottom);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": spec.title });
  for (const t of ticks) {
    root.append(svg("line", { class: "gridline", x1: left, x2: width - right, y1: placeY(t), y2: placeY(t) }));
    root.append(svg("text", { x: left - 8, y: placeY(t) + 4, "text-anchor": "end" }, (spec.tick || tickText)(t)));
  }
  stepAxis(root, first, last, placeX, width, bottom);
  for (const s of series) drawSeries(root, s, placeX, placeY, bottom, good);
  root.append(crosshair(holder, root, spec, series, { first, last, placeX, placeY, top, bottom, left, right, width, good, format }));
  holder.replaceChildren(root);
}

function stepAxis(root, first, last, placeX, width, bottom) {
  root.append(svg("line", { class: "axis", x1: placeX(first), x2: placeX(last), y1: bottom, y2: bottom }));
  const count = width < 420 ? 4 : 6;
  for (const t of niceTicks(first, last, count).filter(Number.isInteger)) {
    const anchor = t >= last - (last - first) / 50 ? "end" : "middle";
    root.append(svg("text", { x: placeX(t), y: bottom + 16, "text-anchor": anchor }, tickText(t)));
  }
}

function drawSeries(root, s, placeX, placeY, bottom, good) {
  if (s.low && s.high) {
    const up = s.x.map((x, i) => [x, s.high[i]]), down = s.x.map((x, i) => [x, s.low[i]]).reverse();
    const ring = [...up, ...down].filter(([, y]) => good(y)).map(([x, y]) => `${placeX(x).toFixed(1)},${placeY(y).toFixed(1)}`);
    root.append(svg("polygon", { points: ring.join(" "), style: `fill:${s.color}`, opacity: .14 }));
  }
  if (s.fill) {
    const line = path(s.x, s.y, placeX, placeY, good), xs = s.x.filter((_, i) => good(s.y[i]));
    root.append(svg("path", { d: `${line}L${placeX(xs.at(-1))},${bottom}L${placeX(xs[0])},${bottom}Z`, style: `fill:${s.color}`, opacity: .16 }));
  }
  const stroke = (d, more) => svg("path", { d, fill: "none", "stroke-linejoin": "round", "stroke-linecap": "round", style: `stroke:${s.color}`, ...more });
  const noisy = s.raw && s.y.length > 20;
  if (noisy) root.append(stroke(path(s.x, s.y, placeX, placeY, good), { "stroke-width": 1, opacity: .28 }));
  const drawn = noisy ? smooth(s.y) : s.y;
  root.append(stroke(path(s.x, drawn, placeX, placeY, good), { "stroke-width": s.dash ? 1.6 : 2.1, ...(s.dash ? { "stroke-dasharray": "5 4", opacity: .85 } : {}) }));
  if (s.points || s.y.filter(good).length === 1) s.x.forEach((x, i) => good(s.y[i]) && root.append(svg("circle", { cx: placeX(x), cy: placeY(s.y[i]), r: 3.2, style: `fill:${s.color};stroke:var(--card)`, "stroke-width": 1.5 })));
}

function nearest(xs, x) {
  let best = 0;
  xs.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(xs[best] - x)) best = i; });
  return best;
}

// The hovered step is marked in every chart: the same moment, seen from all sides.
function crosshair(holder, root, spec, series, g) {
  const group = svg("g");
  const line = svg("line", { class: "cross", y1: g.top, y2: g.bottom, visibility: "hidden" });
  const area = svg("rect", { x: g.left, y: g.top, width: Math.max(1, g.width - g.left - g.right), height: g.bottom - g.top, fill: "transparent" });
  group.append(line, area);
  const show = (step) => {
    const on = step !== null && step >= g.first && step <= g.last;
    line.setAttribute("visibility", on ? "visible" : "hidden");
    if (on) { line.setAttribute("x1", g.placeX(step)); line.setAttribute("x2", g.placeX(step)); }
  };
  holder.crosshair = show;
  if (!crosshairs.includes(holder)) crosshairs.push(holder);
  area.addEventListener("pointermove", (event) => {
    const x = g.first + (event.clientX - root.getBoundingClientRect().left - g.left) / (g.width - g.left - g.right) * (g.last - g.first);
    const grid = series.reduce((a, b) => (b.x.length > a.x.length ? b : a)).x;
    const step = grid[nearest(grid, x)];
    crosshairs.forEach((h) => h.crosshair(step));
    showTip(event, `step ${step}`, series.map((s) => [s.color, s.name, g.format((s.tip || s.y)[nearest(s.x, step)])]));
  });
  area.addEventListener("pointerleave", () => { crosshairs.forEach((h) => h.crosshair(null)); hideTip(); });
  return group;
}

const curve = (name, label, color, more = {}) => ({ name: label, color: `var(--${color})`, x: STEPS, y: column(name), raw: true, ...more });

// ---------------------------------------------------------------- head and result

const folderName = (path) => String(path || "?").replace(/\/+$/, "").split("/").slice(-1)[0];

function head() {
  const model = DATA.config.model || {}, parallel = DATA.config.parallel || {};
  const button = el("button", { class: "theme", type: "button" });
  const apply = (theme) => {
    document.documentElement.dataset.theme = theme;
    button.textContent = theme === "dark" ? "☀ Light" : "☾ Dark";
  };
  const wanted = location.hash.slice(1);
  apply(["dark", "light"].includes(wanted) ? wanted : matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  button.addEventListener("click", () => apply(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  document.title = `${DATA.name} · megatron_tropd`;
  const pair = el("p", { class: "pair" }, "Student ", el("b", {}, folderName(model.student)), " learns from teacher ", el("b", {}, folderName(model.teacher)), " on its own samples");
  const steps = (DATA.config.train || {}).steps, done = STEPS.at(-1) || 0;
  const chips = [
    `TP ${parallel.tensor ?? 1} · PP ${parallel.pipeline ?? 1} · DP ${parallel.data ?? 1}${parallel.sequence_parallel ? " · SP" : ""}`,
    (DATA.config.model || {}).dtype && `dtype ${DATA.config.model.dtype}`,
    `lr ${(DATA.config.train || {}).lr ?? "?"}`, `seed ${(DATA.config.train || {}).seed ?? "?"}`,
    Object.keys(DATA.summary).length ? null : `unfinished: step ${done} of ${steps}`,
  ].filter(Boolean);
  return [
    el("div", { class: "head" }, el("div", {}, el("h1", {}, DATA.name), pair), button),
    el("div", { class: "chips" }, el("span", { class: "chip main" }, DATA.method), ...chips.map((text) => el("span", { class: "chip" }, text))),
  ];
}

// Sets of held-out problems, by name; the only one of a run has none.
const SETS = [...new Set(DATA.evaluations.map((e) => e.set || ""))];
const inSet = (name) => name ? ` of ${name}` : "";

function measured(key, set) {
  const of = (model) => DATA.evaluations.filter((e) => e.model === model && (e.set || "") === set && isNumber(e[key])).sort((a, b) => a.step - b.step);
  const student = of("student");
  return { student, teacher: of("teacher").at(-1), before: student[0], after: student.at(-1) };
}

function result() {
  const box = el("div", { class: "card" });
  for (const set of SETS) {
    const accuracy = measured("accuracy", set), kl = measured("reverse_kl", set);
    if (accuracy.student.length) box.append(...accuracyResult(accuracy, set));
    else if (kl.student.length) box.append(...klResult(kl.before.reverse_kl, kl.after.reverse_kl, `Held-out reverse KL to the teacher${inSet(set)}, nats a token`));
  }
  if (!box.childElementCount) box.append(...klResult(endMean("reverse_kl", "first"), endMean("reverse_kl", "last"), "Reverse KL on training samples, nats a token"));
  return el("div", { class: "hero" }, box, tiles());
}

// How answers of an evaluation were sampled.
function sampled({ settings }) {
  const { samples = 1, temperature = 0 } = settings || {};
  return temperature ? `${samples > 1 ? `mean of ${samples} samples` : "sampled"} at temperature ${temperature}` : "greedy";
}

function accuracyResult({ before, after, teacher }, set) {
  const gain = 100 * (after.accuracy - before.accuracy);
  const head = el("div", { class: "result" },
    el("span", { class: "from" }, percent(before.accuracy)), el("span", { class: "arrow" }, "→"), el("span", { class: "to" }, percent(after.accuracy)),
    el("span", { class: gain < 0 ? "gain worse" : "gain" }, `${gain < 0 ? "−" : "+"}${Math.abs(gain).toFixed(1)} points`));
  const closed = isNumber(DATA.gap_closed) ? `, ${percent(DATA.gap_closed, 0)} of the gap to the teacher closed` : "";
  const unjudged = after.unjudged ? `, ${after.unjudged} answers could not be judged and count as wrong` : "";
  const holder = el("div");
  onWidth(holder, (width) => drawBullet(holder, before, after, teacher, width));
  return [
    el("div", { class: "label" }, `Exact match on ${isNumber(after.total) ? after.total / ((after.settings || {}).samples ?? 1) : "the"} held-out problems${inSet(set)}, ${sampled(after)}${closed}${unjudged}`),
    head, holder,
  ];
}

function drawBullet(holder, before, after, teacher, width) {
  const y = 34, x = (share) => 2 + share * (width - 4);
  const root = svg("svg", { viewBox: `0 0 ${width} 70`, height: 70, role: "img", "aria-label": "student before, student after, teacher" });
  const bar = (from, to, color, opacity) => svg("rect", { x: x(from), y, width: Math.max(0, x(to) - x(from)), height: 12, rx: 6, style: `fill:${color}`, opacity });
  root.append(bar(0, 1, "var(--grid)", 1), bar(0, after.accuracy, "var(--trusted)", .38), bar(0, Math.min(before.accuracy, after.accuracy), "var(--gray)", .75));
  if (isNumber(after.ci_low)) root.append(svg("line", { x1: x(after.ci_low), x2: x(after.ci_high), y1: y + 6, y2: y + 6, style: "stroke:var(--trusted)", "stroke-width": 2 }));
  const close = Math.abs(x(after.accuracy) - x(before.accuracy)) < 125, low = Math.min(before.accuracy, after.accuracy);
  const mark = (share, label, color, above) => {
    const anchor = close && !above ? (share === low ? "end" : "start") : share > .8 ? "end" : share < .1 ? "start" : "middle";
    root.append(svg("line", { x1: x(share), x2: x(share), y1: y - 5, y2: y + 17, style: `stroke:${color}`, "stroke-width": 2.5, "stroke-linecap": "round" }));
    root.append(svg("text", { x: x(share), y: above ? y - 12 : y + 31, "text-anchor": anchor, style: `fill:${color};font-weight:600;font-size:12px` }, label));
  };
  mark(before.accuracy, `before ${percent(before.accuracy)}`, "var(--gray)", false);
  mark(after.accuracy, `after ${percent(after.accuracy)}`, "var(--trusted)", false);
  if (teacher) mark(teacher.accuracy, `teacher ${percent(teacher.accuracy)}`, "var(--teacher)", true);
  holder.replaceChildren(root);
}

function klResult(before, after, label) {
  const share = isNumber(before) && before > 0 ? `${Math.abs(100 * (1 - after / before)).toFixed(0)} % ${after <= before ? "lower" : "higher"}` : "";
  return [
    el("div", { class: "label" }, label),
    el("div", { class: "result" }, el("span", { class: "from" }, short(before)), el("span", { class: "arrow" }, "→"), el("span", { class: "to" }, short(after)),
      el("span", { class: after <= before ? "gain" : "gain worse" }, share)),
  ];
}

function tiles() {
  const box = el("div", { class: "tiles" });
  const tile = (label, value, unit = "") => value !== "–" && box.append(el("div", { class: "tile" }, el("div", { class: "label" }, label), el("div", { class: "value" }, value, el("small", {}, unit && ` ${unit}`))));
  const change = (name, format) => has(name) ? `${format(endMean(name, "first"))} → ${format(endMean(name, "last"))}` : "–";
  tile("Steps", STEPS.length ? String(STEPS.at(-1)) : "–");
  tile("Time", duration(DATA.summary.seconds ?? (has("seconds_total") ? totalOf("seconds_total") : null)));
  tile("Reverse KL, nats", change("reverse_kl", (v) => v.toFixed(2)));
  tile("Outliers, %", change("outlier_share", (v) => (100 * v).toFixed(v < .1 ? 1 : 0)));
  tile("Throughput", has("tokens_per_second") ? short(median(column("tokens_per_second"))) : "–", "tokens/s");
  tile("Peak memory", has("peak_memory_gib") ? Math.max(...column("peak_memory_gib").filter(isNumber)).toFixed(1) : "–", "GiB");
  return box;
}

// ---------------------------------------------------------------- learning

function evaluationChart(set) {
  const accuracy = measured("accuracy", set), kl = measured("reverse_kl", set);
  const key = accuracy.student.length ? "accuracy" : "reverse_kl";
  const { student, teacher } = key === "accuracy" ? accuracy : kl;
  if (!student.length) return null;
  const x = student.map((e) => e.step), color = "var(--trusted)";
  const series = [{ name: "student", color, x, y: student.map((e) => e[key]), low: student.map((e) => e.ci_low), high: student.map((e) => e.ci_high), points: true }];
  if (key === "reverse_kl") { delete series[0].low; delete series[0].high; }
  if (teacher && key === "accuracy") series.push({ name: "teacher", color: "var(--teacher)", x: [0, Math.max(...x, STEPS.at(-1) || 0)], y: [teacher.accuracy, teacher.accuracy], dash: true });
  return key === "accuracy"
    ? chart({ title: `Held-out accuracy${inSet(set)}`, note: `Exact match, ${sampled(student.at(-1))}; band: 95 % confidence interval`, series, unit: true, format: percent, tick: (v) => percent(v, 0) })
    : chart({ title: `Held-out reverse KL${inSet(set)}`, note: "Exact over the vocabulary, nats a token", series, zero: true });
}

// With several teachers or tasks: one that starves shows.
const GROUP_COLORS = ["trusted", "teacher", "outlier", "violet", "gray"];
function groupCurves(kind) {
  const pattern = new RegExp(`^${kind}/(.+)/token_share$`);
  const names = Object.keys(COLUMNS).map((name) => (name.match(pattern) || [])[1]).filter(Boolean);
  return names.length ? (key) => names.map((name, i) => curve(`${kind}/${name}/${key}`, name, GROUP_COLORS[i % GROUP_COLORS.length])) : null;
}
function ofTasks() {
  const of = groupCurves("task");
  return of ? [
    chart({ title: "Tokens of each task", note: "Share of the loss tokens", zero: true, format: percent, tick: (v) => percent(v, 0), series: of("token_share") }),
    chart({ title: "Divergence on each task", note: "K1 estimate on its student tokens, nats a token", series: of("k1") }),
    chart({ title: "Response length of each task", note: "Mean tokens", zero: true, series: of("response_length") }),
    chart({ title: "Cut off, by task", note: "Responses that reach the task's limit", zero: true, format: percent, tick: (v) => percent(v, 0), series: of("truncated_share") }),
  ] : [];
}
function ofTeachers() {
  const of = groupCurves("teacher");
  return of ? [
    chart({ title: "Tokens of each teacher", note: "Share of the loss tokens", zero: true, format: percent, tick: (v) => percent(v, 0), series: of("token_share") }),
    chart({ title: "Divergence from each teacher", note: "K1 estimate on its student tokens, nats a token", series: of("k1") }),
  ] : [];
}

function learning() {
  const charts = [
    ...SETS.map(evaluationChart),
    chart({ title: "Divergence from the teacher", note: "On student tokens, nats a token", zero: true, series: [
      curve("reverse_kl", "reverse KL", "trusted"), curve("forward_kl", "forward KL", "teacher"), curve("k1", "K1 estimate", "gray", { dash: true, raw: false, y: smooth(column("k1")) })] }),
    chart({ title: "Outlier share against total variation", note: "The drawn share must follow its expectation, TV", zero: true, format: percent, tick: (v) => percent(v, 0), series: [
      curve("outlier_share", "outliers drawn", "outlier"), curve("tv", "TV", "trusted", { raw: false, dash: true })] }),
    chart({ title: "Teacher prefix", note: "Longest of the step, and mean response, in tokens", zero: true, series: [
      curve("prefix_longest", "longest prefix", "teacher", { raw: false, fill: true }), curve("response_length", "response length", "gray")] }),
    chart({ title: "Gradient norm", note: "Before clipping", log: true, series: [curve("grad_norm", "norm", "violet")] }),
    chart({ title: "Entropy", note: "On student tokens, nats a token", zero: true, series: [curve("student_entropy", "student", "trusted"), curve("teacher_entropy", "teacher", "teacher")] }),
    chart({ title: "Endings and repetition", note: "Responses cut off at the limit; 4-grams that stood before", zero: true, format: percent, tick: (v) => percent(v, 0), series: [curve("truncated_share", "cut off", "outlier"), curve("repetition_share", "repeated", "violet")] }),
    chart({ title: "Engine against trainer", note: "Difference of log-probabilities of the same tokens, nats", log: true, series: [curve("engine_gap_mean", "mean", "trusted"), curve("engine_gap_max", "largest", "outlier")] }),
    chart({ title: "Mass of the teacher's top-k", note: "Probability on the teacher's k likeliest tokens", format: (v) => isNumber(v) ? v.toFixed(3) : "–", series: [curve("topk_mass_teacher", "teacher", "teacher", { raw: false }), curve("topk_mass_student", "student", "trusted", { raw: false })] }),
    ...ofTasks(),
    ...ofTeachers(),
  ].filter(Boolean);
  return section("Learning", "Bold lines are running means of the faint ones. Hover to read one step in every chart.", el("div", { class: "grid" }, ...charts));
}

function section(title, lead, ...content) {
  return el("section", { class: "section" }, el("h2", {}, title), el("p", { class: "lead" }, lead), ...content);
}

// ---------------------------------------------------------------- trust region

const RAMP = [[214, 76, 10], [244, 178, 92], [247, 233, 190], [120, 196, 178], [11, 112, 108]];
function rampColor(share) {
  const at = clamp(share, 0, 1) * (RAMP.length - 1), i = Math.min(Math.floor(at), RAMP.length - 2), t = at - i;
  return `rgb(${RAMP[i].map((c, j) => Math.round(c + (RAMP[i + 1][j] - c) * t)).join(",")})`;
}

function trustRegion() {
  const rows = column("acceptance_by_position");
  if (!rows.length || !DATA.buckets.length) return null;
  const known = rows.flat().filter(isNumber);
  if (!known.length) return null;
  const low = Math.min(.9, Math.floor(10 * Math.min(...known)) / 10);
  const holder = el("div");
  onWidth(holder, (width) => drawHeat(holder, rows, low, width));
  const bar = el("span", { class: "bar", style: `background:linear-gradient(90deg,${RAMP.map((c) => `rgb(${c.join(",")})`).join(",")})` });
  const map = el("div", { class: "card chart" }, el("h3", {}, "Acceptance over training, by position"),
    el("div", { class: "note" }, "Rows: token position in the response. Columns: training steps."), holder,
    el("div", { class: "ramp" }, `${percent(low, 0)} trusted`, bar, "100 %"));
  return section("The trust region", "A student token is trusted with probability min(p/q, 1). Late positions stand on everything the student wrote before them, its mistakes included.",
    el("div", { class: "grid two" }, map, profileCard(rows)));
}

function drawHeat(holder, rows, low, width) {
  const count = DATA.buckets.length;
  const left = 66, right = 6, cell = clamp(220 / count, 18, 32), height = count * cell + 28;
  const bins = Math.min(rows.length, Math.floor((width - left - right) / 4)), step = rows.length / bins;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "acceptance by position and step" });
  const w = (width - left - right) / bins;
  for (let b = 0; b < bins; b++) {
    const from = Math.floor(b * step), to = Math.max(from + 1, Math.floor((b + 1) * step));
    for (let p = 0; p < count; p++) {
      const value = mean(rows.slice(from, to).map((row) => (row || [])[p]));
      const color = value === null ? "var(--grid)" : rampColor((value - low) / (1 - low));
      const rect = svg("rect", { x: left + b * w, y: 4 + p * cell, width: w + .4, height: cell - 2, style: `fill:${color}` });
      rect.addEventListener("pointermove", (event) => showTip(event, `step ${STEPS[to - 1]}`, [[color, `positions ${DATA.buckets[p]}`, value === null ? "none" : percent(value)]]));
      rect.addEventListener("pointerleave", hideTip);
      root.append(rect);
    }
  }
  DATA.buckets.forEach((name, p) => root.append(svg("text", { x: left - 8, y: 4 + p * cell + cell / 2 + 3, "text-anchor": "end" }, name)));
  const first = STEPS[0], last = STEPS.at(-1), placeX = (s) => left + (s - first) / Math.max(1, last - first) * (width - left - right);
  for (const t of niceTicks(first, last, 5).filter(Number.isInteger)) root.append(svg("text", { x: placeX(t), y: height - 8, "text-anchor": t >= last ? "end" : "middle" }, short(t)));
  holder.replaceChildren(root);
}

function profileCard(rows) {
  const width = Math.max(1, Math.round(rows.length / 10));
  const profile = (part) => DATA.buckets.map((_, p) => mean(part.map((row) => (row || [])[p])));
  const before = profile(rows.slice(0, width)), after = profile(rows.slice(-width));
  const holder = el("div");
  onWidth(holder, (width) => drawProfile(holder, before, after, width));
  const key = (color, name) => el("span", {}, el("i", { style: `color:var(--${color})` }), name);
  return el("div", { class: "card chart" }, el("h3", {}, "Acceptance along the response"), el("div", { class: "note" }, "First and last tenth of the run"),
    el("div", { class: "legend" }, key("outlier", "first"), key("trusted", "last")), holder);
}

function drawProfile(holder, before, after, width) {
  const height = 232, left = 44, right = 12, top = 8, bottom = height - 24;
  const known = [...before, ...after].filter(isNumber), low = Math.min(.9, Math.floor(10 * Math.min(...known)) / 10);
  const placeX = (p) => left + (before.length > 1 ? p / (before.length - 1) : .5) * (width - left - right);
  const placeY = (v) => bottom - (v - low) / (1 - low) * (bottom - top);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "acceptance along the response" });
  for (const t of niceTicks(low, 1, 5)) {
    root.append(svg("line", { class: "gridline", x1: left, x2: width - right, y1: placeY(t), y2: placeY(t) }), svg("text", { x: left - 8, y: placeY(t) + 4, "text-anchor": "end" }, percent(t, 0)));
  }
  const every = Math.ceil(before.length / Math.max(2, Math.floor((width - left) / 62)));
  DATA.buckets.forEach((name, p) => p % every === 0 && root.append(svg("text", { x: placeX(p), y: height - 6, "text-anchor": p === 0 ? "start" : p === before.length - 1 ? "end" : "middle" }, name)));
  const xs = before.map((_, p) => p);
  for (const [values, color] of [[before, "outlier"], [after, "trusted"]]) {
    root.append(svg("path", { d: path(xs, values, placeX, placeY), fill: "none", style: `stroke:var(--${color})`, "stroke-width": 2.1, "stroke-linejoin": "round" }));
    values.forEach((v, p) => {
      if (!isNumber(v)) return;
      const dot = svg("circle", { cx: placeX(p), cy: placeY(v), r: 4, style: `fill:var(--${color});stroke:var(--card)`, "stroke-width": 1.5 });
      dot.addEventListener("pointermove", (event) => showTip(event, `positions ${DATA.buckets[p]}`, [[`var(--${color})`, "accepted", percent(v)]]));
      dot.addEventListener("pointerleave", hideTip);
      root.append(dot);
    });
  }
  holder.replaceChildren(root);
}

// ---------------------------------------------------------------- time

const PHASES = [["rollout", "trusted"], ["teacher", "teacher"], ["student", "outlier"], ["optimizer", "violet"], ["sync", "gold"]];
const BESIDES = ["evaluation", "checkpoint"];  // not part of every step

function phases() {
  const named = PHASES.filter(([name]) => has(`seconds_${name}`)).map(([name, color]) => ({ name, color: `var(--${color})`, values: column(`seconds_${name}`) }));
  if (!named.length || !has("seconds_total")) return named;
  const known = [...named.map((p) => p.values), ...BESIDES.map((name) => column(`seconds_${name}`))];
  const rest = column("seconds_total").map((t, i) => isNumber(t) ? Math.max(0, t - known.reduce((sum, values) => sum + (values[i] || 0), 0)) : null);
  return [...named, { name: "other", color: "var(--gray)", values: rest }];
}

function timing() {
  const parts = phases();
  if (!parts.length || !STEPS.length) return null;
  const means = parts.map((p) => mean(p.values) || 0), total = means.reduce((a, b) => a + b, 0) || 1;
  const holder = el("div");
  onWidth(holder, (width) => drawStack(holder, parts, width));
  const stack = el("div", { class: "card chart" }, el("h3", {}, "Seconds of each step"), el("div", { class: "note" }, "Stacked phases, without evaluations and checkpoints"), holder);
  const bar = el("div", { class: "shares" }, ...parts.map((p, i) => el("div", { style: `background:${p.color};flex:${means[i] / total}` })));
  const rows = el("div", { class: "rows" });
  parts.forEach((p, i) => rows.append(el("i", { style: `background:${p.color}` }), el("span", {}, p.name), el("span", { class: "num" }, duration(means[i])), el("span", { class: "dim" }, percent(means[i] / total))));
  const besides = BESIDES.filter((name) => has(`seconds_${name}`)).map((name) => `${name}s ${duration(totalOf(`seconds_${name}`))}`);
  const share = el("div", { class: "card chart" }, el("h3", {}, "Mean step"), el("div", { class: "note" }, duration(total)), bar, rows,
    besides.length ? el("p", { class: "note besides" }, `Besides, between steps: ${besides.join(", ")}`) : null);
  const waste = chart({ title: "Padding and waiting", note: "Of all positions; of the time of teacher and student, at the sum of the gradients", zero: true, format: percent, tick: (v) => percent(v, 0), series: [curve("padding_share", "padding", "violet"), curve("waiting_share", "waiting", "outlier")] });
  return section("Where the time goes", "Wall-clock time of the phases of a step on the first rank.", el("div", { class: "grid two" }, stack, share, waste));
}

const LINE_COLORS = { ...Object.fromEntries(PHASES), scoring: "teacher", "handing over": "gold", checkpoint: "gray", evaluation: "gray" };

// Phases of the student's and the teacher's ranks, one above the other.
function timeline() {
  const found = DATA.timeline;
  if (!found) return null;
  const ends = Object.values(found.rows).flat().map((span) => span[3]), whole = Math.max(...ends) || 1;
  const lines = Object.entries(found.rows).map(([kind, spans]) => el("div", { class: "line" }, el("span", { class: "dim" }, kind),
    el("div", { class: "spans" }, ...spans.map(([step, phase, from, to]) => el("div", {
      title: `${phase} of step ${step}: ${duration(to - from)}`,
      style: `left:${100 * from / whole}%;width:${100 * (to - from) / whole}%;background:var(--${LINE_COLORS[phase] || "gray"})`,
    })))));
  const names = [...new Set(Object.values(found.rows).flat().map((span) => span[1]))];
  const legend = el("p", { class: "note" }, ...names.flatMap((name) => [el("b", { style: `color:var(--${LINE_COLORS[name] || "gray"})` }, "■ "), `${name}  `]));
  const card = el("div", { class: "card chart" }, el("h3", {}, "Who was busy when"), el("div", { class: "note" }, `The last steps, ${duration(whole)}`), ...lines, legend);
  return section("Student and teacher side by side", `For ${percent(found.hidden)} of the teacher's scoring the student did not wait.`, card);
}

function drawStack(holder, parts, width) {
  const height = 215, left = 44, right = 10, top = 8, bottom = height - 22;
  const sums = STEPS.map((_, i) => parts.reduce((sum, p) => sum + (p.values[i] || 0), 0));
  // The first step may compile or warm up: it must not flatten the others.
  const sorted = [...sums].sort((a, b) => a - b), high = Math.min(sorted.at(-1), 1.6 * sorted[Math.floor(.95 * (sorted.length - 1))]) || 1;
  const { place, ticks } = yScale({ zero: true }, [0, high], top, bottom);
  const placeY = (v) => Math.max(top, place(v));
  const first = 0, last = Math.max(STEPS.at(-1), 1), placeX = (s) => left + (s - first) / (last - first) * (width - left - right);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "seconds of each phase" });
  for (const t of ticks) root.append(svg("line", { class: "gridline", x1: left, x2: width - right, y1: placeY(t), y2: placeY(t) }), svg("text", { x: left - 8, y: placeY(t) + 4, "text-anchor": "end" }, `${tickText(t)} s`));
  let base = STEPS.map(() => 0);
  for (const part of parts) {
    const next = base.map((b, i) => b + (part.values[i] || 0));
    const up = STEPS.map((s, i) => `${placeX(s).toFixed(1)},${placeY(next[i]).toFixed(1)}`), down = STEPS.map((s, i) => `${placeX(s).toFixed(1)},${placeY(base[i]).toFixed(1)}`).reverse();
    root.append(svg("polygon", { points: [...up, ...down].join(" "), style: `fill:${part.color}`, opacity: .85 }));
    base = next;
  }
  stepAxis(root, first, last, placeX, width, bottom);
  const series = parts.map((p) => ({ name: p.name, color: p.color, x: STEPS, y: p.values }));
  root.append(crosshair(holder, root, {}, series, { first, last, placeX, placeY, top, bottom, left, right, width, good: isNumber, format: duration }));
  holder.replaceChildren(root);
}

// ---------------------------------------------------------------- trajectories

const SHADES = {
  "TV": (item, i) => (item.tv || [])[i],
  "1 − trust": (item, i) => isNumber((item.trust || [])[i]) ? 1 - item.trust[i] : null,
  "log-ratio": (item, i) => isNumber((item.k1 || [])[i]) ? Math.abs(item.k1[i]) / 3 : null,
};

function trajectories() {
  const dumps = DATA.dumps.filter((dump) => dump.items.length);
  if (!dumps.length) return null;
  const state = { left: 0, right: dumps.length - 1, shade: "TV" };
  const list = el("div");
  const refresh = () => list.replaceChildren(...pairs(dumps[state.left], dumps[state.right]).map(([a, b]) => example(a, b, dumps[state.left].step, dumps[state.right].step, state.shade)));
  const chooser = (side, label) => {
    const select = el("select", { "aria-label": label });
    dumps.forEach((dump, i) => select.append(el("option", { value: i }, `step ${dump.step}`)));
    select.value = state[side];
    select.addEventListener("change", () => { state[side] = Number(select.value); refresh(); });
    return el("label", {}, `${label} `, select);
  };
  const shades = el("span", { class: "segmented" });
  for (const name of Object.keys(SHADES)) {
    const button = el("button", { type: "button", "aria-pressed": name === state.shade }, name);
    button.addEventListener("click", () => { state.shade = name; [...shades.children].forEach((b) => b.setAttribute("aria-pressed", b === button)); refresh(); });
    shades.append(button);
  }
  const key = (kind, name) => el("span", { class: `tok ${kind}`, style: "--a:.35;padding:1px 7px" }, name);
  const controls = el("div", { class: "controls" }, chooser("left", "Left"), chooser("right", "Right"), el("span", {}, "Shade by ", shades),
    el("span", { class: "keys" }, key("trusted", "trusted"), key("outlier", "outlier"), key("teacher", "teacher prefix"), key("context", "environment")));
  refresh();
  return section("Training trajectories", "Colour is the region of a token; strength is how far student and teacher are apart there. Hover or tap a token for its numbers.", controls, list);
}

// The same prompt side by side where both dumps have it, else in order.
function pairs(left, right) {
  const rest = [...right.items];
  const matched = left.items.map((a) => {
    const i = rest.findIndex((b) => b.prompt === a.prompt);
    return [a, i < 0 ? null : rest.splice(i, 1)[0]];
  });
  return matched.map(([a, b]) => [a, b || rest.shift() || null]).concat(rest.map((b) => [null, b]));
}

function example(a, b, stepA, stepB, shade) {
  const same = a && b && a.prompt === b.prompt;
  const box = el("div", { class: "card example" });
  if (same || !a || !b) box.append(el("div", { class: "prompt" }, (a || b).prompt || ""));
  const sides = el("div", { class: "sides" });
  for (const [item, step] of [[a, stepA], [b, stepB]]) if (item) sides.append(side(item, step, shade, !same && a && b));
  box.append(sides);
  return box;
}

function side(item, step, shade, withPrompt) {
  const students = item.segment.map((s, i) => (s === "student" ? i : -1)).filter((i) => i >= 0);
  const said = item.segment.filter((s) => s === "context").length, given = item.segment.length - students.length - said;
  const outliers = students.reduce((sum, i) => sum + (item.outlier[i] || 0), 0), masked = students.filter((i) => isMasked(item, i)).length;
  const caption = el("div", { class: "caption" }, el("b", {}, `Step ${step}`));
  if (item.task) caption.append(el("span", {}, item.task));
  if (item.correct === true || item.correct === false) caption.append(verdict(item.correct));
  caption.append(el("span", {}, `${Number.isInteger(outliers) ? outliers : outliers.toFixed(1)} of ${students.length - masked} tokens outliers`));
  if (masked) caption.append(el("span", {}, `masked ${masked}`));
  if (given) caption.append(el("span", {}, `prefix ${given}`));
  if (said) caption.append(el("span", {}, `environment ${said}`));
  const prompt = withPrompt ? el("div", { class: "prompt" }, item.prompt || "") : null;
  return el("div", { class: "side" }, caption, prompt, ...tokenPages(item, shade));
}

// A span for each token of thousands would take seconds to draw: a page of them at a time.
const PAGE_TOKENS = 500;

function tokenPages(item, shade) {
  const text = el("div", { class: "tokens" }), where = el("span"), last = Math.ceil(item.tokens.length / PAGE_TOKENS) - 1;
  const turn = (by, label) => {
    const button = el("button", { type: "button", "aria-label": label }, by < 0 ? "‹" : "›");
    button.addEventListener("click", () => { item.page += by; draw(); });
    return button;
  };
  const back = turn(-1, "earlier tokens"), on = turn(1, "later tokens");
  const draw = () => {
    const start = item.page * PAGE_TOKENS, shown = item.tokens.slice(start, start + PAGE_TOKENS);
    text.replaceChildren(...shown.map((token, i) => tokenSpan(item, token, start + i, shade)));
    text.scrollTop = 0;
    where.textContent = `tokens ${start + 1} to ${start + shown.length} of ${item.tokens.length + (item.cut || 0)}`;
    if (item.cut && item.page === last) where.textContent += ", the rest is cut off";
    back.disabled = item.page === 0;
    on.disabled = item.page === last;
  };
  item.page = item.page || 0; // kept if the shade changes
  draw();
  return last > 0 ? [text, el("div", { class: "pages" }, back, where, on)] : [text];
}

// Written by the teacher, or taken from a golden answer.
function isGiven(item, i) {
  return ["teacher", "golden"].includes(item.segment[i]);
}

// Written by a tool, another speaker or the chat template, between two turns of the student.
function isContext(item, i) {
  return item.segment[i] === "context";
}

// A token left out of the loss has no values.
function isMasked(item, i) {
  return !isGiven(item, i) && !isContext(item, i) && ["outlier", "trust", "tv", "k1"].every((name) => !isNumber((item[name] || [])[i]));
}

// A drawn outlier is 0 or 1; in closed form it is a probability, whose sum is the number expected.
function tokenSpan(item, token, i, shade) {
  const region = isContext(item, i) ? "context" : isMasked(item, i) ? "masked" : isGiven(item, i) ? "teacher" : item.outlier[i] >= .5 ? "outlier" : "trusted";
  const amount = SHADES[shade](item, i);
  const floor = { teacher: .18, outlier: .25, trusted: .05, masked: 0, context: 0 }[region], strength = isNumber(amount) ? clamp(amount, 0, 1) : 0;
  const special = /^<[^<>]*>$/.test(token) ? " special" : "";
  const shown = token.replaceAll("▁", " ").replaceAll("\n", "↵\n");
  const span = el("span", { class: `tok ${region}${special}`, style: `--a:${(floor + (.72 - floor) * Math.sqrt(strength)).toFixed(3)}` }, shown || "∅");
  const number = (name, digits) => isNumber((item[name] || [])[i]) ? item[name][i].toFixed(digits) : "–";
  const color = ["masked", "context"].includes(region) ? "var(--gray)" : `var(--${region})`;
  const show = (event) => showTip(event, `${JSON.stringify(token)} · position ${i}`, [
    [color, "region", { teacher: item.segment[i] === "golden" ? "golden answer" : "teacher prefix", masked: "left out of the loss", context: "environment: no loss" }[region] || region], [null, "trust min(p/q, 1)", number("trust", 3)],
    [null, "total variation", number("tv", 3)], [null, "log q − log p", number("k1", 3)]]);
  span.addEventListener("pointermove", show);
  span.addEventListener("click", show);
  span.addEventListener("pointerleave", hideTip);
  return span;
}

// ---------------------------------------------------------------- held-out answers

function answers() {
  if (!DATA.answers.length) return null;
  const cards = DATA.answers.map((problem) => {
    const columns = [["before", "Student before"], ["after", "Student after"], ["teacher", "Teacher"]].filter(([name]) => problem[name]);
    return el("div", { class: "card example" },
      problem.set ? el("div", { class: "caption" }, el("b", {}, problem.set)) : null,
      el("div", { class: "prompt" }, problem.prompt),
      el("div", { class: `sides n${columns.length}` }, ...columns.map(([name, label]) => answer(problem[name], label, problem.teacher))),
      el("div", { class: "reference" }, "Reference answer ", el("b", {}, String(problem.answer))));
  });
  return section("Held-out answers, before and after", "The first problems of each held-out file and the first answer to each. Underlined: where a wrong answer leaves the teacher's text.", ...cards);
}

// A grader that cannot judge says null.
function verdict(correct) {
  if (correct === null) return el("span", {}, "? cannot be judged");
  return el("span", { class: correct ? "yes" : "no" }, correct ? "✓ correct" : "✗ wrong");
}

function answer(item, label, teacher) {
  let same = item.response.length;
  if (item.correct === false && teacher && teacher !== item) {
    same = 0;
    while (same < item.response.length && item.response[same] === teacher.response[same]) same++;
  }
  return el("div", { class: "side" },
    el("div", { class: "caption" }, el("b", {}, label), verdict(item.correct)),
    el("div", { class: "answer" }, item.response.slice(0, same), el("span", { class: "off" }, item.response.slice(same))));
}

// ---------------------------------------------------------------- settings

function settings() {
  const grid = el("div", { class: "config" });
  for (const [name, table] of Object.entries(DATA.config)) {
    const list = el("dl");
    const items = table && typeof table === "object" ? Object.entries(table) : [["", table]];
    for (const [key, value] of items) list.append(el("dt", {}, key), el("dd", {}, value === null ? "none" : typeof value === "string" ? value : JSON.stringify(value)));
    grid.append(el("div", {}, el("h3", {}, `[${name}]`), list));
  }
  return el("section", { class: "section" }, el("details", { class: "card" }, el("summary", {}, "Resolved settings"), grid));
}

document.getElementById("page").replaceChildren(...[
  ...head(), result(), learning(), trustRegion(), timing(), timeline(), answers(), trajectories(), settings(),
  el("footer", {}, "Made by tropd report from config.json, metrics.jsonl, evaluations.jsonl, summary.json and trajectories/ of this folder."),
].filter(Boolean));
firstDraws.forEach((draw) => draw());
