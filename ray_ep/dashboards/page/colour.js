// Colours of load and of links, as CSS and as pixels; they follow the theme that page.css says.

const LOAD = { // from starved to hot, by doublings; the middle is the load of the mean
  light: ["#1e40af", "#5b8def", "#e3e6ea", "#f0953f", "#b4330a"],
  dark: ["#7fb0ff", "#3563b8", "#333c46", "#c9691f", "#ffb066"],
};
const SPEED = { // from slow to fast; told apart by readers of all kinds of colour vision (viridis)
  light: ["#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#d9c715"],
  dark: ["#6b3fa0", "#5468b8", "#3390a8", "#35b58f", "#8ad95c", "#fde725"],
};
const GROUPS = ["#3b82f6", "#f08c2e", "#2aa876", "#b65fcf", "#d1495b", "#0f9bb0", "#b58900", "#7c86ff"];
const STEPS = 256;

export const theme = () => (document.documentElement.dataset.theme === "dark" ? "dark" : "light");
export const property = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
export const group = (number) => GROUPS[number % GROUPS.length];

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const css = ([r, g, b]) => `#${[r, g, b].map((c) => Math.round(c).toString(16).padStart(2, "0")).join("")}`;

// Little-endian RGBA, as an image's buffer has it.
export const pixel = ([r, g, b], alpha = 255) => ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0;
export const pixelOf = (hex, alpha) => pixel(channels(hex), alpha);

class Ramp {
  constructor(stops, low, high, log) {
    [this.low, this.high, this.log, this.stops] = [low, high, log, stops];
    this.pixels = new Uint32Array(STEPS);
    this.names = new Array(STEPS);
    const ends = stops.map(channels);
    for (let i = 0; i < STEPS; i += 1) {
      const at = (i / (STEPS - 1)) * (ends.length - 1);
      const left = Math.min(Math.floor(at), ends.length - 2);
      const mixed = ends[left].map((c, k) => c + (ends[left + 1][k] - c) * (at - left));
      this.pixels[i] = pixel(mixed.map(Math.round));
      this.names[i] = css(mixed);
    }
  }

  index(value) {
    const at = this.log ? Math.log2(Math.max(value, 1e-12)) : value;
    return Math.max(0, Math.min(STEPS - 1, Math.round(((at - this.low) / (this.high - this.low)) * (STEPS - 1))));
  }

  pixel(value) { return this.pixels[this.index(value)]; }

  css(value) { return this.names[this.index(value)]; }

  // Text that is read well on the colour of a value: WCAG's two contrasts are equal at a luminance of 0.179.
  ink(value) {
    const linear = channels(this.css(value)).map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179 ? "#000000" : "#ffffff";
  }

  gradient() { return `linear-gradient(90deg, ${this.stops.join(", ")})`; }
}

// Of a load over its mean: 1/4 to 4, twice and half equally far from the middle.
export const loads = () => new Ramp(LOAD[theme()], -2, 2, true);
// Of a ratio to what chance gives: 1/8 to 8.
export const ratios = () => new Ramp(LOAD[theme()], -3, 3, true);
// Of a ratio to a mean, so many doublings to each side.
export const spread = (doublings) => new Ramp(LOAD[theme()], -doublings, doublings, true);
// Of an amount from 0 up.
export const amounts = (top) => new Ramp(SPEED[theme()], 0, top || 1, false);
// Of bytes a second between two bounds, by doublings.
export function speeds(low, high) {
  const [a, b] = [Math.log2(Math.max(low, 1)), Math.log2(Math.max(high, 1))];
  return new Ramp(SPEED[theme()], b - a < 0.2 ? b - 3 : a, b, true);
}
