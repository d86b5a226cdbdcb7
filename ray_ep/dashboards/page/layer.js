// One layer's experts: their load, which fire together (ordered by placement), and where tokens go in the next layer.

import { Chart, IMAGE, arrows, label, thinned } from "ray_ep/chart.js";
import { group, pixelOf, property, ratios } from "ray_ep/colour.js";
import { figure as number, many, share } from "ray_ep/format.js";

const FLOWS = 160; // of the greatest, drawn

// What the driver packs: the upper triangle without its diagonal, a byte a pair; 0: not known, else 1..255 for 1/8 .. 8.
export function unpacked(base64, experts) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const found = new Float32Array(experts * experts).fill(NaN);
  let at = 0;
  for (let a = 0; a < experts; a += 1) {
    for (let b = a + 1; b < experts; b += 1, at += 1) {
      if (bytes[at]) found[a * experts + b] = found[b * experts + a] = 2 ** (((bytes[at] - 1) / 254) * 6 - 3);
    }
  }
  return found;
}

export class LoadBars {
  constructor(view) {
    this.view = view;
    this.chart = new Chart("Load of each expert of the layer, by rank. Arrow keys walk.", 230, {
      build: (chart) => this.build(chart), draw: () => this.draw(),
      words: (x) => this.words(Math.floor(x)),
      act: (x) => { const e = this.expert(Math.floor(x)); if (e !== undefined) view.chooseExpert(view.layer, e); },
      cursor: (key, at) => arrows(key, at, view.experts, 1),
    });
  }

  expert(at) { return this.view.order(this.view.layer).order[at]; }

  build(chart) {
    const figure = chart.start({ x: [0, this.view.experts], y: [0, 1], left: "load / mean", below: "experts, in the order of the ranks that own them" });
    figure.xgrids.forEach((grid) => { grid.visible = false; });
    chart.glyph(figure, "vbar", "bars", { x: { field: "x" }, top: { field: "top" }, width: 0.86, fill_color: { field: "c" }, line_color: null });
    chart.glyph(figure, "line", "mean", { x: { field: "x" }, y: { field: "y" }, line_color: property("text"), line_dash: "dashed", line_width: 1 });
    chart.glyph(figure, "vbar", "chosen", { x: { field: "x" }, top: { field: "top" }, width: 1, fill_color: null, line_color: property("text"), line_width: 2 });
    return figure;
  }

  draw() {
    const { view, chart } = this;
    const ratio = view.ratios?.[view.layer];
    const { order, firsts, owner } = view.order(view.layer);
    const top = order.map((e) => ratio?.[e] ?? 0);
    const ranks = view.ranks();
    const many = new Set(ranks.map((r) => r.node)).size > 1;
    chart.figure.y_range.end = Math.max(1.15, 1.06 * Math.max(...top));
    label(chart.figure.xaxis, thinned(firsts.map((f) => ({ at: f.at, text: ` r${f.rank}` })), chart.width / 34));
    chart.set("bars", { x: order.map((_, i) => i + 0.5), top, c: order.map((e) => group(many ? ranks[owner(e)]?.node ?? 0 : owner(e))) });
    chart.set("mean", { x: [0, view.experts], y: [1, 1] });
    const at = view.expert === null ? -1 : order.indexOf(view.expert);
    chart.set("chosen", at < 0 ? { x: [], top: [] } : { x: [at + 0.5], top: [Math.max(top[at], 0.02)] });
  }

  words(at) {
    const expert = this.expert(at);
    if (expert === undefined) return null;
    const { view } = this;
    const { owner } = view.order(view.layer);
    return [`Expert ${expert}`, `owned by rank ${owner(expert)}`, ...view.loadWords(view.layer, expert, 1)];
  }
}

export class Company {
  constructor(view) {
    this.view = view;
    this.pairs = null;
    this.chart = new Chart("Experts that fire together, ordered by placement. Arrow keys walk.", 430, {
      build: (chart) => this.build(chart), draw: () => this.draw(),
      words: (x, y) => this.words(Math.floor(x), Math.floor(y)), cursor: (key, at) => arrows(key, at, view.experts, view.experts),
    });
  }

  // The layer's pairs, as `unpacked` gives them; null: not known.
  take(pairs) {
    this.pairs = pairs;
    this.chart.redraw();
  }

