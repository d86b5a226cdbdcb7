// Every placement that a run had, from the first whole one and what changed from version to version.
//
// kept: [{version, members, ranks, width, slots, primary}] where ranks came or went, else [{version, members, at, to,
// owner_at, owner_to}].
// slots [L, R, S] are flat: slot s of rank r in layer l is (l * ranks + r) * width + s; an expert, or -1 where empty.

export class Placements {
  constructor({ layers, experts, kept }) {
    [this.layers, this.experts, this.kept] = [layers, experts, []];
    this.versions = [];
    this.whole = new Map();
    this.moves = new Map();
    this.add(kept);
  }

  add(kept) {
    for (const entry of kept) {
      if (this.versions.length && entry.version <= this.versions.at(-1)) continue;
      this.kept.push(entry);
      this.versions.push(entry.version);
    }
  }

  get newest() { return this.versions.at(-1); }

  // {version, ranks, width, slots, primary [L, E] rank of each owner, since: version that filled each slot so}.
  get(version) {
    const number = this.versions.indexOf(version);
    if (number < 0) return null;
    if (!this.whole.has(version)) this.#build(number);
    return this.whole.get(version);
  }

  #build(number) {
    let from = number;
    while (!this.kept[from].slots && !this.whole.has(this.versions[from])) from -= 1;
    for (let at = from; at <= number; at += 1) {
      const version = this.versions[at];
      if (this.whole.has(version)) continue;
      const entry = this.kept[at];
      const before = at > 0 ? this.whole.get(this.versions[at - 1]) : null;
      this.whole.set(version, entry.slots ? this.#first(entry, at) : this.#changed(entry, before));
    }
  }

  #first(entry, at) {
    const { version, ranks, width } = entry;
    const since = new Int32Array(entry.slots.length).fill(version);
    const made = { version, ranks, width, slots: Int16Array.from(entry.slots), primary: Int16Array.from(entry.primary), since };
    if (at === 0) made.first = true;
    return made;
  }

  #changed(entry, before) {
    const { version } = entry;
    const { ranks, width } = before;
    const [slots, primary, since] = [before.slots.slice(), before.primary.slice(), before.since.slice()];
    entry.at.forEach((at, i) => {
      slots[at] = entry.to[i];
      since[at] = version;
    });
    entry.owner_at.forEach((at, i) => { primary[at] = entry.owner_to[i]; });
    return { version, ranks, width, slots, primary, since };
  }

  #moved(version, now, old) {
    const [entry, earlier] = [version, this.before(version)].map((v) => this.kept[this.versions.indexOf(v)]);
    const rankNow = renumbered(earlier.members, entry.members) ?? Array.from({ length: old.ranks }, (_, r) => r);
    const places = entry.slots ? now.slots.keys() : entry.at;
    const had = new Map(); // layer -> expert -> ranks, of layers that something changed in
    const found = [];
    for (const index of places) {
      const expert = now.slots[index];
      if (expert < 0) continue;
      const layer = Math.floor(index / (now.ranks * now.width));
      const rank = Math.floor(index / now.width) % now.ranks;
      if (!had.has(layer)) had.set(layer, held(old, layer, rankNow));
      const from = had.get(layer).get(expert) ?? [];
      if (!from.includes(rank)) found.push({ layer, expert, rank, slot: index % now.width, index, from });
    }
    return found;
  }

  before(version) {
    const number = this.versions.indexOf(version);
    return number > 0 ? this.versions[number - 1] : null;
  }

  // What came to a rank that did not have it: [{layer, expert, rank, slot, index, from: ranks that had it, as now}].
  moved(version) {
    const [now, earlier] = [this.get(version), this.before(version)];
    if (earlier === null) return [];
    if (!this.moves.has(version)) this.moves.set(version, this.#moved(version, now, this.get(earlier)));
    return this.moves.get(version);
  }
}

// Ranks are numbered anew when some come or go: where each rank of before is now, -1 for one that left.
function renumbered(before, after) {
  if (!before?.length || !after?.length) return null;
  return before.map((member) => after.indexOf(member));
}

export const slotAt = (placement, layer, rank, slot) => (layer * placement.ranks + rank) * placement.width + slot;

// Slots of one expert in one layer: [{rank, slot}].
export function holders(placement, layer, expert) {
  const found = [];
  const [start, size] = [slotAt(placement, layer, 0, 0), placement.ranks * placement.width];
  for (let i = 0; i < size; i += 1) {
    if (placement.slots[start + i] === expert) found.push({ rank: Math.floor(i / placement.width), slot: i % placement.width });
  }
  return found;
}

// Ranks of each expert of a layer, numbered as `rankNow` says; who left is not among them.
function held(placement, layer, rankNow) {
  const found = new Map();
  const [start, size] = [slotAt(placement, layer, 0, 0), placement.ranks * placement.width];
  for (let i = 0; i < size; i += 1) {
    const [expert, rank] = [placement.slots[start + i], rankNow[Math.floor(i / placement.width)]];
    if (expert < 0 || rank === undefined || rank < 0) continue;
    if (!found.has(expert)) found.set(expert, []);
    found.get(expert).push(rank);
  }
  return found;
}

// How many slots each expert of a layer has.
export function replicas(placement, layer, experts) {
  const counts = new Uint16Array(experts);
  const [start, size] = [slotAt(placement, layer, 0, 0), placement.ranks * placement.width];
  for (let i = start; i < start + size; i += 1) if (placement.slots[i] >= 0) counts[placement.slots[i]] += 1;
  return counts;
}

// Experts of a layer in the order of the ranks that own them, and for each rank the first of its own.
export function ordered(placement, layer, experts) {
  const order = Array.from({ length: experts }, (_, e) => e);
  const owner = (e) => placement.primary[layer * experts + e];
  order.sort((a, b) => owner(a) - owner(b) || a - b);
  const firsts = [];
  order.forEach((e, i) => { if (i === 0 || owner(e) !== owner(order[i - 1])) firsts.push({ at: i, rank: owner(e) }); });
  return { order, firsts, owner };
}
