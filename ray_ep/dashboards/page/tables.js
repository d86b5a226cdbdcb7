// The page's figures as tables: what every chart shows, for readers who do not see charts or want to copy.

import { element, table } from "ray_ep/dom.js";
import { bytes, clock, figure, known, rate, seconds, share } from "ray_ep/format.js";
import { holders, slotAt } from "ray_ep/placements.js";

const LONGEST = 400; // rows

const cut = (rows) => rows.slice(0, LONGEST);

// Experts of one rank: neighbours as a range; replicas alone and marked.
function experts(placement, layer, rank) {
  const found = [];
  for (let s = 0; s < placement.width; s += 1) {
    const expert = placement.slots[slotAt(placement, layer, rank, s)];
    if (expert >= 0) found.push([expert, holders(placement, layer, expert).length > 1]);
  }
  found.sort((a, b) => a[0] - b[0]);
  const words = [];
  for (let i = 0; i < found.length; i += 1) {
    let last = i;
    while (!found[i][1] && last + 1 < found.length && !found[last + 1][1] && found[last + 1][0] === found[last][0] + 1) last += 1;
    const few = last - i < 2;
    words.push(few ? `${found[i][0]}${found[i][1] ? "*" : ""}` : `${found[i][0]}-${found[last][0]}`);
    if (!few) i = last;
  }
  return words.join(" ");
}

export function placementTable(view) {
  const { placement, layer } = view;
  const loads = view.rankLoads(layer);
  const ranks = view.ranks();
  return table(["rank", "node", "#load / mean", "~experts of this layer (* has replicas)"],
    ranks.map((r) => [r.rank, r.host ?? r.node, figure(loads[r.rank]), experts(placement, layer, r.rank)]), `Placement of layer ${layer}`);
}

export function loadTable(view) {
  const { layer } = view;
  const { order, owner } = view.order(layer);
  const ratio = view.ratios?.[layer];
  const sorted = [...order].sort((a, b) => (ratio?.[b] ?? 0) - (ratio?.[a] ?? 0));
  return table(["expert", "owner", "ranks", "#tokens", "#load / mean"], cut(sorted.map((e) => [
    e, `rank ${owner(e)}`, [...new Set(holders(view.placement, layer, e).map((h) => h.rank))].join(" "), figure(view.load?.[layer]?.[e]), figure(ratio?.[e]),
  ])), `Load of layer ${layer}, the hottest first`);
}

export function layersTable(view) {
  return table(["layer", "#hottest expert / mean", "hottest", "#busiest rank / mean", "#balancedness"], Array.from({ length: view.layers }, (_, l) => {
    const [ratio, loads] = [view.ratios?.[l], view.rankLoads(l)];
    const [top, most] = [ratio ? Math.max(...ratio) : NaN, Math.max(...loads)];
    return [l, figure(top), ratio ? `expert ${ratio.indexOf(top)}` : "", figure(most), share(1 / most)];
  }), "Balance of layers");
}

export function pairsTable(view, pairs) {
  const found = [];
  for (let a = 0; pairs && a < view.experts; a += 1) {
    for (let b = a + 1; b < view.experts; b += 1) if (pairs[a * view.experts + b] > 1) found.push([a, b, pairs[a * view.experts + b]]);
  }
  found.sort((x, y) => y[2] - x[2]);
  const { owner } = view.order(view.layer);
  return table(["experts", "#together / by chance", "owners"], found.slice(0, 40).map(([a, b, r]) => [
    `${a} and ${b}`, figure(r, 2), owner(a) === owner(b) ? `rank ${owner(a)}` : `ranks ${owner(a)} and ${owner(b)}`,
  ]), "Pairs that fire together most");
}

export function flowsTable(view, found) {
  return table(["from", "to", "#tokens", "#share"], (found?.flows ?? []).slice(0, 60).map(([a, b, tokens]) => [
    `expert ${a}`, `expert ${b}`, figure(tokens), share(tokens / found.all),
  ]), `Transitions from layer ${view.layer}`);
}

