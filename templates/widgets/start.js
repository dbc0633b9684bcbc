// Everything is in place: show the layer that the address names, or the worst.
frame.showTheme();
$("[data-test=filter]")?.value && table.filter();
addEventListener("hashchange", () => { const i = detail.fromHash(); if (i >= 0) detail.select(i, {scroll: true}); });
const wanted = detail.fromHash();
let drawing;
if (data.layers.length) {
  if (wanted >= 0) drawing = detail.select(wanted, {scroll: true, instant: true});
  else if (!narrow.matches) drawing = detail.select(+table.visible()[0].dataset.i, {quiet: true});
  else detail.close();
}
await frame.start(drawing);
