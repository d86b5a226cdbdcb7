// The run over its steps: where a step's time goes, the curves, and on lanes what happened; all share one span of steps.

import { Chart, label, plainNumbers } from "ray_ep/chart.js";
import { property } from "ray_ep/colour.js";
import { clock, figure as number, known, seconds, share } from "ray_ep/format.js";

const { Range1d } = Bokeh;

export const LANES = [ // what is on each lane, from the top: its name, entries of the time line, a colour
  ["moves", ["move", "gain", "placement"], "#2aa876"],
  ["ranks come, go", ["change", "members"], "#3b82f6"],
  ["losses, recovery", ["loss"], "#d1495b"],
  ["saves", ["checkpoint"], "#7c8794"],
  ["links", ["links"], "#b65fcf"],
  ["alarms", ["alarm"], "#f08c2e"],
  ["start, end", ["start", "end"], "#0f9bb0"],
];

export class TimeLine {
  constructor(view) {
    this.view = view;
    [this.span, this.ranges] = [[0, 1], new Map()];
    const curve = (label, height, lines, options = {}) => new Curves(this, label, height, lines, options);
    this.phases = new Phases(this);
    this.lanes = new Lanes(this);
    this.curves = [
      curve("Loss", 190, [["loss", "train", "#3b82f6"], ["eval_loss", "held out", "#f08c2e"]], { left: "nats a token" }),
      curve("Throughput", 190, [["tokens_per_second", "tokens/s", "#2aa876"]], { left: "tokens/s", zero: true, form: "0,0" }),
      curve("Balance", 190, [["balancedness", "balancedness of ranks", "#3b82f6"], ["worst_expert_load", "hottest expert / mean", "#f08c2e"]], { left: "ratio", zero: true }),
      curve("Bytes between nodes and inside", 190, [["bytes_inter_node", "between nodes", "#f08c2e"], ["bytes_intra_node", "inside nodes", "#3b82f6"]], { left: "a step", zero: true, form: "0.[0]b" }),
    ];
    this.charts = [this.phases, this.lanes, ...this.curves].map((part) => part.chart);
  }

  get steps() { return this.view.state.steps; }

  column(name) { return this.steps.columns[name] ?? []; }

  // A range for one chart: models of Bokeh belong to one chart each, so all hear of the others' change here.
  range(chart) {
    const range = new Range1d({ start: this.span[0], end: this.span[1] });
    this.ranges.set(chart, range);
    range.connect(range.change, () => { if (this.ranges.get(chart) === range) this.show(range.start, range.end); });
    return range;
  }

  show(start, end) {
    if (start === this.span[0] && end === this.span[1]) return;
    this.span = [start, end];
    for (const range of this.ranges.values()) range.setv({ start, end });
  }

  // The whole run, unless the reader has zoomed in.
  fit(anew = false) {
    const { step } = this.steps;
    const whole = [Math.min(step[0] ?? 0, 0), Math.max(step.at(-1) ?? 1, 1)];
    if (anew || !this.whole || (this.span[0] === this.whole[0] && this.span[1] === this.whole[1])) this.show(...whole);
    this.whole = whole;
  }

  // Number of the step that is nearest to x; -1: there is none.
  at(x) {
    const { step } = this.steps;
    let [low, high] = [0, step.length - 1];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (step[middle] <= x) low = middle; else high = middle;
    }
    return step.length && Math.abs(step[high] - x) < Math.abs(step[low] - x) ? high : step.length ? low : -1;
  }

  cursor(key, last) {
    const { step } = this.steps;
    if (key === "Home" || key === "End") return { x: step.at(key === "Home" ? 0 : -1) ?? 0, y: 0 };
    if (key === "+" || key === "-") {
      const [start, end] = this.span;
      const [middle, half] = [last?.x ?? (start + end) / 2, (end - start) * (key === "+" ? 0.25 : 1)];
      this.show(Math.max(this.whole[0], middle - half), Math.min(this.whole[1], middle + half));
      return last;
    }
    const way = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[key];
    if (!way || !step.length) return null;
    const at = last ? this.at(last.x) + way : way > 0 ? 0 : step.length - 1;
    return { x: step[Math.max(0, Math.min(step.length - 1, at))], y: 0 };
  }

  // The place of the version that is looked at, as a line over every chart.
  mark(chart, figure, low, high) {
    chart.glyph(figure, "segment", "version", {
      x0: { field: "x" }, x1: { field: "x" }, y0: { field: "y0" }, y1: { field: "y1" }, line_color: property("text"), line_dash: "dashed", line_width: 1.5,
      level: "overlay", // which is painted without what lies below it
    });
    chart.marks = [low, high];
  }

  drawMark(chart) {
    const step = this.view.told(this.view.version)?.step;
    const at = known(step) ? [step] : [];
    chart.set("version", { x: at, y0: at.map(() => chart.marks[0]), y1: at.map(() => chart.marks[1]) });
  }

  redraw() {
    this.fit();
    for (const chart of this.charts) chart.redraw();
  }

  redrawMarks() {
    for (const chart of this.charts) chart.change(() => this.drawMark(chart));
  }
}

