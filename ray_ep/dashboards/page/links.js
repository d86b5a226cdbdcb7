// The measured links, rank to rank, as a square of colours; or, on the same square, what travels over them now.

import { Chart, IMAGE, arrows, label, thinned } from "ray_ep/chart.js";
import { pixelOf, property, speeds } from "ray_ep/colour.js";
import { bytes, known, rate, seconds } from "ray_ep/format.js";

const WRITTEN = 12; // ranks up to which each link has its figure in its field

export class Links {
  // what: "bandwidth" (bytes/s) or "sent" (bytes a step).
  constructor(view, what) {
    [this.view, this.what] = [view, what];
    const words = what === "sent" ? "Bytes that ranks send each other in a step" : "Measured bandwidth from rank to rank";
    this.chart = new Chart(`${words}. Arrow keys walk.`, 400, {
      build: (chart) => this.build(chart), draw: () => this.draw(),
      words: (x, y) => this.words(this.size - 1 - Math.floor(y), Math.floor(x)), cursor: (key, at) => arrows(key, at, this.size, this.size),
    });
  }

  get table() { return this.view.state.links?.[this.what] ?? null; }
  get size() { return this.table?.length ?? 0; }

  // Off the diagonal; null where there is no figure.
  value(from, to) {
    const value = this.table?.[from]?.[to];
    return from !== to && known(value) && value > 0 ? value : null;
  }

  get ramp() {
    const some = this.table.flatMap((row, a) => row.map((_, b) => this.value(a, b))).filter(known);
    return speeds(Math.min(...some, 1e15), Math.max(...some, 1));
  }

  build(chart) {
    const { size } = this;
    this.drawn = size;
    const figure = chart.start({ x: [0, size], y: [0, size], left: "from rank", below: "to rank" });
    figure.xgrids.concat(figure.ygrids).forEach((grid) => { grid.visible = false; });
    const marks = Array.from({ length: size }, (_, r) => ({ at: r + 0.5, text: r }));
    label(figure.xaxis, thinned(marks, chart.width / 30));
    label(figure.yaxis, thinned(marks.map(({ at, text }) => ({ at: size - at, text })), chart.height / 18));
    chart.glyph(figure, "image_rgba", "links", IMAGE);
    chart.glyph(figure, "segment", "nodes", { x0: { field: "x0" }, y0: { field: "y0" }, x1: { field: "x1" }, y1: { field: "y1" }, line_color: property("text"), line_width: 1.2, line_alpha: 0.7 });
    chart.glyph(figure, "text", "figures", {
      x: { field: "x" }, y: { field: "y" }, text: { field: "text" }, text_color: { field: "c" }, text_align: "center", text_baseline: "middle", text_font_size: "10.5px",
    });
    return figure;
  }

  draw() {
    const { chart, size } = this;
    if (this.drawn !== size) {
      chart.rebuild();
      return;
    }
    const [ramp, unknown] = [this.ramp, pixelOf(property("sunk"))];
    const pixels = new Uint32Array(size * size).fill(unknown);
    const figures = { x: [], y: [], text: [], c: [] };
    for (let from = 0; from < size; from += 1) {
      for (let to = 0; to < size; to += 1) {
        const value = this.value(from, to);
        if (value === null) continue;
        pixels[(size - 1 - from) * size + to] = ramp.pixel(value);
        if (size > WRITTEN) continue;
        figures.x.push(to + 0.5); figures.y.push(size - from - 0.5); figures.c.push(ramp.ink(value));
        figures.text.push(this.what === "sent" ? bytes(value) : rate(value).replace(" ", "\n"));
      }
    }
    chart.image("links", pixels, size, size);
    chart.set("figures", figures);
    const { node_of: nodes = [] } = this.view.state.links;
    const edges = (nodes ?? []).flatMap((node, r) => (r && nodes[r - 1] !== node ? [r] : []));
    chart.set("nodes", {
      x0: [...edges, ...edges.map(() => 0)], x1: [...edges, ...edges.map(() => size)],
      y0: [...edges.map(() => 0), ...edges.map((e) => size - e)], y1: [...edges.map(() => size), ...edges.map((e) => size - e)],
    });
  }

  words(from, to) {
    if (from < 0 || to < 0 || from >= this.size || to >= this.size || from === to) return null;
    const { bandwidth, latency, sent } = this.view.state.links;
    const lines = [];
    if (known(bandwidth?.[from]?.[to])) lines.push(`${rate(bandwidth[from][to])} measured, ${seconds(latency?.[from]?.[to])} until it begins`);
    if (known(sent?.[from]?.[to])) lines.push(`${bytes(sent[from][to])} a step now`);
    return [`Rank ${from} to rank ${to}`, ...(lines.length ? lines : ["not measured"])];
  }
}
