/* The report of a run. `view` is what the reader chose, which stays when a live page is renewed. */
let content = JSON.parse(document.getElementById("content").textContent);
const view = { label: null, mode: "split", split: 50, query: "", timer: null };
const sections = {};
const phases = { "starting": "--c6", "caching text": "--c7", "caching images": "--c3", "loading": "--c8", "training": "--c1", "held-out loss": "--c4", "validation": "--c2", "saving": "--c5" };
const colour = name => "var(" + name + ")";

/* ---- curves ---- */
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(times => times * power).find(one => one >= raw * .999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}
function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}
/* An average over neighbours, each with the weight of the steps that are in it. */
function smoothed(bins) {
  const reach = Math.max(1, Math.round(bins.length / 30));
  return bins.map((bin, at) => {
    let sum = 0, weight = 0;
    for (let near = Math.max(0, at - reach); near <= Math.min(bins.length - 1, at + reach); near++) {
      const share = bins[near][2] * (1 - Math.abs(near - at) / (reach + 1));
      sum += share * bins[near][3]; weight += share;
    }
    return [(bin[0] + bin[1]) / 2, sum / weight];
  });
}
function range(spec) {
  const values = spec.series.flatMap(one => [...one.points.map(point => point[1]), ...(one.band || []).flatMap(point => [point[1], point[2]])]);
  let low = Math.min(...values), high = Math.max(...values);
  if (spec.trims && values.length > 40) {
    low = Math.max(low, quantile(values, .004)); high = Math.min(high, quantile(values, .985));
    for (const one of spec.series) if (one.matters) for (const point of one.points) { low = Math.min(low, point[1]); high = Math.max(high, point[1]); }
  }
  if (spec.zero) low = Math.min(0, low);
  if (high - low < 1e-12 * Math.max(1, Math.abs(high))) { const room = Math.abs(high) * .1 || 1; low -= spec.zero && !low ? 0 : room; high += room; }
  else { const room = (high - low) * .06; high += room; low = spec.zero && low >= 0 ? low : low - room; }
  return [low, high];
}
function chart(spec) {
  const node = make("div", "chart" + (spec.wide ? " wide" : "")), place = make("div", "");
  const named = spec.series.filter(one => one.name);
  const legend = make("div", "legend", ...named.map(one => { const mark = make("i", ""); mark.style.background = colour(one.colour); if (one.thin) mark.style.opacity = .4; return make("span", "", mark, one.name); }));
  node.append(make("h3", "", spec.title), ...(named.length > 1 || spec.says ? [legend] : []), ...(spec.says ? [make("p", "soft small", spec.says)] : []), place);
  const summary = named.map(one => one.name + " " + (spec.format || short)(one.points.length ? one.points[one.points.length - 1][1] : 0)).join(", ");
  let last = 0;
  new ResizeObserver(() => { const width = Math.floor(place.clientWidth); if (width && width !== last) { last = width; place.replaceChildren(plot(spec, width, node, summary)); } }).observe(place);
  return node;
}
function plot(spec, width, node, summary) {
  const height = spec.wide ? Math.min(300, Math.max(190, width * .3)) : 190, format = spec.format || short, left = 52, right = 10, top = 8, bottom = spec.strip ? 40 : 24;
  const xs = spec.series.flatMap(one => one.points.map(point => point[0])), [low, high] = range(spec);
  const first = spec.from ?? Math.min(...xs), last = Math.max(spec.to ?? -Infinity, ...xs), wide = last - first || 1;
  const x = value => left + (value - first) / wide * (width - left - right), y = value => top + (1 - (value - low) / (high - low)) * (height - top - bottom);
  const within = value => Math.max(low, Math.min(high, value)), at = (a, b) => x(a).toFixed(1) + " " + y(within(b)).toFixed(1);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": spec.title + ": " + summary });
  for (const tick of ticks(low, high, 4)) {
    svg.append(drawn("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), stroke: "var(--grid)" }));
    svg.append(drawn("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, format(tick)));
  }
  for (const tick of ticks(first, first + wide, Math.max(3, Math.floor(width / 130)))) {
    if (!spec.seconds && tick % 1) continue;
    svg.append(drawn("text", { x: x(tick), y: height - 6, "text-anchor": tick === first ? "start" : x(tick) > width - 40 ? "end" : "middle" }, spec.seconds ? lasting(tick) : tick.toLocaleString("en")));
  }
  for (const mark of spec.marks || []) {
    if (mark.x < first || mark.x > last) continue;
    svg.append(drawn("line", { x1: x(mark.x), x2: x(mark.x), y1: top, y2: height - bottom, stroke: colour(mark.colour), "stroke-dasharray": mark.dash || "3 4", opacity: .8 }));
    if (mark.name) svg.append(drawn("text", { x: x(mark.x) + (x(mark.x) > width - 90 ? -5 : 5), y: top + 10, "text-anchor": x(mark.x) > width - 90 ? "end" : "start" }, mark.name));
  }
  for (const line of spec.lines || []) {
    svg.append(drawn("line", { x1: left, x2: width - right, y1: y(line.y), y2: y(line.y), stroke: colour(line.colour), "stroke-dasharray": "6 4", opacity: .75 }));
    svg.append(drawn("text", { x: width - right, y: y(line.y) - 4, "text-anchor": "end" }, line.name));
  }
  for (const one of spec.series.filter(one => !one.hidden)) {
    if (one.band && one.band.length > 1) {
      const upper = one.band.map(point => at(point[0], point[2])), lower = one.band.map(point => at(point[0], point[1])).reverse();
      svg.append(drawn("path", { d: "M" + [...upper, ...lower].join("L") + "Z", fill: colour(one.colour), opacity: .16 }));
    }
    if (one.points.length > 1) svg.append(drawn("path", { d: "M" + one.points.map(point => at(...point)).join("L"), fill: "none", stroke: colour(one.colour), "stroke-width": one.thin ? 1 : 2, "stroke-linejoin": "round", opacity: one.thin ? .38 : 1 }));
    if (one.dots || one.points.length === 1) for (const point of one.points.length > 80 ? [] : one.points) svg.append(drawn("circle", { cx: x(point[0]), cy: y(within(point[1])), r: 2.8, fill: colour(one.colour) }));
  }
  if (spec.strip) for (const [phase, begin, end] of spec.strip) {
    const rect = drawn("rect", { x: x(begin), y: height - 34, width: Math.max(1, x(Math.min(end, last)) - x(begin)), height: 9, fill: colour(phases[phase] || "--c6") }, drawn("title", {}, phase));
    if (begin < last) svg.append(rect);
  }
  hover(svg, spec, node, width, height, { x, first, wide, left, right, format });
  return svg;
}
function hover(svg, spec, node, width, height, scale) {
  const rule = drawn("line", { y1: 8, y2: height - 24, stroke: "var(--soft)", opacity: 0 });
  svg.append(rule);
  const shown = spec.series.filter(one => one.name && one.points.length);
  const nearest = (points, x) => { let low = 0, high = points.length - 1; while (high - low > 1) { const middle = (low + high) >> 1; if (points[middle][0] < x) low = middle; else high = middle; } return Math.abs(points[low][0] - x) < Math.abs(points[high][0] - x) ? points[low] : points[high]; };
  const hide = () => { rule.setAttribute("opacity", 0); node.querySelector(".tip")?.remove(); };
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), place = (event.clientX - box.left) / box.width * width;
    if (!shown.length || place < scale.left) return hide();
    const at = nearest(shown[0].points, scale.first + (place - scale.left) / (width - scale.left - scale.right) * scale.wide)[0];
    node.querySelector(".tip")?.remove();
    const lines = shown.map(one => make("div", "", one.name + ": " + scale.format(nearest(one.points, at)[1])));
    const tip = make("div", "tip", make("b", "", spec.seconds ? lasting(at) : "step " + Math.round(at).toLocaleString("en")), ...lines);
    node.append(tip);
    tip.style.left = Math.max(0, Math.min(scale.x(at) + 12, node.clientWidth - tip.offsetWidth - 2)) + "px";
    tip.style.top = svg.parentNode.offsetTop + 12 + "px";
    for (const name of ["x1", "x2"]) rule.setAttribute(name, scale.x(at));
    rule.setAttribute("opacity", .6);
  });
  svg.addEventListener("pointerleave", hide);
}

/* ---- sections ---- */
const words = { starting: "note", running: "note", finished: "good", stopped: "warning", failed: "error" };
function last(name) { const bins = content.curves[name]; return bins && bins.length ? bins[bins.length - 1] : null; }

function headOf() {
  const facts = content.facts, total = content.total_steps, silent = content.status === "running" && Date.now() / 1000 - content.updated > 900;
  const state = content.status === "running" ? content.phase : content.status;
  const pill = make("span", "pill " + (silent ? "warning" : words[content.status]), silent ? "no news for " + lasting(Date.now() / 1000 - content.updated) : state);
  const node = make("header", "", make("div", "row", make("h1", "", facts.name || "A run"), pill, content.live ? make("span", "pill good", "live") : null));
  node.append(make("p", "soft break", [facts.family && facts.family + " from " + facts.base, facts.learns, facts.device && "on " + facts.device].filter(Boolean).join(" · ")));
  if (total) {
    const fill = make("i", ""), track = make("div", "progress", fill);
    fill.style.width = 100 * content.step / total + "%";
    track.setAttribute("role", "progressbar"); track.setAttribute("aria-valuenow", content.step); track.setAttribute("aria-valuemax", total); track.setAttribute("aria-label", "Steps");
    const pace = (content.curves.seconds || []).slice(-12), each = pace.reduce((sum, bin) => sum + bin[2] * bin[3], 0) / (pace.reduce((sum, bin) => sum + bin[2], 0) || 1);
    const left = content.status === "running" && each && content.step < total ? ", about " + lasting(each * (total - content.step)) + " left" : "";
    node.append(track, make("p", "small soft number", "step " + content.step.toLocaleString("en") + " of " + total.toLocaleString("en") + left + " · as of " + new Date(content.updated * 1000).toLocaleString()));
  }
  const spent = Object.values(content.phases).reduce((sum, one) => sum + one, 0), loss = content.curves.loss || [], tail = smoothed(loss).pop(), best = content.best, norm = last("grad_norm"), rate = last("learning_rate");
  const pace = content.curves.seconds || [], usual = pace.length ? quantile(pace.map(bin => bin[3]), .5) : 0;
  const tiles = [
    tail && ["loss, smoothed", short(tail[1])],
    best && [best.metric === "clip" ? "best CLIP score, step " + best.step : "best held-out loss, step " + best.step, short(best.value)],
    rate && ["learning rate", short(rate[3])], norm && ["gradient norm", short(norm[3])],
    usual && ["a step", usual < 1 ? Math.round(usual * 1000) + " ms" : usual.toFixed(2) + " s"],
    spent && ["running", lasting(spent)], content.epoch && facts.steps_per_epoch && ["epochs", Number((content.step / facts.steps_per_epoch).toPrecision(3)).toLocaleString("en")],
  ].filter(Boolean);
  node.append(make("div", "tiles", ...tiles.map(([label, value]) => make("div", "tile", make("b", "", value), make("span", "soft small", label)))));
  return node;
}

function adviceOf() {
  if (!content.advice.length) return null;
  const names = { error: "error", warning: "look", good: "next", note: "note" };
  return panel("What to do next", make("ul", "advice", ...content.advice.map(one => make("li", "", make("span", "pill " + one.kind, names[one.kind]), make("div", "break", make("p", "", one.text), one.command ? command(one.command) : null)))));
}

function called(label) { return label === "base" ? "base model" : "step " + content.samples.labels[label].toLocaleString("en") + (label.endsWith("_ema") ? ", average" : ""); }
function framed(row, ...children) {
  const node = make("div", "view", ...children), size = /_(\d+)x(\d+)$/.exec(row.stem);
  node.style.aspectRatio = size ? size[1] + " / " + size[2] : "1";
  return node;
}
function shownAt(row, label) {
  const source = row.pictures[label];
  return source ? picture(source, called(label) + ": " + (row.said.prompt || row.stem)) : make("div", "missing", "no picture of " + called(label));
}
function cellOf(row, label) {
  const base = row.pictures.base, now = row.pictures[label];
  if (view.mode === "beside" && base) return make("div", "beside", framed(row, shownAt(row, "base"), make("span", "tag left", "base")), framed(row, shownAt(row, label), make("span", "tag left", called(label))));
  if (view.mode !== "split" || !base || !now || label === "base") { const node = framed(row, shownAt(row, label)); if (now) { node.addEventListener("click", () => look(now, called(label), row.said)); node.style.cursor = "zoom-in"; } return node; }
  const over = shownAt(row, label), divider = make("div", "divider"), slide = make("input", "");
  slide.type = "range"; slide.min = 0; slide.max = 100; slide.value = row.split ?? view.split;
  slide.setAttribute("aria-label", "Base model to the left, " + called(label) + " to the right: " + (row.said.prompt || row.stem));
  const apply = () => { row.split = view.split = Number(slide.value); over.style.clipPath = "inset(0 0 0 " + slide.value + "%)"; divider.style.left = "calc(" + slide.value + "% - 1px)"; };
  slide.addEventListener("input", apply);
  const node = framed(row, shownAt(row, "base"), over, make("span", "tag left", "base"), make("span", "tag right", called(label)), divider, slide);
  node.classList.add("peek");
  apply();
  return node;
}
function captionOf(row) {
  const said = row.said, seed = said.seed ? "seed " + said.seed : "", size = (/_(\d+x\d+)$/.exec(row.stem) || ["", ""])[1], guidance = said.guidance ? "guidance " + said.guidance : "", steps = said.inference_steps ? said.inference_steps + " steps" : "";
  const text = make("div", "clamp", "prompt" in said ? said.prompt || "(empty prompt)" : row.stem);
  text.title = said.prompt || row.stem;
  return make("figcaption", "", text, said.negative_prompt ? make("div", "soft small clamp", "not: " + said.negative_prompt) : null, make("div", "soft small", [seed, size, guidance, steps].filter(Boolean).join(" · ")));
}
function samplesOf() {
  const samples = content.samples, labels = Object.keys(samples.labels);
  if (!labels.length) return null;
  const steps = labels.filter(label => label !== "base"), order = steps.length ? steps : labels;
  const follows = view.label === null || !order.includes(view.label);
  let at = follows ? order.length - 1 : order.indexOf(view.label);
  const grid = make("div", "samples"), slider = make("input", ""), output = make("output", "");
  const small = samples.rows.every(row => Math.max(...(/_(\d+)x(\d+)$/.exec(row.stem) || [0, 512, 512]).slice(1).map(Number)) <= 160);
  if (small && !matchMedia("(max-width: 40rem)").matches) grid.style.setProperty("--cell", samples.rows.length > 6 ? "8rem" : "10.5rem");
  slider.type = "range"; slider.min = 0; slider.max = order.length - 1; slider.step = 1; slider.value = at; slider.id = "step"; slider.disabled = order.length < 2;
  slider.setAttribute("aria-label", "Step of the pictures");
  const draw = () => {
    const label = order[at];
    output.textContent = called(label) + (content.best && content.best.step === samples.labels[label] ? " ★ best" : "");
    slider.setAttribute("aria-valuetext", called(label));
    grid.replaceChildren(...samples.rows.map(row => make("figure", "sample", cellOf(row, label), captionOf(row))));
  };
  const go = next => { at = next; view.label = at === order.length - 1 ? null : order[at]; slider.value = at; draw(); };
  slider.addEventListener("input", () => go(Number(slider.value)));
  const play = press("play", () => {
    if (view.timer) { clearInterval(view.timer); view.timer = null; play.textContent = "play"; return; }
    play.textContent = "stop";
    view.timer = setInterval(() => go((at + 1) % order.length), 700);
  });
  play.disabled = order.length < 2;
  const modes = [["split", "before | after"], ["beside", "side by side"], ["one", "after"]];
  const choice = make("div", "choice", ...modes.map(([mode, label]) => { const button = press(label, () => { view.mode = mode; for (const one of choice.children) one.setAttribute("aria-pressed", String(one === button)); draw(); }, "x"); button.setAttribute("aria-pressed", String(view.mode === mode)); return button; }));
  const left = [samples.left_out.length ? many(samples.left_out.length, "step") : "", samples.rows_left_out > 0 ? many(samples.rows_left_out, "prompt") : ""].filter(Boolean).join(" and ");
  const note = left ? make("p", "soft small", left + " left out to keep this page small; every picture is in " + samples.folder + "/ in full size.") : make("p", "soft small", "In full size in " + samples.folder + "/ beside this page.");
  const has = samples.rows.some(row => row.pictures.base);
  clearInterval(view.timer); view.timer = null;
  draw();
  return panel("", make("div", "row", make("h2", "", "Pictures by step"), has ? choice : null), make("div", "slider", output, slider, play), grid, note);
}
function previewsOf() {
  const previews = content.previews || [];
  if (!previews.length || content.phase !== "validation" || content.status !== "running") return null;
  return panel("Being made", make("div", "samples", ...previews.map(one => { const node = make("div", "view", picture(one.address, one.prompt)); node.style.aspectRatio = "1"; return make("figure", "sample", node, make("figcaption", "", make("div", "clamp", one.prompt), make("div", "soft small", "after " + one.sampling_step + " sampling steps"))); })));
}

function marks() {
  const found = content.checkpoints.length <= 40 ? content.checkpoints.map(step => ({ x: step, colour: "--c6", dash: "1 5" })) : [];
  return content.best ? [...found, { x: content.best.step, colour: "--c3", name: "best" }] : found;
}
function curvesOf() {
  const found = [], loss = content.curves.loss || [], every = content.evaluations, spec = { marks: marks(), from: 0 };
  /* What the base gives is mostly so far off that nothing else would be seen. */
  const trained = every.filter(row => row.step), rows = trained.length > 2 ? trained : every, base = rows === every ? null : every.find(row => !row.step);
  const middle = bin => (bin[0] + bin[1]) / 2, raw = bins => bins.map(bin => [middle(bin), bin[3]]), along = name => rows.filter(row => name in row).map(row => [row.step, row[name]]);
  if (loss.length) {
    const band = loss.some(bin => bin[2] > 1) ? loss.map(bin => [middle(bin), bin[4], bin[5]]) : null;
    found.push(chart({ ...spec, title: "Loss", wide: true, says: content.checkpoints.length && content.checkpoints.length <= 40 ? "dotted: checkpoints" : "", trims: true, zero: true, series: [{ name: "each step", points: raw(loss), band, colour: "--c1", thin: true }, { name: "smoothed", points: smoothed(loss), colour: "--c1", matters: true }] }));
  }
  const names = [...new Set(rows.flatMap(Object.keys))], held = names.filter(name => /^loss\/val\/[^/]+$/.test(name)), bands = names.filter(name => name.includes("/noise_"));
  if (held.length) found.push(chart({ ...spec, title: "Held-out loss", says: base ? "at step 0: " + held.filter(name => name in base).map(name => short(base[name]) + (held.length > 1 ? " " + name.replace("loss/val/", "") : "")).join(", ") : "", series: held.map((name, at) => ({ name: name.replace("loss/val/", ""), points: along(name), colour: "--c" + (1 + at % 8), dots: true })) }));
  if (bands.length) {
    const levels = [...new Set(bands.map(name => name.split("/noise_")[1]))];
    const series = levels.map((level, at) => {
      const mine = bands.filter(name => name.endsWith("/noise_" + level));
      const points = rows.filter(row => mine.some(name => name in row)).map(row => { const values = mine.filter(name => name in row).map(name => row[name]); return [row.step, values.reduce((sum, one) => sum + one, 0) / values.length]; });
      const first = points.length ? points[0][1] : 1;
      return { name: level + " % noise", points: points.map(([step, value]) => [step, value / first]), colour: ["--c3", "--c1", "--c4", "--c2"][at % 4], dots: true };
    });
    found.push(chart({ ...spec, title: "Held-out loss by noise level", says: "each beside what it was at first", format: value => value.toFixed(2) + "×", series }));
  }
  const scores = names.filter(name => /^clip(_ema)?\/mean/.test(name));
  if (scores.length) found.push(chart({ ...spec, title: "CLIP score", series: scores.map((name, at) => ({ name, points: along(name), colour: "--c" + (4 + at), dots: true })) }));
  for (const [name, title, tone, extra] of [["learning_rate", "Learning rate", "--c7", { zero: true }], ["grad_norm", "Gradient norm", "--c4", { zero: true, trims: true }], ["seconds", "Seconds a step", "--c6", { zero: true, trims: true }]]) {
    const bins = content.curves[name] || [];
    if (!bins.length) continue;
    const band = bins.some(bin => bin[2] > 1) ? bins.map(bin => [middle(bin), bin[4], bin[5]]) : null, is_noisy = name !== "learning_rate";
    const series = [...(is_noisy ? [{ points: raw(bins), band, colour: tone, thin: true }] : []), { name: title, points: is_noisy ? smoothed(bins) : raw(bins), colour: tone, matters: true }];
    const limit = content.facts.max_grad_norm, lines = name === "grad_norm" && limit && bins.some(bin => bin[5] > limit * .5) ? [{ y: limit, colour: "--c2", name: "clipped above" }] : [];
    if (lines.length) series.push({ points: [[bins[0][0], limit]], hidden: true, matters: true });
    found.push(chart({ ...spec, ...extra, lines, title, marks: [], series }));
  }
  return found.length ? panel("Curves", make("div", "charts", ...found)) : null;
}

function timeOf() {
  const total = Object.values(content.phases).reduce((sum, one) => sum + one, 0);
  if (!total) return null;
  const bar = make("div", "bar"), key = make("div", "key");
  for (const [phase, seconds] of Object.entries(content.phases).filter(one => one[1] >= .05).sort((a, b) => Object.keys(phases).indexOf(a[0]) - Object.keys(phases).indexOf(b[0]))) {
    const part = make("i", ""), mark = make("i", "");
    part.style.flexGrow = seconds / total; part.style.background = mark.style.background = colour(phases[phase] || "--c6");
    part.title = phase + ": " + lasting(seconds);
    bar.append(part);
    key.append(make("span", "", mark, phase + " ", make("span", "soft number", lasting(seconds) + ", " + (100 * seconds / total).toFixed(seconds / total < .0995 ? 1 : 0) + " %")));
  }
  bar.setAttribute("role", "img"); bar.setAttribute("aria-label", "Time by phase");
  const node = panel("Time and memory", bar, key, content.starts > 1 ? make("p", "soft small", "All " + content.starts + " starts together; checkpoints are written behind the training.") : null);
  const charts = Object.entries(content.memory).filter(([, bins]) => bins.length > 1).map(([name, bins]) => {
    const of_card = name === "card", planned = (content.facts.planned || []).map(phase => ({ name: phase.name, y: of_card ? phase.card_bytes : phase.main_bytes })).filter(phase => phase.y);
    const most = planned.length ? planned.reduce((one, other) => other.y > one.y ? other : one) : null, series = [{ name: "measured", points: bins.map(bin => [bin[1], bin[5]]), colour: of_card ? "--c2" : "--c7" }];
    if (most) series.push({ points: [[bins[0][0], most.y]], hidden: true });
    return chart({ title: of_card ? "Memory of the card" : "Main memory", zero: true, seconds: true, from: 0, format: gigabytes, strip: content.spans, series, lines: most ? [{ y: most.y, colour: "--c6", name: "most planned: " + gigabytes(most.y) + " (" + most.name + ")" }] : [] });
  });
  if (charts.length) node.append(make("div", "charts", ...charts));
  const planned = content.facts.planned || [];
  if (planned.length) node.append(make("details", "", make("summary", "", "Planned memory by phase"), tableOf(["phase", "card", "main memory"], planned.map(one => [one.name, one.card_bytes ? gigabytes(one.card_bytes) : "", gigabytes(one.main_bytes)]))));
  return node;
}
function tableOf(titles, rows, classes) {
  return make("table", "", make("thead", "", make("tr", "", ...titles.map((title, at) => make("th", at === 2 && title === "from" ? "origin" : "", title)))), make("tbody", "", ...rows.map(row => make("tr", "", ...row.map((cell, at) => make("td", classes ? classes[at] : "", cell))))));
}

function cropOf(one) {
  const node = make("div", "view"), [width, height] = one.resized, [left, top, across, down] = one.crop, frame = make("div", "window");
  node.style.aspectRatio = width + " / " + height;
  if (one.thumbnail) node.append(picture("data:image/jpeg;base64," + one.thumbnail, one.file));
  Object.assign(frame.style, { left: 100 * left / width + "%", top: 100 * top / height + "%", width: 100 * across / width + "%", height: 100 * down / height + "%" });
  node.append(frame);
  const name = make("figcaption", "", one.caption || one.file);
  name.title = one.file + ": " + one.original.join("x") + " to " + one.bucket;
  return make("figure", "", node, name);
}
function datasetsOf() {
  const rows = content.facts.datasets || [];
  if (!rows.length) return null;
  return panel("Datasets", ...rows.map(one => {
    const most = Math.max(...one.buckets.map(bucket => bucket[1])), table = make("div", "histogram"), rest = make("div", "histogram");
    one.buckets.forEach(([size, count], at) => {
      const fill = make("i", "");
      fill.style.width = 100 * count / most + "%";
      (at < 8 ? table : rest).append(make("span", "number", size), make("div", "", fill), make("span", "soft", many(count, "picture")));
    });
    const skipped = Object.entries(one.skipped).map(([rule, count]) => count + " " + rule).join(", ");
    const crops = content.crops.filter(crop => crop.dataset === one.id);
    return make("div", "dataset", make("div", "row", make("h3", "break", one.id), make("span", "pill note", one.role), make("span", "soft small", many(one.images, "picture") + (one.repeats ? ", " + many(one.repeats, "repeat") : "") + (one.about ? ", " + one.about : ""))), table, rest.childElementCount ? make("details", "", make("summary", "", many(one.buckets.length - 8, "further bucket")), rest) : null, skipped ? make("p", "small soft break", "skipped: " + skipped) : null, crops.length ? make("div", "crops", ...crops.map(cropOf)) : null);
  }), content.crops.length ? make("p", "soft small", "Framed is what is trained on. `simpletuner dataset` looks at every picture.") : null);
}

function settingsOf() {
  if (!content.settings.length) return null;
  const own = content.settings.filter(row => row.origin && row.origin !== "default"), rest = content.settings.filter(row => !row.origin || row.origin === "default");
  const lines = rows => tableOf(["option", "value", "from"], rows.map(row => [row.key, row.value, row.origin]), ["", "", "soft small"]);
  const node = panel("Settings");
  if (content.changes) node.append(content.changes.length ? make("div", "", make("h3", "", "Other than in the start before"), tableOf(["option", "before", "now"], content.changes.map(row => [row.key, row.before, row.now]))) : make("p", "soft small", "The same as in the start before."));
  if (own.length) node.append(make("details", "", make("summary", "", many(own.length, "option") + " that the config, the family or a flag sets"), lines(own)));
  if (own.length) node.querySelector("details").open = !matchMedia("(max-width: 40rem)").matches && own.length <= 60;
  if (rest.length) {
    const search = make("input", "search"), table = lines(rest);
    search.type = "search"; search.placeholder = "option"; search.setAttribute("aria-label", "Search options"); search.value = view.query;
    const apply = () => { view.query = search.value.toLowerCase(); for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(view.query); };
    search.addEventListener("input", apply);
    node.append(make("details", "", make("summary", "", many(rest.length, "option") + (own.length ? " at their defaults" : "")), search, table));
    apply();
  }
  return node;
}
function warningsOf() {
  if (!content.warnings.length) return null;
  return panel("Warnings", make("ul", "list small", ...content.warnings.map(([time, step, text]) => make("li", "break", make("span", "soft number", new Date(time * 1000).toLocaleTimeString() + (step ? ", step " + step.toLocaleString("en") : "") + "  "), text))));
}

/* ---- putting it together, and renewing only what has changed ---- */
const parts = [
  [headOf, () => [content.status, content.step, content.phase, content.updated, content.phases, content.best]],
  [adviceOf, () => content.advice],
  [previewsOf, () => [content.previews, content.phase, content.status]],
  [samplesOf, () => [content.samples, content.best]],
  [curvesOf, () => [content.curves, content.evaluations, content.checkpoints, content.best]],
  [timeOf, () => [content.phases, content.memory, content.facts.planned]],
  [datasetsOf, () => [content.facts.datasets, content.crops]],
  [warningsOf, () => content.warnings],
  [settingsOf, () => [content.settings, content.changes]],
];
function render() {
  document.title = (content.facts.name || "SimpleTuner") + (content.total_steps ? ` ${Math.floor(100 * content.step / content.total_steps)} %` : "");
  parts.forEach(([build, depends], at) => {
    const now = JSON.stringify(depends());
    if (sections[at] && sections[at].was === now) return;
    const node = build() || make("div", "");
    const held = document.activeElement?.id;
    if (sections[at]) sections[at].node.replaceWith(node); else main.append(node);
    if (held) document.getElementById(held)?.focus();
    sections[at] = { node, was: now };
  });
}
async function listen() {
  try {
    const answer = await fetch("content.json", { cache: "no-store" });
    if (answer.ok) { content = await answer.json(); content.live = true; render(); }
  } catch { /* the server has ended: what was seen last stays */ }
  setTimeout(listen, ["finished", "stopped", "failed"].includes(content.status) ? 10000 : 2500);
}
render();
if (content.live) setTimeout(listen, 1500);
