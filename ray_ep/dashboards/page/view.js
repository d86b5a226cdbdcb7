// What the reader looks at: a placement version, a layer, an expert; and what follows from it for every chart.

import { holders, ordered, replicas, slotAt } from "ray_ep/placements.js";
import { clock, figure, seconds, share } from "ray_ep/format.js";

export class View extends EventTarget {
  constructor(source) {
    super();
    this.source = source;
    [this.version, this.layer, this.expert, this.follow, this.moves] = [source.placements.newest ?? null, 0, null, true, false];
    this.cache = new Map();
    source.addEventListener("change", () => {
      this.cache.clear();
      if (this.follow || !source.placements.versions.includes(this.version)) this.version = source.placements.newest ?? null;
      this.#tell("change");
    });
  }

  #tell(what) { this.dispatchEvent(new Event(what)); }

  see(version) {
    if (version === this.version) return;
    this.version = version;
    this.follow = version === this.source.placements.newest;
    this.#tell("version");
  }

  chooseLayer(layer) {
    if (layer === this.layer) return;
    [this.layer, this.expert] = [layer, null];
    this.#tell("layer");
  }

  chooseExpert(layer, expert) {
    const again = layer === this.layer && expert === this.expert;
    const other = layer !== this.layer;
    [this.layer, this.expert] = [layer, again ? null : expert];
    this.#tell(other ? "layer" : "expert");
  }

  showMoves(on) {
    this.moves = on;
    this.#tell("version");
  }

  get state() { return this.source.state; }
  get layers() { return this.source.placements.layers; }
  get experts() { return this.source.placements.experts; }
  get placement() { return this.version === null ? null : this.source.placements.get(this.version); }
  get newest() { return this.version === this.source.placements.newest; }

