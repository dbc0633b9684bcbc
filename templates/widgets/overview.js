// Pointing at and selecting the stems that the server made.
const overview = (() => {
  const field = $(".field"), stems = $$(".stems i");
  if (!field) return {mark() {}};
  const hover = $(".hover", field);
  const value = (layer, name) => data.report.sensitivity ? layer.sensitivity?.damage ?? null : data.of(layer, name).noise_share;
  const height = (stem) => parseFloat(stem.style.getPropertyValue("--h"));

  function nearest(event) {
    const box = field.getBoundingClientRect(), each = box.width / stems.length;
    const at = Math.max(0, Math.min(stems.length - 1, Math.floor((event.clientX - box.left) / each)));
    const reach = Math.max(0, Math.round(5 / each));                     // within 5 px the worst layer wins
    let best = at;
    for (let i = Math.max(0, at - reach); i <= Math.min(stems.length - 1, at + reach); i++) if (height(stems[i]) > height(stems[best])) best = i;
    return best;
  }
  field.addEventListener("pointermove", (event) => {
    const i = nearest(event), box = field.getBoundingClientRect(), layer = data.layers[i];
    const share = (name) => { const shown = value(layer, name); return shown === null ? "n/a" : words.percent(shown); };
    hover.textContent = `${words.visible(layer.name)}  ${data.series.map(share).join(" → ")}  ${layer.severity}`;
    hover.hidden = false;
    const half = hover.offsetWidth / 2;
    hover.style.left = `${Math.max(half - 56, Math.min(box.width - half + 40, (i + .5) / stems.length * box.width))}px`;
    hover.style.top = `${100 - height(stems[i])}%`;
  });
  field.addEventListener("pointerleave", () => { hover.hidden = true; });
  field.addEventListener("click", (event) => {
    const i = nearest(event);
    if (table.row(i).hidden) table.clear();
    detail.select(i, {scroll: true});
  });
  return {mark(old, now) { stems[old]?.classList.remove("on"); stems[now]?.classList.add("on"); }};
})();
