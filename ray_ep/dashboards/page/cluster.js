// One layer on the cluster: nodes as boxes, ranks and slots in them, replicas linked, links between nodes as wide as fast.
//
// Data coordinates are pixels of the chart, y upwards. Where all ranks share a node, or each has one of its own, the
// boxes are ranks.

import { Chart, arrows, fitted } from "ray_ep/chart.js";
import { group, loads, property, speeds } from "ray_ep/colour.js";
import { bytes, known, many, rate } from "ray_ep/format.js";
import { holders, slotAt } from "ray_ep/placements.js";

const [PAD, HEAD, GAP, ROW] = [8, 20, 14, 4]; // pixels: inside a box, its name, between boxes, between ranks
const [LEAST, MOST, BAND] = [7, 40, 150]; // of a slot's side; of the room for links
const CURVE = 40; // points of a link

export class Cluster {
  constructor(view) {
    this.view = view;
    this.chart = new Chart("One layer on the cluster: nodes, ranks, slots and links. Arrow keys walk over slots.", 320, {
      build: (chart) => this.build(chart), draw: () => this.draw(),
      words: (x, y) => this.words(x, y), act: (x, y) => this.act(x, y), cursor: (key, at) => this.cursor(key, at),
    });
  }

  // ---- where everything lies

  // [{name, ranks}]: nodes, or single ranks.
  units() {
    const ranks = this.view.ranks();
    const nodes = [...new Set(ranks.map((r) => r.node))];
    if (nodes.length === 1 || nodes.length === ranks.length) {
      return ranks.map((r) => ({ name: `rank ${r.rank}`, ranks: [r.rank], note: r.host ?? `node ${r.node}` }));
    }
    return nodes.map((node) => {
      const members = ranks.filter((r) => r.node === node);
      return { name: `node ${node}`, ranks: members.map((r) => r.rank), note: members[0].host ?? "" };
    });
  }

  layout(width) {
    const units = this.units();
    const slots = this.view.placement.width;
    const { bandwidth, sent } = this.view.state.links ?? {};
    const linked = units.length > 1 && Boolean(sent || bandwidth?.some((row, a) => row.some((value, b) => a !== b && known(value))));
    const lines = linked && units.length > 4 ? 2 : 1;
    const across = Math.ceil(units.length / lines);
    const room = (width - GAP * (across - 1)) / across - 2 * PAD;
    const most = Math.max(...units.map((u) => u.ranks.length));
    const names = most > 1 ? 22 : 0;
    let columns = Math.min(slots, Math.max(1, Math.floor((room - names) / LEAST)));
    let side = Math.min(MOST, Math.floor((room - names) / columns));
    if (most === 1 && slots > 4) { // one rank a box: nearly a square of slots
      columns = Math.min(columns, Math.max(4, Math.ceil(Math.sqrt(2 * slots))));
      side = Math.min(MOST, Math.floor(room / columns));
    }
    const rows = Math.ceil(slots / columns);
    const block = rows * side + (most > 1 ? ROW : 0);
    const high = HEAD + most * block + 2 * PAD;
    const band = linked ? BAND : 0;
    const height = lines * high + band + 4;
    const boxWidth = Math.min(room, names + columns * side) + 2 * PAD;
    const step = (width + GAP) / across;
    const boxes = units.map((unit, i) => {
      const [line, at] = [Math.floor(i / across), i % across];
      const left = at * step + (step - GAP - boxWidth) / 2;
      const top = height - 2 - line * (high + band);
      return { ...unit, left, top, right: left + boxWidth, bottom: top - high, line };
    });
    const cells = [];
    for (const box of boxes) {
      box.ranks.forEach((rank, k) => {
        for (let slot = 0; slot < slots; slot += 1) {
          const x = box.left + PAD + names + (slot % columns) * side;
          const y = box.top - PAD - HEAD - k * block - (Math.floor(slot / columns) + 1) * side;
          cells.push({ rank, slot, x, y });
        }
      });
    }
    return { boxes, cells, side, height, names, lines };
  }

