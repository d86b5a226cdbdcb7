// Where figures come from: the page itself (a finished run's file), or the driver, live by server-sent events, else by asking.

import { held } from "ray_ep/dom.js";
import { Placements } from "ray_ep/placements.js";

const ASK_MS = 2000; // where events cannot pass: behind Ray's dashboard
const SILENCE_MS = 4000; // a stream that has said nothing by then is one that somebody buffers

export async function open() {
  const data = held();
  if (data) return new Source(data, null);
  // The same beside every address that the page has: behind Ray's dashboard, too, and where a run has a name in it.
  const source = new Source(null, new URL(location.pathname.replace("/ray_ep/", "/api/ray_ep/"), location.origin));
  await source.refresh();
  source.listen();
  return source;
}

class Source extends EventTarget {
  constructor(held, base) {
    super();
    [this.base, this.lost, this.standing] = [base, false, null];
    this.layers = new Map();
    if (held) this.#take(held.state, held.summary, held.placements, held.layers);
  }

  get live() { return this.base !== null; }

  // Parts that have not changed are not in `state`: those of before stay.
  #take(state, summary, placements, layers = {}) {
    if (state.changed.load !== this.state?.changed.load) this.layers.clear();
    if (state.steps) state.steps = joined(this.state?.steps, state.steps);
    [this.state, this.summary] = [{ ...this.state, ...state }, summary];
    if (placements) this.placements = new Placements(placements);
    for (const [layer, found] of Object.entries(layers)) this.layers.set(Number(layer), found);
  }

  async #ask(path, query = {}) {
    const url = new URL(path, this.base);
    url.search = new URLSearchParams({ ...Object.fromEntries(new URLSearchParams(location.search)), ...query });
    const answer = await fetch(url, { headers: { accept: "application/json" } });
    if (!answer.ok) throw new Error(`${url.pathname} answers ${answer.status}`);
    return answer.json();
  }

  // Ask for what is new; whether there was something.
  async refresh() {
    try {
      const known = this.state?.version ?? 0;
      const state = await this.#ask("state", { since: known, mark: this.state?.steps.mark ?? "" });
      const again = this.lost;
      this.lost = false;
      if (again) this.standing = null; // it may be another process
      await this.#stand();
      if (this.state && state.version === known) {
        if (again) this.dispatchEvent(new Event("change"));
        return false;
      }
      const summary = await this.#ask("summary");
      const after = this.placements?.newest ?? -1;
      let fresh = null;
      if (!this.placements || state.placement) {
        const found = await this.#ask("placements", { after });
        const fits = this.placements && found.layers === this.placements.layers && found.experts === this.placements.experts;
        const follow = fits && !(found.kept[0]?.version <= after); // else the run began anew, or much was left out
        if (follow) this.placements.add(found.kept);
        else fresh = found;
      }
      this.#take(state, summary, fresh);
      this.dispatchEvent(new Event("change"));
      return true;
    } catch (error) {
      if (!this.state) throw error;
      if (!this.lost) {
        this.lost = true;
        this.dispatchEvent(new Event("change"));
      }
      return false;
    }
  }

  // Whether this page has buttons: {closed: for good, why: not, now, token: one is wanted, key: of this server}; null: not asked.
  async #stand() {
    if (!this.standing || (this.standing.why && !this.standing.closed)) this.standing = await this.#ask("control");
  }

  // Asks the run's control for a change: {code, words} of its answer; a code of "": there was none.
  async press(call, message, token) {
    const headers = { "content-type": "application/json", "x-ray-ep-press": this.standing.key };
    if (token) headers.authorization = `Bearer ${token}`;
    try {
      const answer = await fetch(new URL(`control/${call}`, this.base), { method: "POST", headers, body: JSON.stringify(message) });
      if (answer.ok) return answer.json();
      return { code: "PERMISSION_DENIED", words: (await answer.text()).trim() };
    } catch {
      return { code: "", words: "no answer came. If the run took it, it is carried out: see what the run says above." };
    }
  }

  listen() {
    const stream = new URL("stream", this.base);
    stream.search = location.search;
    const events = new EventSource(stream);
    let heard = false;
    const poll = () => {
      events.close();
      const ask = async () => {
        if (!document.hidden) await this.refresh();
        setTimeout(ask, ASK_MS);
      };
      setTimeout(ask, ASK_MS);
    };
    const silent = setTimeout(() => { if (!heard) poll(); }, SILENCE_MS);
    events.addEventListener("state", () => {
      heard = true;
      clearTimeout(silent);
      this.#soon();
    });
    events.onerror = () => {
      if (heard) { // it was there and is gone: EventSource comes back by itself, and meanwhile this says so
        this.#soon();
        return;
      }
      clearTimeout(silent);
      poll();
    };
  }

  // One question at a time; what comes meanwhile is asked for once more.
  #soon() {
    if (this.asking) {
      this.again = true;
      return;
    }
    this.asking = this.refresh().finally(() => {
      this.asking = null;
      if (this.again) {
        this.again = false;
        this.#soon();
      }
    });
  }

  // {load, ratio: base64 of the upper triangle, flows: [[expert, expert of the next layer, tokens]]} of one layer; null: not there.
  async layer(number) {
    if (!this.layers.has(number) && this.live) {
      this.layers.set(number, await this.#ask(`layers/${number}`).catch(() => null));
    }
    return this.layers.get(number) ?? null;
  }
}

// Steps that follow the ones that are there already (`after`), behind them; or all of them.
function joined(before, news) {
  if (news.after === null || news.after === undefined || !before) return news;
  const [had, came] = [before.step.length, news.step.length];
  const columns = (old, more, missing) => Object.fromEntries([...new Set([...Object.keys(old), ...Object.keys(more)])].map((name) => [
    name, [...(old[name] ?? Array(had).fill(missing)), ...(more[name] ?? Array(came).fill(missing))],
  ]));
  return {
    ...news, step: [...before.step, ...news.step], columns: columns(before.columns, news.columns, null),
    phase_seconds: columns(before.phase_seconds, news.phase_seconds, 0),
  };
}