  build(chart) {
    const { experts } = this.view;
    const figure = chart.start({ x: [0, experts], y: [0, experts] });
    figure.xgrids.concat(figure.ygrids).forEach((grid) => { grid.visible = false; });
    chart.glyph(figure, "image_rgba", "pairs", IMAGE);
    chart.glyph(figure, "segment", "ranks", {
      x0: { field: "x0" }, y0: { field: "y0" }, x1: { field: "x1" }, y1: { field: "y1" }, line_color: property("text"), line_alpha: { field: "a" }, line_width: { field: "w" },
    });
    return figure;
  }

  draw() {
    const { view, chart } = this;
    const { experts } = view;
    const { order, firsts } = view.order(view.layer);
    const [ramp, unknown] = [ratios(), pixelOf(property("sunk"))];
    const pixels = new Uint32Array(experts * experts).fill(unknown);
    for (let row = 0; this.pairs && row < experts; row += 1) {
      const from = order[row] * experts;
      const line = (experts - 1 - row) * experts;
      for (let column = 0; column < experts; column += 1) {
        const ratio = this.pairs[from + order[column]];
        if (ratio === ratio) pixels[line + column] = ramp.pixel(ratio);
      }
    }
    chart.image("pairs", pixels, experts, experts);
    this.drawRanks(firsts);
  }

  drawRanks(firsts) {
    const { view: { experts }, chart } = this;
    const ranks = this.view.ranks();
    const edges = firsts.slice(1);
    const starts = firsts.map((f, i) => i > 0 && ranks[f.rank]?.node !== ranks[firsts[i - 1].rank]?.node).slice(1);
    const shown = edges.map((f, i) => ({ at: f.at, node: starts[i] })).filter((edge) => edge.node || edges.length <= 40);
    const both = (across, down) => [...shown.map(across), ...shown.map(down)];
    chart.set("ranks", {
      x0: both((e) => e.at, () => 0), x1: both((e) => e.at, () => experts),
      y0: both(() => 0, (e) => experts - e.at), y1: both(() => experts, (e) => experts - e.at),
      w: both((e) => (e.node ? 1.6 : 0.8), (e) => (e.node ? 1.6 : 0.8)), a: both((e) => (e.node ? 0.9 : 0.35), (e) => (e.node ? 0.9 : 0.35)),
    });
    const marks = firsts.map((f, i) => ({ at: (f.at + (firsts[i + 1]?.at ?? experts)) / 2, text: `r${f.rank}` }));
    label(chart.figure.xaxis, thinned(marks, chart.width / 34));
    label(chart.figure.yaxis, thinned(marks.map(({ at, text }) => ({ at: experts - at, text })), chart.height / 20));
  }

  words(column, y) {
    const { order, owner } = this.view.order(this.view.layer);
    const [a, b] = [order[this.view.experts - 1 - y], order[column]];
    if (a === undefined || b === undefined || a === b) return null;
    const ratio = this.pairs?.[a * this.view.experts + b];
    const where = owner(a) === owner(b) ? `both owned by rank ${owner(a)}` : `owned by ranks ${owner(a)} and ${owner(b)}`;
    const often = ratio !== ratio || ratio === undefined ? "how often together is not known"
      : `together ${number(ratio, 2)} times as often as their loads alone would give`;
    return [`Experts ${a} and ${b}`, often, where];
  }
}

export class Flows {
  constructor(view) {
    this.view = view;
    this.flows = [];
    this.chart = new Chart("Transitions to the next layer, experts ordered by placement", 430, {
      build: (chart) => this.build(chart), draw: () => this.draw(), words: (x, y) => this.words(x, y),
    });
  }

  // found: {flows: [[expert, expert of the next layer, tokens]], all: tokens of all}; null: not known.
  take(found) {
    this.found = found;
    this.chart.redraw();
  }

  build(chart) {
    const { experts } = this.view;
    const figure = chart.start({ x: [-0.16, 1.16], y: [0, experts] });
    figure.xgrids.concat(figure.ygrids).forEach((grid) => { grid.visible = false; });
    figure.yaxis.visible = false;
    chart.glyph(figure, "patches", "flows", { xs: { field: "xs" }, ys: { field: "ys" }, fill_color: { field: "c" }, fill_alpha: { field: "a" }, line_color: null });
    const box = { left: { field: "l" }, right: { field: "r" }, bottom: { field: "b" }, top: { field: "t" } };
    chart.glyph(figure, "quad", "ranks", { ...box, fill_color: { field: "c" }, line_color: property("card"), line_width: 1 });
    const text = { x: { field: "x" }, y: { field: "y" }, text: { field: "text" }, text_align: { field: "align" } };
    chart.glyph(figure, "text", "names", { ...text, text_baseline: "middle", text_color: property("muted"), text_font_size: "11px" });
    return figure;
  }

