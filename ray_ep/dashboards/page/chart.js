// One chart: Bokeh draws it, this gives it the page's colours, its words under pointer and keys, and its turn to draw.

import { element } from "ray_ep/dom.js";
import { property } from "ray_ep/colour.js";

const { Plotting, Range1d, FixedTicker, BoxZoomTool, NumeralTickFormatter } = Bokeh;
const { ndarray } = Bokeh.require("core/util/ndarray");

const FONT = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";

// ---- turns: one chart draws in one frame, the one that waits longest first, so that no frame gets long; Bokeh paints
// what it drew in the frame after, which is nobody's turn

const waiting = new Map();
let asked = false;

function turn() {
  const [chart] = waiting.keys();
  const draw = waiting.get(chart);
  waiting.delete(chart);
  requestAnimationFrame(() => {
    asked = false;
    next();
  });
  draw?.();
}

function next() {
  if (asked || !waiting.size) return;
  asked = true;
  requestAnimationFrame(turn);
}

// ---- what the pointer or the keys are at

const tip = () => document.getElementById("tip");

function say(words, x, y) {
  const box = tip();
  if (!words) {
    box.hidden = true;
    return;
  }
  const [head, ...rest] = words;
  box.replaceChildren(element("b", {}, head), rest.length ? `\n${rest.join("\n")}` : "");
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${Math.max(4, x + 16 + width > innerWidth ? x - width - 12 : x + 16)}px`;
  box.style.top = `${Math.max(4, y + 18 + height > innerHeight ? y - height - 12 : y + 18)}px`;
}

addEventListener("keydown", (event) => { if (event.key === "Escape") say(null); });

// words: (x, y) -> [heading, line, ...] or null. act: (x, y), on a click or Enter.
// cursor: (key, at) -> {x, y}: where the keys go from `at` (null: nowhere yet).
export class Chart {
  constructor(label, height, { words, act, cursor, build, draw, plain }) {
    Object.assign(this, { label, height, words, act, cursor, build, plain });
    this.paint = draw;
    this.host = element("div", {
      class: "chart", tabindex: 0, role: "application", "aria-roledescription": "chart", "aria-label": label,
      style: `height: ${height}px`,
    });
    this.seen = this.dirty = this.shown = false;
    this.sources = {};
    new IntersectionObserver(([entry]) => {
      this.seen = entry.isIntersecting;
      if (this.seen && this.dirty) this.redraw();
    }, { rootMargin: "150px" }).observe(this.host);
    new ResizeObserver(() => this.#resized()).observe(this.host);
    this.host.addEventListener("pointerleave", () => say(null));
    this.host.addEventListener("blur", () => say(null));
    this.host.addEventListener("keydown", (event) => this.#key(event));
  }

  get width() { return Math.max(this.host.clientWidth, 200); }

  // Draw when it is this chart's turn; one that is out of sight draws when it comes into it.
  redraw() {
    this.dirty = true;
    if (!this.seen) return;
    waiting.set(this, () => this.#turn());
    next();
  }

  // A new figure takes two turns: it is made, then shown, which is the greater part.
  #turn() {
    this.dirty = false;
    const first = !this.figure;
    if (first) this.#make();
    this.paint(this);
    if (first) waiting.set(this, () => this.#turn());
    else if (this.figure && !this.shown) this.#show();
  }

  // Change a part of what is drawn when it is this chart's turn; one that is out of sight is drawn whole once it is seen.
  change(part) {
    if (!this.figure || !this.seen) {
      this.dirty = true;
      return;
    }
    if (waiting.has(this)) return; // it is drawn whole anyway, or changed so
    waiting.set(this, part);
    next();
  }

  // Forget the figure: it is built anew at its next turn (another theme, another width, other axes).
  rebuild() {
    this.view?.remove();
    this.view = this.figure = null;
    this.redraw();
  }

  #resized() {
    if (this.figure && Math.abs(this.width - this.built) > 8) this.rebuild();
  }

  #make() {
    this.built = this.width;
    this.sources = {};
    this.figure = this.build(this);
    this.shown = false;
  }

  #show() {
    this.shown = true;
    const place = element("div", { "aria-hidden": "true" });
    this.host.replaceChildren(place);
    const made = this.figure;
    made.on_event("mousemove", (event) => this.#at(event.x, event.y));
    made.on_event("tap", (event) => this.act?.(event.x, event.y));
    Plotting.show(made, place).then((view) => {
      if (this.figure !== made) return;
      this.view = view;
      view.canvas_view.events_el.tabIndex = -1; // the keys are this chart's
    });
  }

  #at(x, y) {
    this.last = { x, y };
    const said = this.words?.(x, y) ?? null;
    const [left, top] = this.#onScreen(x, y);
    say(said, left, top);
    this.host.style.cursor = said && this.act ? "pointer" : "default";
  }

  #onScreen(x, y) {
    const box = this.host.getBoundingClientRect();
    const frame = this.view?.frame;
    return frame ? [box.left + frame.x_scale.compute(x), box.top + frame.y_scale.compute(y)] : [box.left, box.top];
  }

  #key(event) {
    if (event.key === "Enter" && this.last) this.act?.(this.last.x, this.last.y);
    const at = this.cursor?.(event.key, this.last ?? null);
    if (!at) return;
    event.preventDefault();
    this.#at(at.x, at.y);
  }

  // ---- parts of a figure

  start({ x, y, axes = true, zoom = false, left, below }) {
    const [text, line] = [property("muted"), property("line")];
    const figure = Plotting.figure({
      height: this.height, sizing_mode: "stretch_width", toolbar_location: null, tools: [],
      x_range: x instanceof Range1d ? x : new Range1d({ start: x[0], end: x[1] }),
      y_range: y instanceof Range1d ? y : new Range1d({ start: y[0], end: y[1] }),
      background_fill_color: null, border_fill_color: null, outline_line_color: null,
      min_border: 0, x_axis_label: below ?? null, y_axis_label: left ?? null, lod_threshold: null,
    });
    if (zoom) {
      const tool = new BoxZoomTool({ dimensions: "width" });
      figure.add_tools(tool);
      figure.toolbar.active_drag = tool;
    }
    for (const axis of [...figure.xaxes, ...figure.yaxes]) {
      Object.assign(axis, {
        visible: axes, axis_line_color: line, major_tick_line_color: line, minor_tick_line_color: null,
        major_label_text_color: text, axis_label_text_color: text, axis_label_text_font_style: "normal",
        axis_label_text_font_size: "12px", major_label_text_font_size: "11.5px", axis_label_text_font: FONT, major_label_text_font: FONT,
      });
    }
    for (const grid of [...figure.xgrids, ...figure.ygrids]) {
      Object.assign(grid, { grid_line_color: line, grid_line_alpha: 0.6, visible: axes });
    }
    return figure;
  }

  // A glyph over a source of its own, by name; `set` gives it its columns.
  glyph(figure, kind, name, properties) {
    const columns = Object.values(properties).filter((value) => value?.field).map((value) => value.field);
    const source = new Bokeh.ColumnDataSource({ data: Object.fromEntries(columns.map((column) => [column, []])) });
    this.sources[name] = source;
    return figure[kind]({ ...properties, ...(kind === "text" ? { text_font: FONT } : {}), source });
  }

  set(name, columns) { this.sources[name].data = columns; }

  // An image of pixels [rows, columns], the lowest row first, over the rectangle from (0, 0) to (columns, rows).
  image(name, pixels, rows, columns) {
    this.set(name, { image: [ndarray(pixels, { dtype: "uint32", shape: [rows, columns] })], x: [0], y: [0], w: [columns], h: [rows] });
  }
}

export const IMAGE = { image: { field: "image" }, x: { field: "x" }, y: { field: "y" }, dw: { field: "w" }, dh: { field: "h" } };

// Ticks where they are said, with these words.
export function label(axis, marks) {
  axis.ticker = new FixedTicker({ ticks: marks.map(({ at }) => at) });
  axis.major_label_overrides = new Map(marks.map(({ at, text }) => [at, String(text)]));
}

// Numbers on an axis as people write them; form: such as "0,0", "0.[0]b" for bytes.
export function plainNumbers(axis, form = "0,0.[00]") {
  axis.formatter = new NumeralTickFormatter({ format: form });
}

const pen = document.createElement("canvas").getContext("2d");

// As much of words as there is room for, in pixels, when they are drawn in this style.
export function fitted(words, room, style = "bold 12px") {
  pen.font = `${style} ${FONT}`;
  const fits = (text) => pen.measureText(text).width <= room;
  if (fits(words)) return words;
  let kept = words.length - 1;
  while (kept > 0 && !fits(`${words.slice(0, kept)}…`)) kept -= 1;
  return `${words.slice(0, kept).trimEnd()}…`;
}

// Every so many, so that at most `most` are left.
export function thinned(items, most) {
  const each = Math.max(1, Math.ceil(items.length / most));
  return items.filter((_, i) => i % each === 0);
}

// Where the arrows go on a grid of columns x rows.
export function arrows(key, at, columns, rows) {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  const step = steps[key];
  if (!step) return null;
  if (!at) return { x: 0.5, y: rows - 0.5 };
  const held = (value, most) => Math.max(0.5, Math.min(most - 0.5, Math.floor(value) + 0.5));
  return { x: held(at.x + step[0], columns), y: held(at.y + step[1], rows) };
}
