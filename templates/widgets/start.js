// Everything is in place: show the layer that the address names, or the worst.
tools.showTheme();
$("[data-test=filter]")?.value && table.filter();
addEventListener("hashchange", () => { const i = detail.fromHash(); if (i >= 0) detail.select(i, {scroll: true}); });
const wanted = detail.fromHash();
let drawing;
if (data.layers.length) {
  if (wanted >= 0) drawing = detail.select(wanted, {scroll: true, instant: true});
  else if (!narrow.matches) drawing = detail.select(+table.visible()[0].dataset.i, {quiet: true});
  else detail.close();
}
// ready: all words and tables stand, and everything answers; drawn: the figures stand there as well
root.dataset.ready = Math.round(performance.now());
await drawing;
root.dataset.drawn = Math.round(performance.now());
$("[data-test=ready]").textContent = `Ready in ${root.dataset.ready} ms${drawing ? `, figures in ${root.dataset.drawn} ms` : ""}.`;
setTimeout(() => root.classList.add("all"));
