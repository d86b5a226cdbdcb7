// The path of one token: MoE layers downwards, ranks side by side, as provenance/picture.py gives it.

import { element, held } from "ray_ep/dom.js";
import { followTheme } from "ray_ep/theme.js";

const CAPTION = "Which expert computed for the token, by MoE layer and rank. A bar is the router's weight; a dashed frame is a guest, lent for one layer of one step; the dashed column is the rank that had the token.";

const choice = ({ expert, weight, kind, why }) => {
  const share = 100 * Math.max(0, Math.min(weight, 1));
  return [
    element("div", { class: `expert ${kind}`, style: `background: linear-gradient(90deg, var(--fill) ${share}%, transparent ${share}%)` },
      `expert ${expert} · ${weight.toFixed(3)} · ${kind}`),
    why ? element("div", { class: "muted" }, why) : null,
  ];
};

const { before, text, after, facts, hosts, ranks, layers } = held();

document.getElementById("main").replaceChildren(
  element("section", { class: "card" },
    element("pre", { class: "context", tabindex: 0, "aria-label": "The token in its text" }, before, element("mark", {}, text), after),
    ...facts.map((sentence) => element("p", { class: "muted" }, sentence))),
  element("section", { class: "card" }, element("p", { class: "muted", id: "caption" }, CAPTION),
    element("div", { class: "scroll path", tabindex: 0, role: "region", "aria-labelledby": "caption" },
      element("table", { "aria-labelledby": "caption" },
        element("thead", {},
          element("tr", {}, element("td", { rowspan: 2 }), ...hosts.map(([host, span]) => element("th", { scope: "colgroup", colspan: span }, host))),
          element("tr", {}, ...ranks.map(({ rank, device }) => element("th", { scope: "col" }, `rank ${rank}, ${device}`)))),
        element("tbody", {}, ...layers.map(({ layer, cells }) => element("tr", {}, element("th", { scope: "row" }, `layer ${layer}`),
          ...cells.map((its, i) => element("td", { class: ranks[i].home ? "home" : null }, ...its.flatMap(choice))))))))),
);
followTheme();