class Phases {
  constructor(time) {
    this.time = time;
    this.chart = new Chart("Seconds of each step by phase. Arrow keys walk over steps, plus and minus zoom.", 240, {
      build: (chart) => this.build(chart), draw: () => this.draw(), words: (x) => this.words(x), cursor: (key, at) => time.cursor(key, at),
    });
  }

  // [{name, colour, group, words}] in the order of the stack.
  get shown() { return this.time.view.source.summary.phases; }

  build(chart) {
    this.names = this.shown.map((p) => p.name).join(" ");
    const figure = chart.start({ x: this.time.range(chart), y: [0, 1], zoom: true, left: "seconds" });
    figure.xgrids.forEach((grid) => { grid.visible = false; });
    for (const { name, colour } of this.shown) {
      chart.glyph(figure, "varea", name, { x: { field: "x" }, y1: { field: "low" }, y2: { field: "high" }, fill_color: colour, fill_alpha: 0.92 });
    }
    this.time.mark(chart, figure, 0, 1e9);
    figure.on_event("doubletap", () => this.time.fit(true));
    return figure;
  }

  draw() {
    if (this.names !== this.shown.map((p) => p.name).join(" ")) {
      this.chart.rebuild();
      return;
    }
    const { step, phase_seconds: phases } = this.time.steps;
    const x = Float64Array.from(step);
    let low = new Float64Array(x.length);
    for (const { name } of this.shown) {
      const high = low.map((value, i) => value + (phases[name]?.[i] ?? 0));
      this.chart.set(name, { x, low, high });
      low = high;
    }
    // One slow step, the first as a rule, must not flatten the others.
    const sorted = [...low].sort((a, b) => a - b);
    const usual = 1.6 * (sorted[Math.floor(0.95 * (sorted.length - 1))] ?? 1);
    this.chart.figure.y_range.end = Math.max(Math.min(usual, 1.08 * (sorted.at(-1) ?? 1)), 1e-6);
    this.time.drawMark(this.chart);
  }

  words(x) {
    const at = this.time.at(x);
    const { step, phase_seconds: phases } = this.time.steps;
    if (at < 0) return null;
    const told = this.shown.map(({ name }) => [name, phases[name]?.[at] ?? 0]).filter(([, value]) => value > 0);
    const whole = told.reduce((sum, [, value]) => sum + value, 0);
    return [`Step ${step[at]}: ${seconds(this.time.column("step_seconds")[at] ?? whole)}`,
      ...told.map(([name, value]) => `${name}: ${seconds(value)}, ${share(value / whole)}`)];
  }
}

class Curves {
  constructor(time, title, height, lines, options) {
    Object.assign(this, { time, title, lines, options });
    this.chart = new Chart(`${title}, over steps. Arrow keys walk, plus and minus zoom.`, height, {
      build: (chart) => this.build(chart), draw: () => this.draw(), words: (x) => this.words(x), cursor: (key, at) => time.cursor(key, at),
    });
  }

  get told() { return this.lines.filter(([name]) => this.time.column(name).some(known)); }

  build(chart) {
    const figure = chart.start({ x: this.time.range(chart), y: [0, 1], zoom: true, left: this.options.left });
    figure.xgrids.forEach((grid) => { grid.visible = false; });
    if (this.options.form) plainNumbers(figure.yaxis, this.options.form);
    for (const [name, , colour] of this.lines) {
      chart.glyph(figure, "line", name, { x: { field: "x" }, y: { field: "y" }, line_color: colour, line_width: 1.7 });
      chart.glyph(figure, "scatter", `${name} points`, { x: { field: "x" }, y: { field: "y" }, fill_color: colour, line_color: null, size: 5 });
    }
    this.time.mark(chart, figure, -1e12, 1e12);
    figure.on_event("doubletap", () => this.time.fit(true));
    return figure;
  }

