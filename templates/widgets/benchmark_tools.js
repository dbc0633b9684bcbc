// Sorting of all tables, copies and downloads.
for (const table of $$(".measures")) {
  const [head] = table.tHead.rows;
  // sizes and times with the smallest first, what should be large with the smallest too: what is bad comes to light
  sorting(table.tBodies[0], [...head.cells], {down: (column, cell) => ["integers", "operations", "top1", "top5", "agreement", "kept"].includes(cell.dataset.key), then() {}});
}

const record = (one, at) => ({
  model: one.name, engine: one.engine, simulated: one.simulated, file_bytes: one.file_bytes, parameter_bytes: one.parameter_bytes,
  integer_operations: one.contents?.integer_operations, batch: at?.batch, threads: at?.threads, median_s: at?.median_s, p90_s: at?.p90_s, samples_per_second: at?.per_second,
  ratio: at?.ratio?.value, ratio_low: at?.ratio?.low, ratio_high: at?.ratio?.high, peak_bytes: one.peak_bytes,
  top1: one.answers?.top1, top5: one.answers?.top5, agreement: one.answers?.agreement, sqnr_db: one.identical ? "identical" : one.sqnr_db,
});
Object.assign(frame.actions, {
  json() { frame.save("benchmark.json", JSON.stringify(benchmark.report, null, 1), "application/json"); },
  csv() { frame.save("benchmark.csv", frame.csv(benchmark.variants.flatMap((one) => one.latencies.length ? one.latencies.map((at) => record(one, at)) : [record(one)])), "text/csv"); },
  markdown() {
    const rows = $$("[data-test=models] tbody tr"), heads = $$("[data-test=models] thead th").slice(1);
    const columns = heads.map((head, i) => [head.textContent.trim(), i > 0]);
    const lines = rows.map((row) => [...row.cells].slice(1).map((cell, i) => frame.escape(i ? cell.textContent.trim() : benchmark.variants[row.dataset.i].name)));
    frame.copyLayers(benchmark.report.verdict.text, columns, lines);
  },
});

let themed;                                                            // the theme to return to after printing
addEventListener("beforeprint", () => { themed = root.dataset.theme; root.dataset.theme = "light"; });
addEventListener("afterprint", () => { root.dataset.theme = themed; });
frame.showTheme();
await frame.start();
