// The page of a run: its parts put together, and told when another version, layer or expert is looked at.

import { Cluster } from "ray_ep/cluster.js";
import { ratios, loads } from "ray_ep/colour.js";
import { Control } from "ray_ep/control.js";
import { card, element, folded } from "ray_ep/dom.js";
import { clock, many } from "ray_ep/format.js";
import { Company, Flows, LoadBars, unpacked } from "ray_ep/layer.js";
import { Links } from "ray_ep/links.js";
import { Overview } from "ray_ep/overview.js";
import { open } from "ray_ep/source.js";
import * as tables from "ray_ep/tables.js";
import { followTheme } from "ray_ep/theme.js";
import { LANES, TimeLine } from "ray_ep/time.js";
import { View } from "ray_ep/view.js";

const AGAIN_MS = 30_000;

const legend = (ramp, low, middle, high) => element("div", { class: "legend" }, element("span", {}, low),
  element("span", { class: "ramp", style: `background: ${ramp.gradient()}`, role: "img", "aria-label": `${low} to ${high}, ${middle} in the middle` }),
  element("span", {}, high), element("span", {}, `(middle: ${middle})`));
const named = (pairs) => element("div", { class: "legend" }, ...pairs.map(([name, colour]) => element("span", {},
  element("span", { class: "swatch", style: `background: ${colour}` }), name)));

class Page {
  constructor(source) {
    this.source = source;
    this.view = new View(source);
    this.main = document.getElementById("main");
    this.charts = [];
    this.tables = [];
    this.control = new Control(this.view);
    followTheme(() => this.build());
    this.view.addEventListener("version", () => this.onVersion());
    this.view.addEventListener("layer", () => this.onLayer());
    this.view.addEventListener("expert", () => this.onExpert());
    this.view.addEventListener("change", () => this.onChange());
  }

  get placed() { return this.view.placement !== null; }

  // What there is to show: parts appear as a run gets figures for them.
  get shape() {
    const { state } = this.view;
    return [this.placed, state.steps.step.length > 0, Boolean(state.links?.bandwidth), Boolean(state.links?.sent), this.source.summary.phases.length > 0,
      this.view.layers, this.view.experts, Boolean(state.exchange?.timings)].join();
  }

  build() {
    this.built = this.shape;
    [this.charts, this.tables] = [[], []];
    [this.overview, this.cluster, this.bars, this.company, this.flows, this.time, this.links] = Array(7).fill(null);
    const { state } = this.view;
    this.headlines = element("dl", { class: "headlines" });
    const parts = [this.headlines, this.control.element];
    if (this.source.summary.force) {
      parts.unshift(element("p", { class: "banner", role: "alert" }, `router.force=${this.source.summary.force}: the router's choice is replaced; for benchmarks only`));
    }
    if (!state.steps.step.length) {
      parts.push(card("No step", `This run has not finished a single step${this.source.live ? " yet" : ""}, so there are no figures to show.`));
    }
    if (this.placed) parts.push(this.scrubber(), this.map(), this.layer());
    if (state.steps.step.length) parts.push(this.timeLine());
    parts.push(...this.linkCards(), this.rest());
    this.main.replaceChildren(...parts);
    this.onChange();
  }

  keep(part) {
    this.charts.push(part.chart);
    return part;
  }

  // A table; `data`: it shows what the run said, whatever is looked at.
  fold(summary, make, data = false) {
    const made = folded(summary, make);
    this.tables.push({ ...made, data });
    return made.element;
  }

  // ---- parts

  scrubber() {
    const { view } = this;
    this.slider = element("input", { type: "range", min: 0, step: 1, id: "version", oninput: () => view.see(this.source.placements.versions[Number(this.slider.value)]) });
    this.chosen = element("output", { for: "version" });
    this.layerBox = element("select", { id: "layer", onchange: () => view.chooseLayer(Number(this.layerBox.value)) },
      ...Array.from({ length: view.layers }, (_, l) => element("option", { value: l }, `${l}`)));
    this.newest = element("button", { type: "button", onclick: () => view.see(this.source.placements.newest) }, "Newest");
    const moves = element("input", { type: "checkbox", id: "moves", onchange: () => view.showMoves(moves.checked) });
    moves.checked = view.moves;
    this.story = element("p", { class: "muted", id: "story", role: "status" });
    return element("section", { class: "card sticky", "aria-label": "Placement and layer" },
      element("div", { class: "bar" },
        element("label", { class: "grow" }, "Placement", this.slider, this.chosen), this.newest,
        element("label", {}, moves, "show what moved"), element("label", {}, "Layer", this.layerBox)), this.story);
  }

