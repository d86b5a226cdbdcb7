// Pages that compare: notes, a table, sentences and charts, as sheet.py gives them.

import { Chart, IMAGE, arrows, label, plainNumbers, thinned } from "ray_ep/chart.js";
import { amounts, group, property, spread } from "ray_ep/colour.js";
import { card, element, folded, held, table } from "ray_ep/dom.js";
import { figure as number } from "ray_ep/format.js";
import { followTheme } from "ray_ep/theme.js";

const MOST_ROWS = 400; // of a chart's table

function sheet(main, data) {
  followTheme(() => main.replaceChildren(
    element("div", { class: "notes" }, ...data.notes.map((note) => element("p", { class: "muted" }, note))),
    element("section", { class: "card" }, table(data.head.map((name, i) => (i ? `#${name}` : name)), data.rows, "What was compared"),
      element("p", { class: "muted" }, data.legend)),
    card(data.words_title, "", ...data.words.map((words, i) => element("p", { class: i === 0 || i === data.words.length - 1 ? "verdict" : null }, words))),
    element("div", { class: data.charts.length > 1 && data.charts[0].kind === "heat" ? "grid" : "" }, ...data.charts.map((chart) => (chart.kind === "heat" ? heat(chart) : lines(chart)))),
  ));
}

function heat({ title, values, unit, ratio, rows, columns, top, parted }) {
  const [height, width] = [values.length, values[0].length];
  const square = height === width;
  const ramp = ratio ? spread(Math.log2(top)) : amounts(top);
  const chart = new Chart(`${title}. Arrow keys walk.`, square ? 420 : Math.round(Math.max(150, Math.min(480, 50 + 22 * height))), {
    words: (x, y) => {
      const [row, column] = [height - 1 - Math.floor(y), Math.floor(x)];
      const value = values[row]?.[column];
      return value === undefined ? null : [`${rows} ${row}, ${columns} ${column}`, `${number(value)} ${unit}`];
    },
    cursor: (key, at) => arrows(key, at, width, height),
    build: (self) => {
      const made = self.start({ x: [0, width], y: [0, height], left: rows, below: columns });
      made.xgrids.concat(made.ygrids).forEach((grid) => { grid.visible = false; });
      label(made.xaxis, thinned(Array.from({ length: width }, (_, i) => ({ at: i + 0.5, text: i })), self.width / 34));
      label(made.yaxis, thinned(Array.from({ length: height }, (_, i) => ({ at: height - i - 0.5, text: i })), self.height / 20));
      self.glyph(made, "image_rgba", "values", IMAGE);
      self.glyph(made, "segment", "parted", { x0: { field: "x0" }, x1: { field: "x1" }, y0: { field: "y0" }, y1: { field: "y1" }, line_color: property("text"), line_alpha: 0.7 });
      return made;
    },
    draw: (self) => {
      const pixels = new Uint32Array(height * width);
      values.forEach((row, r) => row.forEach((value, c) => { pixels[(height - 1 - r) * width + c] = ramp.pixel(value); }));
      self.image("values", pixels, height, width);
      const across = square ? parted : [];
      self.set("parted", {
        x0: [...parted, ...across.map(() => 0)], x1: [...parted, ...across.map(() => width)],
        y0: [...parted.map(() => 0), ...across.map((e) => height - e)], y1: [...parted.map(() => height), ...across.map((e) => height - e)],
      });
    },
  });
  chart.redraw();
  const low = ratio ? number(1 / top) : "0";
  const ends = element("div", { class: "legend" }, element("span", {}, low), element("span", { class: "ramp", style: `background: ${ramp.gradient()}` }), element("span", {}, `${number(top)} ${unit}`));
  const told = folded("As a table", () => table([rows, ...values[0].map((_, c) => `#${c}`)], values.slice(0, MOST_ROWS).map((row, r) => [r, ...row.map((v) => number(v))]), title));
  return card(title, "", chart.host, ends, told.element);
}

