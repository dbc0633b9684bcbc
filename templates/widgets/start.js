// Everything is in place: show the layer that the address names, or the worst.
tools.showTheme();
$("[data-test=filter]")?.value && table.filter();
addEventListener("hashchange", () => { const i = detail.fromHash(); if (i >= 0) detail.select(i, {scroll: true}); });
const wanted = detail.fromHash();
if (data.layers.length) {
  if (wanted >= 0) await detail.select(wanted, {scroll: true, instant: true});
  else if (!narrow.matches) await detail.select(+table.visible()[0].dataset.i, {quiet: true});
  else detail.close();
}
setTimeout(() => root.classList.add("all"));
root.dataset.ready = Math.round(performance.now());
$("[data-test=ready]").textContent = `Ready in ${root.dataset.ready} ms.`;