  map() {
    this.overview = this.keep(new Overview(this.view));
    this.cluster = this.keep(new Cluster(this.view));
    this.clusterCaption = element("p", { class: "muted" });
    return card("Where every expert sits", "A row a layer, a column a slot; colour is what the slot computes, in loads of the mean expert (a replica takes its share).",
      this.overview.chart.host, legend(loads(), "1/4", "the mean", "4 times"),
      element("h3", {}, "One layer on the cluster"), this.clusterCaption, this.cluster.chart.host,
      element("p", { class: "muted" }, "Curves in colour join replicas; links between boxes are as wide as what travels now, and coloured by measured bandwidth (dark: slow)."),
      this.fold("This layer as a table", () => tables.placementTable(this.view)),
      this.fold("All layers as a table", () => tables.layersTable(this.view)),
      this.fold("Placements and what they brought, as a table", () => tables.movesTable(this.view, (version) => this.view.see(version))),
      this.fold("What this placement moved, as a table", () => tables.movedTable(this.view)));
  }

  layer() {
    this.bars = this.keep(new LoadBars(this.view));
    this.company = this.keep(new Company(this.view));
    this.flows = this.keep(new Flows(this.view));
    this.layerTitle = element("h2", {});
    this.flowCaption = element("p", { class: "muted" });
    this.pairCaption = element("p", { class: "muted" });
    return element("div", {},
      element("section", { class: "card" }, this.layerTitle,
        element("p", { class: "muted" }, "Tokens of each expert over the layer's mean; experts stand in the order of the ranks that own them, in their node's colour."),
        this.bars.chart.host, this.fold("As a table", () => tables.loadTable(this.view))),
      element("div", { class: "grid" },
        card("Experts that fire together", "", this.pairCaption, this.company.chart.host, legend(ratios(), "1/8", "chance", "8 times"),
          this.fold("As a table", () => tables.pairsTable(this.view, this.company.pairs))),
        card("Where tokens go next", "", this.flowCaption, this.flows.chart.host, this.fold("As a table", () => tables.flowsTable(this.view, this.flows.found)))));
  }

  timeLine() {
    this.time = new TimeLine(this.view);
    this.charts.push(...this.time.charts);
    const [loss, speed, balance, bytes] = this.time.curves;
    const curve = (part) => element("div", {}, element("h3", {}, part.title), named(part.lines.map(([, name, colour]) => [name, colour])), part.chart.host);
    this.breakdown = element("p", { class: "muted" });
    return card("Time line", "Drag to zoom in, double-click to see all; the dotted line is the placement that is shown above.",
      element("h3", {}, "Where a step's time goes"), this.breakdown, this.time.phases.chart.host,
      named(this.source.summary.phases.map((p) => [p.name, p.colour])),
      element("h3", {}, "What happened"), this.time.lanes.chart.host,
      element("div", { class: "grid" }, curve(loss), curve(speed), curve(balance), curve(bytes)),
      this.fold("Phases as a table", () => tables.phasesTable(this.view), true), this.fold("Newest steps as a table", () => tables.stepsTable(this.view), true));
  }

  linkCards() {
    const { links, exchange } = this.view.state;
    const parts = [];
    this.links = ["bandwidth", "sent"].filter((what) => links?.[what]?.length > 1).map((what) => this.keep(new Links(this.view, what)));
    if (this.links.length) {
      const { contradictions = [], nodes = 0 } = this.source.summary.links ?? {};
      const titles = { bandwidth: "Measured bandwidth", sent: "Bytes a step, now" };
      parts.push(element("section", { class: "card" }, element("h2", {}, "Links"),
        element("p", { class: "muted" }, `Between ranks of ${many(nodes, "node")}; lines part the nodes.`),
        ...contradictions.map((words) => element("p", { class: "verdict" }, words)),
        element("div", { class: "grid" }, ...this.links.map((part) => element("div", {}, element("h3", {}, titles[part.what]), part.chart.host))),
        this.source.summary.links ? this.fold("As a table", () => tables.linksTable(this.view), true) : null));
    }
    if (exchange?.words) {
      parts.push(card("Exchange", exchange.words, exchange.timings.length > 1 ? this.fold("Ways that were timed", () => tables.exchangeTable(this.view), true) : null));
    }
    return parts;
  }

  rest() {
    const { config } = this.source.summary;
    const events = this.fold("As a table", () => tables.eventsTable(this.view), true);
    events.open = true;
    return element("div", {},
      this.view.state.membership.ranks.length ? card("Ranks", "", this.fold("As a table", () => tables.ranksTable(this.view), true)) : "",
      card("Events", LANES.length ? "What the run said, the newest first." : "", events),
      config ? element("section", { class: "card" }, element("details", {}, element("summary", { class: "strong" }, "Configuration"), element("pre", { tabindex: 0 }, config))) : "");
  }