  draw() {
    const { view, chart, found } = this;
    const next = Math.min(view.layer + 1, view.layers - 1);
    const sides = [view.order(view.layer), view.order(next)];
    label(chart.figure.xaxis, [{ at: 0, text: `layer ${view.layer}` }, { at: 1, text: `layer ${next}` }]);
    const ranks = view.ranks();
    const apart = new Set(ranks.map((r) => r.node)).size > 1;
    const colour = (rank) => group(apart ? ranks[rank]?.node ?? 0 : rank);
    const kept = (found?.flows ?? []).slice(0, FLOWS);
    const place = sides.map(({ order }) => { const at = new Uint16Array(order.length); order.forEach((e, i) => { at[e] = i; }); return at; });
    const scale = widths(kept, place, view.experts);
    this.flows = stacked(kept, place, scale, view.experts);
    const home = (flow) => ranks[sides[0].owner(flow.from)]?.node === ranks[sides[1].owner(flow.to)]?.node;
    chart.set("flows", {
      xs: this.flows.map((f) => f.xs), ys: this.flows.map((f) => f.ys),
      c: this.flows.map((f) => colour(sides[0].owner(f.from))),
      a: this.flows.map((f) => (view.expert !== null && f.from !== view.expert ? 0.08 : apart && home(f) ? 0.65 : 0.38)),
    });
    const bars = { l: [], r: [], b: [], t: [], c: [] };
    const names = { x: [], y: [], text: [], align: [] };
    sides.forEach(({ firsts }, side) => firsts.forEach((f, i) => {
      const [low, high] = [view.experts - (firsts[i + 1]?.at ?? view.experts), view.experts - f.at];
      bars.l.push(side ? 1 : -0.025); bars.r.push(side ? 1.025 : 0); bars.b.push(low); bars.t.push(high); bars.c.push(colour(f.rank));
      if ((high - low) / view.experts > 0.025) {
        names.x.push(side ? 1.04 : -0.04); names.y.push((low + high) / 2); names.text.push(`rank ${f.rank}`); names.align.push(side ? "left" : "right");
      }
    }));
    chart.set("ranks", bars);
    chart.set("names", names);
  }

  words(x, y) {
    if (x < 0 || x > 1) return null;
    const [eased, height] = [x * x * (3 - 2 * x), (f) => f.w / 2 + 0.15];
    const hit = this.flows.filter((f) => Math.abs(f.y0 + (f.y1 - f.y0) * eased - y) <= height(f)).at(-1);
    if (!hit) return null;
    const { view } = this;
    const owners = [view.order(view.layer).owner(hit.from), view.order(view.layer + 1).owner(hit.to)];
    return [`Expert ${hit.from} of layer ${view.layer} to expert ${hit.to} of layer ${view.layer + 1}`,
      `${number(hit.tokens)} tokens, ${share(hit.tokens / this.found.all)} of all`, `ranks ${owners[0]} and ${owners[1]}`];
  }

  get caption() {
    const { found, view } = this;
    if (!found) return "Transitions are not known yet, or this is the last layer, which has none.";
    const drawn = Math.min(found.flows.length, FLOWS);
    return `The ${many(drawn, "strongest flow")} of tokens from layer ${view.layer} to ${view.layer + 1}; those in stronger colour stay on their node.`;
  }
}

// How many experts' heights a token is wide, so that no expert's flows are wider than 1.6 places.
function widths(flows, place, experts) {
  const sums = [new Float64Array(experts), new Float64Array(experts)];
  for (const [from, to, tokens] of flows) {
    sums[0][place[0][from]] += tokens;
    sums[1][place[1][to]] += tokens;
  }
  return Math.max(1.6, experts / 60) / Math.max(1, ...sums[0], ...sums[1]);
}

function stacked(flows, place, scale, experts) {
  const middle = ([from, to]) => [experts - place[0][from] - 0.5, experts - place[1][to] - 0.5];
  return flows.map((flow) => {
    const [y0, y1] = middle(flow);
    const w = Math.max(flow[2] * scale, 0.06);
    const [xs, top, bottom] = [[], [], []];
    for (let i = 0; i <= 20; i += 1) {
      const t = i / 20;
      const y = y0 + (y1 - y0) * t * t * (3 - 2 * t);
      xs.push(t);
      top.push(y + w / 2);
      bottom.push(y - w / 2);
    }
    return { from: flow[0], to: flow[1], tokens: flow[2], y0, y1, w, xs: [...xs, ...[...xs].reverse()], ys: [...top, ...bottom.reverse()] };
  });
}
