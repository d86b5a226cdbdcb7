// All layers at once: a row a layer, a column a slot, ranks side by side and nodes apart; colour is the slot's load.

import { Chart, IMAGE, arrows, label, thinned } from "ray_ep/chart.js";
import { loads, pixelOf, property } from "ray_ep/colour.js";
import { holders, slotAt } from "ray_ep/placements.js";

const OUTLINED = 400; // moved slots that get an outline of their own; of more the others fade

export class Overview {
  constructor(view) {
    this.view = view;
    this.chart = new Chart("Load of all slots, layers by ranks. Arrow keys walk, Enter chooses.", this.height(), {
      build: (chart) => this.build(chart), draw: () => this.draw(),
      words: (x, y) => this.at(x, y, (layer, rank, slot) => view.describe(layer, rank, slot)),
      act: (x, y) => this.at(x, y, (layer, rank, slot) => this.choose(layer, rank, slot)),
      cursor: (key, at) => this.cursor(key, at),
    });
  }

  height() { return Math.round(Math.max(120, Math.min(430, 26 * this.view.layers))) + 34; }

  // The columns: {of: [rank, slot] or null for what parts ranks, marks: where ranks and nodes have their names}.
  columns() {
    const { placement } = this.view;
    const ranks = [...this.view.ranks()].sort((a, b) => a.node - b.node || a.rank - b.rank);
    const [of, first] = [[], new Array(ranks.length)];
    const wide = placement.ranks * placement.width;
    const each = Math.max(1, Math.round(160 / wide)); // columns of a slot: of few, so that what parts them is narrow
    const gap = wide > 600 ? 0 : Math.max(1, Math.round(placement.width * each / 12));
    ranks.forEach(({ rank, node }, i) => {
      if (i) of.push(...Array(ranks[i - 1].node === node ? gap : Math.max(2, Math.round(wide * each / 80), Math.round(1.6 * gap))).fill(null));
      first[rank] = of.length;
      for (let at = 0; at < placement.width * each; at += 1) of.push([rank, Math.floor(at / each)]);
    });
    return { of, first, each, key: `${ranks.map((r) => [r.rank, r.node])} ${placement.width}` };
  }

  build(chart) {
    this.grid = this.columns();
    const { placement, layers } = this.view;
    const figure = chart.start({ x: [0, this.grid.of.length], y: [0, layers], left: "MoE layer" });
    figure.xgrids.concat(figure.ygrids).forEach((grid) => { grid.visible = false; });
    const middles = this.grid.first.map((at, rank) => ({ at: at + placement.width * this.grid.each / 2, text: placement.ranks > 24 ? rank : `rank ${rank}` }));
    label(figure.xaxis, thinned(middles.sort((a, b) => a.at - b.at), chart.width / 52));
    label(figure.yaxis, thinned(Array.from({ length: layers }, (_, l) => ({ at: layers - l - 0.5, text: l })), chart.height / 20));
    chart.glyph(figure, "image_rgba", "slots", IMAGE);
    const outline = { left: { field: "l" }, right: { field: "r" }, bottom: { field: "b" }, top: { field: "t" }, fill_color: null };
    chart.glyph(figure, "quad", "row", { ...outline, line_color: property("text"), line_width: 1.5 });
    chart.glyph(figure, "quad", "moved", { ...outline, line_color: property("good"), line_width: 2 });
    chart.glyph(figure, "quad", "chosen", { ...outline, line_color: property("text"), line_width: 2.5 });
    return figure;
  }

  draw() {
    const { view, chart } = this;
    if (this.columns().key !== this.grid.key) {
      chart.rebuild();
      return;
    }
    const { placement, layers } = view;
    const [{ of }, shares, ramp] = [this.grid, view.shares(), loads()];
    const moved = view.moves ? view.source.placements.moved(view.version) : [];
    const came = new Set(moved.map((m) => m.index));
    const empty = pixelOf(property("sunk"));
    const pixels = new Uint32Array(layers * of.length);
    for (let layer = 0; layer < layers; layer += 1) {
      const row = (layers - 1 - layer) * of.length;
      for (let x = 0; x < of.length; x += 1) {
        if (!of[x]) continue;
        const index = slotAt(placement, layer, of[x][0], of[x][1]);
        const colour = shares[index] < 0 ? empty : ramp.pixel(shares[index]);
        pixels[row + x] = view.moves && !came.has(index) ? ((colour & 0xffffff) | 0x38000000) >>> 0 : colour;
      }
    }
    chart.image("slots", pixels, layers, of.length);
    chart.set("moved", this.outlines(moved.length <= OUTLINED ? moved : []));
    chart.set("row", { l: [0], r: [of.length], b: [layers - 1 - view.layer], t: [layers - view.layer] });
    this.drawChosen();
  }

  drawChosen() {
    const { view } = this;
    const slots = view.expert === null ? [] : holders(view.placement, view.layer, view.expert);
    this.chart.set("chosen", this.outlines(slots.map((s) => ({ ...s, layer: view.layer }))));
  }

  outlines(slots) {
    const { first, each } = this.grid;
    const left = slots.map(({ rank, slot }) => first[rank] + slot * each);
    const bottom = slots.map(({ layer }) => this.view.layers - 1 - layer);
    return { l: left, r: left.map((x) => x + each), b: bottom, t: bottom.map((y) => y + 1) };
  }

  at(x, y, answer) {
    const [column, layer] = [this.grid?.of[Math.floor(x)], this.view.layers - 1 - Math.floor(y)];
    return column && layer >= 0 && layer < this.view.layers ? answer(layer, ...column) : null;
  }

  choose(layer, rank, slot) {
    const expert = this.view.placement.slots[slotAt(this.view.placement, layer, rank, slot)];
    if (expert >= 0) this.view.chooseExpert(layer, expert);
    else this.view.chooseLayer(layer);
  }

  cursor(key, at) {
    const { of } = this.grid;
    const slot = (place) => of[Math.floor(place.x)]?.join();
    let next = arrows(key, at, of.length, this.view.layers);
    while (next && at && next.y === at.y && (!slot(next) || slot(next) === slot(at))) {
      const further = arrows(key, next, of.length, this.view.layers);
      if (further.x === next.x) return at;
      next = further;
    }
    return next;
  }
}
