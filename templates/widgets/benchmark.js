// Which model is looked at, and the charts: all models by their size, and the layers of one.
const benchmark = await (async () => {
  const {document: report} = {document: await unpack("payload").then((response) => response.json())};
  const {variants, points} = report, {size} = words;
  const isKnown = (value) => value !== null && value !== undefined;
  const isBaseline = (i) => report.has_baseline && i === 0;
  const short = (text, most = 26) => { const name = words.visible(text), head = Math.floor((most - 1) / 3); return name.length <= most ? name : `${name.slice(0, head)}…${name.slice(name.length - (most - 1 - head))}`; };
  const FAR = 12;                                                      // so many times apart, an axis has powers of ten
  const three = (value) => +value.toPrecision(3);
  const time = (s) => s >= 1 ? `${three(s)} s` : s >= 1e-3 ? `${three(1e3 * s)} ms` : `${three(1e6 * s)} µs`;
  const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
  const decibels = (one) => one.identical ? "identical" : isKnown(one.sqnr_db) ? `${one.sqnr_db.toFixed(1).replace("-", "−")} dB` : "n/a";

  // ------------------------------------------------------------------------------------------ all models
  // Files of one format are compared by what they take on the disk; all else by the parameters.
  const files = variants.every((one) => one.file_bytes !== null && one.bytes_compared !== "parameters"), bytes = (one) => files ? one.file_bytes : one.parameter_bytes;
  const host = $("[data-test=chart]"), axes = $$("[data-test=axis] input"), choice = $("[data-test=point]");
  const call = (one, at) => one.latencies.find(({batch, threads}) => batch === at.batch && threads === at.threads);
  const unit = (largest, units) => units.find(([limit]) => largest >= limit) ?? units.at(-1);
  const axisOf = (values) => Math.max(...values) > FAR * Math.min(...values) && Math.min(...values) > 0 ? {log: true} : {low: 0};
  const shares = {top1: "right answers, %", top5: "label among the first five, %", agreement: "answers as the baseline’s, %"};

  function draw() {
    const axis = axes.find((one) => one.checked).value, at = points[choice?.value ?? 0], isTime = axis === "time";
    if (choice) choice.parentElement.hidden = !isTime;
    const read = (one, i) => isTime ? call(one, at)?.median_s : axis === "kept" ? one.sqnr_db : axis === "agreement" && isBaseline(i) ? 1 : one.answers?.[axis];
    const shown = variants.map((one, i) => [one, i, read(one, i)]).filter(([, , value]) => isKnown(value));
    const [bytesEach, bytesName] = unit(Math.max(...shown.map(([one]) => bytes(one))), [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "bytes"]]);
    const [each, name] = isTime ? unit(Math.max(...shown.map(([, , value]) => value)), [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]]) : axis === "kept" ? [1, ""] : [.01, ""];
    const few = shown.length <= 6 && !narrow.matches;
    const told = (one, value) => {
      const timed = isTime ? call(one, at) : undefined, ratio = timed?.ratio;
      const first = isTime ? `${time(value)}, nine in ten within ${time(timed.p90_s)}` : axis === "kept" ? `keeps ${decibels(one)}` : percent(value);
      return `${short(one.name, 60)}\n${size(bytes(one))}, ${first}${isKnown(ratio?.value) ? `\n${three(ratio.value)} times the baseline’s time` : ""}`;
    };
    const dot = ([one, i, value]) => ({kind: "dots", size: i === at_ ? 6.5 : 5, style: isBaseline(i) ? "open" : "", colour: isBaseline(i) ? "stem" : i === at_ ? "accent" : "box", mark: few ? short(one.name) : String(i + 1), points: [[bytes(one) / bytesEach, value / each, told(one, value), i]]});
    const missing = variants.length - shown.length;
    chart(host, {
      height: narrow.matches ? 280 : 340,
      x: {label: `${files ? "bytes of the file" : "bytes of the parameters"}, ${bytesName}`, ...axisOf(shown.map(([one]) => bytes(one)))},
      y: {label: isTime ? `median of a call, ${name}; ${at ? `batch ${at.batch}, ${words.count(at.threads, "thread")}` : ""}` : axis === "kept" ? "dB of the output kept" : shares[axis], ...(isTime ? axisOf(shown.map(([, , value]) => value)) : {})},
      label: `${isTime ? "Time of a call" : axis === "kept" ? "What the output keeps" : "Answers"} by size: ${shown.map(([one, , value]) => `${short(one.name, 60)} ${isTime ? time(value) : axis === "kept" ? decibels(one) : percent(value)} at ${size(bytes(one))}`).join("; ")}.${missing ? ` ${words.count(missing, "model")} without one.` : ""} The table below has the numbers.`,
      onpick: (i) => choose(i, true),
      series: shown.map(dot),
    });
  }

  // ------------------------------------------------------------------------------------------ one model
  const articles = $$("[data-test=model-detail]"), choosing = $("[data-test=model-choice]"), places = articles.map((one) => +one.dataset.place);
  const rows = $$("[data-test=model]");
  let at_ = places[0];

  // Layers in the model's own order: where a line falls steeply something was lost.
  function drawLayers(article) {
    const into = $("[data-chart]", article);
    if (!into) return;
    const {layers} = variants[+article.dataset.place];
    const told = (one) => `${short(one.name, 60)}\n${decibels(one)}${isKnown(one.worst_db) ? `, channel ${one.worst_channel} ${one.worst_db.toFixed(1).replace("-", "−")} dB` : ""}`;
    const line = (read) => layers.map((one, i) => [i + 1, read(one) ?? NaN, told(one), one.name]);
    const dense = layers.length > 80;
    chart(into, {
      height: 200,
      x: {label: "layer, in the model’s order", ticks: layers.length <= 12 ? layers.map((_, i) => i + 1) : undefined},
      y: {label: "dB kept"},
      label: `What the outputs of ${words.count(layers.length, "layer")} keep, in the model’s order. The table below has the numbers.`,
      onpick: (name) => mark(article, name),
      series: [
        {name: "all channels", kind: "line", points: line((one) => one.sqnr_db)},
        {kind: "dots", size: dense ? 1.5 : 3, points: line((one) => one.sqnr_db)},
        {name: "worst channel", kind: "dots", style: "open", size: dense ? 1.5 : 3, colour: "watch", points: line((one) => one.worst_db)},
      ],
    });
  }
  function mark(article, name) {
    const found = $$("[data-test=layers] tbody tr", article);
    for (const row of found) row.classList.toggle("on", row.dataset.name === name);
    found.find((row) => row.dataset.name === name)?.scrollIntoView({block: "nearest"});
  }

  function choose(place, jump) {
    if (!places.includes(place)) return;
    at_ = place;
    for (const article of articles) article.hidden = +article.dataset.place !== place;
    for (const row of rows) row.classList.toggle("on", articles.length > 1 && +row.dataset.i === place);
    if (choosing) choosing.value = place;
    const article = articles.find((one) => +one.dataset.place === place);
    drawLayers(article);
    if (host) draw();
    if (jump) article.scrollIntoView({block: "nearest", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth"});
  }
  const fromAddress = () => { const found = /^#model-(\d+)$/.exec(location.hash); return found && places.includes(found[1] - 1) ? found[1] - 1 : undefined; };
  const step = (by) => () => { const next = places[places.indexOf(at_) + by]; if (next !== undefined) choose(next, false); };
  choosing?.addEventListener("change", () => choose(+choosing.value, false));
  addEventListener("hashchange", () => { const place = fromAddress(); if (place !== undefined) choose(place, true); });
  Object.assign(frame.keys, {"-": step(-1), "+": step(1), "=": step(1)});
  for (const one of axes) one.addEventListener("change", draw);
  choice?.addEventListener("change", draw);
  choose(fromAddress() ?? (places.includes(report.verdict.variant) ? report.verdict.variant : places[0]), fromAddress() !== undefined);
  if (!places.length && host) draw();

  // ------------------------------------------------------------------------------------------ samples
  const by = $("[data-test=changed-by]"), samples = $$("[data-by]");
  by?.addEventListener("change", () => {
    let shown = 0;
    for (const one of samples) { one.hidden = by.value !== "" && !one.dataset.by.split(" ").includes(by.value); shown += !one.hidden; }
    for (const one of $$(".after")) one.hidden = by.value !== "" && one.dataset.variant !== by.value;
    $("[data-test=changed-count]").textContent = `${words.count(shown, "sample")} shown.`;
  });

  return {report, variants, time, percent, decibels, call, isBaseline};
})();