  build(chart) {
    this.drawn = this.key;
    this.place = this.layout(chart.width);
    chart.height = this.place.height;
    chart.host.style.height = `${this.place.height}px`;
    this.linked = this.links();
    const figure = chart.start({ x: [0, chart.width], y: [0, this.place.height], axes: false });
    const box = { left: { field: "l" }, right: { field: "r" }, bottom: { field: "b" }, top: { field: "t" } };
    chart.glyph(figure, "multi_line", "links", {
      xs: { field: "xs" }, ys: { field: "ys" }, line_color: { field: "c" }, line_width: { field: "w" }, line_alpha: { field: "a" }, line_cap: "round",
    });
    const text = { x: { field: "x" }, y: { field: "y" }, text: { field: "text" }, text_baseline: "middle" };
    chart.glyph(figure, "text", "speeds", {
      ...text, text_align: "center", text_color: property("text"), text_font_size: "11.5px",
      background_fill_color: property("card"), background_fill_alpha: 0.85, padding: 2,
    });
    chart.glyph(figure, "quad", "boxes", { ...box, fill_color: property("sunk"), line_color: { field: "c" }, line_width: 1.5, border_radius: 6 });
    chart.glyph(figure, "quad", "slots", { ...box, fill_color: { field: "c" }, line_color: property("card"), line_width: this.place.side > 10 ? 1.5 : 0.5 });
    chart.glyph(figure, "text", "experts", { ...text, text_align: "center", text_color: { field: "c" }, text_font_size: this.place.side >= 24 ? "12px" : "9.5px" });
    chart.glyph(figure, "text", "names", { ...text, text_color: property("text"), text_font_size: "12px", text_font_style: "bold" });
    chart.glyph(figure, "text", "ranks", { ...text, text_align: "right", text_color: property("muted"), text_font_size: "10px" });
    chart.glyph(figure, "multi_line", "replicas", {
      xs: { field: "xs" }, ys: { field: "ys" }, line_color: property("accent"), line_width: { field: "w" }, line_alpha: { field: "a" },
    });
    chart.glyph(figure, "quad", "moved", { ...box, fill_color: null, line_color: property("good"), line_width: 2.5 });
    chart.glyph(figure, "quad", "chosen", { ...box, fill_color: null, line_color: property("text"), line_width: 3 });
    return figure;
  }

  get key() {
    const { placement } = this.view;
    return `${this.view.ranks().map((r) => r.node)} ${placement.width} ${this.view.state.changed.links}`;
  }

  // ---- drawing

  draw() {
    const { view, chart } = this;
    if (this.drawn !== this.key) {
      chart.rebuild();
      return;
    }
    const { boxes, cells, side, names } = this.place;
    const { placement, layer } = view;
    const [shares, ramp] = [view.shares(), loads()];
    const index = cells.map(({ rank, slot }) => slotAt(placement, layer, rank, slot));
    const quads = (found, by = 0) => ({
      l: found.map((c) => c.x + by), r: found.map((c) => c.x + side - by), b: found.map((c) => c.y + by), t: found.map((c) => c.y + side - by),
    });
    const sunk = property("line");
    chart.set("slots", { ...quads(cells), c: index.map((i) => (shares[i] < 0 ? sunk : ramp.css(shares[i]))) });
    const written = side >= 15 ? cells.filter((_, k) => placement.slots[index[k]] >= 0) : [];
    chart.set("experts", {
      x: written.map((c) => c.x + side / 2), y: written.map((c) => c.y + side / 2 - 1),
      text: written.map((c) => String(placement.slots[slotAt(placement, layer, c.rank, c.slot)])),
      c: written.map((c) => ramp.ink(shares[slotAt(placement, layer, c.rank, c.slot)])),
    });
    chart.set("boxes", {
      l: boxes.map((b) => b.left), r: boxes.map((b) => b.right), b: boxes.map((b) => b.bottom), t: boxes.map((b) => b.top),
      c: boxes.map((_, i) => group(i)),
    });
    const titles = (b) => fitted(b.right - b.left > 150 && b.note ? `${b.name}  ·  ${b.note}` : b.name, b.right - b.left - 2 * PAD);
    chart.set("names", { x: boxes.map((b) => b.left + PAD), y: boxes.map((b) => b.top - PAD - HEAD / 2 + 3), text: boxes.map(titles) });
    const first = names ? cells.filter((c) => c.slot === 0) : [];
    chart.set("ranks", { x: first.map((c) => c.x - 5), y: first.map((c) => c.y + side / 2), text: first.map((c) => String(c.rank)) });
    const moved = view.moves ? view.source.placements.moved(view.version).filter((m) => m.layer === layer) : [];
    chart.set("moved", quads(moved.map((m) => this.cell(m.rank, m.slot)), 1));
    this.drawLinks();
    this.drawChosen();
  }

