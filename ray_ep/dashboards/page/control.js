// The run steered from its page: buttons, what the run's control answers, and a token where it wants one.

import { element } from "ray_ep/dom.js";
import { many } from "ray_ep/format.js";

const STOP = "The run saves a checkpoint and ends, after the step that is under way. To go on with it takes a command on the driver's machine.";

export class Control {
  constructor(view) {
    [this.view, this.source, this.chosen, this.waiting] = [view, view.source, false, new Set()];
    this.answer = element("p", { id: "answer", role: "status" });
    this.token = element("input", { type: "password", id: "token", autocomplete: "off", spellcheck: "false", size: 24 });
    this.tokenLabel = element("label", {}, "Token of the run", this.token);
    this.ranks = element("input", { type: "number", id: "ranks", min: 1, max: 100000, step: 1, required: true, oninput: () => { this.chosen = true; } });
    this.node = element("select", { id: "node" });
    this.buttons = [
      this.#button("Pause", () => this.press(this.paused ? "Resume" : "Pause")),
      this.#button("Checkpoint", () => this.press("Checkpoint")),
      this.#button("Rebalance", () => this.press("Rebalance", {}, true)),
      this.#button("Stop", () => this.ask("Stop", STOP)),
      this.#button("Scale", () => this.#askScale()),
      this.#button("Drain", () => this.#askDrain()),
    ];
    const [pause, checkpoint, rebalance, stop, scale, drain] = this.buttons;
    this.bar = element("div", { class: "bar" }, pause, checkpoint, rebalance, stop,
      element("label", {}, "Ranks", this.ranks), scale, element("label", {}, "Node", this.node), drain, this.tokenLabel);
    this.why = element("p", { class: "muted" });
    this.question = element("p", { id: "question" });
    this.dialog = element("dialog", { "aria-labelledby": "question" },
      element("form", { method: "dialog" }, this.question,
        element("div", { class: "bar" }, element("button", { value: "no" }, "Cancel"), element("button", { value: "yes", id: "yes" }))));
    this.element = element("section", { class: "card", "aria-label": "Control" }, element("h2", {}, "Control"), this.why, this.bar, this.answer, this.dialog);
    this.redraw();
  }

  #button(words, act) {
    return element("button", { type: "button", onclick: (event) => { if (event.target.ariaDisabled !== "true") act(); } }, words);
  }

  get paused() { return this.view.state.run.state === "paused"; }

  // Nodes that hold ranks: [name for the control, words].
  get nodes() {
    const found = new Map();
    for (const rank of this.view.state.membership.ranks) {
      const name = rank.node_id || rank.address || rank.host;
      if (name) found.set(name, [...(found.get(name) ?? []), rank]);
    }
    return [...found].map(([name, ranks]) => [name, `${ranks[0].host ?? name.slice(0, 8)}: ${many(ranks.length, "rank")} (${ranks.map((r) => r.rank).join(", ")})`]);
  }

  redraw() {
    const { standing, lost } = this.source;
    this.element.hidden = !standing || (standing.closed && !standing.why) || Boolean(this.view.state.run.outcome);
    this.why.textContent = standing?.why ?? "";
    this.bar.hidden = this.answer.hidden = !standing || Boolean(standing.why);
    if (this.bar.hidden) return;
    this.tokenLabel.hidden = !standing.token;
    this.buttons[0].textContent = this.paused ? "Resume" : "Pause";
    if (!this.chosen) this.ranks.value = String(this.view.state.membership.active || 1);
    const nodes = this.nodes;
    if (nodes.join() !== this.shown) {
      this.shown = nodes.join();
      const chosen = this.node.value;
      this.node.replaceChildren(...nodes.map(([name, words]) => element("option", { value: name }, words)));
      if (nodes.some(([name]) => name === chosen)) this.node.value = chosen;
    }
    for (const button of this.buttons) button.ariaDisabled = String(lost || this.waiting.has(button.textContent));
  }

  ask(call, words, fields = {}, guarded = false) {
    this.question.textContent = words;
    const yes = this.dialog.querySelector("#yes");
    yes.textContent = call;
    this.dialog.returnValue = "no";
    this.dialog.onclose = () => { if (this.dialog.returnValue === "yes") this.press(call, fields, guarded); };
    this.dialog.showModal();
  }

  #askScale() {
    if (!this.ranks.reportValidity()) return;
    const [ranks, now] = [Number(this.ranks.value), this.view.state.membership.active];
    this.chosen = false;
    this.ask("Scale", `The run has ${many(now, "rank")}. It goes on with ${many(ranks, "rank")} as soon as there is room for them, and keeps that number.`, { ranks }, true);
  }

  #askDrain() {
    const found = this.nodes.find(([name]) => name === this.node.value);
    if (!found) return;
    this.ask("Drain", `All ranks leave ${found[1]}. None comes back to that node until somebody takes the order back: ray-ep drain RUN NODE --undo.`, { node: found[0] }, true);
  }

  // guarded: meant for the ranks and the placement that this page shows, and refused if they are others by now.
  async press(call, fields = {}, guarded = false) {
    const mutation = { request_id: `page-${crypto.getRandomValues(new Uint32Array(4)).join("-")}` };
    if (guarded) {
      mutation.if_epoch = this.view.state.membership.epoch ?? 0;
      mutation.if_placement_version = this.source.placements.newest ?? 0;
    }
    this.waiting.add(call);
    this.redraw();
    this.answer.textContent = `${call} is asked for; the run does it between two steps.`;
    const { code, words } = await this.source.press(call, { mutation, ...fields }, this.token.value.trim());
    this.waiting.delete(call);
    this.answer.textContent = this.#said(call, code, words);
    this.redraw();
    if (code === "UNAUTHENTICATED") this.token.focus();
  }

  #said(call, code, words) {
    if (code === "OK") return `${call}: ${words}`;
    if (code === "UNAUTHENTICATED") return `${call} is refused: it takes a token of this run, an operator's; there was none, or a wrong one.`;
    if (code === "ABORTED") return `${call} is refused, for the run has changed since this page showed it (${words}). Look again, then press again.`;
    if (code === "") return `${call}: ${words}`;
    return `${call} is refused: ${words}`;
  }
}