  #kept(name, make) {
    if (!this.cache.has(name)) this.cache.set(name, make());
    return this.cache.get(name);
  }

  // [L, E] tokens of each expert: of the newest steps, else of the whole run; null: not known.
  get load() { return this.state.load?.experts ?? this.state.load?.run ?? null; }

  // [L, E] load of each expert over its layer's mean; null: not known.
  get ratios() {
    return this.#kept("ratios", () => {
      const { load } = this;
      if (load?.length !== this.layers) return null;
      return load.map((row) => {
        const mean = row.reduce((sum, tokens) => sum + tokens, 0) / row.length;
        return Float32Array.from(row, (tokens) => (mean > 0 ? tokens / mean : 0));
      });
    });
  }

  // [L, R, S] share of each slot, in loads of the mean expert: an expert's load over its replicas; -1 where empty.
  shares(version = this.version) {
    return this.#kept(`shares ${version}`, () => {
      const [placement, ratios] = [this.source.placements.get(version), this.ratios];
      const found = new Float32Array(placement.slots.length).fill(-1);
      const size = placement.ranks * placement.width;
      for (let layer = 0; layer < this.layers; layer += 1) {
        const counts = replicas(placement, layer, this.experts);
        for (let i = layer * size; i < (layer + 1) * size; i += 1) {
          const expert = placement.slots[i];
          if (expert >= 0) found[i] = ratios ? ratios[layer][expert] / counts[expert] : 1;
        }
      }
      return found;
    });
  }

  // [R] load of each rank of a layer over the mean rank's, of a version.
  rankLoads(layer, version = this.version) {
    const [placement, shares] = [this.source.placements.get(version), this.shares(version)];
    const sums = Array.from({ length: placement.ranks }, (_, rank) => {
      let sum = 0;
      for (let s = 0; s < placement.width; s += 1) sum += Math.max(shares[slotAt(placement, layer, rank, s)], 0);
      return sum;
    });
    const mean = sums.reduce((a, b) => a + b, 0) / sums.length;
    return sums.map((sum) => (mean > 0 ? sum / mean : 0));
  }

  order(layer) {
    return this.#kept(`order ${this.version} ${layer}`, () => ordered(this.placement, layer, this.experts));
  }

  // The ranks of a version: [{rank, node, member, host, device, state}], nodes numbered from 0 in their order.
  ranks(version = this.version) {
    return this.#kept(`ranks ${version}`, () => {
      const { ranks: count } = this.source.placements.get(version);
      const told = this.members(version);
      const names = told.map((rank, i) => rank.node_id || rank.host || rank.node || String(this.state.links?.node_of?.[i] ?? 0));
      const nodes = [...new Set(names)];
      return Array.from({ length: count }, (_, rank) => ({ ...told[rank], rank, node: Math.max(nodes.indexOf(names[rank]), 0) }));
    });
  }

  members(version) {
    const said = this.told(version);
    const epochs = this.state.membership?.epochs ?? [];
    const epoch = epochs.findLast?.((e) => said && e.epoch === said.epoch) ?? null;
    const { ranks: count } = this.source.placements.get(version);
    for (const ranks of [epoch?.ranks, this.state.membership?.ranks]) if (ranks?.length === count) return ranks;
    return Array.from({ length: count }, () => ({}));
  }

  // What was said of a version: {version, step, time, words, cause, gain_predicted, gain_measured, ...}; null: nothing.
  told(version) { return this.state.placement?.versions?.find((v) => v.version === version) ?? null; }

  // The words of one slot: expert, load, owner, replicas, and why it sits here.
  describe(layer, rank, slot) {
    const placement = this.placement;
    const index = slotAt(placement, layer, rank, slot);
    const expert = placement.slots[index];
    const where = this.ranks()[rank];
    const place = `rank ${rank}${where.host ? ` on ${where.host}` : ` of node ${where.node}`}, slot ${slot}, layer ${layer}`;
    if (expert < 0) return [`Empty slot`, place];
    const others = holders(placement, layer, expert).filter((h) => h.rank !== rank || h.slot !== slot);
    const lines = [place, ...this.loadWords(layer, expert, others.length + 1)];
    const owner = placement.primary[layer * this.experts + expert];
    if (others.length) {
      lines.push(`${owner === rank ? "its owner; replicas" : `a replica; owned by rank ${owner}; others`} on ${
        others.map((h) => `rank ${h.rank}`).join(", ")}`);
    }
    return [`Expert ${expert}`, ...lines, this.why(placement.since[index])];
  }

  loadWords(layer, expert, slots) {
    const ratio = this.ratios?.[layer]?.[expert];
    if (ratio === undefined) return [];
    const tokens = this.load[layer][expert];
    const each = slots > 1 ? `, ${figure(ratio / slots)} on each of ${slots} slots` : "";
    return [`${figure(tokens)} tokens: ${figure(ratio)} times the mean expert${each}`];
  }

  // Of the chosen expert.
  expertWords() {
    const slots = holders(this.placement, this.layer, this.expert);
    const owner = this.placement.primary[this.layer * this.experts + this.expert];
    const own = slots.find((s) => s.rank === owner) ?? slots[0];
    return this.describe(this.layer, own.rank, own.slot);
  }

  why(version) {
    const said = this.told(version);
    if (!said) return `here since placement ${version}`;
    const at = said.step === null || said.step === undefined ? "" : `, step ${said.step}`;
    return `here since placement ${version}${at}: ${said.words ?? said.cause ?? ""}`;
  }

  versionWords(version) {
    const [said, moved] = [this.told(version), this.source.placements.moved(version)];
    const at = said?.step === null || said?.step === undefined ? "" : `, after step ${said.step}`;
    const gain = [];
    if (Number.isFinite(said?.gain_predicted)) gain.push(`${seconds(said.gain_predicted)} a step predicted`);
    if (Number.isFinite(said?.gain_measured)) gain.push(`${seconds(said.gain_measured)} measured`);
    const head = `placement ${version}${at}${said?.time ? ` (${clock(said.time)} UTC)` : ""}`;
    const first = this.source.placements.before(version) === null;
    const what = first ? "the first that is kept" : `${moved.length} experts came to another rank`;
    return `${head}: ${what}${gain.length ? `; gain ${gain.join(", ")}` : ""}${said?.words ? `; ${said.words}` : ""}`;
  }

  balance(layer) {
    const loads = this.rankLoads(layer);
    const most = Math.max(...loads);
    return most > 0 ? `balancedness of ranks ${share(1 / most)}, busiest rank ${loads.indexOf(most)} at ${figure(most)} times the mean` : "";
  }
}