  // ---- changes

  onChange() {
    if (this.shape !== this.built) {
      this.build();
      return;
    }
    const { summary } = this.source;
    document.getElementById("name").textContent = this.view.state.run.name;
    document.getElementById("model").textContent = summary.model || "Model unknown: the run has no configuration.";
    document.getElementById("status").textContent = this.status();
    this.headlines.replaceChildren(...summary.headlines.map(({ label, value, note }) => element("div", { class: "card" },
      element("dt", {}, label), element("dd", { class: "value" }, value), element("dd", { class: "muted" }, note))));
    this.control.redraw();
    this.time?.redraw();
    if (this.breakdown) this.breakdown.textContent = `${summary.breakdown}. Medians over the newest half of the steps; evaluations, saves and moves of experts are not in them.`;
    this.links?.forEach((part) => part.chart.redraw());
    this.tables.filter((made) => made.data).forEach((made) => made.draw());
    this.onLayer();
  }

  status() {
    const { run, membership } = this.view.state;
    const ranks = membership.active ? ` on ${many(membership.active, "rank")}, epoch ${membership.epoch ?? 0}` : "";
    const of = run.steps ? `step ${run.done} of ${run.steps}` : `step ${run.done}`;
    if (!run.outcome && this.source.lost) return `The driver does not answer: shown is what it said last, ${of}.`;
    if (run.outcome) return `${run.outcome}, ${of}${run.error ? `: ${run.error}` : ""}`;
    if (!this.source.live && run.alive !== false) return `In progress at ${clock(run.seen)} UTC, when this page was written: ${of}${ranks}`;
    return `${run.state || "running"}, ${of}${ranks}${run.why && run.state !== "stepping" ? ` (${run.why})` : ""}`;
  }

  onLayer() {
    if (!this.placed) {
      this.drawTables();
      return;
    }
    const { view } = this;
    this.layerBox.value = String(view.layer);
    this.layerTitle.textContent = `Layer ${view.layer}: load of its experts`;
    this.onVersion();
    this.takeLayer(view.layer);
  }

  async takeLayer(layer) {
    const found = await this.source.layer(layer);
    if (layer !== this.view.layer) return;
    this.company.take(found?.ratios ? unpacked(found.ratios, this.view.experts) : null);
    this.flows.take(found?.flows ? found : null);
    const over = { run: "Counted until the newest checkpoint.", recent: "Of a sample of recent tokens." }[this.view.state.load.pairs] ?? "";
    this.pairCaption.textContent = found?.ratios ? `How often two experts serve the same token, over what their loads alone would give; lines part ranks, strong ones nodes. ${over}`
      : "Not known: of very many layers a file holds the first ones; before its first steps a run knows none.";
    this.flowCaption.textContent = this.flows.caption;
    this.drawTables();
  }

  onVersion() {
    const { view } = this;
    const { versions } = this.source.placements;
    this.slider.max = String(versions.length - 1);
    this.slider.value = String(versions.indexOf(view.version));
    this.slider.setAttribute("aria-valuetext", `version ${view.version}`);
    this.slider.disabled = versions.length < 2;
    this.newest.disabled = view.newest;
    this.chosen.textContent = `${view.version} (${versions.indexOf(view.version) + 1} of ${versions.length})`;
    this.story.textContent = view.versionWords(view.version);
    this.clusterCaption.textContent = this.cluster.caption;
    for (const part of [this.overview, this.cluster, this.bars, this.company, this.flows]) part.chart.redraw();
    this.time?.redrawMarks();
    this.drawTables();
  }

  onExpert() {
    if (this.overview.chart.figure) this.overview.drawChosen();
    if (this.cluster.chart.figure) this.cluster.drawChosen();
    for (const part of [this.bars, this.flows]) part.chart.redraw();
    const { view } = this;
    if (view.expert !== null) this.story.textContent = view.expertWords().join(". ");
    else this.story.textContent = view.versionWords(view.version);
  }

  // Tables that are open, once the reader has stopped for a moment.
  drawTables() {
    clearTimeout(this.later);
    this.later = setTimeout(() => this.tables.filter((made) => !made.data).forEach((made) => made.draw()), 120);
  }
}

async function start() {
  const status = document.getElementById("status");
  try {
    window.page = new Page(await open()); // for those who try things in a console, and tests
    // A file of a run in progress is written again now and then.
    if (!page.source.live && page.view.state.run.alive) setTimeout(() => location.reload(), AGAIN_MS);
  } catch (error) {
    status.textContent = `The run cannot be shown: ${error.message}`;
    throw error;
  }
}

start();