  drawChosen() {
    if (!this.place) return;
    const { view, chart } = this;
    const { placement, layer, expert } = view;
    const { side } = this.place;
    const chosen = expert === null ? [] : holders(placement, layer, expert).map((h) => this.cell(h.rank, h.slot));
    chart.set("chosen", {
      l: chosen.map((c) => c.x), r: chosen.map((c) => c.x + side), b: chosen.map((c) => c.y), t: chosen.map((c) => c.y + side),
    });
    const lines = { xs: [], ys: [], w: [], a: [] };
    const seen = new Map();
    for (const cell of this.place.cells) {
      const found = placement.slots[slotAt(placement, layer, cell.rank, cell.slot)];
      if (found < 0) continue;
      const earlier = seen.get(found);
      seen.set(found, cell);
      if (!earlier) continue;
      const bent = curve(earlier.x + side / 2, earlier.y + side / 2, cell.x + side / 2, cell.y + side / 2, 0.12);
      lines.xs.push(bent.xs);
      lines.ys.push(bent.ys);
      lines.w.push(found === expert ? 3 : 1.2);
      lines.a.push(found === expert ? 1 : expert === null ? 0.55 : 0.15);
    }
    if (expert === null && lines.a.length > 24) lines.a.fill(0.28);
    chart.set("replicas", lines);
  }

  cell(rank, slot) { return this.place.cells.find((c) => c.rank === rank && c.slot === slot); }

  // ---- links between boxes

  // [{a, b (boxes), speed, back (bytes/s), sent, returned (bytes a step), xs, ys}]; the slowest link of their ranks counts.
  links() {
    const { bandwidth, sent } = this.view.state.links ?? {};
    const { boxes, height, lines } = this.place;
    const count = this.view.placement.ranks;
    const [measured, moved] = [bandwidth?.length === count, sent?.length === count];
    if (!measured && !moved) return [];
    const between = (table, from, to, fold, start) => boxes[from].ranks.flatMap((r) => boxes[to].ranks.map((q) => table[r][q]))
      .filter(known).reduce(fold, start);
    const found = [];
    for (let a = 0; a < boxes.length; a += 1) {
      for (let b = a + 1; b < boxes.length; b += 1) {
        const least = (from, to) => {
          const value = measured ? between(bandwidth, from, to, (x, y) => Math.min(x, y), Infinity) : Infinity;
          return value === Infinity ? null : value;
        };
        const sum = (from, to) => (moved ? between(sent, from, to, (x, y) => x + y, 0) : null);
        const link = { a, b, speed: least(a, b), back: least(b, a), sent: sum(a, b), returned: sum(b, a) };
        if (link.speed === null && !link.sent && !link.returned) continue;
        found.push({ ...link, ...path(boxes[a], boxes[b], height, lines) });
      }
    }
    return found;
  }

  drawLinks() {
    const speedsOf = this.linked.map((l) => Math.min(l.speed ?? Infinity, l.back ?? Infinity)).map((s) => (s === Infinity ? null : s));
    const some = speedsOf.filter(known);
    const ramp = speeds(Math.min(...some, 1e12), Math.max(...some, 1));
    const traffic = this.linked.map((l) => (l.sent ?? 0) + (l.returned ?? 0));
    const [most, quiet] = [Math.max(...traffic, 0), this.linked.length > 40];
    this.chart.set("links", {
      xs: this.linked.map((l) => l.xs), ys: this.linked.map((l) => l.ys),
      c: speedsOf.map((s) => (known(s) ? ramp.css(s) : property("muted"))),
      w: traffic.map((t) => (most > 0 ? 1 + (this.linked.length > 10 ? 4 : 8) * Math.sqrt(t / most) : 2.5)), a: this.linked.map(() => (quiet ? 0.55 : 0.85)),
    });
    const named = this.linked.length <= 10 ? this.linked : [];
    const middle = Math.floor(CURVE / 2);
    this.chart.set("speeds", {
      x: named.map((l) => l.xs[middle]), y: named.map((l) => l.ys[middle]),
      text: named.map((l) => [known(l.speed) ? rate(Math.min(l.speed, l.back ?? l.speed)) : "", l.sent ? `${bytes(l.sent + (l.returned ?? 0))} a step` : ""].filter(Boolean).join(", ")),
    });
  }

  // ---- what the reader is told

  slotUnder(x, y) {
    const { side } = this.place;
    return this.place.cells.find((c) => x >= c.x && x < c.x + side && y >= c.y && y < c.y + side) ?? null;
  }

  words(x, y) {
    if (!this.place) return null;
    const cell = this.slotUnder(x, y);
    if (cell) return this.view.describe(this.view.layer, cell.rank, cell.slot);
    const box = this.place.boxes.find((b) => x >= b.left && x <= b.right && y >= b.bottom && y <= b.top);
    if (box) return this.boxWords(box);
    const link = nearest(this.linked, x, y);
    return link ? this.linkWords(link) : null;
  }

