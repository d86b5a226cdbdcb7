// Elements in one line each, and tables: the readable alternative of every chart.

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

// What a self-contained page shows; null: a server has it.
export function held() {
  const data = document.getElementById("data");
  return data && JSON.parse(data.textContent);
}

// head: names; those that begin with "#" are of numbers, with "~" of sentences. rows: of cells, text or elements.
export function table(head, rows, label) {
  const kinds = head.map((name) => ({ "#": "number", "~": "words" })[name[0]] ?? "");
  const cell = (tag, kind, content, scope) => element(tag, { class: kind || null, scope }, content);
  return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label },
    element("table", {},
      element("thead", {}, element("tr", {},
        ...head.map((name, i) => cell("th", kinds[i], name.replace(/^[#~]/, ""), "col")))),
      element("tbody", {}, ...rows.map((row) => element("tr", {},
        ...row.map((content, i) => cell("td", kinds[i], content === "" ? "\u00a0" : content)))))));
}

// A table that is made when it is opened first, and again at each change while it is open.
export function folded(summary, make) {
  const body = element("div");
  const details = element("details", {}, element("summary", {}, summary), body);
  const draw = () => { if (details.open) body.replaceChildren(make()); };
  details.addEventListener("toggle", draw);
  return { element: details, draw };
}

export function card(title, caption, ...children) {
  return element("section", { class: "card" }, element("h2", {}, title),
    caption ? element("p", { class: "muted" }, caption) : null, ...children);
}
