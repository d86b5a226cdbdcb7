// Light or dark: as the system says, or as the reader has chosen; kept for the next visit where the browser allows it.

const KEY = "ray_ep theme";
const NEXT = { system: "light", light: "dark", dark: "system" };

const kept = () => { try { return localStorage.getItem(KEY); } catch { return null; } };
const keep = (choice) => { try { localStorage.setItem(KEY, choice); } catch { /* a file, or cookies are off */ } };

// again: what to do once another theme is shown.
export function followTheme(...again) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  let choice = NEXT[kept()] ? kept() : "system";
  const show = () => {
    const now = choice === "system" ? (system.matches ? "dark" : "light") : choice;
    const other = document.documentElement.dataset.theme !== now;
    document.documentElement.dataset.theme = now;
    document.documentElement.style.colorScheme = now;
    button.textContent = `Theme: ${choice}`;
    return other;
  };
  button.addEventListener("click", () => {
    choice = NEXT[choice];
    keep(choice);
    if (show()) again.forEach((act) => act());
  });
  system.addEventListener("change", () => { if (show()) again.forEach((act) => act()); });
  if (show()) again.forEach((act) => act());
}