  boxWords(box) {
    const loadsOf = this.view.rankLoads(this.view.layer);
    const ranks = this.view.ranks();
    const each = box.ranks.slice(0, 16).map((r) => `rank ${r}${ranks[r].device ? ` (${ranks[r].device})` : ""}: load ${loadsOf[r].toFixed(2)} of the mean rank's${ranks[r].state === "slow" ? ", slow" : ""}`);
    return [`${box.name}${box.note ? ` · ${box.note}` : ""}`, ...each];
  }

  linkWords({ a, b, speed, back, sent, returned }) {
    const [from, to] = [this.place.boxes[a].name, this.place.boxes[b].name];
    const way = (one, other, fast, carried) => `${one} to ${other}: ${known(fast) ? `${rate(fast)} measured` : "not measured"}${
      known(carried) ? `, ${bytes(carried)} a step now` : ""}`;
    return [`Link of ${from} and ${to}`, way(from, to, speed, sent), way(to, from, back, returned)];
  }

  act(x, y) {
    const cell = this.place && this.slotUnder(x, y);
    if (!cell) return;
    const expert = this.view.placement.slots[slotAt(this.view.placement, this.view.layer, cell.rank, cell.slot)];
    if (expert >= 0) this.view.chooseExpert(this.view.layer, expert);
  }

  // The nearest slot in the direction of the arrow.
  cursor(key, at) {
    if (!this.place || !arrows(key, null, 1, 1)) return null;
    const { cells, side } = this.place;
    const middle = (c) => ({ x: c.x + side / 2, y: c.y + side / 2 });
    if (!at) return middle(cells[0]);
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[key];
    let [best, least] = [null, Infinity];
    for (const cell of cells) {
      const { x, y } = middle(cell);
      const [along, aside] = [(x - at.x) * dx + (y - at.y) * dy, Math.abs((x - at.x) * dy) + Math.abs((y - at.y) * dx)];
      if (along > side / 2 && along + 3 * aside < least) [best, least] = [{ x, y }, along + 3 * aside];
    }
    return best ?? at;
  }

  get caption() {
    const { placement, layer, experts } = this.view;
    const held = new Map();
    for (let i = 0; i < placement.ranks * placement.width; i += 1) {
      const expert = placement.slots[slotAt(placement, layer, 0, 0) + i];
      if (expert >= 0) held.set(expert, (held.get(expert) ?? 0) + 1);
    }
    const more = [...held.values()].reduce((sum, n) => sum + n - 1, 0);
    return `Layer ${layer}: ${many(experts, "expert")} on ${many(placement.ranks, "rank")}, ${many(more, "further replica")}; ${this.view.balance(layer)}.`;
  }
}

// A cubic curve from one point to another, bent aside by a share of its length.
function curve(x0, y0, x1, y1, bend) {
  const [mx, my] = [(x0 + x1) / 2 - bend * (y1 - y0), (y0 + y1) / 2 + bend * (x1 - x0)];
  return sampled((t) => [(1 - t) ** 2 * x0 + 2 * t * (1 - t) * mx + t * t * x1, (1 - t) ** 2 * y0 + 2 * t * (1 - t) * my + t * t * y1]);
}

function sampled(at) {
  const [xs, ys] = [new Array(CURVE + 1), new Array(CURVE + 1)];
  for (let i = 0; i <= CURVE; i += 1) [xs[i], ys[i]] = at(i / CURVE);
  return { xs, ys };
}

// From box to box through the band of links: below one line of boxes, between two.
function path(a, b, height, lines) {
  const [xa, xb] = [(a.left + a.right) / 2, (b.left + b.right) / 2];
  if (a.line !== b.line) {
    const [ya, yb] = [a.bottom, b.top];
    const middle = (ya + yb) / 2;
    return sampled((t) => bezier(t, [xa, ya], [xa, middle], [xb, middle], [xb, yb]));
  }
  const up = a.line === 1; // the lower line's curves go up into the band
  const [edge, way] = up ? [a.top, 1] : [a.bottom, -1];
  const reach = BAND * (lines === 1 ? 0.85 : 0.42) * Math.min(1, 0.35 + Math.abs(xb - xa) / 1100);
  const deep = edge + way * reach * 4 / 3;
  return sampled((t) => bezier(t, [xa, edge], [xa, deep], [xb, deep], [xb, edge]));
}

function bezier(t, p, q, r, s) {
  const [a, b, c, d] = [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t ** 3];
  return [a * p[0] + b * q[0] + c * r[0] + d * s[0], a * p[1] + b * q[1] + c * r[1] + d * s[1]];
}

function nearest(links, x, y) {
  let [best, least] = [null, 8];
  for (const link of links) {
    for (let i = 0; i <= CURVE; i += 1) {
      const distance = Math.hypot(link.xs[i] - x, link.ys[i] - y);
      if (distance < least) [best, least] = [link, distance];
    }
  }
  return best;
}
