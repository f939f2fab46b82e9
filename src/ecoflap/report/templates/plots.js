// Plots: still drawings until they come near the screen, then plotly's. plotly is unpacked only for the first of them.
"use strict";
(() => {
  const holder = document.getElementById("figures");
  const packed = document.getElementById("plotly");
  if (!holder || !packed || !("DecompressionStream" in window) || !("IntersectionObserver" in window)) return;
  const figures = JSON.parse(holder.textContent);
  const drawn = new Map(); // id of a figure -> the promise of its drawing
  const hidden = new Map(); // id of a figure -> names of its series that are switched off
  let loading = null;

  function load() {
    loading ??= (async () => {
      const bytes = Uint8Array.from(atob(packed.textContent.trim()), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      const script = document.createElement("script");
      script.textContent = await new Response(stream).text();
      document.head.append(script); // runs at once; the policy of this page allows it by its hash
      script.textContent = "";
    })();
    return loading;
  }

  // "var(--name)" or "var(--name) 0.2" becomes the colour of the scheme in use.
  function painter() {
    const style = getComputedStyle(document.documentElement);
    const paint = (value) => {
      if (typeof value === "string") {
        const found = /^var\((--[a-z0-9]+)\)(?: ([\d.]+))?$/.exec(value);
        if (!found) return value;
        const colour = style.getPropertyValue(found[1]).trim();
        if (!found[2]) return colour;
        const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
        return `rgba(${r},${g},${b},${found[2]})`;
      }
      if (Array.isArray(value)) return value.map(paint);
      if (value && typeof value === "object") {
        return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, paint(item)]));
      }
      return value;
    };
    return paint;
  }

  function content(id) {
    const paint = painter();
    const { data, layout } = paint(figures[id]);
    const off = hidden.get(id) ?? new Set();
    for (const trace of data) trace.visible = !off.has(trace.name);
    layout.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom"; // a finger scrolls the page
    return { data, layout };
  }

  function draw(plot) {
    if (!drawn.has(plot.id)) drawn.set(plot.id, drawFirst(plot));
    return drawn.get(plot.id);
  }

  async function drawFirst(plot) {
    await load();
    const height = plot.querySelector(".still").getBoundingClientRect().height;
    figures[plot.id].layout.height = Math.max(Math.round(height), 220);
    const { data, layout } = content(plot.id);
    plot.classList.add("drawn");
    await Plotly.newPlot(plot.querySelector(".live"), data, layout, { responsive: true, displayModeBar: false });
  }

  function redraw(id) {
    const { data, layout } = content(id);
    return Plotly.react(document.getElementById(id).querySelector(".live"), data, layout);
  }

  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        near.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "400px" });
  for (const id of Object.keys(figures)) near.observe(document.getElementById(id));

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const [id, finished] of drawn) finished.then(() => redraw(id));
  });

  for (const button of document.querySelectorAll(".legend button")) {
    button.disabled = false;
    button.addEventListener("click", async () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      for (const id of button.dataset.plots.split(" ")) {
        const off = hidden.get(id) ?? new Set();
        if (on) off.delete(button.dataset.series);
        else off.add(button.dataset.series);
        hidden.set(id, off);
        await draw(document.getElementById(id));
        await redraw(id);
      }
    });
  }
})();