function lines({ title, curves, x, y, log, low, marks }) {
  const shown = (value) => (log ? Math.log2(value) : value);
  const [xs, ys] = [curves.flatMap((c) => c.x).map(shown), curves.flatMap((c) => c.y)];
  const [left, right, bottom, top] = [Math.min(...xs, Infinity), Math.max(...xs, -Infinity), low ?? Math.min(...ys), Math.max(...ys)];
  const [wide, high] = [(right - left) * 0.03 || 1, (top - bottom) * 0.06 || 1];
  const kinds = [...new Set(marks.map((m) => m.name))];
  const nearest = (at) => curves.map((c) => {
    const i = c.x.reduce((best, value, k) => (Math.abs(shown(value) - at) < Math.abs(shown(c.x[best]) - at) ? k : best), 0);
    return [c, i];
  });
  const chart = new Chart(`${title}. Arrow keys walk.`, 320, {
    words: (at) => {
      if (!xs.length) return null;
      const close = marks.filter((m) => Math.abs(shown(m.x) - at) < wide / 4).map((m) => `${m.name} at ${number(m.x)}`);
      const found = nearest(at);
      return [`${x} ${number(found[0][0].x[found[0][1]])}`, ...found.map(([c, i]) => `${c.name}: ${number(c.y[i], 4)}`), ...close];
    },
    cursor: (key, last) => {
      const all = [...new Set(xs)].sort((a, b) => a - b);
      const way = { ArrowLeft: -1, ArrowRight: 1 }[key];
      if (!way || !all.length) return null;
      const now = last ? all.findIndex((value) => value >= last.x) + way : 0;
      return { x: all[Math.max(0, Math.min(all.length - 1, now))], y: bottom };
    },
    build: (self) => {
      const made = self.start({ x: [left - wide, right + wide], y: [low === null ? bottom - high : low, top + high], left: y, below: x, zoom: !log });
      made.xgrids.forEach((grid) => { grid.visible = false; });
      plainNumbers(made.yaxis);
      if (log) label(made.xaxis, [...new Set(xs)].map((at) => ({ at, text: 2 ** at })));
      const band = { left: { field: "l" }, right: { field: "r" }, bottom: { field: "b" }, top: { field: "t" } };
      self.glyph(made, "quad", "bands", { ...band, fill_color: { field: "c" }, fill_alpha: 0.2, line_color: null });
      self.glyph(made, "segment", "marks", { x0: { field: "x" }, x1: { field: "x" }, y0: { field: "b" }, y1: { field: "t" }, line_color: { field: "c" }, line_width: 1.5 });
      curves.forEach((curve, i) => {
        const drawn = { x: { field: "x" }, y: { field: "y" }, line_color: group(i), line_width: i ? 1.4 : 2 };
        if (curve.stairs) self.glyph(made, "step", curve.name, { ...drawn, mode: "after" });
        else self.glyph(made, "line", curve.name, drawn);
        self.glyph(made, "scatter", `${curve.name} points`, { x: { field: "x" }, y: { field: "y" }, fill_color: group(i), line_color: null, size: 6 });
      });
      return made;
    },
    draw: (self) => {
      const colour = (m) => group(curves.length + kinds.indexOf(m.name));
      const bands = marks.filter((m) => m.until !== null);
      const span = (of) => ({ b: of.map(() => bottom - high), t: of.map(() => top + high), c: of.map(colour) });
      self.set("bands", { l: bands.map((m) => m.x), r: bands.map((m) => m.until), ...span(bands) });
      self.set("marks", { x: marks.map((m) => m.x), ...span(marks) });
      for (const curve of curves) {
        const points = { x: curve.x.map(shown), y: curve.y };
        self.set(curve.name, points);
        self.set(`${curve.name} points`, curve.x.length <= 40 ? points : { x: [], y: [] });
      }
    },
  });
  chart.redraw();
  const names = [...curves.map((c, i) => [c.name, group(i)]), ...kinds.map((kind, i) => [kind, group(curves.length + i)])];
  const legend = element("div", { class: "legend" }, ...names.map(([name, colour]) => element("span", {}, element("span", { class: "swatch", style: `background: ${colour}` }), name)));
  const told = folded("As a table", () => table(["of", `#${x}`, `#${y}`], curves.flatMap((c) => c.x.map((at, i) => [c.name, number(at), number(c.y[i], 4)])).slice(0, MOST_ROWS), title));
  return card(title, "", legend, chart.host, told.element);
}

sheet(document.getElementById("main"), held());