  draw() {
    const { step } = this.time.steps;
    let [low, high] = [Infinity, -Infinity];
    for (const [name] of this.lines) {
      const column = this.time.column(name);
      const at = column.map((value, i) => (known(value) ? i : -1)).filter((i) => i >= 0);
      const [x, y] = [at.map((i) => step[i]), at.map((i) => column[i])];
      for (const value of y) [low, high] = [Math.min(low, value), Math.max(high, value)];
      const few = at.length && at.length <= Math.max(2, step.length / 8);
      this.chart.set(name, { x, y });
      this.chart.set(`${name} points`, few ? { x, y } : { x: [], y: [] });
    }
    if (!(high >= low)) return;
    const room = 0.07 * (high - low || Math.abs(high) || 1);
    Object.assign(this.chart.figure.y_range, { start: this.options.zero ? 0 : low - room, end: high + room });
    this.time.drawMark(this.chart);
  }

  words(x) {
    const at = this.time.at(x);
    if (at < 0) return null;
    return [`Step ${this.time.steps.step[at]}`, ...this.told.filter(([name]) => known(this.time.column(name)[at]))
      .map(([name, words]) => `${words}: ${number(this.time.column(name)[at], 4)}`)];
  }
}

class Lanes {
  constructor(time) {
    this.time = time;
    this.chart = new Chart("What happened, on lanes over steps. Arrow keys walk from event to event, Enter goes to its placement.", 34 + 24 * LANES.length, {
      build: (chart) => this.build(chart), draw: () => this.draw(), words: (x, y) => this.words(x, y), act: (x, y) => this.act(x, y),
      cursor: (key, at) => this.cursor(key, at),
    });
  }

  // [{...entry, x, y, colour}] in the order of time.
  get entries() {
    const { view } = this.time;
    const line = view.state.events.time_line;
    return line.flatMap((entry) => {
      const lane = LANES.findIndex(([, kinds]) => kinds.includes(entry.entry));
      return lane < 0 || entry.step === null ? [] : [{ ...entry, x: entry.step, y: LANES.length - lane - 0.5, colour: LANES[lane][2] }];
    });
  }

  build(chart) {
    const figure = chart.start({ x: this.time.range(chart), y: [0, LANES.length], below: "step" });
    label(figure.yaxis, LANES.map(([name], i) => ({ at: LANES.length - i - 0.5, text: name })));
    figure.xgrids.forEach((grid) => { grid.visible = false; });
    chart.glyph(figure, "scatter", "events", {
      x: { field: "x" }, y: { field: "y" }, fill_color: { field: "c" }, line_color: property("card"), line_width: 1.2, size: 12, marker: { field: "m" },
    });
    this.time.mark(chart, figure, 0, LANES.length);
    return figure;
  }

  draw() {
    const found = this.entries;
    this.chart.set("events", {
      x: found.map((e) => e.x), y: found.map((e) => e.y), c: found.map((e) => e.colour),
      m: found.map((e) => ({ gain: "diamond", move: "circle", placement: "square", loss: "inverted_triangle" }[e.entry] ?? "circle")),
    });
    this.time.drawMark(this.chart);
  }

  nearest(x, y) {
    const reach = (this.time.span[1] - this.time.span[0]) * 9 / this.chart.width;
    const close = this.entries.filter((e) => Math.abs(e.x - x) <= reach && Math.abs(e.y - y) < 0.5);
    return close.sort((a, b) => Math.abs(a.x - x) - Math.abs(b.x - x))[0] ?? null;
  }

  words(x, y) {
    const found = this.nearest(x, y);
    return found && eventWords(found);
  }

  act(x, y) {
    const found = this.nearest(x, y);
    const { view } = this.time;
    const version = found?.fields?.placement_version ?? view.state.placement.versions.findLast((v) => found && v.step <= found.step)?.version;
    if (view.source.placements.versions.includes(version)) view.see(version);
  }

  cursor(key, last) {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[key];
    const found = this.entries;
    if (!way || !found.length) return null;
    const now = last ? found.findIndex((e) => e.x === last.x && e.y === last.y) : -1;
    return found[Math.max(0, Math.min(found.length - 1, now < 0 ? (way > 0 ? 0 : found.length - 1) : now + way))];
  }
}

// What an event says, with its figures: the clocks of a recovery, the predicted and the measured gain of a move.
export function eventWords(event) {
  const { fields } = event;
  const lines = [event.message];
  for (const [name, value] of Object.entries(fields.seconds && typeof fields.seconds === "object" ? fields.seconds : {})) {
    lines.push(`${name.replaceAll("_", " ")}: ${seconds(value)}`);
  }
  for (const name of ["gain_predicted", "gain_measured", "move_predicted", "move_seconds"]) {
    if (known(fields[name])) lines.push(`${name.replaceAll("_", " ")}: ${seconds(fields[name])}`);
  }
  return [`${event.kind}, after step ${event.step} (${clock(event.time)} UTC)`, ...lines];
}