export function stepsTable(view) {
  const { step, columns } = view.state.steps;
  const at = step.map((_, i) => i).slice(-60).reverse();
  const cell = (name, write = figure) => (i) => write(columns[name]?.[i] ?? NaN);
  const shown = [["#loss", cell("loss", (v) => figure(v, 5))], ["#time", cell("step_seconds", seconds)], ["#exchange", cell("exchange_seconds", seconds)],
    ["#experts", cell("expert_seconds", seconds)], ["#tokens/s", cell("tokens_per_second")], ["#balancedness", cell("balancedness")],
    ["#between nodes", cell("bytes_inter_node", bytes)], ["#ranks", cell("world_size")], ["#placement", cell("placement_version")]];
  return table(["#step", ...shown.map(([name]) => name)], at.map((i) => [step[i], ...shown.map(([, write]) => write(i))]), "The newest steps");
}

export function phasesTable(view) {
  const phases = view.source.summary.phases;
  const whole = phases.reduce((sum, p) => sum + p.seconds, 0);
  const swatch = (p) => element("span", {}, element("span", { class: "swatch", style: `background: ${p.colour}` }), p.name);
  return table(["phase", "#ms", "#share", "~what it is"], [
    ...phases.map((p) => [swatch(p), (1e3 * p.seconds).toFixed(2), share(p.share), p.words]), ["together", (1e3 * whole).toFixed(2), "100%", ""],
  ], "Phases of a step: medians over the newest half of the steps");
}

export function movesTable(view, go) {
  const rows = view.source.placements.versions.map((version) => {
    const said = view.told(version);
    const button = element("button", { type: "button", onclick: () => go(version), "aria-label": `Show placement ${version}` }, String(version));
    const moved = view.source.placements.before(version) === null ? NaN : view.source.placements.moved(version).length;
    return [button, said?.step ?? "", said?.cause ?? "", figure(moved), seconds(said?.gain_predicted), seconds(said?.gain_measured), seconds(said?.move_seconds), said?.words ?? ""];
  });
  return table(["version", "#after step", "cause", "#came to ranks", "#predicted gain", "#measured gain", "#move took", "~why"], cut(rows.reverse()), "Placements");
}

export function movedTable(view) {
  const moved = view.source.placements.moved(view.version);
  const rows = moved.slice(0, LONGEST).map((m) => [m.layer, m.expert, m.from.length ? m.from.map((r) => `rank ${r}`).join(", ") : "none that is left", `rank ${m.rank}`]);
  return element("div", {}, moved.length > LONGEST ? element("p", { class: "muted" }, `The first ${LONGEST} of ${moved.length}.`) : "",
    table(["#layer", "#expert", "was on", "is now also or only on"], rows, `What placement ${view.version} moved`));
}

export function ranksTable(view) {
  const { ranks } = view.state.membership;
  return table(["rank", "member", "host", "device", "state"], ranks.map((r) => [r.rank, r.member ?? "", r.host ?? r.node ?? "", r.device ?? "", r.state ?? ""]), "Ranks");
}

export function eventsTable(view) {
  const { newest } = view.state.events;
  return table(["time (UTC)", "#step", "kind", "~message"], [...newest].reverse().map((e) => [clock(e.time), e.step ?? "", e.kind, e.message]), "Events, the newest first");
}

export function linksTable(view) {
  const { links } = view.source.summary;
  return table(links.head.map((name, i) => (i ? `#${name}` : name)), links.rows, "Links");
}

export function exchangeTable(view) {
  const { timings } = view.state.exchange;
  const fastest = Math.min(...timings.map((t) => t.seconds));
  return table(["way", "over", "#ms a layer", "#to the fastest", "#rounds", ""], timings.map((t) => [
    t.kind, t.transport, (1e3 * t.seconds).toFixed(2), (t.seconds / Math.max(fastest, 1e-9)).toFixed(2), t.rounds, t.taken ? "taken" : "",
  ]), "Ways that tokens may travel");
}
